"""Runtimes that compute an ONNX graph, by name."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import QwtError, check_installed, reason, registered

if TYPE_CHECKING:
    import onnx_ir

logger = logging.getLogger(__name__)

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
"""Computes outputs by name from inputs by name."""


LARGEST_SAFE_WEIGHT = 64
"""The sum of two products of a code up to 255 and a weight up to this fits into 16 bits."""


class Graph(NamedTuple):
    """A graph for a runtime.

    Attributes:
        content: bytes of an ONNX file.
        overflow: whether 16-bit sums of products would overflow on this processor.
    """

    content: bytes
    overflow: bool


def _adds_in_16_bits() -> bool:
    """Whether this processor's integer kernels add pairs of 8-bit products in 16 bits: x86 without VNNI."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx2" in flags and "vnni" not in flags


def onnxruntime_session(graph: Graph, threads: int, profile: str | None = None) -> Any:
    """A session of ONNX Runtime, which writes a profile to a file whose name starts with ``profile``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if graph.overflow:  # other kernels
        options.add_session_config_entry("session.x64quantprecision", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
        # the profile lacks the shapes of weights that were packed
        options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(graph.content, options, providers=["CPUExecutionProvider"])


def _onnxruntime(graph: Graph, threads: int) -> Run:
    session = onnxruntime_session(graph, threads)
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def openvino_model(
    graph: Graph, threads: int, shapes: Mapping[str, Sequence[int]] | None = None
) -> Any:
    """A model that OpenVINO has compiled; with ``shapes`` for inputs of these shapes only."""
    import openvino

    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    in_floats = {**options, "LP_TRANSFORMS_MODE": "OFF"}  # quantized values, in floating point
    core = openvino.Core()
    model = core.read_model(graph.content)
    if shapes is not None:
        model.reshape({name: list(shape) for name, shape in shapes.items()})
    try:
        return core.compile_model(model, "CPU", in_floats if graph.overflow else options)
    except RuntimeError as error:  # as OpenVINO does for some grids per channel
        logger.warning("OpenVINO computes this graph in floating point: %s", reason(error))
        return core.compile_model(model, "CPU", in_floats)


def _openvino(graph: Graph, threads: int) -> Run:
    request = openvino_model(graph, threads).create_infer_request()

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = request.infer(inputs)
        return {output.any_name: values for output, values in found.to_dict().items()}

    return run


RUNTIMES: dict[str, Callable[[Graph, int], Run]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
"""Functions that open a graph for a number of threads, by the name of the runtime, which is its package's."""


def check_runtime(name: str) -> None:
    """Check that a runtime can be used.

    Raises:
        QwtError: there is no such runtime, or it is not installed.
    """
    registered("runtime", name, RUNTIMES)
    check_installed(name)


def prepared(model: "onnx_ir.Model", runtime: str) -> Graph:
    """Change a graph to what a runtime computes fastest, in place, and serialize it."""
    import onnx_ir

    from . import kernels

    kernels.widen_weights(model)
    if runtime == "onnxruntime":
        kernels.float_weights(model)
    overflow = _adds_in_16_bits() and kernels.largest_weight(model) > LARGEST_SAFE_WEIGHT
    return Graph(onnx_ir.to_proto(model).SerializeToString(), overflow)


def open_model(model: "onnx_ir.Model", runtime: str, *, threads: int = 1) -> Run:
    """Open a graph with a runtime; see :func:`prepared`."""
    return RUNTIMES[runtime](prepared(model, runtime), threads)


def open_graph(path: str | os.PathLike[str], runtime: str, *, threads: int = 1) -> Run:
    """Open an ONNX file with a runtime.

    Weights of 4 bits are widened to 8 bits in memory, which runtimes have kernels for.

    Raises:
        QwtError: there is no such runtime, it is not installed, or it cannot read the file.
    """
    check_runtime(runtime)
    import onnx_ir

    try:
        return open_model(onnx_ir.load(path), runtime, threads=threads)
    except Exception as error:
        raise QwtError(
            f"{runtime} cannot open {path} ({type(error).__name__}); it is "
            "truncated, no ONNX file, or needs another version of the runtime; export it again."
        ) from error
