"""A graph that returns boxes, scores and labels: mmdet's own decoding, then NonMaxSuppression."""

from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from mmdet.models import BaseDetector
from mmdet.models.dense_heads import YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import Tensor, nn

from ..errors import QwtError
from .cut import Names

OUTPUTS = ("boxes", "scores", "labels")


class CandidateBoxes(nn.Module):
    """A one-stage detector up to non-maximum suppression; ``outputs`` and ``features`` as of :class:`.cut.Cut`."""

    def __init__(self, model: BaseDetector) -> None:
        super().__init__()
        self.model = model
        self.outputs: Names = ["candidate_boxes", "candidate_scores"]
        self.features: list[Names] = []
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """[1, 3, height, width] -> boxes [1, N, 4] in pixels of the image, scores [1, classes, N]."""
        head = self.model.bbox_head
        outputs = head(self.model.extract_feat(image))
        if isinstance(head, YOLOXHead):
            return _yolox_candidates(head, *outputs)
        single = type(head)._predict_by_feat_single
        config = {**head.test_cfg, "min_bbox_size": -1}
        with mock.patch.dict(single.__globals__, filter_scores_and_topk=_keep_all):
            found = head.predict_by_feat(
                *outputs,
                batch_img_metas=[{"img_shape": None}],  # mmdet's own way to clip has no graph
                cfg=type(head.test_cfg)(config),
                with_nms=False,
            )[0]
        boxes = found.bboxes
        if getattr(head.bbox_coder, "clip_border", True):
            height, width = image.shape[2:]
            x, y = boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)
            boxes = torch.stack([x, y], 2).flatten(1)
        scores, least = found.scores, head.test_cfg.get("min_bbox_size", -1)
        if least >= 0:
            scores = scores * (boxes[:, 2:] - boxes[:, :2] > least).all(1, keepdim=True)
        return boxes[None], scores.T[None]


def _keep_all(
    scores: Tensor, threshold: float, most: int, results: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Replacement of mmdet's ``filter_scores_and_topk`` with output shapes that do not depend on the scores.

    Scores of all classes [N, classes] are 0 up to the threshold, and labels meaningless. Indices are [N, 1], so that
    factors of scores are, too.
    """
    positions = torch.arange(len(scores), device=scores.device)
    return scores * (scores > threshold), positions, positions[:, None], results


def _yolox_candidates(
    head: YOLOXHead, classes: Sequence[Tensor], boxes: Sequence[Tensor], objects: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Candidate boxes of YOLOX, which uses only the best class of each box."""
    priors = head.prior_generator.grid_priors(
        [scores.shape[2:] for scores in classes], device=classes[0].device, with_stride=True
    )
    flat_classes, flat_boxes, flat_objects = (
        torch.cat([x.flatten(2) for x in maps], 2) for maps in (classes, boxes, objects)
    )
    scores = flat_classes.sigmoid() * flat_objects.sigmoid()
    best = scores == scores.amax(1, keepdim=True)
    scores = scores * (best & (scores >= head.test_cfg.score_thr))
    return head._bbox_decode(torch.cat(priors), flat_boxes.transpose(1, 2)), scores


def check_suppression(model: BaseDetector) -> dict[str, Any]:
    """The IoU threshold of a detector's non-maximum suppression, and the most detections (−1: all), for its graph.

    Raises:
        QwtError: the graph cannot hold it; the message names the module.
    """
    head = getattr(model, "bbox_head", None)
    known = isinstance(head, YOLOXHead) or (
        isinstance(head, BaseDenseHead)
        and type(head).predict_by_feat is BaseDenseHead.predict_by_feat
        and type(head)._predict_by_feat_single is BaseDenseHead._predict_by_feat_single
    )
    if head is None or not known:
        raise QwtError(
            f"The head of a {type(model).__name__} has its own code to make boxes, which cannot be in a graph; "
            "export it without non-maximum suppression."
        )
    config = head.test_cfg
    suppression = config.nms
    if suppression.get("type", "nms") != "nms" or suppression.get("class_agnostic"):
        raise QwtError(
            f"The module bbox_head suppresses boxes with {dict(suppression)}, which ONNX has no operator for; "
            "export it without non-maximum suppression."
        )
    return {
        "iou_threshold": suppression.iou_threshold,
        "most": config.get("max_per_img", -1),
    }


def append_suppression(graph: ir.Model, settings: Mapping[str, Any]) -> Names:
    """Append non-maximum suppression to a graph of :class:`CandidateBoxes`, in place; return the outputs' names.

    The graph then returns detections with scores above 0, the highest first.
    """
    boxes, scores = graph.graph.outputs
    tape = ir.tape.Tape(graph.graph)

    def constant(name: str, value: Any, dtype: type) -> ir.Value:
        return tape.initializer(ir.tensor(np.array(value, dtype), name=f"suppression.{name}"))

    limit = settings["most"] if settings["most"] >= 0 else np.iinfo(np.int64).max
    chosen = tape.op(
        "NonMaxSuppression",
        [
            boxes,
            scores,
            constant("most", [limit], np.int64),
            constant("iou_threshold", [settings["iou_threshold"]], np.float32),
            constant("score_threshold", [0], np.float32),
        ],
    )  # image, class and box of each
    values = tape.op("GatherND", [scores, chosen])
    number = [constant(f"number_{value}", value, np.int64) for value in (0, 1, 2)]
    classes, indices = (tape.op("Gather", [chosen, number[i]], {"axis": 1}) for i in (1, 2))
    count = tape.op("Min", [tape.op("Shape", [values]), constant("limit", [limit], np.int64)])
    best, order = tape.op_multi_out("TopK", [values, count], num_outputs=2)
    first = tape.op("Gather", [boxes, number[0]], {"axis": 0})
    corners = tape.op("Gather", [first, tape.op("Gather", [indices, order])])
    labels = tape.op("Gather", [classes, order])
    graph.graph.outputs.clear()
    dtypes = (ir.DataType.FLOAT, ir.DataType.FLOAT, ir.DataType.INT64)
    for name, value, dtype in zip(OUTPUTS, (corners, best, labels), dtypes, strict=True):
        value.name, value.type = name, ir.TensorType(dtype)
        value.shape = ir.Shape(["detections", 4] if name == "boxes" else ["detections"])
        graph.graph.outputs.append(value)
    return {name: name for name in OUTPUTS}
