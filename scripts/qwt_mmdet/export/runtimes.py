"""Runtimes that compute an ONNX graph, by name."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import QwtError, registered

if TYPE_CHECKING:
    import onnx_ir

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
"""Computes outputs by name from inputs by name."""


LARGEST_SAFE_WEIGHT = 64
"""Two products of a code up to 255 and a weight up to this fit into 16 bits."""


def _adds_in_16_bits() -> bool:
    """Whether this processor's integer kernels add pairs of 8-bit products in 16 bits: x86 without VNNI."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx2" in flags and "vnni" not in flags


def _onnxruntime(graph: bytes, threads: int, overflow: bool) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if overflow:  # other kernels
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def _openvino(graph: bytes, threads: int, overflow: bool) -> Run:
    import openvino

    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    if overflow:
        options["LP_TRANSFORMS_MODE"] = "OFF"  # quantized values, computed in floating point
    core = openvino.Core()
    request = core.compile_model(core.read_model(graph), "CPU", options).create_infer_request()

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = request.infer(inputs)
        return {output.any_name: values for output, values in found.to_dict().items()}

    return run


RUNTIMES: dict[str, Callable[[bytes, int, bool], Run]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
"""What opens a graph for a number of threads, by the name of the runtime and of its package. The last argument
says whether sums of its products would overflow on this processor."""


def check_runtime(name: str) -> None:
    """Check that a runtime can be used.

    Raises:
        QwtError: there is no such runtime, or it is not installed.
    """
    registered("runtime", name, RUNTIMES)
    check_installed(name)


def check_installed(package: str) -> None:
    """Check that a package is there.

    Raises:
        QwtError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise QwtError(
            f"The package {package} is not installed; `pip install {package}` installs it."
        )


def open_graph(path: str | os.PathLike[str], runtime: str, *, threads: int = 1) -> Run:
    """Open an ONNX file with a runtime.

    Weights of 4 bits become 8 bits in memory, which runtimes have kernels for.

    Raises:
        QwtError: there is no such runtime, it is not installed, or the file is none that it can read.
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


def open_model(model: "onnx_ir.Model", runtime: str, *, threads: int = 1) -> Run:
    """Open a graph with a runtime. It is changed to what the runtime computes fastest."""
    import onnx_ir

    from . import kernels

    kernels.widen_weights(model)
    if runtime == "onnxruntime":
        kernels.compute_in_floats(model)
    overflow = _adds_in_16_bits() and kernels.largest_weight(model) > LARGEST_SAFE_WEIGHT
    return RUNTIMES[runtime](onnx_ir.to_proto(model).SerializeToString(), threads, overflow)
