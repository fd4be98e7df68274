"""AP against bytes and milliseconds: the lines of ``tradeoff.csv`` of a model, and the Pareto front.

Imports nothing heavy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

from ..evaluation.estimates import Estimate
from ..plan.run import unique
from .summary import ExportedRow, Row

FULL_PRECISION = "full precision"
T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """A variant of a detector as it was evaluated: in PyTorch, or as a file in a runtime.

    Args:
        metrics: ``bbox`` or ``segm``. asked: what a search was asked for. runtime: its title; None in PyTorch.
        ap, ap_low, ap_high: AP and its interval.
        bytes: of the weights with the compensation, or of the file. milliseconds: for an image.
    """

    metrics: str
    variant: str
    asked: str | None
    runtime: str | None
    ap: float
    ap_low: float | None
    ap_high: float | None
    bytes: int | None
    milliseconds: float | None = None


def asked_for(row: Row) -> str | None:
    """What a search was asked for, in words; None where bits were given."""
    wording = {
        "max_drop": "loses at most {:g}",
        "max_size_mb": "at most {:g} MB",
        "average_weight_bits": "{:g} bits per weight",
    }
    return next((wording[key].format(row.asked[key]) for key in wording if key in row.asked), None)


def lines(rows: Sequence[Row], exports: Sequence[ExportedRow]) -> list[Line]:
    """Lines of the variants of a model that were evaluated, each once for each type of AP."""
    found: list[Line] = []
    for metrics in unique(row.metrics for row in rows):
        own = [row for row in rows if row.metrics == metrics]
        baseline = own[0].ap["AP"].baseline
        size = next(filter(None, (row.baseline_bytes for row in own)), None)
        asked: dict[str, str | None] = {FULL_PRECISION: None}
        simulated = {FULL_PRECISION: (baseline, size)}
        for row in own:
            asked[row.quantization] = asked[row.compensated_name] = asked_for(row)
            simulated[row.quantization] = row.ap["AP"].quantized, row.quantized_bytes
            simulated[row.compensated_name] = row.ap["AP"].compensated, row.compensated_bytes
        for name, (ap, size) in simulated.items():
            if ap is not None and ap.value is not None:
                numbers = ap.value, ap.low, ap.high, size
                found.append(Line(metrics, name, asked[name], None, *numbers))
        files = [row for row in exports if row.metrics == metrics]
        found += file_lines(baseline, files, asked)
    return found


def milliseconds(row: ExportedRow, rows: Sequence[ExportedRow]) -> float | None:
    """Latency of a file: its ratio to full precision, measured in turn, times full precision's median of all files.

    Args:
        rows: of its model, whose other runtimes do not count.
    """
    full = [
        ms
        for other in rows
        if other.runtime == row.runtime and (ms := other.full_precision_milliseconds) is not None
    ]
    return row.latency_ratio * median(full) if full and row.latency_ratio is not None else None


def file_lines(
    baseline: Estimate | None, rows: Sequence[ExportedRow], asked: Mapping[str, str | None]
) -> list[Line]:
    """Lines of exported files in one type of AP, and of full precision's in each runtime.

    Args:
        baseline: AP of full precision. asked: what searches were asked for, by variant.
    """
    found: list[Line] = []
    for title in unique(row.title or row.runtime for row in rows):
        own = [row for row in rows if (row.title or row.runtime) == title]
        full = [ms for row in own if (ms := row.full_precision_milliseconds) is not None]
        size = next(filter(None, (row.full_precision_file_bytes for row in own)), None)
        parts = [(row.variant, row.ap, row.file_bytes, milliseconds(row, own)) for row in own]
        if full:
            parts = [(FULL_PRECISION, baseline, size, median(full)), *parts]
        for name, ap, size, timed in parts:
            if ap is not None and ap.value is not None:
                numbers = ap.value, ap.low, ap.high, size
                found.append(Line(own[0].metrics, name, asked.get(name), title, *numbers, timed))
    return found


def pareto_front(
    points: Iterable[T], cost: Callable[[T], float], value: Callable[[T], float]
) -> list[T]:
    """Points that no other point dominates in cost and value, by cost."""
    front: list[T] = []
    for point in sorted(points, key=lambda p: (cost(p), -value(p))):
        if not front or value(point) > value(front[-1]):
            front.append(point)
    return front


def columns(found: Sequence[Line]) -> list[dict[str, Any]]:
    """The rows of tradeoff.csv.

    ``pareto_bytes`` and ``pareto_milliseconds`` say whether a line is on the Pareto front of AP against this cost, of
    the lines with the same type of AP and runtime; empty where the cost is unknown.
    """
    table = []
    for line in found:
        row = {**vars(line)}
        alike = [o for o in found if (o.metrics, o.runtime) == (line.metrics, line.runtime)]
        for name in ("bytes", "milliseconds"):
            costs = [(cost, one) for one in alike if (cost := getattr(one, name)) is not None]
            front = pareto_front(costs, lambda pair: pair[0], lambda pair: pair[1].ap)
            known = getattr(line, name) is not None
            row[f"pareto_{name}"] = any(one is line for _, one in front) if known else None
        table.append(row)
    return table
