"""Scale migration: scales per input channel of a convolution, which the weights take up.

Quiet channels waste the codes of a common scale. With scales of their own the weights have to take up
how the scales differ, and are harder to round (SmoothQuant, Xiao et al., arXiv 2211.10438, with one
strength for all layers). Here ranges go from the tensor's to the channel's by powers,
range_tensor^(1 − a) · range_channel^a, and each layer takes the strength a with the smallest expected
error of its output,

    Σ_c (Σ W_c² · E[(x_c − x̂_c)²] + Σ (W_c − Ŵ_c)² · E[x_c²])

over input channels c, as if errors were not correlated, with Ŵ rounded to the nearest and deviations
from the mean in the place of x_c where biases are corrected.
"""

import torch
from torch import Tensor

from ..config import QuantizationSettings
from .layers import QuantizedConv2d
from .primitives import fake_quantize, quantization_parameters
from .quantizer import ActivationQuantizer
from .ranges import RangeObserver
from .recipe import integer_grids, range_method, weight_grid

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""From one scale for all input channels to one for each."""


@torch.no_grad()
def choose_grid(
    quantizer: ActivationQuantizer,
    observer: RangeObserver,
    migrating: QuantizedConv2d | None,
    settings: QuantizationSettings,
) -> None:
    """Turn what an activation's quantizer has seen into its grid.

    Args:
        migrating: the layer that takes up the scales of this input, if one does.
    """
    if migrating is not None:
        migrate_scales(migrating, observer, settings)
    elif quantizer.logarithmic:
        scale = observer.estimate_log_scale(quantizer.bits)
        quantizer.set_parameters(scale, torch.zeros_like(scale))
    else:
        quantizer.set_range(
            *observer.estimate(range_method(settings), quantizer.bits, settings.percentile)
        )


@torch.no_grad()
def migrate_scales(
    layer: QuantizedConv2d, observer: RangeObserver, settings: QuantizationSettings
) -> None:
    """Choose how far the scale of a convolution's input goes with its channels; set the grid.

    Args:
        observer: what the input's quantizer has seen, channel by channel.
    """
    quantizer = layer.input_quantizer
    each, tensor = (
        seen.estimate(range_method(settings), quantizer.bits, settings.percentile)
        for seen in (observer, observer.pooled())
    )
    silent = (each[0] == 0) & (each[1] == 0)  # their scale would say nothing
    channel = [torch.where(silent, t, c) for t, c in zip(tensor, each, strict=True)]
    power = observer.mean_square(centred=settings.bias_correction)
    energy = _by_input_channel(layer, layer.weight.square())
    best = float("inf")
    for strength in STRENGTHS:
        low, high = (
            sign
            * (sign * whole).clamp(min=0) ** (1 - strength)
            * (sign * own).clamp(min=0) ** strength
            for sign, whole, own in zip((-1, 1), tensor, channel, strict=True)
        )
        if integer_grids(settings) and strength:  # without, they have one already
            low, high = common_zero(observer, low, high, quantizer.bits, energy)
        scale, zero_point = quantization_parameters(low, high, quantizer.bits)
        quantizer.scale, quantizer.zero_point = scale, zero_point
        error = energy @ observer.mean_error(low, high, quantizer.bits)
        factor = layer.input_factor()
        weight = layer.weight * factor
        scales, zero_points = (
            parameter[:, None, None, None]
            for parameter in weight_grid(weight, settings, layer.weight_bits)
        )
        lost = (fake_quantize(weight, scales, zero_points, layer.weight_bits) - weight) / factor
        error += _by_input_channel(layer, lost.square()) @ power
        if error < best:
            best, found = float(error), (scale, zero_point, strength)
    scale, zero_point, strength = found
    if strength == 0:
        scale, zero_point = scale[:1], zero_point[:1]
    quantizer.set_parameters(scale, zero_point)


ZEROS = 8
"""Zero points that are tried for all channels, from the smallest that one of them asks for to the largest."""


def common_zero(
    observer: RangeObserver, low: Tensor, high: Tensor, bits: int, energy: Tensor
) -> tuple[Tensor, Tensor]:
    """Change ranges of channels so that they have one zero point.

    A channel keeps its whole range, or the larger side of it, whichever has the smaller error. The zero
    point is the one with the smallest error of all channels together.

    Args:
        low, high: [channels].
        energy: [channels] weights of the channels' squared errors.

    Returns:
        low, high: [channels].
    """
    levels = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    asked = quantization_parameters(low, high, bits)[1]
    best = float("inf")
    for zero in torch.linspace(asked.min(), asked.max(), ZEROS).round().unique().tolist():
        below, above = zero / levels, 1 - zero / levels  # shares of a range's width
        sides = [side / share for side, share in ((-low, below), (high, above)) if share > 0]
        chosen = sides[-1]
        least = observer.mean_error(-below * chosen, above * chosen, bits)
        width = torch.stack(sides).amax(0)
        error = observer.mean_error(-below * width, above * width, bits)
        chosen = torch.where(error < least, width, chosen)
        least = torch.minimum(least, error)
        if (total := float(energy @ least)) < best:
            best, found = total, (-below * chosen, above * chosen)
    return found


def _by_input_channel(layer: QuantizedConv2d, weight: Tensor) -> Tensor:
    """Sum a tensor of the weight's shape over all but the input channels: [in], float64."""
    grouped = weight.double().unflatten(0, (layer.groups, -1))
    return grouped.sum((1, 3, 4)).flatten()
