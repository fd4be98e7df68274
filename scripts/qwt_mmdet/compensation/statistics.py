"""Streaming sums for a linear regression, centred so that large means cost no precision."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

CHUNK = 2048
"""Samples that are summed at a time, so that their float64 copies stay in the cache."""


@dataclass
class RegressionStatistics:
    """Centred second moments of inputs X [n, in] and targets Y [n, out] in float64.

    Memory is O(in² + in·out), whatever n is. Two of them merge exactly (Chan, Golub & LeVeque,
    "Updating formulae and a pairwise algorithm for computing sample variances", 1979).

    Attributes:
        count: number of samples n.
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
    def zeros(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> Self:
        """Statistics of no samples."""
        x, y = (torch.zeros(1, n, dtype=torch.float64, device=device) for n in (inputs, outputs))
        return cls(0, x[0], y[0], cls._products(x, x), cls._products(x, y), y[0].clone())

    @staticmethod
    def _products(a: Tensor, b: Tensor) -> Tensor:
        """Sum over samples of the products of [n, p] and [n, q]: [p, q]."""
        return a.T @ b

    @staticmethod
    def _predict(products: Tensor, weight: Tensor) -> Tensor:
        return products @ weight

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add samples ``x`` [n, in] and ``y`` [n, out], of any float dtype, in chunks."""
        for x_chunk, y_chunk in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            x_chunk, y_chunk = (t.to(torch.float64, copy=True) for t in (x_chunk, y_chunk))
            mean_x, mean_y = x_chunk.mean(0), y_chunk.mean(0)
            x_chunk -= mean_x
            y_chunk -= mean_y
            self.merge(
                type(self)(
                    len(x_chunk),
                    mean_x,
                    mean_y,
                    self._products(x_chunk, x_chunk),
                    self._products(x_chunk, y_chunk),
                    y_chunk.square_().sum(0),
                )
            )

    def merge(self, other: "RegressionStatistics") -> None:
        """Add all samples of ``other``."""
        if other.count == 0:
            return
        total = self.count + other.count
        weight = self.count * other.count / total
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        self.xx += other.xx + weight * self._products(dx[None], dx[None])
        self.xy += other.xy + weight * self._products(dx[None], dy[None])
        self.yy += other.yy + weight * dy.square()
        self.mean_x = self.mean_x + dx * (other.count / total)
        self.mean_y = self.mean_y + dy * (other.count / total)
        self.count = total

    @property
    def variation(self) -> float:
        """Σ‖y − ȳ‖²."""
        return float(self.yy.sum())

    def error_before(self) -> float:
        """Σ‖y‖²: the squared error without any compensation."""
        return self.constant_error(torch.zeros_like(self.mean_y))

    def constant_error(self, bias: Tensor) -> float:
        """Σ‖y − b‖² for b [out]."""
        return float((self.yy + self.count * (self.mean_y - bias.double()).square()).sum())

    def error_after(self, weight: Tensor, bias: Tensor) -> float:
        """Σ‖y − xW − b‖² for W [in, out] and b [out], from the sums alone."""
        weight, bias = weight.double(), bias.double()
        explained = weight * (self._predict(self.xx, weight) - 2 * self.xy)
        explained = explained.reshape(-1, explained.shape[-1]).sum(0)
        offset = self.mean_y - self._predict(self.mean_x, weight) - bias
        return float((self.yy + explained + self.count * offset.square()).sum().clamp(min=0))


class ChannelStatistics(RegressionStatistics):
    """The same for a regression of each target channel on the input channel of the same index.

    ``xx``, ``xy`` and weights are diagonals, [out].
    """

    @staticmethod
    def _products(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(0)

    @staticmethod
    def _predict(products: Tensor, weight: Tensor) -> Tensor:
        return products * weight


@dataclass
class BlockStatistics:
    """Sums of regressions of a block's error, over its positions.

    Attributes:
        on_input: regression on the block's input; None where no kind needs it.
        on_output: regression on the quantized output, channel by channel; None where no kind needs it.
    """

    on_input: RegressionStatistics | None
    on_output: ChannelStatistics | None

    @property
    def inputs(self) -> RegressionStatistics:
        assert self.on_input is not None, "the needs of the solver lack inputs"
        return self.on_input

    @property
    def outputs(self) -> ChannelStatistics:
        assert self.on_output is not None, "the needs of the solver lack outputs"
        return self.on_output

    @property
    def any(self) -> RegressionStatistics:
        """Either one, for the sums of the error itself, which are the same in both."""
        return self.outputs if self.on_input is None else self.on_input

    @property
    def count(self) -> int:
        return self.any.count

    def update(self, x: Tensor, output: Tensor, error: Tensor) -> None:
        """Add samples of block input [n, in], quantized output [n, out] and error [n, out]."""
        if self.on_input is not None:
            self.on_input.update(x, error)
        if self.on_output is not None:
            self.on_output.update(output, error)

    def merge(self, other: "BlockStatistics") -> None:
        """Add all samples of ``other``."""
        if self.on_input is not None:
            self.on_input.merge(other.inputs)
        if self.on_output is not None:
            self.on_output.merge(other.outputs)

    @property
    def elements(self) -> int:
        """Positions times channels."""
        return self.count * len(self.any.mean_y)


def merged(groups: Sequence[BlockStatistics]) -> BlockStatistics:
    """The sums over all groups."""
    total = copy.deepcopy(groups[0])
    for group in groups[1:]:
        total.merge(group)
    return total
