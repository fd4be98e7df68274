"""Inputs and outputs of a layer at its output positions, as rows of matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import QuantizedConv2d, QuantizedLayer
from .primitives import fake_quantize


def sampled_positions(count: int, limit: int, seed: int, device: torch.device) -> Tensor:
    """At most ``limit`` of ``count`` positions, one from each of as many equal stretches; sorted."""
    if count <= limit:
        return torch.arange(count, device=device)
    within = torch.rand(limit, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((torch.arange(limit) + within) * (count / limit)).long().to(device)


def output_size(layer: QuantizedLayer, x: Tensor) -> tuple[int, ...]:
    """Shape of a layer's output without its channels, for an input ``x``."""
    if not isinstance(layer, QuantizedConv2d):
        return tuple(x.shape[:-1])
    right_to_left = layer._reversed_padding_repeated_twice
    added = (sum(right_to_left[2:]), sum(right_to_left[:2]))
    sides = zip(x.shape[2:], added, layer.dilation, layer.kernel_size, layer.stride, strict=True)
    return (
        len(x),
        *(
            (side + pad - spread * (taps - 1) - 1) // step + 1
            for side, pad, spread, taps, step in sides
        ),
    )


def output_rows(layer: QuantizedLayer, output: Tensor, chosen: Tensor) -> Tensor:
    """What a layer returned at some positions, [positions, out]."""
    if isinstance(layer, QuantizedConv2d):
        output = output.movedim(1, -1)
    size = output.shape[:-1]
    return output[torch.unravel_index(chosen, size)]


def input_rows(layer: QuantizedLayer, x: Tensor, size: tuple[int, ...], chosen: Tensor) -> Tensor:
    """What the weights are multiplied with at some output positions, [groups, positions, columns].

    Args:
        size: of the output (:func:`output_size`).
    """
    if isinstance(layer, QuantizedConv2d):
        return convolution_rows(layer, pad(layer, x), size, chosen)
    return x[torch.unravel_index(chosen, size)][None]


def quantized_rows(layer: QuantizedLayer, rows: Tensor) -> Tensor:
    """Rows of :func:`input_rows` on the grid of the layer's input."""
    quantizer = layer.input_quantizer
    scale, zero_point = quantizer.grid
    if quantizer.channel_axis is not None:
        taps = (
            layer.groups * rows.shape[2] // len(scale) if isinstance(layer, QuantizedConv2d) else 1
        )
        scale, zero_point = (
            p.repeat_interleave(taps).view(len(rows), 1, -1) for p in (scale, zero_point)
        )
    return fake_quantize(rows, scale, zero_point, quantizer.bits)


def pad(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The input of a convolution with its padding."""
    if not any(layer._reversed_padding_repeated_twice):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def convolution_rows(
    layer: nn.Conv2d, padded: Tensor, size: tuple[int, ...], chosen: Tensor
) -> Tensor:
    """What the kernel is multiplied with at some output positions: [groups, positions, columns].

    Args:
        size: of the output (:func:`output_size`).
    """
    channels, height, width = padded.shape[1:]
    line, column = chosen // size[2], chosen % size[2]
    image, row = line // size[1], line % size[1]
    (down, right), (spread_y, spread_x) = layer.stride, layer.dilation
    first = (image * height + row * down) * width + column * right
    y, x = (torch.arange(taps, device=padded.device) for taps in layer.kernel_size)
    taps = (y[:, None] * (spread_y * width) + x * spread_x).flatten()
    # Whole rows of channels are much faster to gather than their elements.
    rows = padded.movedim(1, -1).reshape(-1, channels)[first[:, None] + taps]
    return rows.unflatten(2, (layer.groups, -1)).permute(2, 0, 3, 1).flatten(2)
