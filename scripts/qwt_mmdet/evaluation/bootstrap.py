"""Confidence intervals of COCO AP: paired bootstrap over images.

A resample of N images draws N images with replacement. It is represented by integer weights: how often each
image was drawn. COCO matches detections to objects within one image and category, so AP under these weights
needs no new matching. All variants (baseline, quantized, compensated) share the weights, so that the variance
of the draw cancels in differences (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

AP tends to be larger on fewer distinct images, since fewer false positives of other images rank above an
image's hits. A resample holds only 63 % of the images, so its AP is biased upwards: on 160 COCO images by about
one standard error. For a very small AP the percentile interval can even miss the observed value. In a paired
difference this bias nearly cancels. In simulations of 160 images with 80 classes of uneven frequency, the 95 %
percentile interval covers the expected AP in about 90 % of cases, and the expected difference in about 92 %.
Shifting the interval by the bias does not cover more; mirroring it (the basic interval) covers less.

A resample represents a data set in which an image that was drawn twice has two ids. COCOeval orders detections
of equal score by image id. Here second copies have larger ids than all first copies, third copies than all
second ones, and so on.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import sparse, stats

from ..errors import QwtError
from ..files import read_json
from ..progress import progress
from .coco import AP_METRICS, check_predictions, iou_types, load_ground_truth, match_in_chunks
from .estimates import Comparison, Difference, Estimate, Limit

logger = logging.getLogger(__name__)

T = TypeVar("T")

Records = Sequence[dict[str, Any]] | str | os.PathLike[str]
"""COCO results records, or the file that holds them."""

CONFIDENCE = 0.95
FEW_IMAGES = 30
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
    """Order of the detections of a resample.

    If a group of equal scores has only hits or only misses, its order does not matter. Then the copies of a
    detection form one entry with its weight. In a mixed group the copies of the images interleave, so each
    copy is an entry.

    Args:
        most: largest weight of each image in any resample, [N].

    Returns:
        Detection and copy of each entry in order; copy 0 means all copies together, c > 0 the c-th copy.
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


