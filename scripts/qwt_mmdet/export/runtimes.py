"""Runtimes that compute an ONNX graph, by name. docs/extending/runtime.md shows how to add one."""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime

from ..errors import QwtError, Registry, check_installed, reason
from .packing import largest_weight, own_weights
from .profile import CONVOLUTIONS, PRODUCTS, Kernel, convolution, product

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]
"""Computes outputs by name from inputs by name."""


LARGEST_SAFE_WEIGHT = 64
"""The sum of two products of a code up to 255 and a weight up to this fits into 16 bits."""


class Graph(NamedTuple):
    """A graph for a runtime: an ONNX file, and whether 16-bit sums of its products would overflow on this processor."""

    content: bytes
    overflow: bool


class Runtime:
    """What computes a graph: its title in table and report, and the package that must be installed."""

    title: str
    package: str

    @property
    def version(self) -> str:
        """Of the package."""
        return version(self.package)

    def open(self, graph: Graph, threads: int) -> Run:
        """Open a graph."""
        raise NotImplementedError

    def kernels(self, graph: Graph, inputs: Arrays) -> Iterable[Kernel]:
        """What computes each convolution and product in a run; none where the runtime does not tell."""
        return ()

    def in_bfloat16(self) -> "Runtime | None":
        """This runtime as it computes full precision unless told otherwise, if that is bfloat16 on this processor."""
        return None


RUNTIMES: Registry[type[Runtime]] = Registry("runtime", imports=True)
register_runtime = RUNTIMES.register
"""Decorator: the class is the runtime of a name, which starts with its module (``mylab.reference``)."""


def runtime_by_name(name: str) -> Runtime:
    """The registered runtime; a QwtError if there is none of this name, or it is not installed."""
    runtime = RUNTIMES.find(name)()
    check_installed(runtime.package)
    return runtime


@register_runtime("onnxruntime")
class OnnxRuntime(Runtime):
    """ONNX Runtime on the CPU."""

    title, package = "ONNX Runtime", "onnxruntime"
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    """What computes, by ONNX Runtime's names: the first that has a kernel for a node."""

    @property
    def version(self) -> str:
        """Of the package that is installed: that for GPUs has another name."""
        return onnxruntime.__version__

    def open(self, graph: Graph, threads: int) -> Run:
        """Open a session."""
        session = self._session(graph, threads)
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))

    def kernels(self, graph: Graph, inputs: Arrays) -> Iterator[Kernel]:
        """Kernels from the profile of one run, which has the shapes of each node's inputs and outputs."""
        with tempfile.TemporaryDirectory(prefix="qwt-mmdet-") as folder:
            session = self._session(graph, 1, profile=f"{folder}/profile")
            session.run(None, inputs)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        for event in events:
            about = event.get("args", {})
            name = about.get("op_name")
            if name not in CONVOLUTIONS | PRODUCTS or not event["name"].endswith("_kernel_time"):
                continue
            # scales and zero points have fewer dimensions
            shapes = [s for entry in about["input_type_shape"] for s in entry.values()]
            tensors = [shape for shape in shapes if len(shape) > 1]
            (output,) = about["output_type_shape"][0].values()
            if name in CONVOLUTIONS:
                values = tensors[0] if name == "ConvTranspose" else output
                yield Kernel(CONVOLUTIONS[name], convolution(values, tensors[1]))
            else:
                yield Kernel(PRODUCTS[name], product(output, tensors[0]))

    def _session(self, graph: Graph, threads: int, profile: str | None = None) -> Any:
        """A session, which writes a profile to a file whose name starts with ``profile``."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        if graph.overflow:  # other kernels
            options.add_session_config_entry("session.x64quantprecision", "1")
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, profile
            # the profile lacks the shapes of weights that were packed
            options.add_session_config_entry("session.disable_prepacking", "1")
        wanted, known = self.providers[0], onnxruntime.get_available_providers()
        if wanted not in known:
            raise QwtError(
                f"The installed onnxruntime has no {wanted} (it has {', '.join(known)}); `pip install onnxruntime-gpu` in the place of "
                "onnxruntime brings it, or take the runtime onnxruntime, which computes on the CPU."
            )
        session = onnxruntime.InferenceSession(
            graph.content, options, providers=list(self.providers)
        )
        if wanted not in session.get_providers():  # it only logs why, and computes on the CPU
            raise QwtError(
                f"ONNX Runtime could not start its {wanted}; check the driver and the libraries it needs (its log "
                "names them), or take the runtime onnxruntime, which computes on the CPU."
            )
        return session


@register_runtime("onnxruntime-cuda")
class OnnxRuntimeCuda(OnnxRuntime):
    """ONNX Runtime on an NVIDIA GPU."""

    title = "ONNX Runtime (CUDA)"
    providers = ("CUDAExecutionProvider", *OnnxRuntime.providers)


@register_runtime("onnxruntime-tensorrt")
class OnnxRuntimeTensorRT(OnnxRuntime):
    """ONNX Runtime on an NVIDIA GPU, where TensorRT builds an engine of what it supports."""

    title = "ONNX Runtime (TensorRT)"
    providers = ("TensorrtExecutionProvider", *OnnxRuntimeCuda.providers)


@register_runtime("openvino")
class OpenVino(Runtime):
    """OpenVINO on the CPU. ``precision`` is that of what is not quantized."""

    title, package = "OpenVINO", "openvino"

    def __init__(self, precision: str = "f32") -> None:
        self.precision = precision

    def in_bfloat16(self) -> "OpenVino | None":
        """OpenVINO's default on a processor with instructions for it."""
        import openvino

        known = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return OpenVino("bf16") if "BF16" in known else None

    def open(self, graph: Graph, threads: int) -> Run:
        """Compile the graph for any sizes that it takes."""
        request = self._compiled(graph, threads).create_infer_request()

        def run(inputs: Arrays) -> Arrays:
            found = request.infer(inputs)
            return {output.any_name: values for output, values in found.to_dict().items()}

        return run

    def kernels(self, graph: Graph, inputs: Arrays) -> Iterator[Kernel]:
        """Kernels from the graph that OpenVINO compiles for fixed sizes."""
        compiled = self._compiled(graph, 1, {name: x.shape for name, x in inputs.items()})
        for node in compiled.get_runtime_model().get_ordered_ops():
            about = node.get_rt_info()
            integer = about["runtimePrecision"].astype(str) in ("i8", "u8")
            shapes = [list(entry.get_shape()) for entry in node.inputs()]
            output = [list(entry.get_shape()) for entry in node.outputs()]
            layer_type = about["layerType"].astype(str)
            if layer_type in ("Convolution", "Deconvolution"):
                values = shapes[0] if layer_type == "Deconvolution" else output[0]
                yield Kernel(integer, convolution(values, shapes[1]))
            elif layer_type in ("MatMul", "FullyConnected"):
                yield Kernel(integer, product(output[0], shapes[0]))

    def _compiled(
        self, graph: Graph, threads: int, shapes: Mapping[str, Sequence[int]] | None = None
    ) -> Any:
        """A compiled model; with ``shapes`` for inputs of these shapes only."""
        import openvino

        options: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": "LATENCY",
            # else it rounds the inputs of linear layers with weights of 4 bits, which the detector does not
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
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


