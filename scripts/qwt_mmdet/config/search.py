"""Quantizations that are questions: the bits of each layer are searched."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from .quantization import LEAST_BITS, MOST_BITS, Bits, QuantizationSettings
from .section import Nested, Text, as_plain, section


@section
class Smallest:
    """The smallest detector that loses at most so much."""

    max_drop: Annotated[float, Strict(), Field(ge=0.0001, le=1)]
    """Most AP that may be lost, on a scale to 1: 0.01 is one point."""
    metric: Literal["bbox", "segm"] = "bbox"
    """Box AP or mask AP."""


@section
class Best:
    """The best detector that is at most so large."""

    average_weight_bits: Annotated[float, Strict(), Field(ge=LEAST_BITS, le=MOST_BITS)] | None = (
        None
    )
    """Bits per weight of the layers that are searched, on average."""
    max_size_mb: Annotated[float, Strict(), Field(ge=0.001, le=1_000_000)] | None = None
    """Size of all weights in megabytes, with what stays in full precision."""

    @model_validator(mode="after")
    def _one_budget(self) -> "Best":
        if (self.average_weight_bits is None) == (self.max_size_mb is None):
            raise ValueError("give either average_weight_bits or max_size_mb.")
        return self


@section
class Search:
    """A quantization whose bits are searched, layer by layer, on the calibration images."""

    smallest: Annotated[Smallest, Nested] | None = None
    """Ask for the smallest detector that loses at most so much (this or `best`)."""
    best: Annotated[Best, Nested] | None = None
    """Ask for the best detector of at most this size (this or `smallest`)."""
    like: Text | None = None
    """Plain quantization whose other settings hold: scope, ranges, rounding, overrides. Layers that the search
    cannot judge keep its bits. Omitted: the defaults, with 8 bits."""
    candidates: Annotated[tuple[Bits, ...], Field(min_length=2)] = (3, 4, 5, 6, 8)
    """Bits that weights can get."""
    min_activation_bits: Bits = 4
    """Fewest bits of activations. It matters for the objective `bit_operations` alone; the fewest bytes leave
    all activations at the most bits."""
    max_activation_bits: Bits = 8
    """Most bits of activations."""
    objective: Literal["size", "bit_operations"] = "size"
    """What `smallest` makes small: bytes of weights, or multiply-adds times the bits of both factors."""
    images: Annotated[int, Strict(), Field(ge=1, le=1_000_000)] = 4
    """Calibration images on which the noise of each layer at each number of bits is measured."""
    rounds: Annotated[int, Strict(), Field(ge=1, le=100)] = 5
    """Recipes that `smallest` calibrates and evaluates, at most, on halves of the calibration images."""

    @model_validator(mode="after")
    def _agree(self) -> "Search":
        problems = []
        if (self.smallest is None) == (self.best is None):
            problems.append("give either smallest or best.")
        if len(set(self.candidates)) < 2:
            problems.append("candidates must name two different numbers of bits at least.")
        if self.min_activation_bits > self.max_activation_bits:
            problems.append(
                f"min_activation_bits is {self.min_activation_bits}, more than max_activation_bits, which is "
                f"{self.max_activation_bits}; exchange them."
            )
        if self.best is not None and self.objective != "size":
            problems.append(
                f"best limits the size, so objective: {self.objective} contradicts it; take it out, or ask for "
                "smallest."
            )
        average = self.best and self.best.average_weight_bits
        if average and not min(self.candidates) <= average <= max(self.candidates):
            problems.append(
                f"best.average_weight_bits is {average:g}, but candidates go from {min(self.candidates)} to "
                f"{max(self.candidates)} bits; choose an average in between, or other candidates."
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def activation_candidates(self) -> list[int]:
        """Bits that activations can get, in rising order."""
        if self.objective == "size":
            return [self.max_activation_bits]
        between = {
            bits
            for bits in self.candidates
            if self.min_activation_bits < bits < self.max_activation_bits
        }
        return sorted({self.min_activation_bits, *between, self.max_activation_bits})


def searched_settings(
    quantizations: Mapping[str, Mapping[str, Any]], name: str
) -> Mapping[str, Any]:
    """The plain settings of which all but the bits holds in the answer to a question; a plain entry's own.

    Args:
        quantizations: resolved entries by name.
    """
    entry = quantizations[name]
    if not is_question(entry):
        return entry
    if "like" in entry:
        return quantizations[entry["like"]]
    return as_plain(QuantizationSettings(8, 8))


def is_question(entry: Any) -> bool:
    """Whether a quantization entry, as it was read or resolved, is a question."""
    return isinstance(entry, Search) or (
        hasattr(entry, "keys") and bool({"smallest", "best"} & set(entry))
    )
