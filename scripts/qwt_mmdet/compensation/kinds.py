"""Kinds of compensation: how each changes a block's output, and its cost.

A kind is a dataclass of tensors. Its fields are the buffers of a compensated block and the tensors
in the compensation file; :mod:`.solve` holds the solver of each.

Matrices in eight bits are int8 codes with a scale per column. Their inputs are rounded to eight bits as well,
on a grid per image (ONNX: DynamicQuantizeLinear), so that integers are multiplied.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Registry
from ..quantization.primitives import fake_quantize, quantization_parameters
from ..quantization.rounding import gptq_codes
from ..quantization.size import tensor_bytes
from .statistics import BlockStatistics

BITS = 8
ZERO = 2 ** (BITS - 1)
"""The code of 0 on a symmetric grid of unsigned codes."""

KINDS: Registry[type["Kind"]] = Registry("kind")
"""Dataclass by name of the kind."""


@dataclass(frozen=True)
class Kind:
    """Base of the kinds; a subclass registers itself under its ``name``."""

    name: ClassVar[str]
    grids: ClassVar[tuple[str, ...]] = ()
    """Names of fields that are scales of codes: positive, or None."""

    def __init_subclass__(cls, name: str) -> None:
        cls.name = name
        KINDS[name] = cls

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are set, by name."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Kind":
        """The same with all tensors on ``device``, and of ``dtype`` but for codes."""
        return type(self)(
            **{
                key: v.to(device, dtype if v.is_floating_point() else v.dtype)
                for key, v in self.tensors().items()
            }
        )

    def rounded(self, statistics: BlockStatistics) -> "Kind":
        """The same with its matrices in eight bits, for inputs with these moments; here there are none."""
        return self

    @property
    def parameters(self) -> int:
        """Number of elements of the tensors."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def bytes(self) -> int:
        """Bytes of the tensors as they are stored."""
        return tensor_bytes(self.tensors().values())

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


def _in_eight_bits(weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, rounded with error feedback.

    Args:
        weight: [in, out].
        moments: [in, in] second moments of its inputs.

    Returns:
        int8 codes [in, out], −127 to 127; scales [out].
    """
    most = weight.abs().amax(0)
    scale, zero = quantization_parameters(-most, most, BITS, symmetric=True)
    codes = gptq_codes(weight.T[None], moments[None], scale[None], zero[None], BITS)[0].T
    return (codes.clamp(min=1).short() - ZERO).to(torch.int8).contiguous(), scale


def rounded_input(x: Tensor) -> Tensor:
    """The input of a matrix in eight bits, [images, …], rounded to a grid per image.

    The grid spans the smallest and the largest value, and contains 0.
    """
    across = tuple(range(1, x.dim()))
    low, high = (limit(x.detach(), across, keepdim=True) for limit in (torch.amin, torch.amax))
    return fake_quantize(x, *quantization_parameters(low, high, BITS), BITS)


def _matrix(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The values of a matrix [in, out]; with scales [out], ``weight`` holds codes."""
    if scale is None:
        return weight
    if torch.onnx.is_in_onnx_export():  # a product of constants would be folded into floating point
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", (weight, scale), {"axis": 1}, dtype=scale.dtype, shape=weight.shape, version=21
        )  # fmt: skip
    return weight * scale


def _project(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, axis: int
) -> Tensor:
    """x W + b for W [in, out]; on maps a 1×1 convolution."""
    if scale is not None:
        x = rounded_input(x)
    weight = _matrix(weight, scale)
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

    This is QwT-v2's channel-wise affine compensation (arXiv 2505.20932), a function of the quantized output,
    not of the block's input.

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
        left_scale: [r], right_scale: [out]; None where the factors are in floating point.
    """

    grids = ("left_scale", "right_scale")

    left: Tensor
    right: Tensor
    bias: Tensor
    left_scale: Tensor | None = None
    right_scale: Tensor | None = None

    @property
    def multiply_adds(self) -> int:
        return self.left.numel() + self.right.numel()

    def rounded(self, statistics: BlockStatistics) -> Kind:
        sums = statistics.inputs
        left, left_scale = _in_eight_bits(self.left, sums.xx)
        values = _matrix(left, left_scale).double()
        right, right_scale = _in_eight_bits(self.right, values.T @ sums.xx @ values)
        bias = sums.mean_y - sums.mean_x @ values @ _matrix(right, right_scale).double()
        return LowRank(left, right, bias, left_scale, right_scale)

    def apply(self, x: Tensor, output: Tensor, axis: int) -> Tensor:
        inner = _project(x, self.left, self.left_scale, None, axis)
        return output + _project(inner, self.right, self.right_scale, self.bias, axis)

    def squared_error(self, statistics: BlockStatistics) -> float:
        left, right = (
            _matrix(*pair).double()
            for pair in ((self.left, self.left_scale), (self.right, self.right_scale))
        )
        return statistics.inputs.error_after(left @ right, self.bias)


@dataclass(frozen=True)
class Linear(Kind, name="linear"):
    """output + x W + b on the block's input x (QwT, arXiv 2411.13918).

    Args:
        weight: W [in, out]. bias: [out].
        scale: [out]; None where the weight is in floating point.
    """

    grids = ("scale",)

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None

    @property
    def multiply_adds(self) -> int:
        return self.weight.numel()

    def rounded(self, statistics: BlockStatistics) -> Kind:
        sums = statistics.inputs
        codes, scale = _in_eight_bits(self.weight, sums.xx)
        bias = sums.mean_y - sums.mean_x @ _matrix(codes, scale).double()
        return Linear(codes, bias, scale)

    def apply(self, x: Tensor, output: Tensor, axis: int) -> Tensor:
        return output + _project(x, self.weight, self.scale, self.bias, axis)

    def squared_error(self, statistics: BlockStatistics) -> float:
        return statistics.inputs.error_after(_matrix(self.weight, self.scale), self.bias)
