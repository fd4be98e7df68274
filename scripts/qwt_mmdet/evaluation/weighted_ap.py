"""COCO AP in which each image counts a whole number of times.

COCO matches detections to objects within one image and category, so AP under weights of the images needs no new
matching. Weights represent a data set in which an image that counts twice has two ids. COCOeval orders detections
of equal score by image id. Here second copies have larger ids than all first copies, third copies than all second
ones, and so on.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools.coco import COCO
from scipy import sparse

from .coco import AP_METRICS, check_predictions, match_in_chunks

CHUNK_ELEMENTS = 1_000_000
"""Elements of a work array: 8 MB, small enough for the cache, large enough for numpy."""


class Ranking(NamedTuple):
    """Detections of one category in COCOeval's order.

    ``images`` [D] index of each detection's image, ``ties`` [D] number of its group of equal scores.
    """

    images: NDArray[np.int64]
    ties: NDArray[np.int64]


class Outcome(NamedTuple):
    """The matches of a ranking in one size class.

    ``hit`` [T, D]: the detection matches an object; ``counted`` [T, D]: it is not ignored (true and false
    positives); ``objects`` [N]: number of objects of the category per image.
    """

    hit: NDArray[np.bool_]
    counted: NDArray[np.bool_]
    objects: NDArray[np.int64]


def _expand_ties(
    ranking: Ranking, outcome: Outcome, most: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order of the detections of a resample: detection and copy of each entry.

    If a group of equal scores has only hits or only misses, its order does not matter. Then the copies of a
    detection form one entry with its weight (copy 0). In a mixed group the copies of the images interleave, so each
    copy (1, 2, …) is an entry.

    Args:
        most: largest weight of each image in any resample, [N].
    """
    detections = np.arange(len(ranking.images))
    groups = ranking.ties[-1] + 1 if len(detections) else 0
    mixed = np.zeros(groups, dtype=bool)
    for hit, counted in zip(outcome.hit, outcome.counted, strict=True):
        hits = np.bincount(ranking.ties[hit], minlength=groups)
        misses = np.bincount(ranking.ties[counted & ~hit], minlength=groups)
        mixed |= (hits > 0) & (misses > 0)
    apart = mixed[ranking.ties]
    if not apart.any():
        return detections, np.zeros_like(detections)
    times = np.where(apart, most[ranking.images], 1)
    detection = np.repeat(detections, times)
    first = np.repeat(np.cumsum(times) - times, times)
    copy = np.where(apart[detection], np.arange(len(detection)) - first + 1, 0)
    order = np.lexsort((detection, copy, ranking.ties[detection]))
    return detection[order], copy[order]


def _accumulated(function: np.ufunc, rows: NDArray[Any]) -> NDArray[Any]:
    """``function.accumulate`` over the first axis, in place. numpy goes along columns, which is slow in long rows."""
    if len(rows) > rows.shape[1]:
        return function.accumulate(rows, axis=0, out=rows)
    for before, row in itertools.pairwise(rows):
        function(before, row, out=row)
    return rows


class Recall:
    """Number of recall thresholds that hits reach, by their weight.

    Few different numbers of objects occur, so recall is compared once for each.

    Args:
        objects: weight of the objects in each resample, [R].
    """

    def __init__(self, objects: NDArray[np.int64], recall_thresholds: NDArray[np.float64]) -> None:
        numbers, self._which = np.unique(objects, return_inverse=True)
        recall = np.arange(numbers[-1] + 1)[:, None] / np.maximum(numbers, 1)
        reached = np.searchsorted(recall_thresholds, recall, side="right")
        self._reached, self._numbers = reached.ravel().astype(float), len(numbers)

    def reached(self, hits: NDArray[np.int32], resamples: slice) -> NDArray[np.float64]:
        """Number of thresholds, [H, R of the slice], for weights ``hits`` of this shape."""
        return self._reached[hits * self._numbers + self._which[resamples]]


