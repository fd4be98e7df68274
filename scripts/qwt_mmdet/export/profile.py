"""The share of a graph's multiply-adds that a runtime computes with integers."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Kernel(NamedTuple):
    """The kernel of a runtime that computed a convolution or matrix product."""

    integer: bool
    multiply_adds: int


def convolution(values: Sequence[int], weight: Sequence[int]) -> int:
    """Multiply-adds of a convolution, in any layout of its maps.

    Args:
        values: shape of the output; of the input where it is transposed.
        weight: [out, in / groups, …], or [groups, out / groups, in / groups, …] with one dimension more
            (OpenVINO); transposed convolutions have in and out exchanged.
    """
    return math.prod(values) * math.prod(weight[1 + len(weight) - len(values) :])


def product(output: Sequence[int], left: Sequence[int]) -> int:
    """Multiply-adds of a matrix product, from the shapes […, n, m] and [… n, k]."""
    return math.prod(output) * left[-1]


# Operators of ONNX and of ONNX Runtime's own, {name: computed with integers}.
CONVOLUTIONS = {
    **dict.fromkeys(("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose"), False),
    **dict.fromkeys(("QLinearConv", "ConvInteger"), True),
}
PRODUCTS = {
    **dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "MatMulNBits"), False),
    **dict.fromkeys(("QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"), True),
    **dict.fromkeys(("DynamicQuantizeMatMul", "QGemm"), True),
}


def integer_share(kernels: Iterable[Kernel]) -> float | None:
    """Part of the multiply-adds, between 0 and 1, that are computed with integers; None without any."""
    found = list(kernels)
    total = sum(kernel.multiply_adds for kernel in found)
    integer = sum(kernel.multiply_adds for kernel in found if kernel.integer)
    return integer / total if total else None
