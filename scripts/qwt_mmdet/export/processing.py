"""What happens to an image before the graph, and to the graph's outputs behind it, in words and numbers.

For those who run an exported file without mmdet; :func:`.loading.load_exported` takes mmdet's own code.
"""

from typing import Any

from mmdet.models import BaseDetector
from mmdet.models.dense_heads import YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.task_modules import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from torch import nn

from ..data.loaders import transforms_by_name
from .cut import dense_head

RESIZE = (
    "with keep_ratio: scale = min(long / max(w, h), short / min(w, h)) for the longer and the shorter of width "
    "and height, new sides int(side * scale + 0.5); without: to width and height"
)


def preprocessing(model: BaseDetector) -> dict[str, Any]:
    """What happens to an image before the graph, in this order: resize, pad, colours, mean and std, pad."""
    given = model.data_preprocessor
    transforms = transforms_by_name(model.cfg)
    normalises = getattr(given, "_enable_normalize", False)
    resize, pad = (transforms.get(name) for name in ("Resize", "Pad"))
    found: dict[str, Any] = {"layout": "NCHW", "type": "float32", "resize": None, "pad": None}
    if resize is not None and "scale" in resize:
        width, height = resize["scale"]
        found["resize"] = {
            "width": width,
            "height": height,
            "keep_ratio": resize.get("keep_ratio", False),
            "interpolation": resize.get("interpolation", "bilinear"),
            "rule": RESIZE,
        }
    if pad is not None:
        value = pad.get("pad_val", 0)
        found["pad"] = {
            "size": pad.get("size") and list(pad["size"])[::-1],
            "square": pad.get("pad_to_square", False),
            "divisor": pad.get("size_divisor"),
            "value": value.get("img", 0) if isinstance(value, dict) else value,
            "where": "right and below",
        }
    return {
        **found,
        "colors": "RGB" if getattr(given, "_channel_conversion", False) else "BGR",
        "mean": given.mean.flatten().tolist() if normalises else [0.0, 0.0, 0.0],
        "std": given.std.flatten().tolist() if normalises else [1.0, 1.0, 1.0],
        "size_divisor": given.pad_size_divisor,
        "pad_value": given.pad_value,
    }


def _yolox(head: YOLOXHead) -> dict[str, Any]:
    return {
        "scores": "of the most probable class: sigmoid(cls_scores) * sigmoid(objectnesses)",
        "boxes": "with stride s, in column x and row y, of bbox_preds b: centre ((x + b0) s, (y + b1) s), width "
        "exp(b2) s, height exp(b3) s",
    }


def _anchors(head: Any) -> dict[str, Any]:
    """Of heads that decode boxes as mmdet's base class does."""
    activation = (
        "sigmoid" if getattr(head, "use_sigmoid_cls", True) else "softmax (background last)"
    )
    coder = head.bbox_coder
    found = {
        "clipped": coder.clip_border,  # to the image as it is after resizing
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
        "centre (cx, cy), width w and height h, and d = bbox_preds * stds + means, d2 and d3 clipped to "
        "±log(1000 / 16): centre (cx + d0 w, cy + d1 h), width w exp(d2), height h exp(d3)",
    }


def _decodes_as_mmdet_does(head: nn.Module) -> bool:
    decodable = (DistancePointBBoxCoder, DeltaXYWHBBoxCoder)
    own = ("predict_by_feat", "_predict_by_feat_single", "_bbox_post_process")
    coder = getattr(head, "bbox_coder", None)
    return (
        type(coder) in decodable
        and not getattr(coder, "add_ctr_clamp", False)
        and all(getattr(type(head), name) is getattr(BaseDenseHead, name) for name in own)
    )


def postprocessing(model: BaseDetector) -> dict[str, Any]:
    """How boxes, in pixels of the graph's input, and scores come from the outputs of the first graph's head.

    ``scores`` and ``boxes`` are None where the head has rules of its own that only mmdet's code tells.
    """
    head = model.get_submodule(dense_head(model))
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
        "nms": nms and {**nms, "class_by_class": True},
        "boxes_per_image": test.get("max_per_img"),
    }