def _interpolated_precision(
    hits: NDArray[np.int32], counted: NDArray[np.int32], reached: NDArray[np.float64]
) -> NDArray[np.float64]:
    """COCO's interpolated precision, summed over the recall thresholds, [R], of curves given at their hits.

    Precision at a recall threshold is the largest precision at that recall or a higher one. It changes only at
    hits. So each hit contributes this precision times the number of thresholds that its recall reaches first.

    Args:
        hits, counted: weight of the hits, and of hits and false positives, up to each hit, [H, R].
        reached: number of recall thresholds up to each hit, [H, R]; it is overwritten.
    """
    # COCOeval's expression, so that rounding is the same.
    precision = hits / (counted + np.spacing(1))
    envelope = _accumulated(np.maximum, precision[::-1])[::-1]
    reached[1:] -= reached[:-1].copy()
    envelope *= reached
    return envelope.sum(axis=0)


class _Chunk(NamedTuple):
    """Matches of one category in some images.

    ``present`` [P] indices of the images with objects or detections, ``objects`` [areas, P] their numbers of objects;
    ``images`` [D] and ``scores`` [D] of the detections; ``hit`` and ``counted`` [areas, T, D] as in :class:`Outcome`.
    """

    present: NDArray[np.int64]
    objects: NDArray[np.int64]
    images: NDArray[np.int64]
    scores: NDArray[np.float64]
    hit: NDArray[np.bool_]
    counted: NDArray[np.bool_]


def _collect(present: NDArray[np.int64], by_area: NDArray[np.object_]) -> _Chunk:
    """COCOeval's matches of one category, [areas, P], in the images ``present``."""

    def joined(key: str) -> NDArray[Any]:
        return np.array([np.concatenate([one[key] for one in area], axis=1) for area in by_area])

    scores = [np.asarray(entry["dtScores"], dtype=float) for entry in by_area[0]]
    objects = [[np.count_nonzero(entry["gtIgnore"] == 0) for entry in area] for area in by_area]
    matched, counted = joined("dtMatches") != 0, ~joined("dtIgnore").astype(bool)
    return _Chunk(
        present,
        np.array(objects),
        np.repeat(present, list(map(len, scores))),
        np.concatenate(scores),
        matched & counted,
        counted,
    )


