"""Running exported detectors as mmdet detectors: images to detections."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmdet.apis import inference_detector
from mmdet.models import BaseDetector
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor

from ..config import QuantizationSettings
from ..detectors.build import build_detector, import_custom_modules
from ..errors import QwtError
from ..record import Quantization, record_of
from .cut import cut_of, with_tensors
from .description import from_json, graph_files, read_description
from .runtimes import Run, open_graph


def first_graph(
    run: Run, description: dict[str, Any], image: Tensor
) -> tuple[Any, tuple[Tensor, ...]]:
    """[batch, 3, height, width] -> the head's outputs and the neck's maps; images run one by one."""
    expected = description["input"]
    if not expected["dynamic"] and list(image.shape[2:]) != expected["size"]:
        height, width = expected["size"]
        raise QwtError(
            f"An image has height {image.shape[2]} and width {image.shape[3]} after the test pipeline, but "
            f"this graph takes only {height} and {width}; export it for that size, or as dynamic."
        )
    found = [run({"image": one[None].numpy()}) for one in image.cpu()]
    tensors = {
        name: torch.cat([torch.from_numpy(values[name]) for values in found]).to(image.device)
        for name in found[0]
    }
    outputs, maps = (with_tensors(description[key], tensors) for key in ("outputs", "features"))
    return outputs, tuple(maps)


def region_graph(run: Run, description: dict[str, Any], *regions: Tensor) -> Any:
    """A head's outputs for maps of regions, [regions, channels, height, width]."""
    names = description["inputs"]
    found = run({name: x.cpu().numpy() for name, x in zip(names, regions, strict=True)})
    device = regions[0].device
    tensors = {name: torch.from_numpy(values).to(device) for name, values in found.items()}
    return with_tensors(description["outputs"], tensors)


class ExportedDetector:
    """An exported detector: the content ``description`` of the JSON file, and an mmdet detector ``model``.

    The model's networks are the graph; `inference_detector`, test loops and `evaluate_detector` take it.
    """

    def __init__(self, model: BaseDetector, description: dict[str, Any]) -> None:
        self.model, self.description = model, description

    def __call__(self, images: Any) -> DetDataSample | Sequence[DetDataSample]:
        """What ``mmdet.apis.inference_detector`` returns for the same images."""
        return inference_detector(self.model, images)


def load_exported(
    path: str | os.PathLike[str], runtime: str = "onnxruntime", *, threads: int = 1
) -> ExportedDetector:
    """Open an exported detector, an .onnx file with its .json beside it.

    Args:
        runtime: ``onnxruntime``, ``openvino`` or the name of one that a module registers.

    Raises:
        QwtError: a file is missing, truncated or does not belong to the other; the runtime or a module of the
            config's ``custom_imports`` is not installed; or the graph includes non-maximum suppression.
    """
    description = read_description(path)
    if description["suppression"]:
        raise QwtError(
            f"The graph {path} returns boxes, scores and labels itself; run it with onnxruntime (see "
            "docs/export.md), or export the detector without --nms."
        )
    runs = [open_graph(file, runtime, threads=threads) for file in graph_files(path, description)]
    register_all_modules(init_default_scope=True)
    config = Config(from_json(description["config"]))
    import_custom_modules(path, config)
    model = build_detector(path, config, description["classes"])
    model.dataset_meta = {"classes": tuple(description["classes"])}
    if description["quantization"] is not None:
        settings = QuantizationSettings.from_mapping(description["quantization"])
        record_of(model).quantization = Quantization(settings)
    first, *heads = runs
    regions = zip(description["region_heads"].items(), heads, strict=True)
    cut_of(model).install(
        partial(first_graph, first, description),
        {name: partial(region_graph, run, entry) for (name, entry), run in regions},
    )
    return ExportedDetector(model.eval(), description)
