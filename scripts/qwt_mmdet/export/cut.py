"""The parts of a detector that become ONNX graphs; mmdet's own Python code runs between them.

The first graph holds backbone, neck and the dense head. Each head of a second stage, which takes regions, is a
graph.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmdet.models import (
    BaseDetector,
    CascadeRoIHead,
    MaskScoringRoIHead,
    SingleStageDetector,
    StandardRoIHead,
    TwoStageDetector,
)
from mmdet.models.backbones.swin import ShiftWindowMSA
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.base_mask_head import BaseMaskHead
from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import QwtError
from ..quantization.convert import activation_quantizers

Names = str | None | list["Names"] | dict[str, "Names"]
"""The nested outputs of a graph, with names in place of tensors; a dictionary represents a tuple."""

DENSE_HEADS: dict[type[BaseDetector], tuple[str, type[BaseDenseHead | BaseMaskHead]]] = {
    SingleStageDetector: ("bbox_head", BaseDenseHead),
    SingleStageInstanceSegmentor: ("mask_head", BaseMaskHead),
    TwoStageDetector: ("rpn_head", BaseDenseHead),
}
"""Name of the dense head and the class that defines its ``predict``, by the class that defines the detector's."""

REGION_HEADS = ("shared_head", "bbox_head", "mask_head", "mask_iou_head")
"""Modules of a second stage that take regions: [regions, channels, height, width]."""


class FirstGraph(nn.Module):
    """Backbone, neck and dense head: an image to the raw outputs of the head.

    A call fills the attributes.

    Attributes:
        outputs: names of the head's outputs, after the arguments of ``predict_by_feat``.
        features: names of the neck's maps for a second stage; empty without one.
    """

    def __init__(self, model: BaseDetector) -> None:
        super().__init__()
        self.model = model
        self.head = model.get_submodule(dense_head(model))
        self.outputs: Names = None
        self.features: list[Names] = []
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """[1, 3, height, width], normalised -> the outputs in the order of their names, and the maps."""
        features = self.model.extract_feat(image)
        outputs = self.head(features)
        kept = features if isinstance(self.model, TwoStageDetector) else ()
        self.outputs = _output_names(self.head, outputs)
        self.features = [f"feature_{level}" for level in range(len(kept))]
        return *_tensors(outputs), *kept


