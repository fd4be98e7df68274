"""Quantizations that are searched: entries whose bits a mixed-precision search chooses for each layer."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from ..errors import QwtError
from .quantization import (
    FLOAT_BITS,
    LEAST_BITS,
    MOST_BITS,
    ActivationBits,
    Bits,
    QuantizationSettings,
)
from .section import Nested, Text, as_plain, section

Storage = Literal["bits", "onnx"]


def stored_bits(bits: int, storage: Storage) -> int:
    """Bits that a weight of so many bits takes: as many, or 4 or 8 in an exported file."""
    if storage == "bits":
        return bits
    return 4 if bits <= 4 else 8


@section
class Smallest:
    """The smallest detector whose loss of AP is within a limit."""

    max_drop: Annotated[float, Strict(), Field(ge=0.0001, le=1)]
    """Largest loss of AP, with AP from 0 to 1: 0.01 is one point."""
    metric: Literal["bbox", "segm"] = "bbox"
    """Box AP or mask AP."""
    confidence: Annotated[float, Strict(), Field(ge=0.5, lt=1)] = 0.9
    """How sure the limit is to be met, as the calibration images tell it."""


@section
class Best:
    """The best detector whose size is within a limit."""

    average_weight_bits: Annotated[float, Strict(), Field(ge=LEAST_BITS, le=MOST_BITS)] | None = (
        None
    )
    """Average bits per weight of the searched layers."""
    max_size_mb: Annotated[float, Strict(), Field(ge=0.001, le=1_000_000)] | None = None
    """Size of all weights in megabytes, including those that stay in full precision."""

    @model_validator(mode="after")
    def _one_budget(self) -> "Best":
        if (self.average_weight_bits is None) == (self.max_size_mb is None):
            raise ValueError("give either average_weight_bits or max_size_mb.")
        return self


@section
class Search:
    """A quantization whose bits are searched for each layer, on the calibration images."""

    smallest: Annotated[Smallest, Nested] | None = None
    """Search the smallest detector whose loss of AP is at most `max_drop` (this or `best`)."""
    best: Annotated[Best, Nested] | None = None
    """Search the best detector of at most this size (this or `smallest`)."""
    like: Text | None = None
    """Name of the plain quantization whose other settings are used: scope, ranges, rounding, overrides. Layers
    that do not reach the heads keep its bits. Omitted: the defaults, with 8 bits."""
    candidates: Annotated[tuple[Bits, ...], Field(min_length=2)] = (3, 4, 5, 6, 8)
    """Numbers of bits that the weights of a layer can get."""
    min_activation_bits: Bits = 4
    """Fewest bits of activations. Used by the objective `bit_operations` alone; with `size`, all activations have
    `max_activation_bits`."""
    max_activation_bits: ActivationBits = 8
    """Most bits of activations; 32, with the objective `size`, leaves them in floating point."""
    objective: Literal["size", "bit_operations"] = "size"
    """What `smallest` minimizes: bytes of weights, or multiply-adds times the bits of both factors."""
    storage: Storage = "bits"
    """What a weight takes of a size: its `bits`, or what exported files store (`onnx`): half a byte up to 4 bits, else a
    byte. With `onnx` only the most candidates of each are measured: 4 and 8, by default. Omitted: `onnx` where `export` names
    the search and `onnx` can be asked for, else `bits`."""
    images: Annotated[int, Strict(), Field(ge=1, le=1_000_000)] = 4
    """Calibration images on which the error of each layer is measured at each number of bits."""
    rounds: Annotated[int, Strict(), Field(ge=1, le=100)] = 4
    """Most recipes that `smallest` tries. Each is calibrated on a half of the annotated calibration images and evaluated on
    the other half, both ways."""

    @model_validator(mode="after")
    def _agree(self) -> "Search":
        problems = []
        if (self.smallest is None) == (self.best is None):
            problems.append("give either smallest or best.")
        if len(set(self.candidates)) < 2:
            problems.append("candidates must name two different numbers of bits at least.")
        elif len(self.weight_candidates()) < 2:
            (stored,) = {stored_bits(bits, self.storage) for bits in self.candidates}
            problems.append(
                f"candidates are {', '.join(map(str, self.candidates))}, which all take {stored} bits with storage: onnx; "
                "name one of up to 4 and one of more."
            )
        if self.min_activation_bits > self.max_activation_bits:
            problems.append(
                f"min_activation_bits is {self.min_activation_bits}, more than max_activation_bits, which is "
                f"{self.max_activation_bits}; exchange them."
            )
        if self.max_activation_bits == FLOAT_BITS and self.objective != "size":
            problems.append(
                f"objective: {self.objective} counts bits of activations, so that max_activation_bits is at most "
                f"{MOST_BITS}."
            )
        if self.best is not None and self.objective != "size":
            problems.append(
                f"best limits the size, which objective: {self.objective} contradicts; remove objective, or use "
                "smallest."
            )
        average = self.best and self.best.average_weight_bits
        low, *_, high = sorted(stored_bits(bits, self.storage) for bits in self.candidates)
        if average and not low <= average <= high:
            problems.append(
                f"best.average_weight_bits is {average:g}, but candidates go from {low} to {high} bits; choose an "
                "average in between, or other candidates."
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def weight_candidates(self) -> list[int]:
        """Bits that weights can get, in rising order: the most of those that take the same storage."""
        most = {stored_bits(bits, self.storage): bits for bits in sorted(self.candidates)}
        return sorted(most.values())

    @property
    def measurement(self) -> str:
        """Name of the measurement that it chooses from: ``like``, numbers of bits and of images.

        The name of an entry has no plus sign, so no other settings share the name.
        """
        weights, activations = (
            "".join(map(str, bits))
            for bits in (self.weight_candidates(), self.activation_candidates())
        )
        return f"{self.like or ''}+w{weights}_a{activations}_images{self.images}"

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
    """The plain settings in which a search replaces the bits; of an entry that is not searched, its own.

    Args:
        quantizations: resolved entries by name.
    """
    entry = quantizations[name]
    if not is_search(entry):
        return entry
    if "like" in entry:
        return quantizations[entry["like"]]
    return as_plain(QuantizationSettings(8, 8))


def can_be(entry: Mapping[str, Any]) -> bool:
    """Whether an entry, as it was read, is a search without mistakes."""
    try:
        Search(**entry)
    except (QwtError, TypeError):
        return False
    return True


def is_search(entry: Any) -> bool:
    """Whether the bits of a quantization entry, as it was read or resolved, are searched."""
    return isinstance(entry, Search) or (
        hasattr(entry, "keys") and bool({"smallest", "best"} & set(entry))
    )
