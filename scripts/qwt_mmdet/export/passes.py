"""Passes over a traced graph: folding of batch norms, placing of quantizers, packing of weights."""

from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def constant(value: ir.Value | None) -> np.ndarray:
    """A copy of a constant value of the graph."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return tensor.numpy().copy()


def set_input(model: ir.Model, node: ir.Node, index: int, values: np.ndarray, name: str) -> None:
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


def input_of(node: ir.Node, index: int) -> ir.Value:
    """A required input of a node."""
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} without input {index}"
    return value


def fold_batch_norms(model: ir.Model) -> None:
    """Fold each BatchNormalization behind a convolution with integer weights into it, in place.

    The scale of an output channel is multiplied with the norm's factor. If this is negative, the codes change
    sign.
    """
    for norm in [node for node in model.graph if node.op_type == "BatchNormalization"]:
        convolution = input_of(norm, 0).producer()
        if convolution is None or convolution.op_type != "Conv":
            continue
        weight = input_of(convolution, 1).producer()
        single = len(convolution.outputs[0].uses()) == len(input_of(convolution, 1).uses()) == 1
        if weight is None or weight.op_type != "DequantizeLinear" or not single:
            continue
        gamma, beta, mean, variance = (constant(value) for value in norm.inputs[1:])
        factor = gamma / np.sqrt(variance + norm.attributes["epsilon"].as_float())
        codes, scale, *zero_point = (constant(value) for value in weight.inputs)
        flipped = factor < 0
        if flipped.any():  # negate codes; unsigned ones and their zero points: highest − x
            highest = max(values.max() for values in (codes, *zero_point)) if zero_point else 0
            for values in (codes, *zero_point):
                values[flipped] = highest - values[flipped]
        bias = constant(convolution.inputs[2]) if len(convolution.inputs) > 2 else 0
        shifted = (bias - mean) * factor + beta
        silent = factor == 0  # a scale must be above 0
        codes[silent] = zero_point[0][silent].reshape(-1, 1, 1, 1) if zero_point else 0
        factor[silent] = 1
        name = weight.outputs[0].name
        if (flipped | silent).any():
            set_input(model, weight, 0, codes, f"{name}.codes")
        set_input(model, weight, 1, (scale * np.abs(factor)).astype(np.float32), f"{name}.scale")
        for values in zero_point:
            set_input(model, weight, 2, values, f"{name}.zero_point")
        set_input(model, convolution, 2, shifted.astype(np.float32), f"{name}.bias")
        _return_instead(model, norm.outputs[0], convolution.outputs[0])
        norm.outputs[0].replace_all_uses_with(convolution.outputs[0])
        model.graph.remove(norm, safe=True)


def is_known(value: ir.Value | None) -> bool:
    """Whether a value is constant."""
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def is_scalar(value: ir.Value | None) -> bool:
    return value is not None and constant(value).size == 1


def _readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value; none if the graph also returns it."""
    return [] if value.is_graph_output() else [user for user, _ in value.uses()]


def takes_integers(convolution: ir.Node) -> bool:
    """Whether integer kernels support input and weights: one scale of the input, zero points 0 of the weights."""
    inputs, weight = (input_of(convolution, index).producer() for index in (0, 1))
    if inputs is None or inputs.op_type != "DequantizeLinear" or not is_scalar(inputs.inputs[1]):
        return False
    if weight is None or weight.op_type != "DequantizeLinear":
        return False
    return not zero_points_of(weight).any()


def runs_in_integers(convolution: ir.Node) -> bool:
    """Whether ONNX Runtime has an integer kernel for a convolution: its output must be quantized with one scale."""
    users = _readers(convolution.outputs[0])
    return (
        takes_integers(convolution)
        and bool(users)
        and all(user.op_type == "QuantizeLinear" and is_scalar(user.inputs[1]) for user in users)
    )


