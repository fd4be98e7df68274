"""Write a detector as ONNX graphs, with a JSON file of all that is needed to run them."""

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from mmdet.models import BaseDetector
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from ..archives import summary_path
from ..config import as_plain
from ..config.export import LEAST_OPSET, MOST_OPSET, Storage
from ..detectors.forward import check_precision
from ..errors import QwtError, reason
from ..files import sha256_file, write_atomically, write_json
from ..quantization.convert import activation_quantizers
from ..quantization.state import check_grids
from ..record import record_of
from . import packing, placing, scales
from .cut import Cut, RegionGraph, check_exportable, cut_of, flat, one_size_only
from .description import EXPORT_FORMAT, as_json, exported_bytes
from .detections import CandidateBoxes, append_suppression, check_suppression
from .nodes import onnx_nodes
from .operators import onnx_operators
from .outputs import quantize_outputs
from .processing import postprocessing, preprocessing
from .tensorrt import check_tensorrt

logger = logging.getLogger(__name__)

CONFIG_KEYS = (
    "custom_imports", "model", "test_dataloader", "test_pipeline", "test_cfg", "default_scope",
)  # fmt: skip
"""Keys of a detector's config that :func:`.loading.load_exported` needs."""


@torch.no_grad()
def export_onnx(
    model: BaseDetector,
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    dynamic: bool | None = None,
    nms: bool = False,
    opset: int = LEAST_OPSET,
    weights: Storage = "packed",
    calibration: Iterable[dict[str, Any]] = (),
    details: Mapping[str, Any] | None = None,
) -> None:
    """Write a detector as ``path`` (.onnx), with its description beside it (.json).

    The graph takes a normalised image [1, 3, height, width] from the model's data preprocessor, and returns the
    raw outputs of the head. Each head of a second stage is a graph in a further file, and takes maps of
    regions. Weights are integers of 4 or 8 bits. Whoever opens the file runs what is in it: the graph unpacks weights
    of 4 bits itself, which a runtime does once.

    Args:
        model: in full precision or quantized, compensated or not; it does not change.
        size: height and width of the image; None: as of the model's test pipeline.
        dynamic: whether images may have other sizes; None: if those of the test pipeline vary and the graph
            can take them.
        nms: include non-maximum suppression in the graph of a one-stage detector. It returns boxes
            [detections, 4] in pixels of its input, scores and labels [detections], the highest scores first.
        weights: whether two weights whose codes fit in 4 bits share a byte, or have one each ("bytes").
        calibration: a few batches as mmdet's test step takes them. From them come ranges (8 bits) of
            convolution outputs that the detector does not quantize: those that are added to others or go to a
            second stage. Integer kernels of ONNX Runtime need them.
        details: further entries of the description, such as an AP.

    Raises:
        QwtError: the detector cannot be exported (the message names the module) or is not calibrated, the
            opset is not supported, or ``path`` ends with .json.
    """
    if summary_path(path) == Path(path):
        raise QwtError(
            f"The file to write is {path}, but .json is for its description; end the name with .onnx."
        )
    if not LEAST_OPSET <= opset <= MOST_OPSET:
        raise QwtError(
            f"There is no opset {opset} to export with; give one from {LEAST_OPSET} to {MOST_OPSET}."
        )
    check_precision(model)
    if record_of(model).quantization is not None:
        check_grids(model)
    check_exportable(model)
    suppression = check_suppression(model) if nms else None
    prepared = preprocessing(model)
    size, dynamic = _choose_size(model, prepared, size, dynamic)
    copied = copy.deepcopy(model).cpu().eval()
    cut, image = cut_of(copied).eval(), torch.zeros(1, 3, *size)
    first = CandidateBoxes(copied) if nms else cut
    with _code_of_others(copied):
        first(image)  # finds the names
        inputs_of_heads = cut.regions(image)
    names = [*flat(first.outputs), *flat(first.features)]
    sizes = ({2: Dim.AUTO, 3: Dim.AUTO},) if dynamic else None
    images = (copied.data_preprocessor(batch, False)["inputs"] for batch in calibration)
    try:
        graph = trace(
            first, {"image": image}, names, opset=opset, weights=weights, dynamic_shapes=sizes, images=images,
            maps=flat(first.features),
        )  # fmt: skip
    except QwtError as error:
        if dynamic:
            raise QwtError(
                f"{str(error).rstrip('.')}; a graph for images of one size may be possible (input: fixed)."
            ) from error
        raise
    outputs = append_suppression(graph, suppression) if suppression else first.outputs
    _save(graph, path)
    regions = {
        name: _write_region_head(cut, name, inputs, path, opset, weights)
        for name, inputs in inputs_of_heads.items()
    }
    record = record_of(model)
    description = {
        "format": EXPORT_FORMAT,
        "sha256": sha256_file(path),
        "fingerprint": record.fingerprint,
        "quantization": record.quantization and as_plain(record.quantization.settings),
        "input": {"name": "image", "size": list(size), "dynamic": dynamic},
        "preprocessing": prepared,
        "outputs": outputs,
        "suppression": suppression,
        "features": first.features,
        "region_heads": regions,
        "postprocessing": postprocessing(model),
        "classes": list(model.dataset_meta["classes"]),
        "config": as_json({key: model.cfg[key] for key in CONFIG_KEYS if key in model.cfg}),
        **(details or {}),
    }
    write_json(summary_path(path), description, indent=1)
    logger.info("%s: %.2f MB", path, exported_bytes(path, description) / 1e6)


