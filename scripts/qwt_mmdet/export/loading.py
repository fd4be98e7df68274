"""Exported detectors that take images and return what mmdet's own return."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.apis import inference_detector
from mmdet.models import BaseDetector
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor, nn

from ..archives import read_summary, summary_path
from ..detectors.build import build_detector
from ..errors import QwtError
from ..files import sha256_file
from .onnx_file import EXPORT_FORMAT, from_json
from .parts import Names, with_tensors
from .runtimes import Run, open_graph


class _Graph:
    """The head of an exported detector: it takes the image and runs the graph."""

    def __init__(self, run: Run, names: dict[str, Names]) -> None:
        self.run, self.names = run, names

    def __call__(self, image: Tensor) -> tuple[Any, ...]:
        """[batch, 3, height, width] -> what the head returns; images run one by one."""
        found = [self.run({"image": one[None].numpy()}) for one in image]
        tensors = {
            name: torch.cat([torch.from_numpy(values[name]) for values in found])
            for name in found[0]
        }
        return tuple(with_tensors(self.names, tensors).values())


class ExportedDetector:
    """An exported detector.

    Attributes:
        model: an mmdet detector whose networks are the graph; `inference_detector`, test loops and
            `evaluate_detector` take it.
        description: the content of the JSON file.
    """

    def __init__(self, model: BaseDetector, description: dict[str, Any]) -> None:
        self.model, self.description = model, description

    def __call__(self, images: Any) -> DetDataSample | Sequence[DetDataSample]:
        """What ``mmdet.apis.inference_detector`` returns for the same images."""
        return inference_detector(self.model, images)


def load_exported(
    path: str | os.PathLike[str], runtime: str = "onnxruntime", *, threads: int = 1
) -> ExportedDetector:
    """Open an exported detector.

    Args:
        path: of the .onnx file; its .json lies beside it.
        runtime: ``onnxruntime`` or ``openvino``.

    Raises:
        QwtError: a file is missing, truncated or does not belong to the other, or the runtime is not
            installed.
    """
    description = read_summary(path, EXPORT_FORMAT, "exported")
    if not os.path.isfile(path):
        raise QwtError(f"The exported file {path} does not exist; check the path.")
    if sha256_file(path) != description["sha256"]:
        raise QwtError(
            f"{path} is not the file that {summary_path(path)} describes (another sha256); one of them is "
            "truncated or from another export, so export both again."
        )
    run = open_graph(path, runtime, threads=threads)
    register_all_modules(init_default_scope=True)
    config = Config(from_json(description["config"]))
    model = build_detector(path, config, description["classes"])
    model.dataset_meta = {"classes": tuple(description["classes"])}
    model.backbone = model.neck = nn.Identity()
    model.bbox_head.forward = _Graph(run, description["outputs"])
    return ExportedDetector(model.eval(), description)
