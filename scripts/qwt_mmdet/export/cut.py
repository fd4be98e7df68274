"""The parts of a detector that become ONNX graphs; mmdet's own Python code runs between them.

The first graph takes an image. Each head of a second stage, which takes regions, is a further graph. A :class:`Cut`
does this for a family of detectors; docs/extending/cut.md shows how to add one.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmdet.models import (
    BaseDetector,
    SingleStageDetector,
    TwoStageDetector,
)
from mmdet.models.backbones.swin import ShiftWindowMSA
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.base_mask_head import BaseMaskHead
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.models.detectors.single_stage_instance_seg import SingleStageInstanceSegmentor
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..detectors.forward import computes_on_regions
from ..errors import QwtError, Registry
from ..quantization.convert import activation_quantizers
from .operators import lacking

Names = str | None | list["Names"] | dict[str, "Names"]
"""The nested outputs of a graph, with names in place of tensors; a dictionary represents a tuple."""

First = Callable[[Tensor], tuple[Any, tuple[Tensor, ...]]]
"""The first graph: [images, 3, height, width], normalised, to the head's outputs and the maps for a second stage."""

REGION_HEADS = ("shared_head", "bbox_head", "mask_head", "mask_iou_head")
"""Modules of a second stage that take regions: [regions, channels, height, width]."""