def quantize_before_pools(model: ir.Model) -> None:
    """Move quantizers from behind a max pooling to the convolution before it, in place: both commute."""
    for node in [node for node in model.graph if node.op_type == "MaxPool"]:
        before = input_of(node, 0)
        source = before.producer()
        if source is not None and source.op_type == "Relu":
            source = input_of(source, 0).producer()
        if source is None or source.op_type != "Conv" or not _is_read_once(before):
            continue
        grids = [_grid_of(user) for user in _readers(node.outputs[0])]
        if grids and grids[0] is not None and all(grid == grids[0] for grid in grids):
            quantize_value(model, before, *grids[0])


def _grid_of(node: ir.Node) -> tuple[float, int] | None:
    """Scale and zero point of a quantizer with one scale; None for other nodes."""
    if node.op_type != "QuantizeLinear" or not is_scalar(node.inputs[1]):
        return None
    return constant(node.inputs[1]).item(), constant(node.inputs[2]).item()


def outputs_without_grid(model: ir.Model, maps: Collection[str]) -> list[ir.Value]:
    """Outputs of integer convolutions that are not quantized but may be, to 8 bits.

    Args:
        maps: names of the graph's outputs for a second stage.
    """
    return [
        node.outputs[0]
        for node in model.graph
        if node.op_type == "Conv"
        and takes_integers(node)
        and not runs_in_integers(node)
        and _may_have_a_grid(node.outputs[0], maps)
    ]


def share_quantizers(model: ir.Model, maps: Collection[str]) -> None:
    """Let all readers of a convolution's output share one of its 8-bit quantizers, in place.

    So the output itself is quantized, as integer kernels require. The other readers get values on this grid.

    Args:
        maps: names of the graph's outputs for a second stage.
    """
    for node in [n for n in model.graph if n.op_type == "Conv" and takes_integers(n)]:
        value = node.outputs[0]
        if [user.op_type for user in _readers(value)] == ["Relu"]:
            value = _readers(value)[0].outputs[0]
        users = [(user, index) for user, index in value.uses()]
        first = next((user for user, _ in users if _has_8_bits(user)), None)
        alone = len(users) == 1 and not value.is_graph_output()
        if first is None or alone or not _may_have_a_grid(value, maps):
            continue
        name = f"{value.name}.rounded"
        rounded = ir.Node("", "DequantizeLinear", [first.outputs[0], *first.inputs[1:]])
        rounded.attributes.update(first.attributes)
        rounded.outputs[0].name = name
        for user, index in users:
            if user is not first:
                user.replace_input_with(index, rounded.outputs[0])
        _return_instead(model, value, rounded.outputs[0])
        model.graph.remove(first)
        producer = value.producer()
        assert producer is not None
        model.graph.insert_after(producer, [first, rounded])


def _has_8_bits(node: ir.Node) -> bool:
    """Whether a node is a quantizer that uses all 8-bit codes."""
    return node.op_type == "QuantizeLinear" and all(
        user.op_type == "DequantizeLinear" for user in _readers(node.outputs[0])
    )


def _may_have_a_grid(value: ir.Value, maps: Collection[str]) -> bool:
    """Whether a value may be quantized to 8 bits: it is added, resized, pooled, quantized, or for a second stage."""
    if value.is_graph_output() and value.name not in maps:
        return False
    users = [user.op_type for user, _ in value.uses()]
    return all(user in ("Add", "MaxPool", "QuantizeLinear", "Resize") for user in users)


def _return_instead(model: ir.Model, value: ir.Value, other: ir.Value) -> None:
    """Let a graph that returns a value return another one under its name."""
    if not value.is_graph_output():
        return
    name, other.type, other.shape = value.name, value.type, value.shape
    model.graph.outputs[model.graph.outputs.index(value)] = other
    value.name, other.name = f"{name}.inside", name


def quantize_value(model: ir.Model, value: ir.Value, scale: float, zero_point: int) -> None:
    """Quantize a value to an 8-bit grid for all its readers, in place."""
    producer = value.producer()
    assert producer is not None
    name = str(value.name)
    nodes = [
        ir.Node("", operator, [None, None, None], outputs=[ir.Value(name=f"{name}.{operator}")])
        for operator in ("QuantizeLinear", "DequantizeLinear")
    ]
    _return_instead(model, value, nodes[1].outputs[0])
    value.replace_all_uses_with(nodes[1].outputs[0])
    for node, given in zip(nodes, (value, nodes[0].outputs[0]), strict=True):
        node.replace_input_with(0, given)
        for index, number in ((1, np.float32(scale)), (2, np.uint8(zero_point))):
            set_input(model, node, index, np.asarray(number), fresh_name(node, index, "output"))
    model.graph.insert_after(producer, nodes)