def _choose_size(
    model: BaseDetector,
    prepared: Mapping[str, Any],
    size: tuple[int, int] | None,
    dynamic: bool | None,
) -> tuple[tuple[int, int], bool]:
    """Height and width of the image, and whether others are possible; from the test pipeline where they are None."""
    fixed = one_size_only(model)
    if dynamic and fixed:
        raise QwtError(f"{fixed}; export the detector for a fixed size.")
    if size is None or dynamic is None:
        found, varies = image_size(prepared)
        size, dynamic = size or found, varies and not fixed if dynamic is None else dynamic
    return size, dynamic


def _write_region_head(
    cut: Cut,
    name: str,
    inputs: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    opset: int,
    weights: Storage,
) -> dict[str, Any]:
    """Write the graph of a head of the second stage beside ``path``; return its entry in the description."""
    head = RegionGraph(cut.model.get_submodule(name))
    head(*inputs.values())  # finds the names
    file = Path(path).with_suffix(f".{name}.onnx")
    counts = (tuple({0: Dim.DYNAMIC} for _ in inputs),)
    names = flat(head.outputs)
    _save(trace(head, inputs, names, opset=opset, weights=weights, dynamic_shapes=counts), file)
    return {
        "file": file.name,
        "sha256": sha256_file(file),
        "inputs": {key: list(value.shape[1:]) for key, value in inputs.items()},
        "outputs": head.outputs,
        "most_regions": cut.most_regions(name),
    }


def _save(graph: ir.Model, path: str | os.PathLike[str]) -> None:
    with write_atomically(path) as partial:
        ir.save(graph, partial)


def image_size(preprocessing: Mapping[str, Any]) -> tuple[tuple[int, int], bool]:
    """Height and width of images after a detector's :func:`.processing.preprocessing`, and whether sizes vary.

    If the pipeline keeps proportions and does not pad, it is the size of the widest image.
    """
    resize, pad = preprocessing["resize"], preprocessing["pad"] or {}
    if pad.get("size"):
        sides, varies = pad["size"], False
    elif resize and "or" not in pad:
        sides, varies = [resize["height"], resize["width"]], resize["keep_ratio"]
        if pad.get("square"):
            sides, varies = [max(sides)] * 2, varies and sides[0] != sides[1]
    else:
        raise QwtError(
            "The test pipeline neither resizes nor pads images to a size; give the size to export for."
        )
    for divisor in (pad.get("divisor") or 1, preprocessing["size_divisor"]):
        sides = [-(-side // divisor) * divisor for side in sides]
    height, width = sides
    return (height, width), varies


def trace(
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    *,
    opset: int = LEAST_OPSET,
    weights: Storage = "packed",
    dynamic_shapes: Any = None,
    images: Iterable[Tensor] = (),
    maps: Collection[str] = (),
) -> ir.Model:
    """The optimized graph of a network (quantized or not) that returns a tuple of tensors.

    Args:
        inputs: examples, by their names in the graph. outputs: names of the tensors.
        weights: as of :func:`export_onnx`.
        dynamic_shapes: axes of the inputs whose size may vary, as torch.export takes them.
        images, maps: for :func:`.outputs.quantize_outputs`.

    Raises:
        QwtError: torch cannot export it.
    """
    with onnx_nodes(network), onnx_operators(network), _code_of_others(network):
        program = torch.onnx.export(
            network,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    assert program is not None
    graph = program.model
    packing.separate_values(graph)
    scales.fold_batch_norms(graph)
    placing.share_quantizers(graph, maps)
    placing.drop_clips(graph)
    scales.move_channel_scales(graph)
    placing.quantize_before_pools(graph)
    placing.drop_clips(graph)
    symmetric = any(quantizer.symmetric for quantizer in activation_quantizers(network).values())
    quantize_outputs(graph, images, maps, symmetric=symmetric)
    placing.share_quantizers_of_sums(graph, maps)
    placing.drop_clips(graph)
    packing.separate_values(graph)
    if symmetric:
        packing.store_weights(graph, packed=False, for_any_kernel=True)
        check_tensorrt(graph)
    else:
        scales.integer_biases(graph)
        placing.keep_in_floating_point(graph)
        packing.store_weights(graph, packed=weights == "packed")
    packing.narrow_constants(graph)
    packing.keep_what_runs(graph)
    return graph


@contextlib.contextmanager
def _code_of_others(model: nn.Module) -> Iterator[None]:
    """Inside: an error of torch's exporter or of mmdet becomes a sentence that names the module; warnings are silent."""
    names = {module: name for name, module in model.named_modules()}
    entered: list[str] = []

    def enter(module: nn.Module, *_: Any) -> None:
        if module in names:
            entered.append(names[module])

    def leave(module: nn.Module, *_: Any) -> None:
        if module in names:
            entered.pop()

    with contextlib.ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave).remove)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # torch's about mmdet's code
        try:
            yield
        except QwtError:
            raise
        except Exception as error:
            where = f" at the module {entered[-1]}" if entered and entered[-1] else ""
            why = reason(error.__cause__ or error)
            raise QwtError(f"torch cannot export this detector{where}: {why}.") from error
