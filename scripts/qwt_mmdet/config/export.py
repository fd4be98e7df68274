"""Exports of quantized detectors as files, and the runtimes that run them."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict

from .names import check_name
from .section import Foreign, Text, section

LEAST_OPSET, MOST_OPSET = 21, 23
"""Opset 21 is the first with 4-bit integers."""

OwnRuntime = Literal["onnxruntime", "openvino", "ncnn", "onnxruntime-cuda", "onnxruntime-tensorrt"]
GPU_RUNTIMES = ("onnxruntime-cuda", "onnxruntime-tensorrt")
"""Runtimes whose jobs take a GPU."""
SYMMETRIC_RUNTIMES = {"ncnn", "onnxruntime-tensorrt"}
"""Runtimes that take symmetric grids alone."""
Runtime = OwnRuntime | Annotated[Foreign, AfterValidator(check_name)]
InputSize = Literal["fixed", "dynamic"]
Storage = Literal["packed", "bytes"]
Named = Annotated[tuple[Text, ...], Field(min_length=1)] | None


@section
class Export:
    """Detectors to export: the product of three lists, restricted to `targets`."""

    model: Named = None
    """Names of models. Omitted: all of them."""
    quantization: Named = None
    """Names of quantizations. Omitted: all of them."""
    compensation: Named = None
    """Names of compensations. Omitted: the quantized detector without compensation."""
    runtime: Annotated[tuple[Runtime, ...], Field(min_length=1)] = ("onnxruntime",)
    """Runtimes that evaluate the file and measure its latency: `onnxruntime`, `openvino`, `ncnn`; on an NVIDIA GPU
    `onnxruntime-cuda`, `onnxruntime-tensorrt`; or one that a module of yours registers, such as `mylab.reference`."""
    opset: Annotated[int, Strict(), Field(ge=LEAST_OPSET, le=MOST_OPSET)] = LEAST_OPSET
    """Version of the ONNX operators."""
    weights: Storage = "packed"
    """How the file stores weights of up to 4 bits: two in a byte (`packed`), which the graph unpacks when a runtime
    opens it, or a byte each (`bytes`), for a runtime that cannot."""
    input: InputSize | None = None
    """Sizes of images that the file takes: one (`fixed`) or any (`dynamic`). Omitted: `dynamic` if sizes vary
    after the model's test pipeline."""
