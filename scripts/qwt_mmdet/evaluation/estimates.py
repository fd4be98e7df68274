"""Numbers with intervals, and comparisons of a detector's variants.

Imports nothing heavy: Snakemake's own process prints such numbers.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pydantic import computed_field


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95 % interval; None where they are undefined.

    Args:
        spread: standard deviation between repeats, each calibrated on other images; None without repeats.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    spread: float | None = None


def value_of(estimate: Estimate | None) -> float | None:
    """The number, None also where there is no estimate."""
    return None if estimate is None else estimate.value


@dataclass(frozen=True)
class Difference(Estimate):
    """A difference of two numbers."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def significant(self) -> bool:
        """Whether there is an interval and it excludes 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Comparison:
    """An AP metric, between 0 and 1, of three variants of a detector; None where one was not evaluated.

    Args:
        recovered: (compensated - quantized) / (baseline - quantized), where the loss is significant.
    """

    baseline: Estimate | None = None
    quantized: Estimate | None = None
    compensated: Estimate | None = None
    quantized_minus_baseline: Difference | None = None
    compensated_minus_baseline: Difference | None = None
    compensated_minus_quantized: Difference | None = None
    recovered: Estimate | None = None

    def without_intervals(self) -> "Comparison":
        """The numbers alone; no difference is significant then."""
        alone: dict[str, Any] = {
            name: entry and dataclasses.replace(entry, low=None, high=None)
            for name, entry in vars(self).items()
        }
        return Comparison(**alone)


@dataclass(frozen=True)
class Limit:
    """A drop of AP (below 0: a gain) on a number of images, compared with its limit ``max_drop``.

    Args:
        worst_drop, least_drop: 95 % of the resamples have a smaller, and a larger, drop; None where AP is undefined.
    """

    max_drop: float
    drop: float
    worst_drop: float | None
    least_drop: float | None
    images: int

    @property
    def met(self) -> bool | None:
        """Whether the limit is met; None where this is not significant."""
        if self.worst_drop is not None and self.worst_drop <= self.max_drop:
            return True
        if self.least_drop is not None and self.least_drop > self.max_drop:
            return False
        return None

    @property
    def images_to_tell(self) -> int | None:
        """About how many images with the same drop would make ``met`` significant; None where no number would.

        The width of the interval falls with the square root of the number of images.
        """
        end = self.worst_drop if self.drop <= self.max_drop else self.least_drop
        spare = abs(self.max_drop - self.drop)
        if end is None or not spare:
            return None
        return math.ceil(self.images * ((end - self.drop) / spare) ** 2)
