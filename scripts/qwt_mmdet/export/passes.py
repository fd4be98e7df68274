"""What is changed in a traced graph: batch norms go into weights, and small weights into 4 bits."""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir


def constant(value: ir.Value | None) -> np.ndarray:
    """A copy of a value that is known before the graph runs."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return tensor.numpy().copy()


def _set_input(model: ir.Model, node: ir.Node, index: int, values: np.ndarray, name: str) -> None:
    """Give a node a new initializer as input."""
    value = ir.Value(
        name=name,
        const_value=ir.tensor(values, name=name),
        shape=ir.Shape(values.shape),
        type=ir.TensorType(ir.DataType.from_numpy(values.dtype)),
    )
    model.graph.register_initializer(value)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _input(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator must have."""
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} without input {index}"
    return value


def fold_batch_norms(model: ir.Model) -> None:
    """Fold each BatchNormalization behind a convolution with integer weights into it, in place.

    The scale of an output channel takes up the factor. Where that is negative, the codes change sign.
    """
    for norm in [node for node in model.graph if node.op_type == "BatchNormalization"]:
        convolution = _input(norm, 0).producer()
        if convolution is None or convolution.op_type != "Conv":
            continue
        weight = _input(convolution, 1).producer()
        single = len(convolution.outputs[0].uses()) == len(_input(convolution, 1).uses()) == 1
        if weight is None or weight.op_type != "DequantizeLinear" or not single:
            continue
        gamma, beta, mean, variance = (constant(value) for value in norm.inputs[1:])
        factor = gamma / np.sqrt(variance + norm.attributes["epsilon"].as_float())
        codes, scale, *zero_point = (constant(value) for value in weight.inputs)
        flipped = factor < 0
        if flipped.any():  # x becomes −x; where there are zero points, highest − x, and they too
            highest = max(values.max() for values in (codes, *zero_point)) if zero_point else 0
            for values in (codes, *zero_point):
                values[flipped] = highest - values[flipped]
        bias = constant(convolution.inputs[2]) if len(convolution.inputs) > 2 else 0
        shifted = (bias - mean) * factor + beta
        name = weight.outputs[0].name
        _set_input(model, weight, 0, codes, f"{name}.codes")
        _set_input(model, weight, 1, (scale * np.abs(factor)).astype(np.float32), f"{name}.scale")
        for values in zero_point:
            _set_input(model, weight, 2, values, f"{name}.zero_point")
        _set_input(model, convolution, 2, shifted.astype(np.float32), f"{name}.bias")
        norm.outputs[0].replace_all_uses_with(convolution.outputs[0], replace_graph_outputs=True)
        model.graph.remove(norm, safe=True)


def _weight_nodes(model: ir.Model) -> Iterable[ir.Node]:
    for node in model.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is not None and ir.convenience.get_const_tensor(codes) is not None:
            yield node


INT4 = {np.dtype(np.int8): ir.DataType.INT4, np.dtype(np.uint8): ir.DataType.UINT4}
LIMITS = {np.dtype(np.int8): (-8, 7), np.dtype(np.uint8): (0, 15)}
WIDE = {ir.DataType.INT4: np.int8, ir.DataType.UINT4: np.uint8}


def pack_weights(model: ir.Model) -> None:
    """Store weights whose codes and zero points fit into 4 bits as INT4 or UINT4, in place."""
    for node in list(_weight_nodes(model)):
        values = _codes(node)
        low, high = LIMITS.get(values[0].dtype, (1, 0))
        if all(v.min() >= low and v.max() <= high for v in values.values()):
            for index, value in values.items():
                narrow = INT4[value.dtype]
                _set_input(
                    model, node, index, value.astype(narrow.numpy()), _fresh(node, index, narrow)
                )


def widen_weights(model: ir.Model) -> None:
    """Make 4-bit weights INT8 or UINT8, which the kernels of runtimes take, in place.

    Each weight has zero points of its own afterwards: ONNX Runtime makes both unsigned where the processor
    asks for it, and fails where zero points are missing or shared.
    """
    for node in list(_weight_nodes(model)):
        values = _codes(node)
        stored = _input(node, 0).dtype
        codes = values[0].astype(WIDE[stored] if stored in WIDE else values[0].dtype)
        scales = constant(node.inputs[1])
        zero_points = values.get(2, np.zeros_like(scales)).astype(codes.dtype)
        _set_input(model, node, 0, codes, _fresh(node, 0, "wide"))
        _set_input(model, node, 2, zero_points, _fresh(node, 2, "wide"))


def _codes(node: ir.Node) -> dict[int, np.ndarray]:
    """Codes and, where there are any, zero points, by the index of the input."""
    return {index: constant(node.inputs[index]) for index in (0, 2) if index < len(node.inputs)}


def _fresh(node: ir.Node, index: int, mark: object) -> str:
    return f"{node.outputs[0].name}.{index}.{mark}"


def keep_what_runs(model: ir.Model) -> None:
    """Remove what nothing reads, where nodes come from in the Python code, and types that follow from
    others, in place."""
    ir.passes.common.RemoveUnusedNodesPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    outputs = {*model.graph.outputs}
    values = [*model.graph.initializers.values()]
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        values += [value for value in node.outputs if value not in outputs]
    for value in values:
        value.metadata_props.clear()
        value.shape = value.type = None
