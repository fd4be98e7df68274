"""Description of preprocessing and postprocessing, in words and numbers.

It is for users who run an exported file without mmdet; :func:`.loading.load_exported` uses mmdet's own code.
"""

import math
from collections.abc import Callable
from typing import Any

import mmcv.transforms
import numpy as np
from mmcv.ops import RoIAlign
from mmdet.datasets import transforms
from mmdet.models import BaseDetector, BBoxHead, DetDataPreprocessor, StandardRoIHead
from mmdet.models.dense_heads import RPNHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from mmdet.registry import TRANSFORMS
from mmengine.registry import DefaultScope
from torch import nn

from ..data.loaders import inference_pipeline, transform_name
from ..errors import QwtError, reason
from .cut import cut_of

RESIZE = (
    "with keep_ratio: scale = min(long / max(w, h), short / min(w, h)) for the longer and the shorter of width "
    "and height, new sides int(side * scale + 0.5); without: to width and height"
)
DELTAS = (
    "centre (cx, cy), width w and height h, and d = bbox_preds * stds + means, d2 and d3 clipped to ±log(1000 / 16): "
    "centre (cx + d0 w, cy + d1 h), width w exp(d2), height h exp(d3)"
)
REGIONS = (
    "a box of width w and height h is cut out of the map floor(log2(sqrt(w h) / finest_scale + 1e-6)), 0 being the first "
    "and the last one being the limit, by average RoIAlign in size[0] × size[1] bins (sampling_ratio 0: ceil(side of a "
    "bin in the map) points for each side)"
)
AROUND = (
    "around: a side becomes (side | or) + plus, or the next multiple of divisor; pixel side // 2 becomes pixel new "
    "side // 2, and the image keeps at most new side // 2 pixels before it and as many from it on"
)

SIGMOID, SOFTMAX = "sigmoid", "softmax (background last)"

Found = dict[str, Any]
"""The description of the preprocessing so far; the key ``mean`` is set by a normalisation."""


def _refusal(step: Any, why: str = "") -> QwtError:
    return QwtError(
        f"The test pipeline has {type(step).__name__}{why}, and the description of an exported file cannot tell what "
        "that does to an image; take a pipeline without it (test_dataloader.dataset.pipeline in the model config)."
    )


def _load(found: Found, step: Any) -> None:
    found["load"] = {
        "decoder": step.imdecode_backend,
        "color_type": step.color_type,
        "to_float32": step.to_float32,
    }


def _resize(found: Found, step: Any) -> None:
    if found["resize"] or found["pad"] or "mean" in found:
        raise _refusal(step, " behind another Resize, a padding or a normalisation")
    if step.scale is None or not all(math.isfinite(side) for side in step.scale):
        raise _refusal(step, " without a scale in pixels")
    width, height = step.scale
    found["resize"] = {
        "width": width,
        "height": height,
        "keep_ratio": step.keep_ratio,
        "interpolation": step.interpolation,
        "library": step.backend,
        "rule": RESIZE,
    }


def _pad(found: Found, step: Any) -> None:
    if step.padding_mode != "constant":
        raise _refusal(step, f" with padding_mode {step.padding_mode}")
    rule = {
        "size": step.size and list(step.size)[::-1],
        "square": step.pad_to_square,
        "divisor": step.size_divisor,
    }
    _add_padding(found, step, step.pad_val.get("img", 0), rule, "right and below")


def _pad_around(found: Found, step: Any) -> None:
    if not step.test_mode:
        raise _refusal(step, " without test_mode")
    mode, number = step.test_pad_mode
    rule: dict[str, Any] = {"size": None, "square": False, "divisor": None}
    rule |= (
        {"divisor": number}
        if mode == "size_divisor"
        else {"or": number, "plus": step.test_pad_add_pix}
    )
    _add_padding(found, step, list(step.mean), rule, AROUND)


def _add_padding(found: Found, step: Any, value: Any, rule: dict[str, Any], where: str) -> None:
    if found["pad"]:
        raise _refusal(step, " behind another padding")
    if "mean" in found:  # the description gives pixel values before normalisation
        pixel = value * np.asarray(found["std"]) + found["mean"]
        value = (pixel[::-1] if found["colors"] == "RGB" else pixel).tolist()
    found["pad"] = {**rule, "value": value, "where": where}


