"""The rules that TensorRT's importer has for quantized ONNX graphs, and a check of them.

They are those of the parser of TensorRT 10 (onnx-tensorrt, operators QuantizeLinear and DequantizeLinear): codes are
INT8 with the zero point 0, scales are positive constants, activations have one scale, and weights one or one for each
output channel. Biases stay in floating point. No TensorRT was at hand to try a file in.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ..errors import QwtError
from .graph import constant, is_known, readers

OPERATORS = ("QuantizeLinear", "DequantizeLinear")


def problems(graph: ir.Model) -> Iterator[str]:
    """What TensorRT would refuse of a graph's quantizers, a sentence's end for each."""
    for node in [node for node in graph.graph if node.op_type in OPERATORS]:
        name = f"the node {node.name or node.outputs[0].name} ({node.op_type})"
        if not all(is_known(value) for value in node.inputs[1:]):
            yield f"{name} has a scale or zero point that is computed"
            continue
        scale = constant(node.inputs[1])
        zero_point = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.uint8)
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if zero_point.dtype != np.int8:
            yield f"{name} has codes of the type {zero_point.dtype.name}, not int8"
        elif zero_point.any():
            yield f"{name} has the zero point {zero_point.flatten()[0]}, not 0"
        elif (scale <= 0).any():
            yield f"{name} has a scale that is not positive"
        elif codes is not None and is_known(codes):
            yield from _weight_problems(node, name, scale)
        elif scale.size > 1:
            yield f"{name} has {scale.size} scales of an activation, not one"


def _weight_problems(node: ir.Node, name: str, scale: np.ndarray) -> Iterator[str]:
    if scale.size == 1:
        return
    for reader in readers(node.outputs[0]):
        expected = {"Conv": 0, "MatMul": 1, "ConvTranspose": 1}.get(reader.op_type)
        axis = node.attributes.get_int("axis", 1)
        if expected is not None and axis != expected:
            yield f"{name} has scales along the axis {axis}, which is not that of the output channels"


def check_tensorrt(graph: ir.Model) -> None:
    """Check that TensorRT takes the quantizers of a graph.

    Raises:
        QwtError: it does not; the message names the first node.
    """
    found = list(problems(graph))
    if found:
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        raise QwtError(
            f"TensorRT does not take this graph: {found[0]}{more}; quantize the detector with grids: symmetric."
        )
