"""Changes of a graph, when it is opened, to operators that a runtime has kernels for."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .graph import (
    LARGEST_WEIGHT,
    constant,
    fresh_name,
    input_of,
    is_bias,
    runs_in_integers,
    set_input,
    weight_nodes,
    weight_steps,
    zero_points_of,
)


def widen_weights(model: ir.Model) -> None:
    """Make weights INT8 with the zero point 0 where they fit, else UINT8, in place: what kernels of runtimes take.

    On some processors ONNX Runtime makes both unsigned, and fails if codes or zero points are shared or missing.
    """
    for node in list(weight_nodes(model)):
        if is_bias(node):
            continue
        codes, zero_points = weight_steps(node), np.zeros_like(constant(node.inputs[1]))
        wide = np.dtype(np.int8)
        if np.abs(codes).max(initial=0) > LARGEST_WEIGHT:
            codes, zero_points = constant(node.inputs[0]), zero_points_of(node)
            wide = codes.dtype
        set_input(model, node, 0, codes.astype(wide), fresh_name(node, 0, "wide"))
        set_input(model, node, 2, zero_points.astype(wide), fresh_name(node, 2, "wide"))


def largest_weight(model: ir.Model) -> int:
    """The largest magnitude of an 8-bit weight's code minus its zero point."""
    weights = [node for node in weight_nodes(model) if not is_bias(node)]
    return max((int(np.abs(weight_steps(node)).max()) for node in weights), default=0)


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
    steps, scale = weight_steps(dequantize), constant(dequantize.inputs[1])
    return steps.astype(np.float32) * scale.reshape(-1, *[1] * (steps.ndim - 1))