def _add_normalization(found: Found, swaps: bool, mean: Any, std: Any) -> None:
    """Add a normalisation after earlier ones; its means and deviations are in the order of swapped colours."""
    mean, std = (np.asarray(values, np.float64).flatten() for values in (mean, std))
    colors = found.get("colors", "BGR")
    before = [
        np.asarray(found.get(key, [start] * 3)) for key, start in (("mean", 0.0), ("std", 1.0))
    ]
    if swaps:
        colors, before = colors[::-1], [values[::-1] for values in before]
    found["colors"] = colors
    found["mean"] = (before[0] + before[1] * mean).tolist()
    found["std"] = (before[1] * std).tolist()


def _flip(found: Found, step: Any) -> None:
    if np.any(step.prob):
        raise _refusal(step, f" with the probability {step.prob}")


STEPS: dict[type, Callable[[Found, Any], None]] = {
    mmcv.transforms.LoadImageFromFile: _load,
    mmcv.transforms.Resize: _resize,
    transforms.Resize: _resize,
    mmcv.transforms.Pad: _pad,
    transforms.Pad: _pad,
    transforms.RandomCenterCropPad: _pad_around,
    mmcv.transforms.Normalize: lambda found, step: _add_normalization(
        found, step.to_rgb, step.mean, step.std
    ),
    mmcv.transforms.RandomFlip: _flip,
    transforms.RandomFlip: _flip,
    # these change no pixel
    transforms.PackDetInputs: lambda found, step: None,
    transforms.FilterAnnotations: lambda found, step: None,
    transforms.LoadEmptyAnnotations: lambda found, step: None,
}
"""Functions that add a transform to the description; all others are refused."""


def preprocessing(model: BaseDetector) -> dict[str, Any]:
    """The preprocessing of an image, in this order: load, resize, pad, colours, mean and std, pad.

    Raises:
        QwtError: the test pipeline or the data preprocessor has another transform.
    """
    found: Found = {"layout": "NCHW", "type": "float32", "load": None, "resize": None, "pad": None}
    for transform in inference_pipeline(model.cfg):
        try:
            with DefaultScope.overwrite_default_scope("mmdet"):
                step = TRANSFORMS.build(transform)
        except Exception as error:
            raise QwtError(
                f"The transform {transform_name(transform)} of the test pipeline cannot be built: {reason(error)}."
            ) from error
        if type(step) not in STEPS:
            raise _refusal(step)
        STEPS[type(step)](found, step)
    given = model.data_preprocessor
    if type(given).forward is not DetDataPreprocessor.forward:
        raise QwtError(
            f"The data preprocessor is a {type(given).__name__}, and the description of an exported file cannot tell "
            "what that does to an image; only a DetDataPreprocessor can be exported."
        )
    normalises = getattr(given, "_enable_normalize", False)
    _add_normalization(
        found,
        given._channel_conversion,
        given.mean.tolist() if normalises else 0,
        given.std.tolist() if normalises else 1,
    )
    return {**found, "size_divisor": given.pad_size_divisor, "pad_value": given.pad_value}


def _yolox(head: YOLOXHead) -> dict[str, Any]:
    return {
        "scores": "of the most probable class: sigmoid(cls_scores) * sigmoid(objectnesses)",
        "boxes": "with stride s, in column x and row y, of bbox_preds b: centre ((x + b0) s, (y + b1) s), width "
        "exp(b2) s, height exp(b3) s",
    }


def _anchors(head: Any) -> dict[str, Any]:
    """Rules of heads that decode boxes as mmdet's base class does."""
    activation = SIGMOID if getattr(head, "use_sigmoid_cls", True) else SOFTMAX
    coder = head.bbox_coder
    found = {
        "clipped": coder.clip_border,  # to the image as the test pipeline returns it
        "activation": activation,
        "scores": f"of each class: {activation} of cls_scores, whose channels are classes within anchors; where "
        "there are score_factors, times their sigmoid",
    }
    if type(coder) is DistancePointBBoxCoder:
        return found | {
            "offset": head.prior_generator.offset,
            "boxes": "with stride s, in column x and row y, of bbox_preds b: from ((x + offset) s - b0, (y + "
            "offset) s - b1) to ((x + offset) s + b2, (y + offset) s + b3)",
        }
    return found | {
        "anchors": [level.tolist() for level in head.prior_generator.base_anchors],
        "means": list(coder.means),
        "stds": list(coder.stds),
        "boxes": "with stride s, in column x and row y, of an anchor (x1, y1, x2, y2) + (x s, y s, x s, y s) with "
        + DELTAS,
    }


