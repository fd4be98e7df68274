"""Reading and changing a graph: constants, inputs, readers, and which nodes runtimes compute in integers."""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir


def constant(value: ir.Value | None) -> np.ndarray:
    """A copy of a constant value of the graph."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return tensor.numpy().copy()


def new_initializer(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    """A constant that is stored in the graph, under the tensor's name."""
    value = ir.Value(
        name=tensor.name,
        const_value=tensor,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
    )
    model.graph.register_initializer(value)
    return value


def set_input(model: ir.Model, node: ir.Node, index: int, values: np.ndarray, name: str) -> None:
    """Give a node a new initializer as input."""
    value = new_initializer(model, ir.tensor(values, name=name))
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def insert_before(
    model: ir.Model,
    node: ir.Node,
    operator: str,
    inputs: Sequence[ir.Value | np.ndarray],
    **attributes: int,
) -> ir.Value:
    """Insert a node in front of another one; arrays among its inputs become initializers. Returns its output."""
    added = ir.node(operator, [None] * len(inputs), attributes)
    model.graph.insert_before(node, added)
    for index, given in enumerate(inputs):
        if isinstance(given, ir.Value):
            added.replace_input_with(index, given)
        else:
            set_input(model, added, index, given, fresh_name(added, index, "constant"))
    return added.outputs[0]


def values_of(
    model: ir.Model, node: ir.Node, codes: ir.Value, scale: np.ndarray, zero_points: np.ndarray
) -> ir.Value:
    """Values of codes by Cast, Sub and Mul in front of a node; scale and zero points broadcast against the codes."""
    values = insert_before(model, node, "Cast", [codes], to=ir.DataType.FLOAT)
    if zero_points.any():
        values = insert_before(model, node, "Sub", [values, zero_points.astype(np.float32)])
    return insert_before(model, node, "Mul", [values, scale])


def input_of(node: ir.Node, index: int) -> ir.Value:
    """A required input of a node."""
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} without input {index}"
    return value


def is_known(value: ir.Value | None) -> bool:
    """Whether a value is constant."""
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def is_scalar(value: ir.Value | None) -> bool:
    return value is not None and constant(value).size == 1


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value; none if the graph also returns it."""
    return [] if value.is_graph_output() else [user for user, _ in value.uses()]


def is_read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def return_instead(model: ir.Model, value: ir.Value, other: ir.Value) -> None:
    """Let a graph that returns a value return another one under its name."""
    if not value.is_graph_output():
        return
    name, other.type, other.shape = value.name, value.type, value.shape
    model.graph.outputs[model.graph.outputs.index(value)] = other
    value.name, other.name = f"{name}.inside", name


def fresh_name(node: ir.Node, index: int, mark: object) -> str:
    return f"{node.outputs[0].name}.{index}.{mark}"


def zero_points_of(node: ir.Node) -> np.ndarray:
    return constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1, np.int8)


def weight_nodes(model: ir.Model) -> Iterable[ir.Node]:
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and is_known(node.inputs[0]):
            yield node


def is_bias(node: ir.Node) -> bool:
    """Whether a node of :func:`weight_nodes` holds a bias, in 32 bits."""
    return constant(node.inputs[0]).dtype == np.int32


LARGEST_WEIGHT = 127
"""Of a signed 8-bit weight with the zero point 0, which kernels multiply."""


def along_axis(dequantize: ir.Node, values: np.ndarray) -> np.ndarray:
    """A value for each channel of a constant, in the shape that broadcasts against the codes."""
    shape = [1] * constant(dequantize.inputs[0]).ndim
    shape[dequantize.attributes.get_int("axis", 1)] = -1
    return values.reshape(shape)


def weight_steps(node: ir.Node) -> np.ndarray:
    """The codes of a weight minus their zero points, int32."""
    codes, zero_points = (
        v.astype(np.int32) for v in (constant(node.inputs[0]), zero_points_of(node))
    )
    return codes - along_axis(node, zero_points)


def takes_integers(convolution: ir.Node) -> bool:
    """Whether integer kernels support input and weights: one scale of the input, weights that fit in signed 8 bits."""
    inputs, weight = (input_of(convolution, index).producer() for index in (0, 1))
    if inputs is None or inputs.op_type != "DequantizeLinear" or not is_scalar(inputs.inputs[1]):
        return False
    if weight is None or weight.op_type != "DequantizeLinear":
        return False
    return bool(np.abs(weight_steps(weight)).max(initial=0) <= LARGEST_WEIGHT)


def runs_in_integers(convolution: ir.Node) -> bool:
    """Whether ONNX Runtime has an integer kernel for a convolution: its output must be quantized with one scale."""
    users = readers(convolution.outputs[0])
    return (
        takes_integers(convolution)
        and bool(users)
        and all(user.op_type == "QuantizeLinear" and is_scalar(user.inputs[1]) for user in users)
    )
