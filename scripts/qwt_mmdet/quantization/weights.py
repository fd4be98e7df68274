"""From full-precision weights to integer codes: grid, rounding and bias correction of one layer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import QuantizationSettings
from .layers import QuantizedConv2d, QuantizedLayer
from .moments import InputMoments
from .rounding import ROUNDINGS
from .scheme import symmetric_weights, weight_grid


@torch.no_grad()
def quantize_weight(
    layer: QuantizedLayer,
    settings: QuantizationSettings,
    moments: InputMoments | None,
) -> None:
    """Choose grids and codes of a layer's weights, per output channel, and correct its bias.

    Args:
        moments: of the inputs; None where neither rounding nor bias correction needs them. Second moments are
            taken about the mean where the bias is corrected, since that removes the mean error.
    """
    second = None
    if ROUNDINGS.find(settings.rounding).needs_moments and moments is not None:
        sums = moments.second
        second, _ = sums.moments(sums.about(centred=settings.bias_correction))
    choose_codes(layer, layer.weight, settings, second)
    if moments is not None and settings.bias_correction:
        layer.bias_correction = bias_shift(layer, moments)


def choose_codes(
    layer: QuantizedLayer,
    weight: Tensor,
    settings: QuantizationSettings,
    moments: Sequence[Tensor] | None,
) -> None:
    """Choose grids and codes of a layer for the weights ``weight``.

    Args:
        moments: second moments of the quantized inputs in chunks of columns, [groups, columns, columns]
            each; None for a rounding that does not need them.
    """
    bits, factor = layer.weight_bits, layer.input_factor()
    scaled = weight * factor
    scale, zero_point = weight_grid(scaled, settings, bits)
    grouped, factors = (
        w.flatten(1).unflatten(0, (layer.weight_groups, -1))
        for w in (scaled, factor.expand_as(scaled))
    )
    second = None
    if moments is not None:
        # The weights are multiplied with the factors, so the inputs are divided by them.
        chunks = factors[:, 0].double().split([m.shape[-1] for m in moments], dim=1)
        second = [m / (f[:, :, None] * f[:, None]) for f, m in zip(chunks, moments, strict=True)]
    scales, zero_points = (parameter.view(grouped.shape[:2]) for parameter in (scale, zero_point))
    rounding = ROUNDINGS.find(settings.rounding)
    codes = rounding.function(grouped, scales, zero_points, bits, second).view_as(scaled)
    if symmetric_weights(settings, bits):
        codes.clamp_(min=1)  # the negative of every code is a code
    layer.weight_codes, layer.weight_scale, layer.weight_zero_point = codes, scale, zero_point


def bias_shift(layer: QuantizedLayer, moments: InputMoments) -> Tensor:
    """The mean difference of a layer's outputs in full precision and quantized, [out], float32.

    W E[x] − Wq E[xq] (after Nagel et al., arXiv 1906.04721, section 4.2).
    """
    full, quantized = moments.means()
    expected = _mean_output(layer, layer.weight.double(), full)
    found = _mean_output(layer, layer.rounded_weight().double(), quantized)
    return (expected - found).float()


def _mean_output(layer: QuantizedLayer, weight: Tensor, mean: Tensor) -> Tensor:
    """The mean output [out] for the mean of the weights' inputs (see InputMoments)."""
    if not isinstance(layer, QuantizedConv2d):
        return weight @ mean
    grouped = mean.view(layer.groups, -1, *mean.shape[1:])
    weight = weight.view(layer.groups, -1, *weight.shape[1:])
    return torch.einsum("goihw,gihw->go", weight, grouped).flatten()
