"""The share of a graph's multiply-adds that a runtime computes with integers, from the runtime's profile."""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .runtimes import Graph, onnxruntime_session, openvino_model

Inputs = dict[str, np.ndarray]


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


def _onnxruntime(graph: Graph, inputs: Inputs) -> Iterator[Kernel]:
    """Kernels from the profile of one run, which has the shapes of each node's inputs and outputs."""
    with tempfile.TemporaryDirectory(prefix="qwt-mmdet-") as folder:
        session = onnxruntime_session(graph, 1, profile=f"{folder}/profile")
        session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        about = event.get("args", {})
        name = about.get("op_name")
        if name not in CONVOLUTIONS | PRODUCTS or not event["name"].endswith("_kernel_time"):
            continue
        # scales and zero points have fewer dimensions
        tensors = [s for entry in about["input_type_shape"] for s in entry.values() if len(s) > 1]
        (output,) = about["output_type_shape"][0].values()
        if name in CONVOLUTIONS:
            values = tensors[0] if name == "ConvTranspose" else output
            yield Kernel(CONVOLUTIONS[name], convolution(values, tensors[1]))
        else:
            yield Kernel(PRODUCTS[name], product(output, tensors[0]))


def _openvino(graph: Graph, inputs: Inputs) -> Iterator[Kernel]:
    """Kernels from the graph that OpenVINO compiles for fixed sizes."""
    compiled = openvino_model(graph, 1, {name: x.shape for name, x in inputs.items()})
    for node in compiled.get_runtime_model().get_ordered_ops():
        about = node.get_rt_info()
        integer = about["runtimePrecision"].astype(str) in ("i8", "u8")
        shapes = [list(entry.get_shape()) for entry in node.inputs()]
        output = [list(entry.get_shape()) for entry in node.outputs()]
        layer_type = about["layerType"].astype(str)
        if layer_type in ("Convolution", "Deconvolution"):
            values = shapes[0] if layer_type == "Deconvolution" else output[0]
            yield Kernel(integer, convolution(values, shapes[1]))
        elif layer_type in ("MatMul", "FullyConnected"):
            yield Kernel(integer, product(output[0], shapes[0]))


PROFILES: dict[str, Callable[[Graph, Inputs], Iterator[Kernel]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def integer_share(kernels: Iterator[Kernel]) -> float | None:
    """Part of the multiply-adds, between 0 and 1, that are computed with integers; None without any."""
    found = list(kernels)
    total = sum(kernel.multiply_adds for kernel in found)
    integer = sum(kernel.multiply_adds for kernel in found if kernel.integer)
    return integer / total if total else None
