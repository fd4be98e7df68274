"""Streaming moments of what a layer's weights are multiplied with, for bias correction and GPTQ."""

import torch
from torch import Tensor, nn

from .layers import QuantizedConv2d, QuantizedLayer
from .rows import convolution_rows, pad, taps

MAX_COLUMNS = 4096
"""Inputs of a weight whose second moments are taken together. Larger weights are worked on in chunks
of this many columns, as if inputs of different chunks were not correlated."""
MAX_ROWS = 4096
"""Output positions of one forward pass that count towards second moments, chosen at random."""


class InputMoments:
    """Means of what each weight is multiplied with, and second moments of it once quantized.

    Means, in float64, have the shape of the weight without its output axis: [in] for Linear,
    [in, kernel height, kernel width] for Conv2d.
    """

    def __init__(self) -> None:
        self.positions = 0
        self._full = torch.zeros((), dtype=torch.float64)
        self._quantized = torch.zeros((), dtype=torch.float64)
        self._rows = 0
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

    def update_second(self, rows: Tensor) -> None:
        """Add quantized inputs, [groups, positions, columns]."""
        self._waiting.append(rows)
        # Adding up [columns, columns] costs more than multiplying a few rows.
        if sum(chunk.shape[1] for chunk in self._waiting) >= rows.shape[2]:
            self._add_waiting()

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        rows = torch.cat(self._waiting, dim=1)
        self._waiting.clear()
        if self._rows == 0:
            self._origin = rows.mean(1, keepdim=True)
        # Far from the origin, products in single precision would lose the deviations.
        chunks = (rows - self._origin).split(MAX_COLUMNS, dim=2)
        sums = [chunk.sum(1, dtype=torch.float64) for chunk in chunks]
        products = [(chunk.transpose(1, 2) @ chunk).double() for chunk in chunks]
        if self._rows == 0:
            self._sums, self._products = sums, products
        else:
            for kept, new in zip((*self._sums, *self._products), (*sums, *products), strict=True):
                kept += new
        self._rows += rows.shape[1]

    def second(self, *, centred: bool) -> list[Tensor]:
        """Second moments of each chunk of the columns, [groups, columns, columns], float64.

        Args:
            centred: of the deviations from the mean.
        """
        self._add_waiting()
        origins = self._origin[:, 0].double().split(MAX_COLUMNS, dim=1)
        moments = []
        for product, sums, origin in zip(self._products, self._sums, origins, strict=True):
            mean = sums / self._rows  # from the origin
            moment = product / self._rows - mean[:, :, None] * mean[:, None]
            if not centred:
                mean = mean + origin
                moment = moment + mean[:, :, None] * mean[:, None]
            moments.append(moment)
        return moments


def chosen_rows(count: int, device: torch.device) -> Tensor:
    """Indices of at most ``MAX_ROWS`` of ``count`` positions: the same ones at every call."""
    if count <= MAX_ROWS:
        return torch.arange(count, device=device)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return order[:MAX_ROWS].sort().values.to(device)


def measure_inputs(
    layer: QuantizedLayer,
    x: Tensor,
    output: Tensor,
    moments: InputMoments,
    *,
    second: bool,
) -> None:
    """Add one call of a layer to ``moments``.

    Args:
        x: the layer's input in full precision. output: what it returned.
        second: also to the second moments.
    """
    if not x.numel():  # a head of regions, where an image has none
        return
    quantized = layer.input_quantizer.quantized(x)
    if isinstance(layer, QuantizedConv2d):
        padded, padded_quantized = pad(layer, x), pad(layer, quantized)
        size = output.shape[2:]
        full, rounded = (_tap_sums(layer, t, size) for t in (padded, padded_quantized))
        moments.update_means(full, rounded, len(x) * size.numel())
        if second:
            chosen = chosen_rows(len(x) * size.numel(), x.device)
            moments.update_second(convolution_rows(layer, padded_quantized, size, chosen))
    else:
        rows, quantized = (t.reshape(-1, t.shape[-1]) for t in (x, quantized))
        full, rounded = (t.sum(0, dtype=torch.float64) for t in (rows, quantized))
        moments.update_means(full, rounded, len(rows))
        if second:
            moments.update_second(quantized[chosen_rows(len(rows), x.device)][None])


def _tap_sums(layer: nn.Conv2d, padded: Tensor, size: torch.Size) -> Tensor:
    """Sum of the padded input under each kernel tap: [in, kernel height, kernel width]."""
    total = padded.sum(0, keepdim=True)
    return taps(layer, total, size).sum((0, 2, 3), dtype=torch.float64)
