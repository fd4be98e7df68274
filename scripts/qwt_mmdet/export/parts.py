"""Where a detector is cut: what of it becomes a graph, and what mmdet's own Python code does behind it."""

import inspect
from typing import Any

from mmdet.models import BaseDetector, SingleStageDetector
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import QwtError
from ..quantization.convert import activation_quantizers

Names = str | None | list["Names"] | dict[str, "Names"]
"""Names of outputs in the place of the tensors, in what a head returns."""


class OneStage(nn.Module):
    """Backbone, neck and dense head: an image to the raw outputs of the head.

    Attributes:
        names: of the outputs, by the argument of ``predict_by_feat`` that they become; filled by a call.
    """

    def __init__(self, model: SingleStageDetector) -> None:
        super().__init__()
        self.model = model
        self.names: dict[str, Names] = {}
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """[1, 3, height, width], normalised -> the outputs in the order of their names."""
        outputs = self.model.bbox_head(self.model.extract_feat(image))
        arguments = inspect.signature(self.model.bbox_head.predict_by_feat).parameters
        self.names = {
            name: _named(name, value) for name, value in zip(arguments, outputs, strict=False)
        }
        return tuple(leaf for leaf in tree_leaves(outputs) if leaf is not None)


def _named(name: str, value: Any) -> Names:
    if value is None or isinstance(value, Tensor):
        return None if value is None else name
    if isinstance(value, list | tuple):
        return [_named(f"{name}_{index}", entry) for index, entry in enumerate(value)]
    raise QwtError(
        f"The head returns a {type(value).__name__} for {name}, which has no place among the outputs of "
        "a graph; this detector cannot be exported."
    )


def output_names(names: Names) -> list[str]:
    """All names, in the order of the outputs."""
    return [name for name in tree_leaves(names) if name is not None]


def with_tensors(names: Names, tensors: dict[str, Tensor]) -> Any:
    """What a head returns, from the tensors by their names."""
    if isinstance(names, str):
        return tensors[names]
    if isinstance(names, dict):
        return {key: with_tensors(entry, tensors) for key, entry in names.items()}
    return None if names is None else [with_tensors(entry, tensors) for entry in names]


def refuse_what_has_no_form(model: BaseDetector) -> None:
    """Check that a detector can be exported, as far as that is known without running it.

    Raises:
        QwtError: it cannot; the message names the module.
    """
    class_name = type(model).__name__
    if not (
        isinstance(model, SingleStageDetector)
        and type(model).predict is SingleStageDetector.predict
        and type(model.bbox_head).predict is BaseDenseHead.predict
    ):
        raise QwtError(
            f"A {class_name} cannot be exported: only one-stage detectors whose head mmdet runs apart from what "
            "makes boxes of its outputs (YOLOX, RetinaNet, FCOS, ATSS, RTMDet, … without masks) can."
        )
    for name, module in model.named_modules():
        if type(module).__module__.startswith("mmcv.ops"):
            raise QwtError(
                f"The module {name} is a {type(module).__name__}, an operator of mmcv's own that ONNX has "
                "no form for; this detector cannot be exported."
            )
    for name, quantizer in activation_quantizers(model).items():
        if not quantizer.is_calibrated:
            raise QwtError(
                f"The quantizer {name} has not seen any calibration image and has no grid; exclude its layer "
                "with an override (skip: true), or calibrate on more images."
            )
        if quantizer.logarithmic:
            raise QwtError(
                f"The quantizer {name} has a log-√2 grid, which integer kernels do not compute with; "
                "quantize with grids: integer."
            )
