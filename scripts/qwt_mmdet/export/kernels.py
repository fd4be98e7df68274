"""Change a graph to what a runtime has kernels for, when it is opened."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .passes import (
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

    Each reader of a weight has one of its own afterwards, with zero points: ONNX Runtime makes both unsigned
    where the processor asks for it, and fails where they are shared or zero points are missing.
    """
    for node in list(weight_nodes(model)):
        _repeat_per_reader(node)
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
    """The largest magnitude of an 8-bit weight's code, seen from its zero point."""
    largest = 0
    for node in weight_nodes(model):
        if input_of(node, 0).dtype != ir.DataType.INT32:
            codes = np.moveaxis(constant(node.inputs[0]), node.attributes.get_int("axis", 1), -1)
            steps = codes.astype(np.int32) - zero_points_of(node).astype(np.int32)
            largest = max(largest, int(np.abs(steps).max()))
    return largest


def _repeat_per_reader(node: ir.Node) -> None:
    """Give all readers of a node but the first a copy of it, in place."""
    output = node.outputs[0]
    for number, (reader, index) in enumerate(list(output.uses())[1:], start=1):
        copied = ir.Node(
            "", node.op_type, node.inputs, attributes=node.attributes.values(), num_outputs=1
        )
        copied.outputs[0].name = f"{output.name}.{number}"
        node.append(copied)
        reader.replace_input_with(index, copied.outputs[0])


def compute_in_floats(model: ir.Model) -> None:
    """Make float convolutions of those that ONNX Runtime has no integer kernel for, in place.

    It would dequantize their weights at each image, and quantize an input of 8 bits to multiply it in floating
    point all the same. Inputs with fewer bits are clipped, and stay on their grid.
    """
    for node in [n for n in model.graph if n.op_type == "Conv" and not runs_in_integers(n)]:
        for index in range(1, len(node.inputs)):
            source = input_of(node, index).producer()
            if source is not None and source.op_type == "DequantizeLinear":
                name = f"{node.outputs[0].name}.float{index}"
                set_input(model, node, index, _values(source), name)
        _skip_quantizer(model, node)
    RemoveUnusedNodesPass()(model)


def _values(dequantize: ir.Node) -> np.ndarray:
    """What a node makes of constant codes, whose first axis has the scales."""
    codes, scale = (constant(value) for value in dequantize.inputs[:2])
    shape = (-1, *[1] * (codes.ndim - 1))
    steps = codes.astype(np.int32) - zero_points_of(dequantize).astype(np.int32).reshape(shape)
    return steps.astype(np.float32) * scale.reshape(shape)


def _skip_quantizer(model: ir.Model, convolution: ir.Node) -> None:
    """Let a convolution read what its quantizer reads; its weights take up how that scales the channels."""
    dequantize = input_of(convolution, 0).producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return
    quantize = input_of(dequantize, 0).producer()
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return
    value = input_of(quantize, 0)
    factor = constant(dequantize.inputs[1]).reshape(-1) / constant(quantize.inputs[1]).reshape(-1)
    multiply = value.producer()
    if multiply is not None and multiply.op_type == "Mul":
        known = ir.convenience.get_const_tensor(input_of(multiply, 1))
        if known is not None and known.numpy().shape[1:] == (1, 1):
            factor = factor * known.numpy().reshape(-1)
            value = input_of(multiply, 0)
    if (factor != 1).any():
        weight = constant(convolution.inputs[1])
        group = convolution.attributes.get_int("group", 1)
        factor = np.broadcast_to(factor, group * weight.shape[1])
        grouped = weight.reshape(group, -1, *weight.shape[1:])
        scaled = (grouped * factor.reshape(group, 1, -1, 1, 1)).reshape(weight.shape)
        name = f"{convolution.outputs[0].name}.weight"
        set_input(model, convolution, 1, scaled.astype(np.float32), name)
    if not constant(quantize.inputs[2]).any():  # it clips at 0
        relu = ir.Node("", "Relu", [value])
        relu.outputs[0].name = f"{convolution.outputs[0].name}.input"
        model.graph.insert_before(convolution, relu)
        value = relu.outputs[0]
    convolution.replace_input_with(0, value)
