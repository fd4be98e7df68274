"""Numbers with intervals, and what comes of comparing a detector's variants.

Imports nothing heavy: Snakemake's own process prints such numbers.
"""

import dataclasses
from dataclasses import dataclass
from typing import Self

from pydantic import computed_field


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95 % interval; None where they are undefined.

    Args:
        spread: standard deviation between repeats, each calibrated on other images; None without any.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    spread: float | None = None

    def without_interval(self) -> Self:
        """The number alone."""
        return dataclasses.replace(self, low=None, high=None)


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
    """One AP, between 0 and 1, of three variants of a detector; None for what was not evaluated.

    Args:
        recovered: (compensated - quantized) / (baseline - quantized), where the loss is significant.
    """

    baseline: Estimate | None
    quantized: Estimate | None
    compensated: Estimate | None
    quantized_minus_baseline: Difference | None
    compensated_minus_baseline: Difference | None
    compensated_minus_quantized: Difference | None
    recovered: Estimate | None

    def without_intervals(self) -> "Comparison":
        """The numbers alone, of which then nothing is significant."""
        return Comparison(
            **{name: entry and entry.without_interval() for name, entry in vars(self).items()}
        )