class ApTable:
    """Matches of one variant and IoU type, for AP under any weights of the images.

    Args:
        predictions: COCO results records. iou_type: ``bbox`` or ``segm``.

    Attributes:
        images: ids of the columns of the weights.

    Raises:
        QwtError: see ``coco.check_predictions``.
    """

    def __init__(
        self, ground_truth: COCO, predictions: Sequence[dict[str, Any]], iou_type: str
    ) -> None:
        check_predictions(ground_truth, predictions, masks=iou_type == "segm")
        self.images: list[int] = []
        chunks: dict[int, list[_Chunk]] = {}
        # of each evaluator only small arrays are kept
        for evaluator in match_in_chunks(ground_truth, predictions, iou_type):
            parameters = evaluator.params
            self.iou_thresholds: NDArray[np.float64] = parameters.iouThrs
            self.recall_thresholds: NDArray[np.float64] = parameters.recThrs
            self.areas: list[str] = parameters.areaRngLbl
            # None (for all areas) where an image has neither objects nor detections of the category
            shape = len(parameters.catIds), len(self.areas), len(parameters.imgIds)
            found = np.array(evaluator.evalImgs, dtype=object).reshape(shape)
            for category, by_area in zip(parameters.catIds, found, strict=True):
                present = np.flatnonzero(by_area[0])
                if len(present):
                    chunk = _collect(present + len(self.images), by_area[:, present])
                    chunks.setdefault(int(category), []).append(chunk)
            self.images += map(int, parameters.imgIds)
        self.categories = {
            category: self._category(chunks[category])
            for category in map(int, parameters.catIds)
            if category in chunks
        }

    def _category(self, chunks: Sequence["_Chunk"]) -> tuple[Ranking, list[Outcome]]:
        """Rank the detections of one category; return also their matches in each size class."""
        scores = np.concatenate([chunk.scores for chunk in chunks])
        order = np.argsort(-scores, kind="mergesort")
        scores = scores[order]
        images = np.concatenate([chunk.images for chunk in chunks])[order]
        ties = np.concatenate([np.zeros(1, dtype=int), np.cumsum(scores[1:] != scores[:-1])])
        hit = np.concatenate([chunk.hit for chunk in chunks], axis=2)[:, :, order]
        counted = np.concatenate([chunk.counted for chunk in chunks], axis=2)[:, :, order]
        objects = np.zeros((len(self.areas), len(self.images)), dtype=np.int64)
        for chunk in chunks:
            objects[:, chunk.present] = chunk.objects
        outcomes = [Outcome(*of_area) for of_area in zip(hit, counted, objects, strict=True)]
        return Ranking(images, ties[: len(images)]), outcomes

    def ap(
        self, weights: NDArray[np.integer]
    ) -> tuple[dict[str, NDArray[np.float64]], dict[int, NDArray[np.float64]]]:
        """Return AP under whole weights of the images, [R, N], in the order of ``images``.

        Returns:
            For each of ``AP_METRICS`` the values [R], NaN where there is no object; categories without
            objects in a resample are left out of its mean. And AP of each category id with objects, [R].
        """
        drawn = np.ascontiguousarray(weights.T, dtype=np.int32)
        most = drawn.max(axis=1, initial=0)
        # [area, IoU threshold, R]: sum over the categories that have objects, and their number.
        total = np.zeros((len(self.areas), len(self.iou_thresholds), len(weights)))
        defined = np.zeros((len(self.areas), 1, len(weights)), dtype=int)
        classes: dict[int, NDArray[np.float64]] = {}
        for category, (ranking, outcomes) in self.categories.items():
            for area, outcome in enumerate(outcomes):
                holders = np.flatnonzero(outcome.objects)
                if not len(holders):
                    continue
                objects = outcome.objects[holders] @ drawn[holders]
                curves = self._curves(ranking, outcome, drawn, most, objects)
                total[area] += curves
                defined[area] += objects > 0
                if self.areas[area] == "all":
                    classes[category] = np.where(objects > 0, curves.mean(axis=0), np.nan)
        mean = np.full(total.shape, np.nan)
        np.divide(total, defined, out=mean, where=defined > 0)
        metrics = {}
        for name, over in AP_METRICS.items():
            ap = mean[self.areas.index(over.area)]
            if over.iou is not None:
                ap = ap[np.isclose(self.iou_thresholds, over.iou)]
            metrics[name] = ap.mean(axis=0)
        return metrics, classes

    def _curves(
        self,
        ranking: Ranking,
        outcome: Outcome,
        drawn: NDArray[np.int32],
        most: NDArray[np.int32],
        objects: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """AP of one category and size class at each IoU threshold, [T, R].

        Args:
            drawn: weight of the images in each resample, [N, R]; ``most`` [N] its largest values.
            objects: weight of the objects in each resample, [R].
        """
        detection, copy = _expand_ties(ranking, outcome, most)
        hit, counted = outcome.hit[:, detection], outcome.counted[:, detection]
        columns, column = np.unique(
            copy * len(self.images) + ranking.images[detection], return_inverse=True
        )
        copies, images = np.divmod(columns, len(self.images))
        # A column is a copy of an image. The matrix row of a hit holds the counted detections after the previous hit, up to this hit.
        # Detections after the last hit do not matter.
        intervals, hit_columns = [], []
        for hit_t, counted_t in zip(hit, counted, strict=True):
            row = np.cumsum(hit_t) - hit_t
            hits = np.count_nonzero(hit_t)
            used = counted_t & (row < hits)
            ones = np.ones(np.count_nonzero(used), dtype=np.int32)
            intervals.append(
                sparse.csr_array((ones, (row[used], column[used])), shape=(hits, len(columns)))
            )
            hit_columns.append(column[hit_t])
        recall = Recall(objects, self.recall_thresholds)
        result = np.zeros((len(hit), len(objects)))
        size = max(CHUNK_ELEMENTS // max(len(columns), *map(len, hit_columns), 1), 1)
        for start in range(0, len(objects), size):
            chunk = slice(start, start + size)
            times, copy = drawn[images, chunk], copies[:, None]
            weights = np.where(copy == 0, times, times >= copy).astype(np.int32)  # [C, R]
            for threshold, interval_sums in enumerate(intervals):
                hit_sums = _accumulated(np.add, weights[hit_columns[threshold]])
                result[threshold, chunk] = _interpolated_precision(
                    hit_sums,
                    _accumulated(np.add, interval_sums @ weights),
                    recall.reached(hit_sums, chunk),
                )
        return result / len(self.recall_thresholds)