def zero_points_of(node: ir.Node) -> np.ndarray:
    return constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.int8)


def integer_biases(model: ir.Model) -> None:
    """Make biases INT32 where ONNX Runtime computes in integers, in place.

    The scale of an output channel is the input's times the weight's.
    """
    for node in list(model.graph):
        if node.op_type == "Conv" and len(node.inputs) > 2 and runs_in_integers(node):
            _make_bias_integer(model, node, node, 2)
        if node.op_type == "Add":
            product = input_of(node, 0).producer()
            if product is not None and product.op_type == "MatMul" and takes_integers(product):
                _make_bias_integer(model, product, node, 1)


def _make_bias_integer(model: ir.Model, product: ir.Node, node: ir.Node, index: int) -> None:
    """Make input ``index`` of a node INT32: the bias of a convolution or matrix product."""
    inputs, weight = (input_of(product, i).producer() for i in (0, 1))
    assert inputs is not None
    assert weight is not None
    scale = constant(inputs.inputs[1]).reshape(1) * constant(weight.inputs[1])
    bias, name = input_of(node, index), f"{node.outputs[0].name}.bias"
    if not is_known(bias) or constant(bias).shape != scale.shape:
        return
    codes = np.rint(constant(bias).astype(np.float64) / scale)
    if np.abs(codes).max() >= 2**31:
        return
    values = ir.Value(name=f"{name}.values")
    dequantize = ir.Node(
        "", "DequantizeLinear", [None, None], [ir.AttrInt64("axis", 0)], outputs=[values]
    )
    set_input(model, dequantize, 0, codes.astype(np.int32), f"{name}.codes")
    set_input(model, dequantize, 1, scale.astype(np.float32), f"{name}.scale")
    model.graph.insert_before(node, dequantize)
    node.replace_input_with(index, values)


def move_channel_scales(model: ir.Model) -> None:
    """Give quantizers with a scale per channel one scale, in place: runtimes have slow kernels for several scales.

    The ratios of the scales are folded into the convolution before, also through a ReLU and a max pooling, which
    commute with positive factors. Without a convolution, a multiplication is inserted.
    """
    for quantize in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        scale, zero_point = (constant(quantize.inputs[index]) for index in (1, 2))
        if scale.size == 1 or (zero_point != zero_point[0]).any():
            continue
        factor = scale.mean() / scale
        name = quantize.outputs[0].name
        if not _scale_channels(model, input_of(quantize, 0), factor):
            multiply = ir.Node("", "Mul", [input_of(quantize, 0), None])
            multiply.outputs[0].name = f"{name}.scaled"
            shape = (-1, *[1] * (3 - quantize.attributes["axis"].as_int() % 4))
            set_input(model, multiply, 1, factor.reshape(shape), f"{name}.factor")
            model.graph.insert_before(quantize, multiply)
            quantize.replace_input_with(0, multiply.outputs[0])
        set_input(model, quantize, 1, np.asarray(scale.mean()), f"{name}.scale")
        set_input(model, quantize, 2, np.asarray(zero_point[0]), f"{name}.zero_point")
        quantize.attributes.pop("axis")


def _scale_channels(model: ir.Model, value: ir.Value, factor: np.ndarray) -> bool:
    """Multiply the channels of a value with factors if it is a convolution's output; return whether it is."""
    producer = value.producer()
    while producer is not None and producer.op_type in ("Relu", "MaxPool") and _is_read_once(value):
        value = input_of(producer, 0)
        producer = value.producer()
    if producer is None or producer.op_type != "Conv" or not _is_read_once(value):
        return False
    weight = input_of(producer, 1).producer()
    if (
        weight is None
        or weight.op_type != "DequantizeLinear"
        or not _is_read_once(weight.outputs[0])
    ):
        return False
    for node, index in ((weight, 1), (producer, 2)):
        if len(node.inputs) > index:
            scaled = constant(node.inputs[index]) * factor
            set_input(model, node, index, scaled, f"{producer.outputs[0].name}.scaled{index}")
    return True


