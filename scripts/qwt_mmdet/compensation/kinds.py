"""Forms of compensation: what happens to a block's output, and what that costs.

A kind is a dataclass of tensors. Its fields are the buffers of a compensated block and the tensors
in the compensation file; :mod:`.solve` holds the solver of each.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .statistics import BlockStatistics

KINDS: dict[str, type["Kind"]] = {}
"""Dataclass by name of the kind."""


@dataclass(frozen=True)
class Kind:
    """Base of the kinds; a subclass registers itself under its ``name``."""

    name: ClassVar[str]

    def __init_subclass__(cls, name: str) -> None:
        cls.name = name
        KINDS[name] = cls

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Kind":
        """The same with all tensors on ``device`` and of ``dtype``."""
        return type(self)(**{key: v.to(device, dtype) for key, v in self.tensors().items()})

    @property
    def parameters(self) -> int:
        """How many numbers the tensors hold."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds for one position (token or pixel) of the output."""
        raise NotImplementedError

    def apply(self, x: Tensor, output: Tensor, axis: int) -> Tensor:
        """Return the compensated output.

        Args:
            x: the block's input at the positions of its output.
            output: of the quantized block, with ``out`` channels along ``axis``.
            axis: 1 for maps [batch, channels, height, width], −1 for tokens and maps with the
                channels last; ``x`` has the same layout.
        """
        raise NotImplementedError

    def squared_error(self, statistics: BlockStatistics) -> float:
        """Squared error that is left, summed over positions and channels."""
        raise NotImplementedError


def _per_channel(values: Tensor, axis: int) -> Tensor:
    return values[:, None, None] if axis == 1 else values


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """x W + b for W [in, out]; on maps a 1×1 convolution."""
    if axis == 1:
        return F.conv2d(x, weight.T[:, :, None, None], bias)
    return F.linear(x, weight.T, bias)


@dataclass(frozen=True)
class Bias(Kind, name="bias"):
    """output + b, the mean error of each channel.

    Args:
        bias: [out].
    """

    bias: Tensor

    @property
    def multiply_adds(self) -> int:
        return 0

    def apply(self, x: Tensor, output: Tensor, axis: int) -> Tensor:
        return output + _per_channel(self.bias, axis)

    def squared_error(self, statistics: BlockStatistics) -> float:
        return statistics.any.constant_error(self.bias)


@dataclass(frozen=True)
class Affine(Kind, name="affine"):
    """scale · output + b per channel of the block's quantized output.

    This is QwT-v2's channel-wise affine compensation (arXiv 2505.20932), which looks at the
    quantized output, not at the block's input.

    Args:
        scale, bias: [out].
    """

    scale: Tensor
    bias: Tensor

    @property
    def multiply_adds(self) -> int:
        return len(self.scale)

    def apply(self, x: Tensor, output: Tensor, axis: int) -> Tensor:
        return output * _per_channel(self.scale, axis) + _per_channel(self.bias, axis)

    def squared_error(self, statistics: BlockStatistics) -> float:
        return statistics.outputs.error_after(self.scale.double() - 1, self.bias)


@dataclass(frozen=True)
class LowRank(Kind, name="lowrank"):
    """output + x L R + b: a linear compensation of rank r.

    Args:
        left: [in, r]. right: [r, out]. bias: [out].
    """

    left: Tensor
    right: Tensor
    bias: Tensor

    @property
    def multiply_adds(self) -> int:
        return self.left.numel() + self.right.numel()

    def apply(self, x: Tensor, output: Tensor, axis: int) -> Tensor:
        return output + _project(_project(x, self.left, None, axis), self.right, self.bias, axis)

    def squared_error(self, statistics: BlockStatistics) -> float:
        return statistics.inputs.error_after(self.left.double() @ self.right.double(), self.bias)


@dataclass(frozen=True)
class Linear(Kind, name="linear"):
    """output + x W + b on the block's input x (QwT, arXiv 2411.13918).

    Args:
        weight: W [in, out]. bias: [out].
    """

    weight: Tensor
    bias: Tensor

    @property
    def multiply_adds(self) -> int:
        return self.weight.numel()

    def apply(self, x: Tensor, output: Tensor, axis: int) -> Tensor:
        return output + _project(x, self.weight, self.bias, axis)

    def squared_error(self, statistics: BlockStatistics) -> float:
        return statistics.inputs.error_after(self.weight, self.bias)
