"""Input and output vectors of a layer at its output positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import QuantizedConv2d, QuantizedLayer
from .primitives import fake_quantize

POSITIONS = 2**15
"""Output positions of each layer that are sampled, of all images together."""


def sampled_positions(count: int, limit: int, seed: int, device: torch.device) -> Tensor:
    """At most ``limit`` of ``count`` positions, sorted: a random one of each of ``limit`` equal intervals."""
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


def output_vectors(layer: QuantizedLayer, output: Tensor, chosen: Tensor) -> Tensor:
    """The outputs of a layer at some positions, [positions, out]."""
    if isinstance(layer, QuantizedConv2d):
        output = output.movedim(1, -1)
    size = output.shape[:-1]
    return output[torch.unravel_index(chosen, size)]


def input_vectors(
    layer: QuantizedLayer, x: Tensor, size: tuple[int, ...], chosen: Tensor
) -> Tensor:
    """The inputs that the weights multiply at some positions of an output of a size, [groups, positions, columns]."""
    if isinstance(layer, QuantizedConv2d):
        return convolution_vectors(layer, pad(layer, x), size, chosen)
    return x[torch.unravel_index(chosen, size)][None]


def quantized_vectors(layer: QuantizedLayer, vectors: Tensor) -> Tensor:
    """Vectors of :func:`input_vectors` on the grid of the layer's input."""
    quantizer = layer.input_quantizer
    if not quantizer.rounds:
        return vectors
    scale, zero_point = quantizer.grid
    if quantizer.channel_axis is not None:
        taps = (
            layer.groups * vectors.shape[2] // len(scale)
            if isinstance(layer, QuantizedConv2d)
            else 1
        )
        scale, zero_point = (
            p.repeat_interleave(taps).view(len(vectors), 1, -1) for p in (scale, zero_point)
        )
    return fake_quantize(vectors, scale, zero_point, quantizer.bits)


def pad(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The input of a convolution with its padding."""
    if not any(layer._reversed_padding_repeated_twice):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)


def convolution_vectors(
    layer: nn.Conv2d, padded: Tensor, size: tuple[int, ...], chosen: Tensor
) -> Tensor:
    """:func:`input_vectors` of a convolution whose input is padded (im2col)."""
    channels, height, width = padded.shape[1:]
    line, column = chosen // size[2], chosen % size[2]
    image, line = line // size[1], line % size[1]
    (down, right), (spread_y, spread_x) = layer.stride, layer.dilation
    first = (image * height + line * down) * width + column * right
    y, x = (torch.arange(taps, device=padded.device) for taps in layer.kernel_size)
    taps = (y[:, None] * (spread_y * width) + x * spread_x).flatten()
    # Gathering all channels of a pixel at once is much faster than gathering elements.
    pixels = padded.movedim(1, -1).reshape(-1, channels)[first[:, None] + taps]
    return pixels.unflatten(2, (layer.groups, -1)).permute(2, 0, 3, 1).flatten(2)
