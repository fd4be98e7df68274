"""Passes that place quantizers where runtimes need them for integer kernels.

``maps`` are the names of the graph's outputs for a second stage.
"""

import math
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from .graph import (
    constant,
    fresh_name,
    input_of,
    is_known,
    is_read_once,
    is_scalar,
    readers,
    return_instead,
    runs_in_integers,
    set_input,
    takes_integers,
    values_of,
)


def quantize_before_pools(model: ir.Model) -> None:
    """Move quantizers from behind a max pooling to the convolution before it, in place: both commute."""
    for node in [node for node in model.graph if node.op_type == "MaxPool"]:
        before = input_of(node, 0)
        source = before.producer()
        if source is not None and source.op_type == "Relu":
            source = input_of(source, 0).producer()
        if source is None or source.op_type != "Conv" or not is_read_once(before):
            continue
        grids = [_grid_of(user) for user in readers(node.outputs[0])]
        if grids and grids[0] is not None and all(grid == grids[0] for grid in grids):
            quantize_value(model, before, *grids[0])


def _grid_of(node: ir.Node) -> tuple[float, np.generic] | None:
    """Scale and zero point of a quantizer with one scale; None for other nodes."""
    if node.op_type != "QuantizeLinear" or not is_scalar(node.inputs[1]):
        return None
    return constant(node.inputs[1]).item(), constant(node.inputs[2]).reshape(-1)[0]


def outputs_without_grid(model: ir.Model, maps: Collection[str]) -> list[ir.Value]:
    """Outputs of integer convolutions that are not quantized but may be, to 8 bits."""
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
    """
    for node in [n for n in model.graph if n.op_type == "Conv" and takes_integers(n)]:
        _share_quantizer(model, node, maps)


def share_quantizers_of_sums(model: ir.Model, maps: Collection[str]) -> None:
    """The same for sums of two values on grids, such as those of residual blocks, in the order in which they run."""
    for node in [node for node in model.graph if node.op_type == "Add"]:
        producers = [input_of(node, index).producer() for index in (0, 1)]
        if all(p is not None and p.op_type == "DequantizeLinear" for p in producers):
            _share_quantizer(model, node, maps)


def _share_quantizer(model: ir.Model, node: ir.Node, maps: Collection[str]) -> None:
    value = node.outputs[0]
    if [user.op_type for user in readers(value)] in (["Relu"], ["Clip"]):
        value = readers(value)[0].outputs[0]
    users = [(user, index) for user, index in value.uses()]
    first = next((user for user, _ in users if _has_8_bits(user)), None)
    alone = len(users) == 1 and not value.is_graph_output()
    if first is None or alone or not _may_have_a_grid(value, maps):
        return
    rounded = ir.Node("", "DequantizeLinear", [first.outputs[0], *first.inputs[1:]])
    rounded.attributes.update(first.attributes)
    rounded.outputs[0].name = f"{value.name}.rounded"
    for user, index in users:
        if user is not first:
            user.replace_input_with(index, rounded.outputs[0])
    return_instead(model, value, rounded.outputs[0])
    model.graph.remove(first)
    producer = value.producer()
    assert producer is not None
    model.graph.insert_after(producer, [first, rounded])


def _has_8_bits(node: ir.Node) -> bool:
    """Whether a node is a quantizer that uses all 8-bit codes, which others may read.

    Signed codes are for TensorRT, which has no scales per channel for activations.
    """
    return (
        node.op_type == "QuantizeLinear"
        and all(user.op_type == "DequantizeLinear" for user in readers(node.outputs[0]))
        and (is_scalar(node.inputs[1]) or constant(node.inputs[2]).dtype == np.uint8)
    )


def _may_have_a_grid(value: ir.Value, maps: Collection[str]) -> bool:
    """Whether a value may be quantized to 8 bits: it is added, resized, pooled, quantized, or for a second stage."""
    if value.is_graph_output() and value.name not in maps:
        return False
    users = [user.op_type for user, _ in value.uses()]
    return all(user in ("Add", "MaxPool", "QuantizeLinear", "Resize") for user in users)


def quantize_value(model: ir.Model, value: ir.Value, scale: float, zero_point: np.generic) -> None:
    """Quantize a value to an 8-bit grid, of codes of the zero point's type, for all its readers, in place."""
    producer = value.producer()
    assert producer is not None
    name = str(value.name)
    nodes = [
        ir.Node("", operator, [None, None, None], outputs=[ir.Value(name=f"{name}.{operator}")])
        for operator in ("QuantizeLinear", "DequantizeLinear")
    ]
    return_instead(model, value, nodes[1].outputs[0])
    value.replace_all_uses_with(nodes[1].outputs[0])
    for node, given in zip(nodes, (value, nodes[0].outputs[0]), strict=True):
        node.replace_input_with(0, given)
        for index, number in ((1, np.float32(scale)), (2, zero_point)):
            set_input(model, node, index, np.asarray(number), fresh_name(node, index, "output"))
    model.graph.insert_after(producer, nodes)


def keep_in_floating_point(model: ir.Model) -> None:
    """Keep ONNX Runtime from integer kernels where it has none that gives the same results, in place.

    It makes a QLinearConv of every convolution between quantizers. That fails if one of them has a grid per channel, and
    where the weights are no signed 8-bit ones it rounds them anew. So Cast, Sub and Mul take the place of the
    DequantizeLinear before such a convolution.
    """
    for node in [node for node in model.graph if node.op_type == "Conv"]:
        given, users = input_of(node, 0).producer(), readers(node.outputs[0])
        if len(users) == 1 and users[0].op_type in ("Relu", "Clip"):
            users = readers(users[0].outputs[0])
        if runs_in_integers(node) or not any(user.op_type == "QuantizeLinear" for user in users):
            continue
        if given is not None and given.op_type == "DequantizeLinear":
            grid = (constant(value).reshape(-1, 1, 1) for value in given.inputs[1:])  # by channel
            node.replace_input_with(0, values_of(model, node, input_of(given, 0), *grid))


def drop_clips(model: ir.Model) -> None:
    """Remove each ReLU, and each Clip such as ReLU6, that only quantizers read which clip as it does, in place.

    ONNX Runtime has no integer kernel for a convolution whose ReLU stays.
    """
    for node in [node for node in model.graph if node.op_type in ("Relu", "Clip")]:
        low, high = _limits(node)
        users = readers(node.outputs[0])
        if low == 0 and users and all(_clips_at_zero_and(high, user) for user in users):
            node.outputs[0].replace_all_uses_with(input_of(node, 0))
            model.graph.remove(node, safe=True)


def _limits(node: ir.Node) -> tuple[float, float]:
    """The smallest and the largest output of a ReLU or Clip; NaN where a limit is not known."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    found = []
    for index, none in ((1, -math.inf), (2, math.inf)):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            found.append(none)
        else:
            found.append(constant(value).item() if is_known(value) else math.nan)
    return found[0], found[1]


def _clips_at_zero_and(high: float, quantize: ir.Node) -> bool:
    """Whether a quantizer gives all values below 0 the code of 0, and all above ``high`` the code of ``high``."""
    if quantize.op_type != "QuantizeLinear":
        return False
    zero_point = constant(quantize.inputs[2])
    if zero_point.dtype != np.uint8 or zero_point.any():  # of signed codes 0 is in the middle
        return False
    largest = 255  # its codes are UINT8; a clip of the codes follows where they have fewer bits
    following = readers(quantize.outputs[0])
    if len(following) == 1 and following[0].op_type == "Clip":
        largest = int(_limits(following[0])[1])
    return bool((constant(quantize.inputs[1]) * (largest - 0.5) <= high).all())
