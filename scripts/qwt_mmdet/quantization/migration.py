"""Scale migration: a scale per input channel of a convolution, folded into the weights.

Channels of small range waste the codes of a common scale. A scale per channel avoids this, but its ratio to
the mean scale must be folded into the weights, which makes them harder to round. SmoothQuant (Xiao et al.,
arXiv 2211.10438) balances both with one strength for all layers. Here the range of a channel is
range_tensor^(1 − a) · range_channel^a. Each layer gets the strength a with the smallest expected error of its
output, as if errors of the input channels c were not correlated:

    Σ_c (Σ W_c² · E[(x_c − x̂_c)²] + Σ (W_c − Ŵ_c)² · E[x_c²])

Ŵ is rounded to the nearest. Where biases are corrected, x_c is its deviation from the mean.
"""

import torch
from torch import Tensor

from ..config import QuantizationSettings
from .layers import QuantizedConv2d, QuantizedLayer
from .primitives import fake_quantize, quantization_parameters
from .quantizer import ActivationQuantizer
from .ranges import RangeObserver
from .scheme import integer_grids, range_method, weight_grid

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""From one scale for all input channels to one for each."""


def choose_grid(
    quantizer: ActivationQuantizer,
    observer: RangeObserver,
    layer: QuantizedLayer | None,
    settings: QuantizationSettings,
) -> None:
    """Choose the grid of an activation from its histogram.

    Args:
        layer: that reads the activation; None for attention.
    """
    if isinstance(layer, QuantizedConv2d) and layer.migrates:
        migrate_scales(layer, observer, settings)
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
    """Choose the strength of scale migration for a convolution's input; set the grid.

    Args:
        observer: histograms of the input, one per channel.
    """
    quantizer = layer.input_quantizer
    each, tensor = (
        seen.estimate(range_method(settings), quantizer.bits, settings.percentile)
        for seen in (observer, observer.pooled())
    )
    silent = (each[0] == 0) & (each[1] == 0)  # channels without a scale
    channel = [torch.where(silent, t, c) for t, c in zip(tensor, each, strict=True)]
    power = observer.mean_square(centred=settings.bias_correction)
    energy = _by_input_channel(layer, layer.weight.square())
    ranges = [
        [
            sign
            * (sign * whole).clamp(min=0) ** (1 - strength)
            * (sign * own).clamp(min=0) ** strength
            for strength in STRENGTHS
        ]
        for sign, whole, own in zip((-1, 1), tensor, channel, strict=True)
    ]
    low, high = (torch.stack(limits, dim=1) for limits in ranges)
    if integer_grids(settings) and not quantizer.symmetric:
        # At strength 0 there is one scale, so also one zero point.
        apart = torch.tensor(STRENGTHS, device=low.device) > 0
        low[:, apart], high[:, apart] = common_zero(
            observer, low[:, apart], high[:, apart], quantizer.bits, energy
        )
    scales, zero_points = quantization_parameters(
        low, high, quantizer.bits, symmetric=quantizer.symmetric
    )
    grids = [
        (scale, zero_point) if strength else (scale[:1], zero_point[:1])
        for strength, scale, zero_point in zip(
            STRENGTHS, scales.T.contiguous(), zero_points.T.contiguous(), strict=True
        )
    ]
    factors = torch.stack([layer.input_factor(scale).expand_as(layer.weight) for scale, _ in grids])
    weights = (layer.weight * factors).flatten(0, 1)
    scale, zero_point = (
        p[:, None, None, None] for p in weight_grid(weights, settings, layer.weight_bits)
    )
    lost = fake_quantize(weights, scale, zero_point, layer.weight_bits) - weights
    lost = _by_input_channel(layer, (lost.view_as(factors) / factors).square())
    # Summed alike for each strength, so that ties are exact and the first one wins.
    rounding = observer.mean_error(low, high, quantizer.bits).T.contiguous()
    errors = torch.linalg.vecdot(rounding, energy) + torch.linalg.vecdot(lost, power)
    quantizer.set_parameters(*grids[int(errors.argmin())])


ZEROS = 8
"""Number of common zero points that are tried, from the smallest zero point of a channel to the largest."""


def common_zero(
    observer: RangeObserver, low: Tensor, high: Tensor, bits: int, energy: Tensor
) -> tuple[Tensor, Tensor]:
    """Change ranges of channels so that they share a zero point.

    With a common zero point, a channel's new range either covers both sides of its range or fits its upper side
    alone, whichever has the smaller error. The zero point with the smallest summed error is chosen.

    Args:
        low, high: [channels, strengths]; each strength gets its own zero point.
        energy: [channels] weights of the channels' squared errors.

    Returns:
        low, high: [channels, strengths].
    """
    levels = 2**bits - 1
    asked = quantization_parameters(low, high, bits)[1]
    low, high = -low.clamp(max=0)[..., None], high.clamp(min=0)[..., None]
    first, last = asked.aminmax(dim=0)
    between = torch.linspace(0, 1, ZEROS, device=low.device)
    zeros = (first[:, None] + (last - first)[:, None] * between).round().double() / levels
    below, above = zeros.float(), (1 - zeros).float()  # shares of a range's width
    left, right = (
        torch.where(share > 0, side / share, 0.0) for side, share in ((low, below), (high, above))
    )
    width = torch.stack((torch.where(above > 0, right, left), torch.maximum(left, right)), dim=-1)
    limits = -below[..., None] * width, above[..., None] * width  # [channels, strengths, zeros, 2]
    least, side = observer.mean_error(*limits, bits).min(-1)
    zero = torch.tensordot(energy, least, 1).argmin(-1).expand(len(low), -1)[..., None]
    chosen = 2 * zero + side.gather(2, zero)
    low, high = (limit.flatten(2).gather(2, chosen)[..., 0] for limit in limits)
    return low, high


def _by_input_channel(layer: QuantizedConv2d, weight: Tensor) -> Tensor:
    """Sum a tensor of the weight's shape, […, out, in, height, width], per input channel: […, in], float64."""
    grouped = weight.double().unflatten(-4, (layer.groups, -1))
    return grouped.sum((-4, -2, -1)).flatten(-2)
