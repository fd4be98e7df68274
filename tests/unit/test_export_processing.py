"""What model.json tells of boxes and scores is what mmdet computes."""

import numpy as np
import pytest
import torch
from mmdet.models.dense_heads import FCOSHead, RetinaHead
from mmengine.config import ConfigDict
from qwt_mmdet.export import processing

SIZE = (64, 96)
STRIDES = (8, 16)
CLASSES = 3


def outputs(head: torch.nn.Module) -> list[list[torch.Tensor]]:
    """What a head returns for random maps."""
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(1, 8, SIZE[0] // stride, SIZE[1] // stride, generator=generator)
        for stride in STRIDES
    ]
    with torch.no_grad():
        return list(head.eval()(maps))


def candidates(head: torch.nn.Module, found: list[list[torch.Tensor]]) -> np.ndarray:
    """Boxes and scores, [n, 5], of each class of all candidates, by mmdet."""
    keep_all = ConfigDict(score_thr=-1.0, nms_pre=10_000, min_bbox_size=-1)
    meta = {"img_shape": SIZE, "scale_factor": (1.0, 1.0)}
    (result,) = head.predict_by_feat(
        *found, batch_img_metas=[meta], cfg=keep_all, rescale=False, with_nms=False
    )
    return np.column_stack([result.bboxes, result.scores])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def clipped(boxes: np.ndarray) -> np.ndarray:
    height, width = SIZE
    return np.clip(boxes, 0, [width, height, width, height])


def ordered(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(rows[:, 4])]


def test_anchors_and_deltas_give_the_boxes_of_a_retinanet():
    torch.manual_seed(0)
    head = RetinaHead(
        CLASSES, 8, feat_channels=8, stacked_convs=1, anchor_generator={
            "type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 1,
            "ratios": [0.5, 1.0], "strides": STRIDES,
        },
        bbox_coder={
            "type": "DeltaXYWHBBoxCoder", "target_means": [0.1, 0, 0, 0],
            "target_stds": [0.5, 1.0, 2.0, 1.0],
        },
    )  # fmt: skip
    found = outputs(head)
    rule = processing._anchors(head)
    rows = []
    for stride, anchors, scores, deltas in zip(STRIDES, rule["anchors"], *found, strict=True):
        y, x = np.mgrid[: scores.shape[2], : scores.shape[3]] * stride
        for number, (x1, y1, x2, y2) in enumerate(anchors):
            d = deltas[0, 4 * number : 4 * number + 4].numpy()
            d = d * np.reshape(rule["stds"], (4, 1, 1)) + np.reshape(rule["means"], (4, 1, 1))
            width, height = x2 - x1, y2 - y1
            cx, cy = x + (x1 + x2) / 2 + d[0] * width, y + (y1 + y2) / 2 + d[1] * height
            w, h = width * np.exp(d[2]), height * np.exp(d[3])
            box = np.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1).reshape(-1, 4)
            for label in range(CLASSES):
                score = sigmoid(scores[0, number * CLASSES + label].numpy()).reshape(-1, 1)
                rows.append(np.hstack([clipped(box), score]))
    assert rule["clipped"]
    expected = candidates(head, found)
    np.testing.assert_allclose(ordered(np.vstack(rows)), ordered(expected), atol=1e-3)


def test_points_and_distances_give_the_boxes_of_an_fcos():
    torch.manual_seed(0)
    head = FCOSHead(CLASSES, 8, feat_channels=8, stacked_convs=1, strides=STRIDES, norm_cfg=None)
    found = outputs(head)
    rule = processing._anchors(head)
    rows = []
    for stride, scores, distances, factors in zip(STRIDES, *found, strict=True):
        y, x = (np.mgrid[: scores.shape[2], : scores.shape[3]] + rule["offset"]) * stride
        b = distances[0].numpy()
        box = np.stack([x - b[0], y - b[1], x + b[2], y + b[3]], -1).reshape(-1, 4)
        for label in range(CLASSES):
            score = sigmoid(scores[0, label].numpy()) * sigmoid(factors[0, 0].numpy())
            rows.append(np.hstack([clipped(box), score.reshape(-1, 1)]))
    expected = candidates(head, found)
    np.testing.assert_allclose(ordered(np.vstack(rows)), ordered(expected), atol=1e-3)


@pytest.mark.parametrize("changed", ["add_ctr_clamp", None])
def test_a_head_that_decodes_in_another_way_has_no_rule(changed):
    head = FCOSHead(CLASSES, 8, feat_channels=8, stacked_convs=1, strides=STRIDES, norm_cfg=None)
    if changed:
        setattr(head.bbox_coder, changed, True)
    assert processing._decodes_as_mmdet_does(head) == (changed is None)
