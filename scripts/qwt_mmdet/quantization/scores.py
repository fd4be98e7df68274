"""Maps of a detector's own scores, for weighting positions by where it sees objects."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models import BaseDetector
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import Tensor

from ..detectors.forward import dense_head


def level_scores(model: BaseDetector, image: dict[str, Any]) -> list[Tensor] | None:
    """The largest class score (times objectness or centerness) at each position of each level of the dense head.

    Returns:
        A map [height, width] for each level, of a one-stage detector's head or of a region proposal network, 0 to 1;
        None for a detector without such scores (DETR).
    """
    head = dense_head(model)
    if head is None:
        return None
    features = model.extract_feat(model.data_preprocessor(image, False)["inputs"])
    return _level_scores(head, head(features))


def score_map(levels: Sequence[Tensor]) -> Tensor:
    """The largest score over all levels, widened by one position: [height, width] of the finest level."""
    maps = [level[None, None] for level in levels]
    size = max((level.shape[-2:] for level in maps), key=lambda s: s[0] * s[1])
    widened = [F.max_pool2d(level, 3, stride=1, padding=1) for level in maps]
    resized = [F.interpolate(level, size, mode="nearest") for level in widened]
    return torch.stack(resized).amax(0)[0, 0]


def _level_scores(head: BaseDenseHead, output: Any) -> list[Tensor] | None:
    """The scores of each level, [height, width]."""
    if not (isinstance(output, tuple | list) and output and isinstance(output[0], tuple | list)):
        return None
    classes = getattr(head, "cls_out_channels", None)
    found = []
    for level, raw in enumerate(output[0]):
        if not isinstance(raw, Tensor) or raw.dim() != 4 or not classes or raw.shape[1] % classes:
            return None
        raw = raw.unflatten(1, (-1, classes))  # [1, anchors, classes, height, width]
        if getattr(head, "use_sigmoid_cls", True):
            scores = raw.sigmoid().amax(2)
        else:
            scores = raw.softmax(2)[:, :, :-1].amax(2)  # the last class is the background
        for others in output[1:]:
            other = others[level] if isinstance(others, tuple | list) else None
            if isinstance(other, Tensor) and other.shape == scores.shape:  # objectness, centerness
                scores = scores * other.sigmoid()
        found.append(scores[0].amax(0))
    return found


def scores_at(scores: Tensor, size: tuple[int, ...]) -> Tensor | None:
    """The largest score in each position of a layer's output.

    Args:
        scores: [height, width] of the whole image.
        size: of the output without channels: [batch, height, width] of a map, or [batch, tokens].

    Returns:
        [positions]; None where positions do not form one map (windows, proposals, queries).
    """
    if size[0] != 1:
        return None
    grid = size[1:]
    if len(grid) == 1:
        height, width = scores.shape
        grids = [
            (-(-height * up // down), -(-width * up // down))
            for up, down in ((8, 1), (4, 1), (2, 1), (1, 1), (1, 2), (1, 4), (1, 8), (1, 16))
        ]
        fitting = [g for g in grids if g[0] * g[1] == grid[0]]
        if not fitting:
            return None
        grid = fitting[0]
    if len(grid) != 2:
        return None
    return F.adaptive_max_pool2d(scores[None, None], grid).flatten()
