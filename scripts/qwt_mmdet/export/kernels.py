"""Changes of a graph, when it is opened, to operators that a runtime has kernels for."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .graph import (
    codes_of,
    constant,
    fresh_name,
    input_of,
    runs_in_integers,
    set_input,
    weight_nodes,
    zero_points_of,
)

WIDE = {ir.DataType.INT4: np.int8, ir.DataType.UINT4: np.uint8}


def widen_weights(model: ir.Model) -> None:
    """Make 4-bit weights INT8 or UINT8, which the kernels of runtimes take, in place.

    On some processors ONNX Runtime makes both unsigned, and fails if codes or zero points are shared or missing.
    """
    for node in list(weight_nodes(model)):
        stored = input_of(node, 0).dtype
        if stored == ir.DataType.INT32:  # a bias
            continue
        values = codes_of(node)
        codes = values[0].astype(WIDE[stored] if stored in WIDE else values[0].dtype)
        scales = constant(node.inputs[1])
        zero_points = values.get(2, np.zeros_like(scales)).astype(codes.dtype)
        set_input(model, node, 0, codes, fresh_name(node, 0, "wide"))
        set_input(model, node, 2, zero_points, fresh_name(node, 2, "wide"))


def largest_weight(model: ir.Model) -> int:
    """The largest magnitude of an 8-bit weight's code minus its zero point."""
    largest = 0
    for node in weight_nodes(model):
        if input_of(node, 0).dtype != ir.DataType.INT32:
            codes = np.moveaxis(constant(node.inputs[0]), node.attributes.get_int("axis", 1), -1)
            steps = codes.astype(np.int32) - zero_points_of(node).astype(np.int32)
            largest = max(largest, int(np.abs(steps).max()))
    return largest


def float_weights(model: ir.Model) -> None:
    """Store weights in floating point where ONNX Runtime has no integer kernel for a convolution, in place.

    It would dequantize the weights for each image, and its fastest convolutions need constant weights. Inputs
    stay on their grids, so the outputs do not change.
    """
    for node in [n for n in model.graph if n.op_type == "Conv" and not runs_in_integers(n)]:
        for index in range(1, len(node.inputs)):
            source = input_of(node, index).producer()
            if source is not None and source.op_type == "DequantizeLinear":
                name = f"{node.outputs[0].name}.float{index}"
                set_input(model, node, index, _values(source), name)
    RemoveUnusedNodesPass()(model)


def _values(dequantize: ir.Node) -> np.ndarray:
    """The output of a node for constant codes with scales along the first axis."""
    codes, scale = (constant(value) for value in dequantize.inputs[:2])
    shape = (-1, *[1] * (codes.ndim - 1))
    steps = codes.astype(np.int32) - zero_points_of(dequantize).astype(np.int32).reshape(shape)
    return steps.astype(np.float32) * scale.reshape(shape)
