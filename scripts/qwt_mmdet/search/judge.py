"""The loss of AP of recipes, predicted from the error at the detector's heads.

AP on some hundred images is a poor ruler of small losses: its luck is larger than what is asked for. The relative error
at the heads is measured well on few images, and the loss of AP is nearly proportional to a power of it. So both are
measured for a few recipes, also for some that lose more than what is asked, and ``loss = factor · error ** EXPONENT`` is
fitted to all of them by generalized least squares, with an offset that they share: what full precision gains on these
images if it was trained on them. The covariances of the luck come from the same resamples of the images for all recipes
(paired bootstrap); the interval holds them, the offset, and how far detectors were found to be from the proportion.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

SEEN = 0.1
"""Probability of such a loss by luck alone, below which a loss is seen."""
EXPONENT = 1.25
"""Of the error, to which losses of AP are proportional."""
DISCREPANCY = 0.2
"""Standard deviation of losses of AP from the proportion, as a part of them (docs/search.md has measurements)."""
OFFSET = 0.01
"""Standard deviation of the AP that full precision gains on calibration images by having been trained on them. Losses of
W8A8 there were up to 0.017, and 0.001 on images that took no part in training."""
LEAST = 0.99
"""Probability that a loss is above the lower end of its interval. Were it the confidence of the upper end, 0.9, the loss would
be between both with a probability of 0.8 only."""
TINY = 1e-12


@dataclass(frozen=True)
class Scored:
    """What was measured of a recipe, on images that took no part in its calibration.

    Args:
        estimate: its relative error at the heads, as the sum of those of its layers.
        error: its relative error at the heads.
        drop: its loss of AP. drops: the same under each resample of the images.
    """

    estimate: float
    error: float
    drop: float
    drops: Sequence[float]


@dataclass(frozen=True)
class Loss:
    """A predicted loss of AP.

    Args:
        low, high: ends of its interval: with the model's confidence it is below ``high``, and with that of :data:`LEAST`
            above ``low``.
        systematic: what the upper end would be if no luck of the images was in it.
    """

    value: float
    low: float
    high: float
    systematic: float

    def images_to_tell(self, images: int, max_drop: float) -> int | None:
        """About how many images for scoring, in the place of ``images``, would show that a limit is met.

        The part of luck in the interval falls with the square root of the number of images. None where it is shown
        already, or no number would.
        """
        if self.high <= max_drop or self.systematic >= max_drop:
            return None
        fixed = (self.systematic - self.value) ** 2
        luck = (self.high - self.value) ** 2 - fixed
        return math.ceil(images * luck / ((max_drop - self.value) ** 2 - fixed))


def cheapest(losses: Sequence[Loss], max_drop: float) -> int:
    """The first of recipes, in the order of their cost, from which on none may lose more; else the last one."""
    above = [index for index, loss in enumerate(losses) if loss.high > max_drop]
    return min(above[-1] + 1, len(losses) - 1) if above else 0


class LossModel:
    """Predicts the loss of AP of recipes from those that were scored.

    Args:
        scored: one recipe at least.
        confidence: that the loss is below the upper end of its interval.
    """

    def __init__(self, scored: Sequence[Scored], confidence: float) -> None:
        powers = np.array([one.error for one in scored]) ** EXPONENT
        drops = np.stack([np.append(one.drop, one.drops) for one in scored])
        drops = drops[:, ~np.isnan(drops).any(axis=0)]
        measured, resampled = drops[:, 0], drops[:, 1:]
        luck = np.atleast_2d(np.cov(resampled)) if resampled.shape[1] > 1 else 0.0
        covariance = luck + OFFSET**2 + np.diag((DISCREPANCY * measured) ** 2 + TINY)
        directions = np.linalg.solve(covariance, powers)
        directions /= directions @ powers
        factor = float(directions @ measured)
        self._factor = max(factor, 0.0)
        chance = float(
            np.sqrt(directions @ (luck + OFFSET**2 * np.ones_like(covariance)) @ directions)
        )
        self._discrepancy = DISCREPANCY * self._factor
        self._deviation = math.hypot(chance, self._discrepancy)
        self._quantile = NormalDist().inv_cdf(confidence)
        self.is_seen = factor > NormalDist().inv_cdf(1 - SEEN) * chance
        self._errors = dict(sorted((one.estimate, one.error) for one in scored))

    def error(self, estimate: float) -> float:
        """The relative error at the heads of a recipe, from the sum of those of its layers.

        It is a line between scored recipes. Beyond them, the line of the last two goes on.
        """
        known, errors = [*self._errors], [*self._errors.values()]
        if len(known) == 1:
            return errors[0] / known[0] * estimate
        if known[0] <= estimate <= known[-1]:
            return float(np.interp(estimate, known, errors))
        end = slice(-2, None) if estimate > known[-1] else slice(None, 2)
        (x, further), (y, there) = known[end], errors[end]
        return max(y + (there - y) / (further - x) * (estimate - x), TINY)

    def loss(self, estimate: float) -> Loss:
        """The loss of a recipe, from the sum of its layers' errors."""
        power = self.error(estimate) ** EXPONENT
        value, half = self._factor * power, self._quantile * self._deviation * power
        systematic = value + self._quantile * self._discrepancy * power
        low = value - NormalDist().inv_cdf(LEAST) * self._deviation * power
        return Loss(value, max(low, 0.0), value + half, systematic)
