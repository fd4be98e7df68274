"""Passes that make a file small: weights as integers, constants in 8 bits, and nothing that does not run.

What is on disk is what runs. Runtimes compute what is constant when they open a file, so weights of 4 bits are unpacked
by nodes of the graph, to the form that a runtime's kernels take.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.optimizer import fold_constants

from .graph import (
    LARGEST_WEIGHT,
    along_axis,
    constant,
    fresh_name,
    input_of,
    insert_before,
    is_bias,
    new_initializer,
    readers,
    runs_in_integers,
    set_input,
    values_of,
    weight_nodes,
    weight_steps,
    zero_points_of,
)

MOST_BYTES = 2**31
"""Of a constant that is computed when a graph is opened: any."""

WORTH_A_CAST = 4096
"""Bytes of the smallest constant that is stored as INT8."""


def separate_values(model: ir.Model) -> None:
    """Give each reader of dequantized values its own DequantizeLinear, in place; the codes stay shared.

    So factors of a reader's output channels can be folded into the scales of its weights, and ONNX Runtime can make
    one kernel of an operator and the nodes around it.
    """
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        output = node.outputs[0]
        for number, (reader, index) in enumerate(list(output.uses())[1:], start=1):
            copied = ir.Node(
                "", node.op_type, node.inputs, attributes=node.attributes.values(), num_outputs=1
            )
            copied.outputs[0].name = f"{output.name}.{number}"
            node.append(copied)
            reader.replace_input_with(index, copied.outputs[0])


def store_weights(model: ir.Model, *, packed: bool = True, for_any_kernel: bool = False) -> None:
    """Store weights as integers of 4 or 8 bits, with nodes that make of them what kernels take, in place.

    Integer kernels take signed 8-bit weights with the zero point 0, from a DequantizeLinear. For a convolution without
    an integer kernel, ONNX Runtime would dequantize the weights for each image. There, Cast and Mul make values of them,
    which it does once; OpenVINO has integer kernels for these, too. Where the input of a matrix product is not quantized,
    ONNX Runtime would round it to 8 bits by itself; values of the weights avoid that.

    Args:
        packed: weights whose codes fit in 4 bits take half a byte each.
        for_any_kernel: leave a DequantizeLinear before each convolution, whatever ONNX Runtime makes of it.
    """
    writer = _WeightWriter(model, packed=packed)
    for node in [node for node in weight_nodes(model) if not is_bias(node)]:
        users = readers(node.outputs[0])
        if users and not for_any_kernel and all(_takes_values(user) for user in users):
            writer.write_values(node)
        else:
            writer.write_codes(node)
    RemoveUnusedNodesPass()(model)


def _takes_values(node: ir.Node) -> bool:
    """Whether ONNX Runtime computes a convolution or matrix product in floating point."""
    if node.op_type == "Conv":
        return not runs_in_integers(node)
    inputs = input_of(node, 0).producer()
    is_quantized = inputs is not None and inputs.op_type == "DequantizeLinear"
    return node.op_type in ("MatMul", "Gemm") and not is_quantized


class _WeightWriter:
    """Writes weights into a graph. Nodes that share their codes share what is stored."""

    def __init__(self, model: ir.Model, *, packed: bool) -> None:
        self.model, self.packed = model, packed
        self._stored: dict[tuple[object, ...], ir.Value] = {}

    def write_codes(self, node: ir.Node) -> None:
        """Give a DequantizeLinear signed 8-bit steps and the zero point 0; codes as they are where steps do not fit."""
        steps = self._steps(node)
        if steps is not None:
            node.replace_input_with(0, steps)
            zero_points = np.zeros_like(constant(node.inputs[1]), dtype=np.int8)
            set_input(self.model, node, 2, zero_points, fresh_name(node, 2, "zero"))

    def write_values(self, node: ir.Node) -> None:
        """Put Cast and Mul in the place of a DequantizeLinear."""
        steps, zero_points = self._steps(node), zero_points_of(node)
        if steps is not None:
            zero_points = np.zeros_like(zero_points)
        grid = (along_axis(node, values) for values in (constant(node.inputs[1]), zero_points))
        values = values_of(self.model, node, steps or input_of(node, 0), *grid)
        node.outputs[0].replace_all_uses_with(values)

    def _steps(self, node: ir.Node) -> ir.Value | None:
        """Codes minus zero points as INT8, in the smallest form; None if they do not fit."""
        steps, zero_points = weight_steps(node), zero_points_of(node)
        codes = constant(node.inputs[0])
        if np.abs(steps).max(initial=0) > LARGEST_WEIGHT:
            return None
        if self.packed and steps.min(initial=0) >= -8 and steps.max(initial=0) <= 7:
            return self._cast(node, self._store(node, 0, steps, ir.DataType.INT4), ir.DataType.INT8)
        unsigned = codes.dtype == np.uint8 and max(codes.max(), zero_points.max()) <= 15
        if not (self.packed and unsigned):
            return self._store(node, 0, steps, ir.DataType.INT8)
        parts = [
            self._cast(node, self._store(node, index, values, ir.DataType.UINT4), ir.DataType.INT32)
            for index, values in ((0, codes), (2, along_axis(node, zero_points)))
        ]
        difference = insert_before(self.model, node, "Sub", parts)
        return self._cast(node, difference, ir.DataType.INT8)

    def _cast(self, node: ir.Node, value: ir.Value, kind: ir.DataType) -> ir.Value:
        return insert_before(self.model, node, "Cast", [value], to=kind)

    def _store(self, node: ir.Node, index: int, values: np.ndarray, kind: ir.DataType) -> ir.Value:
        """An initializer in the place of an input of a node."""
        key = node.inputs[0], *node.inputs[2:], index, kind
        if key not in self._stored:
            tensor = ir.tensor(values.astype(kind.numpy()), name=fresh_name(node, index, kind.name))
            self._stored[key] = new_initializer(self.model, tensor)
        return self._stored[key]


def own_weights(model: ir.Model) -> None:
    """Compute what is constant, and give each DequantizeLinear its own codes and zero points, in place.

    On processors without VNNI, ONNX Runtime makes both unsigned for exact kernels, and fails if they are shared. A second
    time changes nothing.
    """
    fold_constants(model, input_size_limit=MOST_BYTES, output_size_limit=MOST_BYTES)
    for node in list(weight_nodes(model)):
        for index in (0, 2)[: len(node.inputs) - 1]:
            name = fresh_name(node, index, "own")
            if input_of(node, index).name != name:
                set_input(model, node, index, constant(node.inputs[index]), name)


def largest_weight(model: ir.Model) -> int:
    """The largest magnitude of an 8-bit weight's code minus its zero point, after :func:`own_weights`."""
    weights = [node for node in weight_nodes(model) if not is_bias(node)]
    return max((int(np.abs(weight_steps(node)).max()) for node in weights), default=0)


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
        wide = insert_before(model, model.graph[0], "Cast", [codes], to=ir.DataType.FLOAT)
        value.replace_all_uses_with(wide)


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