def _decodes_as_mmdet_does(head: nn.Module) -> bool:
    decodable = (DistancePointBBoxCoder, DeltaXYWHBBoxCoder)
    own = ("predict_by_feat", "_predict_by_feat_single", "_bbox_post_process")
    coder = getattr(head, "bbox_coder", None)
    return (
        type(coder) in decodable
        and not getattr(coder, "add_ctr_clamp", False)
        and any(
            all(getattr(type(head), name) is getattr(base, name) for name in own)
            for base in (BaseDenseHead, RPNHead)
        )
    )


def _suppression(head: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the non-maximum suppression, with the groups of boxes that suppress each other."""
    agnostic = settings.pop("class_agnostic", False)
    if isinstance(head, RPNHead):  # which has no classes
        return {**settings, "class_by_class": False, "level_by_level": not agnostic}
    return {**settings, "class_by_class": not agnostic}


def _second_stage(model: BaseDetector) -> dict[str, Any] | None:
    """Rules of a second stage; None without one, or where only mmdet's code defines them."""
    roi_head: Any = getattr(model, "roi_head", None)
    if type(roi_head) is not StandardRoIHead:
        return None
    extractor, head = roi_head.bbox_roi_extractor, roi_head.bbox_head
    own = ("predict_by_feat", "_predict_by_feat_single")
    known = all(getattr(type(head), name) is getattr(BBoxHead, name) for name in own)
    if not known or head.custom_activation or type(head.bbox_coder) is not DeltaXYWHBBoxCoder:
        return None
    if type(extractor) is not SingleRoIExtractor:
        return None
    layers = list(extractor.roi_layers)
    if any(type(layer) is not RoIAlign or layer.pool_mode != "avg" for layer in layers):
        return None
    test = dict(roi_head.test_cfg)
    coder = head.bbox_coder
    return {
        "regions": {
            "rule": REGIONS,
            "strides": list(extractor.featmap_strides),
            "finest_scale": extractor.finest_scale,
            "size": list(layers[0].output_size),
            "sampling_ratio": layers[0].sampling_ratio,
            "aligned": layers[0].aligned,
        },
        "activation": SOFTMAX,
        "scores": f"of each class: {SOFTMAX} of cls_scores",
        "means": list(coder.means),
        "stds": list(coder.stds),
        "class_agnostic": head.reg_class_agnostic,  # whether there is one box for all classes
        "clipped": coder.clip_border,
        "boxes": f"of each class, of a proposal with {DELTAS}",
        "score_threshold": test["score_thr"],
        "nms": _suppression(head, dict(test["nms"])),
        "boxes_per_image": test["max_per_img"],
    }


def postprocessing(model: BaseDetector) -> dict[str, Any]:
    """The rules by which boxes, in pixels of the graph's input, and scores follow from the first graph's outputs.

    Those of a detector with two stages are its proposals; ``second_stage`` has the rules of what becomes of them.
    ``scores`` and ``boxes`` are None where only mmdet's code defines the rules.
    """
    head = cut_of(model).head
    test = head.test_cfg or {}
    strides = getattr(getattr(head, "prior_generator", None), "strides", [])
    rules: dict[str, Any] = {"scores": None, "boxes": None}
    if type(head) is YOLOXHead:
        rules = _yolox(head)
    elif _decodes_as_mmdet_does(head):
        rules = _anchors(head)
    nms = test.get("nms")
    return {
        "head": type(head).__name__,
        "strides": [stride[0] if isinstance(stride, tuple) else stride for stride in strides],
        **rules,
        "score_threshold": test.get("score_thr"),
        "candidates_per_level": test.get("nms_pre"),
        "nms": nms and _suppression(head, dict(nms)),
        "boxes_per_image": test.get("max_per_img"),
        "least_side": test.get("min_bbox_size", -1),  # wider and higher boxes are kept; -1: all
        "second_stage": _second_stage(model),
    }
