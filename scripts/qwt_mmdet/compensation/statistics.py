"""Streaming sums for a linear regression, centred so that large means lose no digits."""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 16384


@dataclass
class RegressionStatistics:
    """Centred second moments of inputs X [n, in] and targets Y [n, out] in float64.

    Memory is O(in² + in·out), whatever n is. Two of them merge exactly (Chan, Golub & LeVeque,
    "Updating formulae and a pairwise algorithm for computing sample variances", 1979).

    Attributes:
        count: number of rows n.
        mean_x: [in]; mean_y: [out].
        xx: [in, in], Σ (x − x̄)(x − x̄)ᵀ.
        xy: [in, out], Σ (x − x̄)(y − ȳ)ᵀ.
        yy: [out], Σ (y − ȳ)².
    """

    count: int
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def zeros(
        cls, inputs: int, outputs: int, device: torch.device | str = "cpu"
    ) -> "RegressionStatistics":
        """Statistics of no rows at all."""

        def new(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(
            0, new(inputs), new(outputs), new(inputs, inputs), new(inputs, outputs), new(outputs)
        )

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows ``x`` [n, in] and ``y`` [n, out], any float dtype, in chunks."""
        for x_chunk, y_chunk in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            x_chunk, y_chunk = x_chunk.double(), y_chunk.double()
            mean_x, mean_y = x_chunk.mean(0), y_chunk.mean(0)
            x_chunk, y_chunk = x_chunk - mean_x, y_chunk - mean_y
            self.merge(
                RegressionStatistics(
                    len(x_chunk),
                    mean_x,
                    mean_y,
                    x_chunk.T @ x_chunk,
                    x_chunk.T @ y_chunk,
                    y_chunk.square().sum(0),
                )
            )

    def merge(self, other: "RegressionStatistics") -> None:
        """Add all rows that ``other`` has seen."""
        if other.count == 0:
            return
        total = self.count + other.count
        weight = self.count * other.count / total
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        self.xx += other.xx + weight * torch.outer(dx, dx)
        self.xy += other.xy + weight * torch.outer(dx, dy)
        self.yy += other.yy + weight * dy.square()
        self.mean_x = self.mean_x + dx * (other.count / total)
        self.mean_y = self.mean_y + dy * (other.count / total)
        self.count = total

    def error_before(self) -> float:
        """Σ‖y‖²: the squared error without any compensation."""
        return float((self.yy + self.count * self.mean_y.square()).sum())

    def error_after(self, weight: Tensor, bias: Tensor) -> float:
        """Σ‖y − xW − b‖² for W [in, out] and b [out], from the sums alone."""
        weight, bias = weight.double(), bias.double()
        explained = (weight * (self.xx @ weight - 2 * self.xy)).sum(0)
        offset = self.mean_y - self.mean_x @ weight - bias
        return float((self.yy + explained + self.count * offset.square()).sum().clamp(min=0))
