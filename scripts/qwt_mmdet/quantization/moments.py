"""Streaming statistics of a layer's input and output, for bias correction, GPTQ and reports."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

MAX_COLUMNS = 4096
"""Inputs of a weight whose second moments are taken together. Larger weights are worked on in parts
of this many columns, as if inputs of different parts were not correlated."""
MAX_ROWS = 4096
"""Output positions of one forward pass that count towards second moments, chosen at random."""


class InputMoments:
    """Means of what each weight is multiplied with, and second moments of it once quantized.

    Means, in float64, have the shape of the weight without its output axis: [in] for Linear,
    [in, kernel height, kernel width] for Conv2d.
    """

    def __init__(self) -> None:
        self.positions = 0
        self._full: Tensor | float = 0.0
        self._quantized: Tensor | float = 0.0
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
        if sum(part.shape[1] for part in self._waiting) >= rows.shape[2]:
            self._add_waiting()

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        rows = torch.cat(self._waiting, dim=1)
        self._waiting.clear()
        if self._rows == 0:
            self._origin = rows.mean(1, keepdim=True)
        # Far from the origin, products in single precision would lose the deviations.
        parts = (rows - self._origin).split(MAX_COLUMNS, dim=2)
        sums = [part.sum(1, dtype=torch.float64) for part in parts]
        products = [(part.transpose(1, 2) @ part).double() for part in parts]
        if self._rows == 0:
            self._sums, self._products = sums, products
        else:
            for kept, new in zip((*self._sums, *self._products), (*sums, *products), strict=True):
                kept += new
        self._rows += rows.shape[1]

    def second(self, *, centred: bool) -> list[Tensor]:
        """Second moments of each part of the columns, [groups, columns, columns], float64.

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


def worst_layers(signal_noise: Mapping[str, float | None], most: int = 3) -> str:
    """``backbone.conv1 (-2.5 dB), …``: the layers with the lowest ratios in dB, the worst first."""
    measured = [(ratio, name) for name, ratio in signal_noise.items() if ratio is not None]
    return ", ".join(f"{name} ({ratio:.1f} dB)" for ratio, name in sorted(measured)[:most])


def chosen_rows(count: int, device: torch.device) -> Tensor:
    """Indices of at most ``MAX_ROWS`` of ``count`` positions: the same ones at every call."""
    if count <= MAX_ROWS:
        return torch.arange(count, device=device)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return order[:MAX_ROWS].sort().values.to(device)


class SignalNoise:
    """Streaming signal-to-quantization-noise ratio of a tensor."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0

    def update(self, full: Tensor, quantized: Tensor) -> None:
        """Add a tensor as it should be and as it is, of any (equal) shape."""
        self.signal += float(full.square().sum(dtype=torch.float64))
        self.noise += float((full - quantized).square_().sum(dtype=torch.float64))

    def decibels(self) -> float | None:
        """10 log10(signal / noise), or None where one of them is 0."""
        if self.noise == 0 or self.signal == 0:
            return None
        return 10 * math.log10(self.signal / self.noise)
