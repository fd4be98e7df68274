"""Streaming moments of the inputs that a layer's weights multiply, for bias correction and GPTQ."""

import functools
import math

import torch
from torch import Tensor

from .layers import QuantizedConv2d, QuantizedLayer
from .vectors import input_vectors, output_size, pad, sampled_positions

MAX_COLUMNS = 4096
"""Most columns of a matrix of second moments. Larger weights are split into chunks of columns, as if inputs of
different chunks were not correlated."""


class InputMoments:
    """Means of the inputs that each weight multiplies, and second moments of the quantized inputs.

    Means, in float64, have the shape of the weight without its output axis: [in] for Linear,
    [in, kernel height, kernel width] for Conv2d.
    """

    def __init__(self) -> None:
        self.positions = 0
        self._full = torch.zeros((), dtype=torch.float64)
        self._quantized = torch.zeros((), dtype=torch.float64)
        self._count = 0
        self._origin: Tensor
        self._sums: list[Tensor] = []
        self._products: list[Tensor] = []
        self._waiting: list[Tensor] = []

    def update_means(self, full: Tensor, quantized: Tensor, positions: int) -> None:
        """Add sums over ``positions`` output positions, before and after quantization."""
        self._full = self._full + full
        self._quantized = self._quantized + quantized
        self.positions += positions

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean input before and after quantization."""
        return self._full / self.positions, self._quantized / self.positions

    def update_second(self, vectors: Tensor) -> None:
        """Add quantized inputs, [groups, positions, columns]."""
        self._waiting.append(vectors)
        # Adding up [columns, columns] costs more than multiplying a few vectors.
        if sum(chunk.shape[1] for chunk in self._waiting) >= vectors.shape[2]:
            self._add_waiting()

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        vectors = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting, dim=1)
        self._waiting.clear()
        if self._count == 0:
            self._origin = vectors.mean(1, keepdim=True)
        # Far from the origin, products in single precision would lose the deviations.
        chunks = (vectors - self._origin).split(MAX_COLUMNS, dim=2)
        sums = [chunk.sum(1, dtype=torch.float64) for chunk in chunks]
        products = [(chunk.transpose(1, 2) @ chunk).double() for chunk in chunks]
        if self._count == 0:
            self._sums, self._products = sums, products
        else:
            for kept, new in zip((*self._sums, *self._products), (*sums, *products), strict=True):
                kept += new
        self._count += vectors.shape[1]

    def second(self, *, centred: bool) -> list[Tensor]:
        """Second moments of each chunk of the columns, [groups, columns, columns], float64.

        Args:
            centred: about the mean.
        """
        self._add_waiting()
        origins = self._origin[:, 0].double().split(MAX_COLUMNS, dim=1)
        moments = []
        for product, sums, origin in zip(self._products, self._sums, origins, strict=True):
            mean = sums / self._count  # from the origin
            moment = product / self._count - mean[:, :, None] * mean[:, None]
            if not centred:
                mean = mean + origin
                moment = moment + mean[:, :, None] * mean[:, None]
            moments.append(moment)
        return moments


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
        moments.update_second(input_vectors(layer, quantized, size, chosen))
    full, rounded = (_input_sums(layer, t, size) for t in (x, quantized))
    moments.update_means(full, rounded, count)


def _input_sums(layer: QuantizedLayer, x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Sum of the inputs that each weight multiplies, of the shape of :meth:`InputMoments.means`.

    Args:
        size: of the output (:func:`.vectors.output_size`).
    """
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