@register_runtime("ncnn")
class Ncnn(Runtime):
    """ncnn on the CPU, which gets the graph in its own form (:mod:`.ncnn`)."""

    title, package = "ncnn", "ncnn"

    def open(self, graph: Graph, threads: int) -> Run:
        """Translate the graph and load it."""
        import ncnn
        from onnx import load_model_from_string

        from .ncnn import write_ncnn

        model = ir.from_proto(load_model_from_string(graph.content))
        net = ncnn.Net()
        net.opt.num_threads = threads
        net.opt.use_vulkan_compute = net.opt.use_bf16_storage = False
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        with tempfile.TemporaryDirectory(prefix="qwt-mmdet-") as folder:
            write_ncnn(model, f"{folder}/model.param")
            if net.load_param(f"{folder}/model.param") or net.load_model(f"{folder}/model.bin"):
                raise QwtError("ncnn cannot load this graph; its log above says why.")
        inputs = [str(value.name) for value in model.graph.inputs]
        outputs = [
            (f"out{number}", str(value.name)) for number, value in enumerate(model.graph.outputs)
        ]

        def run(given: Arrays) -> Arrays:
            extractor = net.create_extractor()
            for number, name in enumerate(inputs):
                extractor.input(f"in{number}", ncnn.Mat(np.ascontiguousarray(given[name][0])))
            return {name: np.array(extractor.extract(own)[1])[None] for own, name in outputs}

        return run


def _adds_in_16_bits() -> bool:
    """Whether this processor's integer kernels add pairs of 8-bit products in 16 bits: x86 without VNNI."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return "avx2" in flags and "vnni" not in flags


def as_graph(model: ir.Model) -> Graph:
    """Serialize a graph in memory, for a runtime."""
    if not _adds_in_16_bits():
        return Graph(ir.to_proto(model).SerializeToString(), overflow=False)
    model = model.clone()
    own_weights(model)
    overflow = largest_weight(model) > LARGEST_SAFE_WEIGHT
    return Graph(ir.to_proto(model).SerializeToString(), overflow)


def read_graph(path: str | os.PathLike[str]) -> Graph:
    """Read an ONNX file for a runtime."""
    return as_graph(ir.load(path)) if _adds_in_16_bits() else Graph(Path(path).read_bytes(), False)


def open_model(model: ir.Model, runtime: str, *, threads: int = 1) -> Run:
    """Open a graph in memory with a runtime."""
    return runtime_by_name(runtime).open(as_graph(model), threads)


def open_graph(path: str | os.PathLike[str], runtime: str | Runtime, *, threads: int = 1) -> Run:
    """Open an ONNX file with a runtime, or the one of a name.

    Raises:
        QwtError: there is no such runtime, it is not installed, or it cannot read the file.
    """
    found = runtime_by_name(runtime) if isinstance(runtime, str) else runtime
    try:
        return found.open(read_graph(path), threads)
    except QwtError:
        raise
    except Exception as error:
        raise QwtError(
            f"{found.title} cannot open {path} ({type(error).__name__}); it is "
            "truncated, no ONNX file, or needs another version of the runtime; export it again."
        ) from error