class Cut(nn.Module):
    """How the detectors of a family are cut into graphs, and put together again. It computes the first graph.

    Attributes:
        head: the module whose ``predict_by_feat`` takes the outputs of the first graph.
        parts: names of the modules that the graphs hold.
        outputs: names of the head's outputs, after the arguments of ``predict_by_feat``; set by a call.
        features: names of the neck's maps for a second stage, empty without one; set by a call.

    Raises:
        QwtError: it cannot be exported all the same; the message names the module.
    """

    head: Any
    parts: tuple[str, ...]

    def __init__(self, model: BaseDetector) -> None:
        super().__init__()
        self.model = model
        self.outputs: Names = None
        self.features: list[Names] = []

    @classmethod
    def matches(cls, model: BaseDetector) -> bool:
        """Whether a detector is of this family."""
        raise NotImplementedError

    def first(self, image: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        """What the first graph computes, [1, 3, height, width] (see :data:`First`)."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The outputs in the order of their names, and the maps."""
        outputs, maps = self.first(image)
        self.outputs = _output_names(self.head, outputs)
        self.features = [f"feature_{level}" for level in range(len(maps))]
        return *flat(outputs), *maps

    def regions(self, image: Tensor) -> dict[str, dict[str, Tensor]]:
        """Examples of inputs of each head that takes regions, [regions, …], by the name of its module."""
        return {}

    def most_regions(self, head: str) -> int:
        """Most regions of an image that such a head gets."""
        raise NotImplementedError

    def install(self, first: First, heads: Mapping[str, Callable[..., Any]]) -> None:
        """Let graphs compute in place of the modules: the first one, and those of heads, by name."""
        raise NotImplementedError


CUTS: Registry[type[Cut]] = Registry("cut")
register_cut = CUTS.register
"""Decorator: the class, under a name, cuts a family of detectors. The last one that matches a detector is used."""


def cut_of(model: BaseDetector) -> Cut:
    """The cut of a detector; a QwtError if it cannot be exported."""
    for cut in reversed(CUTS.values()):
        if cut.matches(model):
            return cut(model)
    raise QwtError(
        f"A {type(model).__name__} cannot be exported: mmdet must run its head separately from the code that "
        "makes boxes or masks of the outputs (as of YOLOX, RetinaNet, FCOS, RTMDet, SOLO, Faster R-CNN)."
    )


class _Features(tuple):
    """The neck's maps, with the dense head's outputs from the same graph."""

    head: Any


@register_cut("single_stage")
class SingleStage(Cut):
    """A graph of backbone, neck and dense head, whose submodule is ``name``.

    ``detector`` and ``base`` are the classes that define ``predict`` of the detector and of the head.
    """

    detector: type[BaseDetector] = SingleStageDetector
    name: str = "bbox_head"
    base: type[BaseDenseHead | BaseMaskHead] = BaseDenseHead

    def __init__(self, model: BaseDetector) -> None:
        super().__init__(model)
        self.head, self.parts = model.get_submodule(self.name), ("backbone", "neck", self.name)
        if type(self.head).predict is not self.base.predict:
            raise QwtError(
                f"The module {self.name} is a {type(self.head).__name__}, which mmdet does not run separately from "
                "the code that makes boxes of its outputs; this detector cannot be exported."
            )

    @classmethod
    def matches(cls, model: BaseDetector) -> bool:
        """Whether it predicts as the class does."""
        return getattr(type(model), "predict", None) is cls.detector.predict

    def first(self, image: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        """Backbone, neck and head."""
        return self.head(self.model.extract_feat(image)), ()

    def install(self, first: First, heads: Mapping[str, Callable[..., Any]]) -> None:
        """The graph extracts features; the head returns what came with them."""

        def extract(image: Tensor) -> _Features:
            outputs, maps = first(image)
            features = _Features(maps)
            features.head = outputs
            return features

        self.model.backbone = self.model.neck = nn.Identity()
        self.model.extract_feat = extract
        self.head.forward = lambda features: features.head
        for name, run in heads.items():
            self.model.get_submodule(name).forward = run


@register_cut("transformer")
class Transformer(Cut):
    """One graph of backbone, neck, transformer and head (DETR and its kin), for images without padding."""

    def __init__(self, model: BaseDetector) -> None:
        super().__init__(model)
        self.head = model.bbox_head
        children = [name for name, _ in model.named_children() if name != "data_preprocessor"]
        self.parts = ("", *children)  # the detector itself has weights, too
        divisor = model.data_preprocessor.pad_size_divisor
        if divisor > 1:
            raise QwtError(
                f"The data preprocessor pads images to multiples of {divisor}, and a {type(model).__name__} leaves the "
                "padding out by a mask, which its graph does not have; export it with pad_size_divisor=1."
            )

    @classmethod
    def matches(cls, model: BaseDetector) -> bool:
        """Whether it predicts as the class does."""
        return getattr(type(model), "predict", None) is DetectionTransformer.predict

    def first(self, image: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        """All of it; of the decoder's layers, the last one's outputs."""
        shape = tuple(image.shape[2:])
        sample = DetDataSample(metainfo={"img_shape": shape, "batch_input_shape": shape})
        maps = self.model.extract_feat(image)
        states = self.model.forward_transformer(maps, [sample])
        return tuple(output[-1:] for output in self.head(**states)), ()

    def install(self, first: First, heads: Mapping[str, Callable[..., Any]]) -> None:
        """The graph extracts features; what comes after it passes its outputs on."""

        def predict(outputs: Any, batch_data_samples: Any, rescale: bool = True) -> Any:
            metas = [sample.metainfo for sample in batch_data_samples]
            return self.head.predict_by_feat(*outputs, batch_img_metas=metas, rescale=rescale)

        self.model.extract_feat = lambda image: first(image)[0]
        self.model.forward_transformer = lambda outputs, samples: {"outputs": outputs}
        self.head.forward = lambda outputs: outputs
        self.head.predict = predict


@register_cut("instance_segmentation")
class InstanceSegmentation(SingleStage):
    """The same, with a head that makes masks."""

    detector, name, base = SingleStageInstanceSegmentor, "mask_head", BaseMaskHead

    @classmethod
    def matches(cls, model: BaseDetector) -> bool:
        """Whether there is no other head."""
        return super().matches(model) and not model.with_bbox


@register_cut("two_stage")
class TwoStage(SingleStage):
    """A further graph for each head of the second stage, one for each stage of a cascade."""

    detector, name = TwoStageDetector, "rpn_head"

    def __init__(self, model: BaseDetector) -> None:
        super().__init__(model)
        if not computes_on_regions(model.roi_head):
            raise QwtError(
                f"The module roi_head is a {type(model.roi_head).__name__}, whose heads take other inputs than maps of "
                "regions; this detector cannot be exported."
            )
        for name, head in model.roi_head.named_children():
            stages = [name]
            if isinstance(head, nn.ModuleList):
                stages = [f"{name}.{stage}" for stage in range(len(head))]
            if name in REGION_HEADS:
                self.parts += tuple(f"roi_head.{stage}" for stage in stages)

    def first(self, image: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        """Backbone, neck and head, with the neck's maps."""
        features = self.model.extract_feat(image)
        return self.head(features), features

    def regions(self, image: Tensor) -> dict[str, dict[str, Tensor]]:
        """What the heads get for three regions."""
        height, width = image.shape[2:]
        boxes = torch.tensor([[0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0.5, 1, 1]])
        regions = InstanceData(bboxes=boxes * torch.tensor([width, height, width, height]))
        sample = DetDataSample(metainfo={"img_shape": (height, width)})
        found: dict[str, dict[str, Tensor]] = {}
        with contextlib.ExitStack() as stack:
            for name in [name for name in self.parts if name.startswith("roi_head.")]:

                def keep(head: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                    arguments = inspect.signature(head.forward).parameters
                    found[name] = dict(zip(arguments, inputs, strict=False))

                head = self.model.get_submodule(name)
                stack.callback(head.register_forward_pre_hook(keep).remove)
            self.model.roi_head(self.model.extract_feat(image), [regions], [sample])
        return found

    def most_regions(self, head: str) -> int:
        """The number of proposals, or of detections for a mask head."""
        settings = self.model.test_cfg
        return (settings.rcnn if "mask" in head else settings.rpn).max_per_img


class RegionGraph(nn.Module):
    """A head of the second stage; a call sets ``outputs``, as of :class:`Cut`."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.outputs: Names = None
        self.eval()

    def forward(self, *regions: Tensor) -> tuple[Tensor, ...]:
        """Maps of regions, [regions, channels, height, width] -> the outputs in the order of their names."""
        outputs = self.head(*regions)
        self.outputs = _output_names(self.head, outputs)
        return tuple(flat(outputs))


def one_size_only(model: BaseDetector) -> str | None:
    """Why a detector's graph is for one image size only; None where it takes others."""
    if isinstance(model, DetectionTransformer):
        return f"The graph of a {type(model).__name__} holds the sizes of its maps"
    for name, module in model.named_modules():
        if isinstance(module, ShiftWindowMSA):
            return (
                f"The module {name} computes in shifted windows, whose mask is for one image size"
            )
    return None


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


def flat(nested: Any) -> list[Any]:
    """The names, or the tensors, of nested outputs in their order."""
    return [leaf for leaf in tree_leaves(nested) if leaf is not None]


def with_tensors(names: Names, tensors: Mapping[str, Tensor]) -> Any:
    """The nested outputs of a graph, from tensors by name."""
    found = tree_map(lambda name: None if name is None else tensors[name], names)
    return tuple(found.values()) if isinstance(found, dict) else found


def check_exportable(model: BaseDetector) -> None:
    """Check that a detector can be exported, as far as possible without running it."""
    modules = cut_of(model).parts
    for name, module in model.named_modules():
        module_class = type(module)
        if not any(name == start or name.startswith(f"{start}.") for start in modules):
            if any(True for _ in module.parameters(recurse=False)):
                raise QwtError(
                    f"The module {name} is a {module_class.__name__} with weights outside of the modules that are "
                    f"exported as graphs ({', '.join(modules)}); this detector cannot be exported."
                )
        elif lacking(module_class):
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
