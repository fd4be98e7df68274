"""Confidence intervals of COCO AP: paired bootstrap over images.

A resample of N images draws N images with replacement. It is represented by integer weights: how often each image was
drawn. :mod:`.weighted_ap` computes AP under these weights without new matching. All variants (baseline, quantized,
compensated) share the weights, so that the variance of the draw cancels in differences (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13).

AP tends to be larger on fewer distinct images, since fewer false positives of other images rank above an
image's hits. A resample holds only 63 % of the images, so its AP is biased upwards: on 160 COCO images by about
one standard error. For a very small AP the percentile interval can even miss the observed value. In a paired
difference this bias nearly cancels. In simulations of 160 images with 80 classes of uneven frequency, the 95 %
percentile interval covers the expected AP in about 90 % of cases, and the expected difference in about 92 %.
Shifting the interval by the bias does not cover more; mirroring it (the basic interval) covers less.
"""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from pycocotools.coco import COCO

from ..errors import QwtError
from ..files import read_json
from ..progress import progress
from .coco import iou_types, load_ground_truth
from .estimates import Comparison, Difference, Estimate, Limit
from .weighted_ap import ApTable

logger = logging.getLogger(__name__)

T = TypeVar("T")

Records = Sequence[dict[str, Any]] | str | os.PathLike[str]
"""COCO results records, or the file that holds them."""

CONFIDENCE = 0.95
FEW_IMAGES = 30


def draw_weights(images: int, resamples: int, seed: int | tuple[int, ...]) -> NDArray[np.int64]:
    """How often each image is drawn in each resample, [R, N]; a resample draws N images."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(images, np.full(images, 1 / images), size=resamples)


def interval(
    samples: NDArray[np.float64], *, beyond: int = 0
) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile interval of bootstrap samples [R], of which NaN are left out.

    Args:
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
    """AP of each variant on all images and in each of R resamples, which ``seed`` drew.

    Args:
        values: {variant: {IoU type: {metric: AP of all images}}}. A metric is one of ``AP_METRICS``, or the id of a
            category that has objects. NaN is undefined.
        samples: the same, with AP of each resample, [R].
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

        Each resample also draws the K repeats with replacement, the same ones for all variants. Two corrections are
        needed: the variance of K drawn repeats is too small by (K - 1) / K, and it is estimated with K - 1 degrees of
        freedom only. So deviations are multiplied by sqrt(K / (K - 1)) and by the ratio of Student's quantile to the
        normal one (Davison and Hinkley, Bootstrap Methods and Their Application, 1997, chapter 3).

        Args:
            repeats: the variants that are repeats, by the variant that becomes their mean; a single one does not change.
        """
        from scipy import stats  # takes longer to import than all else here

        repeated: dict[str, Any] = {}
        values, samples = (dict[str, Any](found) for found in (self.values, self.samples))
        for variant, names in repeats.items():
            count = len(names)
            if count < 2:
                continue
            tail = (1 + CONFIDENCE) / 2
            stretch = stats.t.ppf(tail, count - 1) / stats.norm.ppf(tail)
            stretch *= math.sqrt(count / (count - 1))
            for results in (values, samples, repeated):
                results[variant] = {iou_type: {} for iou_type in self.values[variant]}
            weights = draw_weights(count, self.resamples, (self.seed, count)) / count
            weights = 1 / count + stretch * (weights - 1 / count)
            for iou_type, by_metric in self.values[variant].items():
                for metric in by_metric:
                    of_all = [self._get(name, iou_type, metric) for name in names]
                    each = np.array([value for value, _ in of_all])
                    drawn = np.einsum("rk,kr->r", weights, np.array([s for _, s in of_all]))
                    repeated[variant][iou_type][metric] = each
                    values[variant][iou_type][metric] = float(each.mean())
                    samples[variant][iou_type][metric] = drawn
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

        It is (compensated - quantized) / (baseline - quantized), and None if the loss is not significantly above 0. A
        resample without a loss counts as beyond both ends of the interval.
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


def _ap_of_variant(
    name: str, ground_truth: COCO, given: Records, iou_type: str, weights: NDArray[np.int64]
) -> dict[str | int, NDArray[np.float64]]:
    try:
        records = given
        if isinstance(records, str | os.PathLike):
            records = read_json(records, what="predictions file")
        metrics, classes = ApTable(ground_truth, records, iou_type).ap(weights)
    except QwtError as error:
        raise QwtError(f"Variant {name}: {error}") from error
    return dict([*metrics.items(), *classes.items()])


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
        variants: COCO results records of each variant by name, or a file of them, which saves memory.
        classes: names of the categories that are evaluated; None: all.
        resamples: number of resamples; a single image gets none, so its values have no intervals.
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
        delayed(_ap_of_variant)(name, ground_truth, variants[name], iou_type, weights)
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
