"""The content of summary.json as dataclasses, and its reading.

Imports nothing heavy: Snakemake's own process prints a table of it.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..errors import QwtError
from ..evaluation.estimates import Comparison, Difference, Estimate, Limit, value_of
from ..files import MADE_BY_US, read_json, write_json
from ..plan.rows import Failure


@dataclass(frozen=True)
class ClassResult:
    """AP of a class that has ``annotations`` objects in ``images`` images; without intervals if these are few."""

    name: str
    annotations: int
    images: int
    ap: Comparison


@dataclass(frozen=True)
class Row:
    """One model × quantization × compensation × type of AP.

    The fields before ``seconds`` are the columns of summary.csv; ``ap`` gives several columns per metric.
    ``reporting.tables`` describes them.

    Args:
        asked: a search's ``smallest`` or ``best``. limit: of a search with a limit for the loss of AP.
        seconds: duration of the steps that the row depends on, by rule; none for supplied warmup files.
        classes: those that have objects.
        lost_most, regained_most: names of the classes with the largest loss by quantization, and gain by
            compensation, the largest first.
    """

    model: str
    quantization: str
    compensation: str | None
    metrics: str
    weight_bits: int | float
    activation_bits: int | float
    scope: str
    failed: str | None
    images: int | None
    resamples: int | None
    collapsed_quantized: bool | None
    collapsed_compensated: bool | None
    not_finite_quantized: int | None
    not_finite_compensated: int | None
    worst_layers: str | None
    ap: dict[str, Comparison]
    baseline_bytes: int | None
    quantized_bytes: int | None
    layers: int | None
    not_quantized: int | None
    compensation_bytes: int | None
    compensation_parameters: int | None
    compensation_multiply_adds: int | float | None
    compensation_multiply_adds_percent: int | float | None
    blocks: int | None
    blocks_kept: int | None
    repeats: int = 1
    quantized_dominated_by: str | None = None
    compensated_dominated_by: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)
    limit: Limit | None = None
    classes: list[ClassResult] = field(default_factory=list)
    lost_most: list[str] = field(default_factory=list)
    regained_most: list[str] = field(default_factory=list)

    @property
    def compensated_name(self) -> str:
        """``w4a4 + qwt``."""
        return f"{self.quantization} + {self.compensation}"

    @property
    def compensated_bytes(self) -> int | None:
        """Size of the weights with the compensation; None if either is missing."""
        if self.quantized_bytes is None or self.compensation_bytes is None:
            return None
        return self.quantized_bytes + self.compensation_bytes

    @property
    def compensation_share(self) -> float | None:
        """Size of the compensation divided by that of the full-precision weights; None if either is missing."""
        if not self.baseline_bytes or self.compensation_bytes is None:
            return None
        return self.compensation_bytes / self.baseline_bytes

    def columns(self) -> dict[str, Any]:
        """The row of summary.csv."""
        columns: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name == "seconds":
                break
            columns[name] = value
            for metric, comparison in columns.pop("ap", {}).items():
                for variant, estimate in vars(comparison).items():
                    columns |= _estimate_columns(f"{metric}_{variant}", estimate, self.repeats)
        return columns


def with_dominance(rows: Sequence[Row]) -> list[Row]:
    """The rows of one model, with the variant that dominates each variant, for each type of AP.

    Variants that are not dominated form the Pareto front of AP against size.
    """
    known: dict[tuple[str, str], tuple[int, float]] = {}
    for row in rows:
        for name, size, estimate in (
            (row.quantization, row.quantized_bytes, row.ap["AP"].quantized),
            (row.compensated_name, row.compensated_bytes, row.ap["AP"].compensated),
        ):
            if size is not None and (value := value_of(estimate)) is not None:
                known[row.metrics, name] = size, value

    def dominator(metrics: str, name: str) -> str | None:
        if (metrics, name) not in known:
            return None
        size, ap = known[metrics, name]
        better = [
            (other_ap, -other_size, other)
            for (other_metrics, other), (other_size, other_ap) in known.items()
            if other_metrics == metrics
            and other_size <= size
            and other_ap >= ap
            and (other_size, other_ap) != (size, ap)
        ]
        return max(better)[2] if better else None

    return [
        dataclasses.replace(
            row,
            quantized_dominated_by=dominator(row.metrics, row.quantization),
            compensated_dominated_by=dominator(row.metrics, row.compensated_name),
        )
        for row in rows
    ]


@dataclass(frozen=True)
class ExportedRow:
    """One exported detector × runtime × type of AP, a row of exports.csv.

    Args:
        compensation: None without compensation.
        failed: in a failed run, why numbers are missing.
        ap: of the file. simulated: of the same detector in PyTorch; None where it was not evaluated.
        exported_minus_simulated: difference of both, paired over the images.
        computed_bytes: weights at their bits, with the compensation. file_bytes: on disk.
        full_precision_file_bytes: of the same model's file in full precision.
        milliseconds, full_precision_milliseconds: median latencies for an image.
        latency_ratio: median of the rounds' ratios of both latencies. processor_ratio: of both processor times, which
            other jobs do not lengthen.
        bfloat16_latency_ratio: as latency_ratio, of full precision in bfloat16; None where the runtime has no such default.
        integer_share: part of the multiply-adds that the runtime computes with integers, by its own profile.
        version, title: of the runtime; the title is in no column. rounds, threads, hardware: of the measurement of latency.
    """

    model: str
    quantization: str
    compensation: str | None
    runtime: str
    metrics: str
    failed: str | None
    ap: Estimate | None
    simulated: Estimate | None
    exported_minus_simulated: Difference | None
    computed_bytes: int | None
    file_bytes: int | None
    full_precision_file_bytes: int | None
    milliseconds: float | None
    full_precision_milliseconds: float | None
    latency_ratio: float | None
    processor_ratio: float | None
    bfloat16_latency_ratio: float | None
    integer_share: float | None
    version: str | None
    rounds: int | None
    threads: int | None
    hardware: str | None
    title: str | None = None

    @property
    def variant(self) -> str:
        """``w4a4 + qwt``."""
        return " + ".join(filter(None, (self.quantization, self.compensation)))

    @property
    def file_share(self) -> float | None:
        """Size of the file divided by that in full precision."""
        if self.file_bytes is None or self.full_precision_file_bytes is None:
            return None
        return self.file_bytes / self.full_precision_file_bytes

    def columns(self) -> dict[str, Any]:
        """The row of exports.csv."""
        columns: dict[str, Any] = {}
        for name, value in vars(self).items():
            if name in ("ap", "simulated", "exported_minus_simulated"):
                columns |= _estimate_columns(name, value)
            elif name != "title":
                columns[name] = value
        return columns


def _estimate_columns(name: str, estimate: Estimate | None, repeats: int = 1) -> dict[str, Any]:
    """Columns of an estimate: value, interval, spread between repeats, and significance of a difference."""
    known = estimate or Estimate()
    columns: dict[str, Any] = {
        name: known.value, f"{name}_low": known.low, f"{name}_high": known.high,
    }  # fmt: skip
    if repeats > 1:
        columns[f"{name}_spread"] = known.spread
    if "_minus_" in name:
        columns[f"{name}_significant"] = estimate and getattr(estimate, "significant", None)
    return columns


@dataclass(frozen=True)
class Summary:
    """The results of a run.

    Args:
        confidence, seed: of the bootstrap.
        failed: the steps that failed.
        quantizations: a dictionary for each model and quantization. ``not_quantized``: name, type, reason and
            multiply_adds_percent (share in the scope, or null). ``layer_sqnr``: name, weight_bits,
            activation_bits and sqnr_db of each layer and each operand of attention; an operand has no
            weight_bits, a layer without error no sqnr_db. ``range_check``: the fields of a
            :class:`..record.RangeCheck`.
        exports: the exported detectors.
    """

    confidence: float
    seed: int
    failed: list[Failure]
    rows: list[Row]
    quantizations: list[dict[str, Any]]
    exports: list[ExportedRow] = field(default_factory=list)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the summary as JSON, with ``significant`` of each difference."""
        write_json(path, _adapter().dump_python(self, mode="json"), indent=1)


@cache
def _adapter() -> TypeAdapter[Summary]:
    return TypeAdapter(Summary)


def read_summary(path: str | os.PathLike[str]) -> Summary:
    """Read summary.json; a QwtError if it is missing, unreadable or of another version."""
    content = read_json(path, what="summary")
    try:
        return _adapter().validate_python(content)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise QwtError(f"{path} is no summary of this version ({where}); {MADE_BY_US}.") from error
