"""Files of ncnn, from an ONNX graph whose grids are symmetric (``grids: symmetric``).

ncnn reads no QuantizeLinear. A layer that it computes with integers has scales in its parameters: those of its weights,
one for each output channel, and that of its input, as the inverse of a step. It rounds the input itself, to −127 … 127.
So quantizers become such scales. pnnx, ncnn's own converter, translates the rest of the graph.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ..errors import QwtError, check_installed
from .graph import along_axis, constant, input_of, is_known, set_input, weight_steps
from .packing import keep_what_runs, own_weights
from .tensorrt import problems

INT8_WEIGHTS = np.uint32(0x000D4B38).tobytes()
"""In ncnn's file, the mark in front of weights of a byte each."""
CONVOLUTIONS = ("Convolution", "ConvolutionDepthWise")
OUTPUTS, BIAS, SIZE, INT8 = 0, 5, 6, 8
"""Numbers of a convolution's parameters in ncnn's file."""


class Scales(NamedTuple):
    """What makes a convolution one of integers.

    Attributes:
        codes: of the weights, int8.
        weights: inverse steps of the weights, [out]. input: that of the input.
    """

    codes: np.ndarray
    weights: np.ndarray
    input: float


Layer = tuple[np.ndarray, Scales | None]
"""Weights of a convolution as they stand in the graph, and its scales; None in floating point."""


