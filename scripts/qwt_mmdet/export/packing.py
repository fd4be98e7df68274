"""Passes that make a file smaller: weights in 4 bits, constants in 8, and nothing that does not run."""

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .graph import codes_of, constant, fresh_name, input_of, set_input, weight_nodes

INT4 = {np.dtype(np.int8): ir.DataType.INT4, np.dtype(np.uint8): ir.DataType.UINT4}
LIMITS = {np.dtype(np.int8): (-8, 7), np.dtype(np.uint8): (0, 15)}
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
