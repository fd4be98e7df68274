"""Streaming moments of the inputs that a layer's weights multiply, for bias correction and GPTQ."""

import functools
import math

import torch
from torch import Tensor

from .layers import QuantizedConv2d, QuantizedLayer
from .regression import RegressionSums
from .vectors import input_vectors, output_size, pad, sampled_positions

MAX_COLUMNS = 4096
"""Most columns of a matrix of second moments. Larger weights are split into chunks of columns, as if inputs of
different chunks were not correlated."""


class InputMoments:
    """Means of the inputs that each weight multiplies, and second moments of the quantized inputs.

    Means, in float64, have the shape of the weight without its output axis: [in] for Linear,
    [in, kernel height, kernel width] for Conv2d.

    Args:
        columns: number of inputs of each output.

    Attributes:
        positions: number of output positions that the means count.
        second: sums of sampled quantized inputs.
    """

    def __init__(self, columns: int) -> None:
        self.positions = 0
        self._full = torch.zeros((), dtype=torch.float64)
        self._quantized = torch.zeros((), dtype=torch.float64)
        widths = [len(chunk) for chunk in torch.arange(columns).split(MAX_COLUMNS)]
        self.second = RegressionSums(widths, columns)

    def update_means(self, full: Tensor, quantized: Tensor, positions: int) -> None:
        """Add sums over ``positions`` output positions, before and after quantization."""
        self._full = self._full + full
        self._quantized = self._quantized + quantized
        self.positions += positions

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean input before and after quantization."""
        return self._full / self.positions, self._quantized / self.positions


def measure_inputs(layer: QuantizedLayer, x: Tensor, moments: InputMoments, limit: int) -> None:
    """Add one call of a layer to ``moments``.

    Args:
        x: the layer's input in full precision.
        limit: most output positions of this call that are sampled for the second moments; 0: none.
    """
    size = output_size(layer, x)
    count = math.prod(size)
    if not count:  # a region head on an image without proposals
        return
    quantized = layer.input_quantizer.quantized(x)
    if limit:
        chosen = sampled_positions(count, limit, moments.positions, x.device)
        moments.second.update(input_vectors(layer, quantized, size, chosen))
    full, rounded = (_input_sums(layer, t, size) for t in (x, quantized))
    moments.update_means(full, rounded, count)


def _input_sums(layer: QuantizedLayer, x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Sum of the inputs that each weight multiplies, of the shape of :meth:`InputMoments.means`."""
    if not isinstance(layer, QuantizedConv2d):
        return x.flatten(0, -2).sum(0, dtype=torch.float64)
    padded = pad(layer, x).double()
    geometry = zip(
        padded.shape[2:], size[1:], layer.kernel_size, layer.stride, layer.dilation, strict=True
    )
    down, across = (_tap_positions(*axis, padded.device) for axis in geometry)
    return (down @ padded @ across.T).sum(0)


@functools.lru_cache(maxsize=1024)
def _tap_positions(
    length: int, outputs: int, taps: int, stride: int, spread: int, device: torch.device
) -> Tensor:
    """1 where a tap of a kernel meets a position along an axis of the input, else 0: [taps, length], float64."""
    tap, output = (torch.arange(n, device=device) for n in (taps, outputs))
    positions = torch.zeros(taps, length, dtype=torch.float64, device=device)
    return positions.scatter_(1, tap[:, None] * spread + output * stride, 1.0)
