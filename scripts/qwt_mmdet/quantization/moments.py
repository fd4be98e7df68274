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
    """Means of the inputs that each weight of a layer multiplies, and second moments of the quantized inputs.

    Means, in float64, have the shape of the weight without its output axis: [in] for Linear,
    [in, kernel height, kernel width] for Conv2d.

    Args:
        limit: most output positions of a call that are sampled for the second moments; 0: none.

    Attributes:
        positions: number of output positions that the means count.
        second: sums of sampled quantized inputs.
    """

    def __init__(self, layer: QuantizedLayer, limit: int) -> None:
        self.layer, self.limit, self.positions = layer, limit, 0
        self._full = self._quantized = torch.zeros((), dtype=torch.float64)
        columns = layer.weight[0].numel()
        self.second = RegressionSums(columns, MAX_COLUMNS, columns)

    def update(self, x: Tensor, output: Tensor) -> None:
        """Add one call of the layer, with its input and output in full precision."""
        layer, size = self.layer, output_size(self.layer, x)
        count = math.prod(size)
        if not count:  # a region head on an image without proposals
            return
        quantized = layer.input_quantizer.quantized(x)
        if self.limit:
            chosen = sampled_positions(count, self.limit, self.positions, x.device)
            self.second.update(input_vectors(layer, quantized, size, chosen))
        self._full = self._full + _input_sums(layer, x, size)
        self._quantized = self._quantized + _input_sums(layer, quantized, size)
        self.positions += count

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean input before and after quantization."""
        return self._full / self.positions, self._quantized / self.positions


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