def write_ncnn(graph: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write a graph as ``path`` (.param), with its weights beside it (.bin).

    Args:
        graph: in full precision, or with symmetric grids; for images of one size. Its inputs and outputs are called
            in0, in1, … and out0, out1, … in ncnn.

    Raises:
        QwtError: pnnx is not installed or cannot translate the graph, a grid is not symmetric, or the size varies.
    """
    check_installed("pnnx")
    graph = graph.clone()
    if found := next(problems(graph), None):
        raise QwtError(
            f"ncnn computes with signed codes alone, but {found}; quantize the detector with grids: symmetric."
        )
    shapes = [_shape(value) for value in graph.graph.inputs]
    own_weights(graph)
    _slice_with_convolutions(graph)
    layers = [*_take_quantizers(graph)]
    keep_what_runs(graph)
    with tempfile.TemporaryDirectory(prefix="qwt-mmdet-") as folder:
        ir.save(graph, f"{folder}/graph.onnx")
        _run_pnnx(folder, shapes)
        text = Path(folder, "graph.ncnn.param").read_text(encoding="ascii")
        content = Path(folder, "graph.ncnn.bin").read_bytes()
    text, content = _with_integers(text, content, layers)
    Path(path).write_text(text, encoding="ascii")
    Path(path).with_suffix(".bin").write_bytes(content)


def _shape(value: ir.Value) -> list[int]:
    shape = [] if value.shape is None else list(value.shape)
    if not shape or not all(isinstance(side, int) for side in shape):
        raise QwtError(
            f"ncnn's converter takes graphs for one image size, and that of the input {value.name} varies; export the "
            "detector for a fixed size (input: fixed)."
        )
    return [int(side) for side in shape]  # type: ignore[arg-type]


def _take_quantizers(graph: ir.Model) -> Iterator[Layer]:
    """Remove all quantizers, in place: weights become values. Yields all convolutions in their order."""
    for node in list(graph.graph):
        if node.op_type != "Conv":
            continue
        given, weight = (input_of(node, index).producer() for index in (0, 1))
        if weight is None or weight.op_type != "DequantizeLinear":
            if is_known(node.inputs[1]):
                yield constant(node.inputs[1]), None
            continue
        steps, scale = weight_steps(weight), constant(weight.inputs[1])
        values = (steps * along_axis(weight, scale)).astype(np.float32)
        set_input(graph, node, 1, values, f"{weight.outputs[0].name}.values")
        found = None
        if given is not None and given.op_type == "DequantizeLinear":
            outputs = np.broadcast_to(1 / scale, len(values)).astype(np.float32)
            found = Scales(steps.astype(np.int8), outputs, 1 / constant(given.inputs[1]).item())
        yield values, found
    for node in [n for n in graph.graph if n.op_type == "DequantizeLinear"]:
        if is_known(node.inputs[0]):
            values = weight_steps(node) * along_axis(node, constant(node.inputs[1]))
            for user, index in list(node.outputs[0].uses()):
                name = f"{node.outputs[0].name}.{index}.values"
                set_input(graph, user, index, values.astype(np.float32), name)
        else:
            quantize = input_of(node, 0).producer()
            assert quantize is not None
            source = input_of(quantize, 0)
            if node.outputs[0].is_graph_output():
                position = graph.graph.outputs.index(node.outputs[0])
                graph.graph.outputs[position] = source
            node.outputs[0].replace_all_uses_with(source)


def _slice_with_convolutions(graph: ir.Model) -> None:
    """Put depthwise convolutions in the place of slices of maps with steps, which ncnn lacks (YOLOX), in place."""
    for node in [node for node in graph.graph if node.op_type == "Slice"]:
        if len(node.inputs) < 5 or not all(is_known(value) for value in node.inputs[1:]):
            continue
        start, _end, axis, step = (constant(value).flatten() for value in node.inputs[1:])
        channels = _channels(input_of(node, 0))
        if axis.size > 1 or axis[0] not in (2, 3) or step[0] < 2 or channels is None:
            continue
        sides = [1, 1]
        sides[axis[0] - 2] = int(step[0])
        kernel = np.zeros((channels, 1, *sides), np.float32)
        kernel.reshape(channels, -1)[:, start[0]] = 1
        taken = ir.node(
            "Conv", [input_of(node, 0), None], {"group": channels, "strides": sides, "kernel_shape": sides}
        )  # fmt: skip
        taken.outputs[0].name = f"{node.outputs[0].name}.taken"
        graph.graph.insert_before(node, taken)
        set_input(graph, taken, 1, kernel, f"{taken.outputs[0].name}.kernel")
        node.outputs[0].replace_all_uses_with(taken.outputs[0])


def _channels(value: ir.Value) -> int | None:
    """Channels of a map that is the image, or a slice of it."""
    while (producer := value.producer()) is not None:
        if producer.op_type not in ("Slice", "Conv"):
            return None
        if producer.op_type == "Conv":
            return len(constant(producer.inputs[1]))
        value = input_of(producer, 0)
    return _shape(value)[1]


def _program() -> Path:
    """pnnx, which its package holds."""
    found = find_spec("pnnx")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).with_name("pnnx")


def _run_pnnx(folder: str, shapes: list[list[int]]) -> None:
    sizes = ",".join(f"[{','.join(map(str, shape))}]f32" for shape in shapes)
    done = subprocess.run(
        [_program(), "graph.onnx", f"inputshape={sizes}", "fp16=0"],
        cwd=folder, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    missing = re.findall(r"^(?!pnnx)(\w+\.\w+) ", _parameters(folder), re.M)
    if done.returncode or not Path(folder, "graph.ncnn.bin").is_file():
        tail = " ".join(done.stderr.split())[-200:]
        raise QwtError(f"pnnx cannot translate this graph for ncnn: {tail}")
    if missing:
        raise QwtError(
            f"ncnn has no layer for the operator {missing[0]}, so this detector has no file for it."
        )


def _parameters(folder: str) -> str:
    file = Path(folder, "graph.ncnn.param")
    return file.read_text(encoding="ascii") if file.is_file() else ""


def _with_integers(text: str, content: bytes, layers: list[Layer]) -> tuple[str, bytes]:
    """Parameters and weights in which convolutions have integer weights and scales.

    Weights stand in the order of the parameters, which is pnnx's own. So convolutions are found by their values, and
    those of one size belong to the parameters of this size in their order.
    """
    alike: dict[bytes, list[Layer]] = {}
    for layer in layers:
        alike.setdefault(layer[0].tobytes(), []).append(layer)
    places: dict[int, list[tuple[int, Scales | None]]] = {}
    for values, group in alike.items():
        starts = [found.start() for found in re.finditer(re.escape(values), content)]
        found = places.setdefault(len(values) // 4, [])
        found += [(start, scales) for start, (_, scales) in zip(starts, group, strict=False)]
    lines = text.splitlines()
    numbers: dict[int, list[int]] = {}  # of lines
    for number, line in enumerate(lines):
        if line.partition(" ")[0] in CONVOLUTIONS:
            numbers.setdefault(_parameter(line, SIZE), []).append(number)
    integers: dict[int, tuple[int, Scales]] = {}  # start of the weights, by number of the line
    for size, of_size in places.items():
        known = sorted(of_size, key=lambda place: place[0])
        if len(known) != len(numbers.get(size, ())):
            if any(scales is not None for _, scales in known):
                raise QwtError(
                    "pnnx changed the weights of convolutions that are not quantized, so the others cannot be told from "
                    "them; quantize the whole detector (scope: detector, no override with skip)."
                )
            continue
        for number, (start, scales) in zip(numbers[size], known, strict=True):
            if scales is not None:
                integers[number] = start, scales
    parts, position = [], 0
    for number, (start, scales) in sorted(integers.items()):
        size, codes = scales.codes.size, scales.codes.tobytes()
        end = start + 4 * size
        biases = end + 4 * _parameter(lines[number], OUTPUTS) * _parameter(lines[number], BIAS)
        parts += [content[position : start - 4], INT8_WEIGHTS, codes, bytes(-size % 4)]
        parts += [content[end:biases], scales.weights.tobytes(), np.float32(scales.input).tobytes()]
        position = biases
        lines[number] += f" {INT8}=1"
    return "\n".join(lines) + "\n", b"".join([*parts, content[position:]])


def _parameter(line: str, number: int) -> int:
    """A whole number among a layer's parameters; 0 if it is not there."""
    found = re.search(rf" {number}=(\d+)", line)
    return int(found[1]) if found else 0