class RegionGraph(nn.Module):
    """A head of the second stage.

    Attributes:
        outputs: names of its outputs, after the arguments of ``predict_by_feat``; set by a call.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.outputs: Names = None
        self.eval()

    def forward(self, *regions: Tensor) -> tuple[Tensor, ...]:
        """Maps of regions, [regions, channels, height, width] -> the outputs in the order of their names."""
        outputs = self.head(*regions)
        self.outputs = _output_names(self.head, outputs)
        return _tensors(outputs)


def dense_head(model: BaseDetector) -> str:
    """Name of the head behind the neck.

    Raises:
        QwtError: mmdet does not separate it from the code that makes boxes of its outputs.
    """
    predict = getattr(type(model), "predict", None)
    entries = [entry for detector, entry in DENSE_HEADS.items() if detector.predict is predict]
    if not entries or (entries[0][0] == "mask_head" and model.with_bbox):
        raise QwtError(
            f"A {type(model).__name__} cannot be exported: mmdet must run its head separately from the code that "
            "makes boxes or masks of the outputs (as of YOLOX, RetinaNet, FCOS, RTMDet, SOLO, Faster R-CNN)."
        )
    name, base = entries[0]
    head = getattr(model, name)
    if type(head).predict is not base.predict:
        raise QwtError(
            f"The module {name} is a {type(head).__name__}, which mmdet does not run separately from the code that "
            "makes boxes of its outputs; this detector cannot be exported."
        )
    return name


def region_heads(model: BaseDetector) -> list[str]:
    """Names of the modules of a second stage that become graphs; one for each stage of a cascade.

    Raises:
        QwtError: the second stage does not run them as mmdet's standard and cascade heads do.
    """
    roi_head = getattr(model, "roi_head", None)
    if roi_head is None:
        return []
    known = (StandardRoIHead, CascadeRoIHead, MaskScoringRoIHead)
    if type(roi_head).forward not in [cls.forward for cls in known]:
        raise QwtError(
            f"The module roi_head is a {type(roi_head).__name__}, whose heads take other inputs than maps of "
            "regions; this detector cannot be exported."
        )
    found = []
    for name, head in roi_head.named_children():
        stages = [name]
        if isinstance(head, nn.ModuleList):
            stages = [f"{name}.{stage}" for stage in range(len(head))]
        found += [f"roi_head.{stage}" for stage in stages if name in REGION_HEADS]
    return found


def most_regions(model: BaseDetector, head: str) -> int:
    """Most regions of an image that a head of the second stage gets: proposals, or detections for a mask head."""
    before = model.test_cfg.rcnn if "mask" in head else model.test_cfg.rpn
    return before.max_per_img


def region_inputs(model: BaseDetector, image: Tensor) -> dict[str, dict[str, Tensor]]:
    """The inputs of each head of the second stage for three regions of an image, by the head's name.

    Args:
        image: [1, 3, height, width].
    """
    height, width = image.shape[2:]
    boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0.5, 1, 1]])
    regions = InstanceData(bboxes=boxes * torch.tensor([width, height, width, height]))
    sample = DetDataSample(metainfo={"img_shape": (height, width)})
    found: dict[str, dict[str, Tensor]] = {}
    hooks = []
    for name in region_heads(model):

        def keep(head: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            arguments = inspect.signature(head.forward).parameters
            found[name] = dict(zip(arguments, inputs, strict=False))

        hooks.append(model.get_submodule(name).register_forward_pre_hook(keep))
    try:
        if hooks:
            model.roi_head(model.extract_feat(image), [regions], [sample])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def one_size_only(model: nn.Module) -> str | None:
    """Name of a module whose graph is for one image size only (shifted windows, by their mask); None without."""
    return next(
        (name for name, module in model.named_modules() if isinstance(module, ShiftWindowMSA)), None
    )


def _output_names(head: nn.Module, outputs: Any) -> Names:
    """The nested outputs of a head, with names in place of tensors."""
    predict = getattr(head, "predict_by_feat", None)
    arguments = [] if predict is None else list(inspect.signature(predict).parameters)
    arguments = [name for name in arguments if name != "rois"] or ["output"]
    if isinstance(outputs, Tensor):
        return arguments[0]
    return {
        name: _named(name, value, head) for name, value in zip(arguments, outputs, strict=False)
    }


def _named(name: str, value: Any, head: nn.Module) -> Names:
    if value is None or isinstance(value, Tensor):
        return None if value is None else name
    if isinstance(value, list | tuple):
        return [_named(f"{name}_{index}", entry, head) for index, entry in enumerate(value)]
    raise QwtError(
        f"A {type(head).__name__} returns a {type(value).__name__} for {name}, which has no place among the "
        "outputs of a graph; this detector cannot be exported."
    )


def _tensors(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(outputs) if leaf is not None)


def flat_names(names: Names) -> list[str]:
    """All names, in the order of the outputs."""
    return [name for name in tree_leaves(names) if name is not None]


def with_tensors(names: Names, tensors: Mapping[str, Tensor]) -> Any:
    """The nested outputs of a graph, from tensors by name."""
    if isinstance(names, str):
        return tensors[names]
    if isinstance(names, dict):
        return tuple(with_tensors(entry, tensors) for entry in names.values())
    return None if names is None else [with_tensors(entry, tensors) for entry in names]


def _deforms(module_class: type[nn.Module]) -> bool:
    """Whether a class's own methods call mmcv's deformable convolution as a function, as TOOD's head does."""
    methods = [method for method in vars(module_class).values() if inspect.isfunction(method)]
    return any("deform_conv2d" in method.__code__.co_names for method in methods)


def check_exportable(model: BaseDetector) -> None:
    """Check that a detector can be exported, as far as possible without running it.

    Raises:
        QwtError: it cannot; the message names the module.
    """
    modules = ("backbone", "neck", dense_head(model), *region_heads(model))
    for name, module in model.named_modules():
        module_class = type(module)
        if not any(name == start or name.startswith(f"{start}.") for start in modules):
            if any(True for _ in module.parameters(recurse=False)):
                raise QwtError(
                    f"The module {name} is a {module_class.__name__} with weights outside of the modules that are "
                    f"exported as graphs ({', '.join(modules)}); this detector cannot be exported."
                )
        elif module_class.__module__.startswith("mmcv.ops") or _deforms(module_class):
            raise QwtError(
                f"The module {name} is a {module_class.__name__}, which uses an operator of mmcv that ONNX lacks; this "
                "detector cannot be exported."
            )
    for name, quantizer in activation_quantizers(model).items():
        if not quantizer.is_calibrated:
            raise QwtError(
                f"The quantizer {name} did not run on any calibration image and has no grid; exclude its layer "
                "with an override (skip: true), or calibrate on more images."
            )
        if quantizer.logarithmic:
            raise QwtError(
                f"The quantizer {name} has a log-√2 grid, which integer kernels do not support; quantize with "
                "grids: integer."
            )