def _is_read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def drop_relus(model: ir.Model) -> None:
    """Remove each ReLU that only quantizers with zero point 0 read, in place: they clip as it does.

    ONNX Runtime has no integer kernel for a convolution whose ReLU stays.
    """
    for node in [node for node in model.graph if node.op_type == "Relu"]:
        users = _readers(node.outputs[0])
        if users and all(
            user.op_type == "QuantizeLinear" and not constant(user.inputs[2]).any()
            for user in users
        ):
            node.outputs[0].replace_all_uses_with(input_of(node, 0))
            model.graph.remove(node, safe=True)


def weight_nodes(model: ir.Model) -> Iterable[ir.Node]:
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and is_known(node.inputs[0]):
            yield node


INT4 = {np.dtype(np.int8): ir.DataType.INT4, np.dtype(np.uint8): ir.DataType.UINT4}
LIMITS = {np.dtype(np.int8): (-8, 7), np.dtype(np.uint8): (0, 15)}


def separate_weights(model: ir.Model) -> None:
    """Give each reader of a weight its own DequantizeLinear, in place; the codes stay shared.

    So factors of a reader's output channels can be folded into its scales.
    """
    for node in list(weight_nodes(model)):
        output = node.outputs[0]
        for number, (reader, index) in enumerate(list(output.uses())[1:], start=1):
            copied = ir.Node(
                "", node.op_type, node.inputs, attributes=node.attributes.values(), num_outputs=1
            )
            copied.outputs[0].name = f"{output.name}.{number}"
            node.append(copied)
            reader.replace_input_with(index, copied.outputs[0])


def pack_weights(model: ir.Model) -> None:
    """Store weights whose codes and zero points fit into 4 bits as INT4 or UINT4, in place."""
    packed: dict[ir.Value, ir.Value] = {}
    for node in list(weight_nodes(model)):
        values = codes_of(node)
        low, high = LIMITS.get(values[0].dtype, (1, 0))
        if all(v.min() >= low and v.max() <= high for v in values.values()):
            for index, value in values.items():
                narrow, given = INT4[value.dtype], input_of(node, index)
                if given in packed:
                    node.replace_input_with(index, packed[given])
                    continue
                name = fresh_name(node, index, narrow)
                set_input(model, node, index, value.astype(narrow.numpy()), name)
                packed[given] = input_of(node, index)


def narrow_constants(model: ir.Model) -> None:
    """Store floating-point constants as INT8 if their values are whole numbers up to 127, in place.

    These are the masks of shifted windows. Runtimes cast them once, when they open the graph.
    """
    for value in list(model.graph.initializers.values()):
        values = constant(value)
        if values.dtype != np.float32 or values.nbytes < WORTH_A_CAST or value.is_graph_output():
            continue
        codes = np.clip(values, -127, 127).astype(np.int8)
        if (codes != values).any():
            continue
        cast = ir.Node("", "Cast", [None], [ir.AttrInt64("to", ir.DataType.FLOAT)])
        cast.outputs[0].name = f"{value.name}.cast"
        value.replace_all_uses_with(cast.outputs[0])
        set_input(model, cast, 0, codes, f"{value.name}.int8")
        model.graph.insert_before(model.graph[0], cast)


WORTH_A_CAST = 4096
"""Bytes of the smallest constant that is stored as INT8."""


def codes_of(node: ir.Node) -> dict[int, np.ndarray]:
    """Codes and zero points, if any, by the index of the input."""
    return {index: constant(node.inputs[index]) for index in (0, 2) if index < len(node.inputs)}


def fresh_name(node: ir.Node, index: int, mark: object) -> str:
    return f"{node.outputs[0].name}.{index}.{mark}"


def keep_what_runs(model: ir.Model) -> None:
    """Remove unused nodes, notes on the Python source, and types that can be inferred, in place."""
    RemoveUnusedNodesPass()(model)
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