def _column_weights(
    images: NDArray[np.int64], copies: NDArray[np.int64], drawn: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Weight of columns (image, copy) in each resample: [C], [C], [N, R] -> [C, R]."""
    times = drawn[images]
    return np.where(copies[:, None] == 0, times, times >= copies[:, None]).astype(np.int32)


def _thresholds_reached(
    hits: NDArray[np.int32], objects: NDArray[np.int64], recall_thresholds: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Number of recall thresholds that ``hits`` [H, R] of ``objects`` [R] reach, [H, R].

    Few different numbers of objects occur, so recall is compared once for each.
    """
    numbers, which = np.unique(objects, return_inverse=True)
    recall = np.arange(hits.max(initial=0) + 1)[:, None] / np.maximum(numbers, 1)
    reached = np.searchsorted(recall_thresholds, recall, side="right")
    return reached.ravel()[hits * len(numbers) + which]


def _interpolated_precision(
    hits: NDArray[np.int32],
    counted: NDArray[np.int32],
    objects: NDArray[np.int64],
    recall_thresholds: NDArray[np.float64],
) -> NDArray[np.float64]:
    """COCO's interpolated AP of precision-recall curves, which are given at their hits.

    Precision at a recall threshold is the largest precision at that recall or a higher one. It changes only at
    hits. So each hit contributes this precision times the number of thresholds that its recall reaches first.

    Args:
        hits, counted: weight of the hits, and of hits and false positives, up to each hit, [H, R].
        objects: weight of the objects, [R].

    Returns:
        AP of each resample, [R]; 0 where there are no objects.
    """
    # COCOeval's expression, so that rounding is the same.
    precision = hits / (counted + np.spacing(1))
    envelope = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    reached = _thresholds_reached(hits, objects, recall_thresholds)
    reached[1:] -= reached[:-1].copy()
    return (envelope * reached).sum(axis=0) / len(recall_thresholds)


class _Chunk(NamedTuple):
    """Detections of one category in some images.

    ``present`` [N] indices of the images with objects or detections of the category, ``images`` [D] index of
    each detection's image, ``scores`` [D]; for each size class ``hit`` [T, D], ``counted`` [T, D] and
    ``objects`` [N] as in :class:`Outcome`.
    """

    present: NDArray[np.int64]
    images: NDArray[np.int64]
    scores: NDArray[np.float64]
    hit: list[NDArray[np.bool_]]
    counted: list[NDArray[np.bool_]]
    objects: list[NDArray[np.int64]]


def _collect(present: NDArray[np.int64], by_area: list[list[dict[str, Any]]]) -> _Chunk:
    """COCOeval's matches of one category in the images ``present``."""
    first = by_area[0]
    scores = np.concatenate([np.asarray(entry["dtScores"], dtype=float) for entry in first])
    images = np.repeat(present, [len(entry["dtScores"]) for entry in first])
    chunk = _Chunk(present, images, scores, [], [], [])
    for entries in by_area:
        matched = np.concatenate([entry["dtMatches"] for entry in entries], axis=1) != 0
        ignored = np.concatenate([entry["dtIgnore"] for entry in entries], axis=1).astype(bool)
        chunk.hit.append(matched & ~ignored)
        chunk.counted.append(~ignored)
        chunk.objects.append(
            np.array([np.count_nonzero(entry["gtIgnore"] == 0) for entry in entries])
        )
    return chunk


class ApTable:
    """Matches of one variant and IoU type, for AP under any weights of the images.

    Build it with ``ApTable.build``. ``images`` are the ids of the columns of the weights.
    """

    def __init__(self, evaluators: Iterable[COCOeval]) -> None:
        """Collect and rank the matches of evaluators of consecutive images.

        Of each evaluator only small arrays are kept, so that many images can be matched in chunks.
        """
        self.images: list[int] = []
        chunks: dict[int, list[_Chunk]] = {}
        for evaluator in evaluators:
            parameters = evaluator.params
            self.iou_thresholds: NDArray[np.float64] = parameters.iouThrs
            self.recall_thresholds: NDArray[np.float64] = parameters.recThrs
            self.areas: list[str] = parameters.areaRngLbl
            # evalImgs is a flat list [category, area, image]; None (for all areas) where an image has neither
            # objects nor detections of the category.
            count = len(parameters.imgIds)
            size = len(self.areas) * count
            for category, start in zip(
                parameters.catIds, range(0, len(evaluator.evalImgs), size), strict=True
            ):
                by_area = [
                    evaluator.evalImgs[begin : begin + count]
                    for begin in range(start, start + size, count)
                ]
                present = [index for index, entry in enumerate(by_area[0]) if entry is not None]
                if present:
                    entries = [[area[index] for index in present] for area in by_area]
                    indices = np.array(present) + len(self.images)
                    chunks.setdefault(int(category), []).append(_collect(indices, entries))
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
        outcomes = []
        for area in range(len(self.areas)):
            hit = np.concatenate([chunk.hit[area] for chunk in chunks], axis=1)[:, order]
            counted = np.concatenate([chunk.counted[area] for chunk in chunks], axis=1)[:, order]
            objects = np.zeros(len(self.images), dtype=np.int64)
            for chunk in chunks:
                objects[chunk.present] = chunk.objects[area]
            outcomes.append(Outcome(hit, counted, objects))
        return Ranking(images, ties[: len(images)]), outcomes

    @classmethod
    def build(
        cls,
        annotations: str | os.PathLike[str],
        predictions: Sequence[dict[str, Any]],
        iou_type: str,
    ) -> "ApTable":
        """Match predictions (COCO results records) to an annotation file, for bbox or segm.

        Raises:
            QwtError: see ``coco.load_ground_truth`` and ``coco.check_predictions``.
        """
        masks = iou_type == "segm"
        ground_truth = load_ground_truth(annotations, masks=masks)
        check_predictions(ground_truth, predictions, masks=masks)
        return cls(match_in_chunks(ground_truth, predictions, iou_type))

    def ap(
        self, weights: NDArray[np.integer]
    ) -> tuple[dict[str, NDArray[np.float64]], dict[int, NDArray[np.float64]]]:
        """Return AP under integer weights of the images.

        Args:
            weights: how often each image counts, [R, N], not negative, in the order of ``images``.

        Returns:
            For each of ``AP_METRICS`` the values [R], NaN where there is no object; categories without
            objects in a resample are left out of its mean. And AP of each category id with objects, [R], NaN
            in resamples without them.
        """
        weights = np.asarray(weights)
        if weights.ndim != 2 or weights.shape[1] != len(self.images):
            raise ValueError(
                f"weights have shape {weights.shape}, expected [R, {len(self.images)}]"
            )
        if not np.issubdtype(weights.dtype, np.integer) or (weights < 0).any():
            raise ValueError("weights must be whole numbers that are not negative")
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
        # The matrix row of a hit holds the counted detections after the previous hit, up to this hit.
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
        result = np.zeros((len(hit), len(objects)))
        size = max(CHUNK_ELEMENTS // max(len(columns), *map(len, hit_columns), 1), 1)
        for start in range(0, len(objects), size):
            chunk = slice(start, start + size)
            weights = _column_weights(images, copies, drawn[:, chunk])
            for threshold, interval_sums in enumerate(intervals):
                result[threshold, chunk] = _interpolated_precision(
                    np.cumsum(weights[hit_columns[threshold]], axis=0),
                    np.cumsum(interval_sums @ weights, axis=0),
                    objects[chunk],
                    self.recall_thresholds,
                )
        return result


def draw_weights(images: int, resamples: int, seed: int | tuple[int, ...]) -> NDArray[np.int64]:
    """How often each image is drawn in each resample, [R, N]; a resample draws N images."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(images, np.full(images, 1 / images), size=resamples)


def interval(
    samples: NDArray[np.float64], *, beyond: int = 0
) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile interval of bootstrap samples [R].

    Args:
        samples: those that are NaN are left out.
        beyond: number of further resamples, counted as beyond both ends.

    Returns:
        The two ends; (None, None) without samples, or if an end lies beyond all samples.
    """
    defined = samples[~np.isnan(samples)]
    tail = (1 - CONFIDENCE) / 2 * (len(defined) + beyond) - beyond
    if not len(defined) or tail < 0:
        return None, None
    tail /= len(defined)
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Bootstrap:
    """AP of each variant on all images and in each resample.

    Args:
        images: number of images.
        resamples: number of resamples R.
        seed: of the drawing.
        values: {variant: {IoU type: {metric: AP of all images, NaN where it is undefined}}}. A
            metric is one of ``AP_METRICS``, or the id of a category that has objects, for its AP.
        samples: the same, with AP of each resample, [R], NaN where it is undefined.
        repeated: the same, with AP of each repeat, [K], of the variants that are means of repeats.
    """

    images: int
    resamples: int
    seed: int
    values: Mapping[str, Mapping[str, Mapping[str | int, float]]]
    samples: Mapping[str, Mapping[str, Mapping[str | int, NDArray[np.float64]]]]
    repeated: Mapping[str, Mapping[str, Mapping[str | int, NDArray[np.float64]]]] = field(
        default_factory=dict
    )

    def with_repeats(self, repeats: Mapping[str, Sequence[str]]) -> "Bootstrap":
        """Return the same with variants replaced by means over repeats, in a two-level bootstrap.

        Each resample also draws the K repeats with replacement, the same ones for all variants. So an interval
        includes the variance of both draws. Two corrections are needed: the variance of K drawn repeats is too
        small by (K - 1) / K, and it is estimated with K - 1 degrees of freedom only. So deviations are
        multiplied by sqrt(K / (K - 1)) and by the ratio of Student's quantile to the normal one (Davison and
        Hinkley, Bootstrap Methods and Their Application, 1997, chapter 3).

        Args:
            repeats: the variants that are repeats, by the variant that becomes their mean. A single repeat
                does not change.
        """
        values, samples, repeated = dict(self.values), dict(self.samples), {}
        for variant, names in repeats.items():
            count = len(names)
            if count < 2:
                continue
            tail = (1 + CONFIDENCE) / 2
            stretch = stats.t.ppf(tail, count - 1) / stats.norm.ppf(tail)
            stretch *= math.sqrt(count / (count - 1))
            weights = draw_weights(count, self.resamples, (self.seed, count)) / count
            weights = 1 / count + stretch * (weights - 1 / count)
            repeated[variant] = {
                iou_type: {
                    metric: np.array([self.values[name][iou_type][metric] for name in names])
                    for metric in by_metric
                }
                for iou_type, by_metric in self.values[variant].items()
            }
            values[variant] = {
                iou_type: {metric: float(of.mean()) for metric, of in by_metric.items()}
                for iou_type, by_metric in repeated[variant].items()
            }
            samples[variant] = {
                iou_type: {
                    metric: np.einsum(
                        "rk,kr->r",
                        weights,
                        np.array([self.samples[name][iou_type][metric] for name in names]),
                    )
                    for metric in by_metric
                }
                for iou_type, by_metric in repeated[variant].items()
            }
        return dataclasses.replace(self, values=values, samples=samples, repeated=repeated)

    def _spread(self, iou_type: str, metric: str | int, *variants: str) -> float | None:
        """Standard deviation over the repeats of a variant, or of one variant minus another."""
        of = [
            self.repeated[variant][iou_type][metric]
            if variant in self.repeated
            else np.array([self.values[variant][iou_type][metric]])
            for variant in variants
        ]
        counts = {len(found) for found in of} - {1}
        if len(counts) != 1:  # no repeats, or some of them failed
            return None
        between = of[0] if len(of) == 1 else of[0] - of[1]
        return None if np.isnan(between).any() else float(between.std(ddof=1))

    def _get(
        self, variant: str, iou_type: str, metric: str | int
    ) -> tuple[float, NDArray[np.float64]]:
        return self.values[variant][iou_type][metric], self.samples[variant][iou_type][metric]

    def estimate(self, variant: str, iou_type: str, metric: str | int) -> Estimate:
        """AP of a variant; its interval leaves out resamples in which AP is undefined."""
        value, samples = self._get(variant, iou_type, metric)
        spread = self._spread(iou_type, metric, variant)
        low, high = interval(samples)
        return Estimate(None if np.isnan(value) else value, low, high, spread)

    def difference(self, a: str, b: str, iou_type: str, metric: str | int) -> Difference:
        """AP of variant ``a`` minus AP of variant ``b``, paired."""
        value_a, samples_a = self._get(a, iou_type, metric)
        value_b, samples_b = self._get(b, iou_type, metric)
        value = value_a - value_b
        low, high = interval(samples_a - samples_b)
        spread = self._spread(iou_type, metric, a, b)
        return Difference(None if np.isnan(value) else value, low, high, spread)

    def limit(self, baseline: str, variant: str, iou_type: str, max_drop: float) -> Limit | None:
        """The drop of AP from the baseline to a variant, compared with a limit; None where AP is undefined."""
        (value_b, samples_b), (value_v, samples_v) = (
            self._get(name, iou_type, "AP") for name in (baseline, variant)
        )
        if np.isnan(value_b - value_v):
            return None
        drops = samples_b - samples_v
        drops = drops[~np.isnan(drops)]
        worst = least = None
        if len(drops):
            worst, least = map(float, np.quantile(drops, [CONFIDENCE, 1 - CONFIDENCE]))
        return Limit(max_drop, value_b - value_v, worst, least, self.images)

    def recovered(
        self, baseline: str, quantized: str, compensated: str, iou_type: str, metric: str | int
    ) -> Estimate:
        """Fraction of the AP lost by quantization that compensation recovers.

        It is (compensated - quantized) / (baseline - quantized). A resample without a loss counts as beyond
        both ends of the interval. If the loss is not significantly above 0, the fraction is meaningless, and
        all values are None.
        """
        value_b, samples_b = self._get(baseline, iou_type, metric)
        value_q, samples_q = self._get(quantized, iou_type, metric)
        value_c, samples_c = self._get(compensated, iou_type, metric)
        lost = samples_b - samples_q
        fraction = np.full(lost.shape, np.nan)
        np.divide(samples_c - samples_q, lost, out=fraction, where=lost > 0)
        loss_low, _ = interval(lost)
        low, high = interval(fraction, beyond=int(np.count_nonzero(lost <= 0)))
        if loss_low is None or loss_low <= 0 or value_b <= value_q or low is None:
            return Estimate()
        return Estimate((value_c - value_q) / (value_b - value_q), low, high)

    def compare(
        self,
        baseline: str | None,
        quantized: str | None,
        compensated: str | None,
        iou_type: str,
        metric: str | int,
    ) -> Comparison:
        """Compare three variants; comparisons with one that is None are left out."""

        def of(method: Callable[..., T], *variants: str | None) -> T | None:
            return None if None in variants else method(*variants, iou_type, metric)

        return Comparison(
            of(self.estimate, baseline),
            of(self.estimate, quantized),
            of(self.estimate, compensated),
            of(self.difference, quantized, baseline),
            of(self.difference, compensated, baseline),
            of(self.difference, compensated, quantized),
            of(self.recovered, baseline, quantized, compensated),
        )


def _ap_under_weights(
    ground_truth: COCO,
    variant: Records,
    iou_type: str,
    weights: NDArray[np.int64],
    masks: bool,
) -> dict[str | int, NDArray[np.float64]]:
    records = variant
    if isinstance(records, str | os.PathLike):
        records = read_json(records, what="predictions file")
    check_predictions(ground_truth, records, masks=masks)
    metrics, classes = ApTable(match_in_chunks(ground_truth, records, iou_type)).ap(weights)
    return dict([*metrics.items(), *classes.items()])


def _ap_of_variant(name: str, *arguments: Any) -> dict[str | int, NDArray[np.float64]]:
    try:
        return _ap_under_weights(*arguments)
    except QwtError as error:
        raise QwtError(f"Variant {name}: {error}") from error


def bootstrap(
    annotations: str | os.PathLike[str],
    variants: Mapping[str, Records],
    *,
    masks: bool,
    classes: Collection[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    processes: int = 1,
) -> Bootstrap:
    """Compute AP of all variants under the same resamples of the images.

    Args:
        annotations: path of the COCO annotation file that all variants were evaluated on.
        variants: COCO results records (see ``coco.coco_metrics``) of each variant by name, or a file of them. Of
            files, each process holds one at a time in memory.
        masks: masks besides boxes.
        classes: names of the categories that are evaluated; None: all.
        resamples: number of resamples; a single image gets none, so its values have no intervals.
        seed: of the drawing.
        processes: number of processes; the result does not depend on it.

    Raises:
        QwtError: see ``coco.load_ground_truth`` and ``coco.check_predictions``; names the variant.
    """
    ground_truth = load_ground_truth(annotations, masks=masks, classes=classes)
    images = len(ground_truth.imgs)
    if images < FEW_IMAGES:
        logger.warning("Bootstrap intervals from %d images are rough; evaluate on more.", images)
    drawn = draw_weights(images, resamples if images > 1 else 0, seed)
    weights = np.concatenate([np.ones((1, images), dtype=drawn.dtype), drawn])
    tables = [(name, iou_type) for name in variants for iou_type in iou_types(masks)]
    tasks = (
        delayed(_ap_of_variant)(name, ground_truth, variants[name], iou_type, weights, masks)
        for name, iou_type in tables
    )
    results = Parallel(n_jobs=processes, return_as="generator")(tasks)
    values: dict[str, dict[str, dict[str | int, float]]] = {name: {} for name in variants}
    samples: dict[str, dict[str, dict[str | int, NDArray[np.float64]]]]
    samples = {name: {} for name in variants}
    done = progress(results, "Bootstrap", total=len(tables), unit="table")
    for (name, iou_type), under_weights in zip(tables, done, strict=True):
        values[name][iou_type] = {key: float(ap[0]) for key, ap in under_weights.items()}
        samples[name][iou_type] = {key: ap[1:] for key, ap in under_weights.items()}
    return Bootstrap(images, len(drawn), seed, values, samples)
