"""The variants of a model, as lines of its table and points of its figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.estimates import Estimate, value_of
from ..plan.files import QUANTIZED
from ..plan.run import unique
from . import figures
from .summary import ExportedRow, Row
from .tradeoff import FULL_PRECISION, asked_for, file_lines


def variant_lines(rows: Sequence[Row], exports: Sequence[ExportedRow] = ()) -> list[dict[str, Any]]:
    """A line for full precision, each quantization and each compensation of a model, in one type of AP.

    Args:
        exports: of the model and the type of AP; the first file of a variant is in its line.
    """
    first = rows[0]
    files = {row.variant: row for row in reversed(exports)}
    full_files = (row.full_precision_file_bytes for row in exports)

    def file_of(title: str) -> dict[str, Any]:
        row = files.get(title)
        return {"file_bytes": row and row.file_bytes, "file_time": row and row.latency_ratio}

    lines: list[dict[str, Any]] = [
        {
            "variant": FULL_PRECISION,
            "series": FULL_PRECISION,
            "note": "",
            "file_bytes": next(filter(None, full_files), None),
            "file_time": None,
            "dominated_by": None,
            "faults": [],
            "ap": first.ap["AP"].baseline,
            # unknown in rows of failed quantizations
            "bytes": next(filter(None, (row.baseline_bytes for row in rows)), None),
        }
    ]
    for name in unique(row.quantization for row in rows):
        chosen = [row for row in rows if row.quantization == name]
        row = chosen[0]
        about = {"quantization": name, "bits": (row.weight_bits, row.activation_bits)}
        lines.append(
            {
                **about,
                **file_of(name),
                "variant": name,
                "title": name,
                "series": QUANTIZED,
                "searched": bool(row.asked),
                "note": f"W{row.weight_bits} A{row.activation_bits}, {row.scope}",
                "ap": row.ap["AP"].quantized,
                "loss": row.ap["AP"].quantized_minus_baseline,
                "faults": _faults(row.collapsed_quantized, row.not_finite_quantized),
                "bytes": row.quantized_bytes,
                "dominated_by": row.quantized_dominated_by,
                "made": row.seconds.get("quantize_model"),
            }
        )
        lines += [
            {
                **about,
                **file_of(row.compensated_name),
                "variant": f"+ {row.compensation}",
                "title": row.compensated_name,
                "series": row.compensation,
                "note": "not fitted"
                if row.blocks is None
                else f"{row.blocks_kept} of {row.blocks} blocks",
                "ap": row.ap["AP"].compensated,
                "loss": row.ap["AP"].compensated_minus_baseline,
                "gain": row.ap["AP"].compensated_minus_quantized,
                "recovered": row.ap["AP"].recovered,
                "faults": _faults(row.collapsed_compensated, row.not_finite_compensated),
                "bytes": row.compensated_bytes,
                "dominated_by": row.compensated_dominated_by,
                "multiply_adds": row.compensation_multiply_adds,
                "multiply_adds_percent": row.compensation_multiply_adds_percent,
                "made": row.seconds.get("fit_compensation"),
            }
            for row in chosen
            if row.compensation is not None
        ]
    return lines


def _faults(collapsed: bool | None, not_finite: int | None) -> list[str]:
    """Faults of a variant's detections."""
    faults = ["collapsed: finds no object"] if collapsed else []
    if not_finite:
        faults.append(f"{not_finite} detections are NaN or infinite and are ignored")
    return faults


def points(lines: Sequence[Mapping[str, Any]]) -> list[figures.Point]:
    """Points of the figures: the variants that were evaluated."""
    return [
        figures.Point(
            quantization=line.get("quantization", ""),
            bits=line.get("bits", (32, 32)),
            series=figures.SEARCHED if line.get("searched") else line["series"],
            value=line["ap"].value,
            low=line["ap"].low,
            high=line["ap"].high,
            cost=line["bytes"] / 1e6,
        )
        for line in lines
        if value_of(line["ap"]) is not None and line["bytes"] is not None
    ]


def timed_points(baseline: Estimate | None, rows: Sequence[ExportedRow]) -> list[figures.Point]:
    """Points of the figure of latency: exported files that were evaluated and timed, and full precision in each runtime."""
    found = []
    for line in file_lines(baseline, rows, {}):
        if line.milliseconds is not None:
            numbers = line.ap, line.ap_low, line.ap_high, line.milliseconds
            found.append(figures.Point(line.variant, (32, 32), line.runtime or "", *numbers))
    return found


def least_ap(rows: Sequence[Row]) -> dict[str, float]:
    """The least AP that searches with a limit for its loss were asked for, by the words for it."""
    limits = {asked_for(row): (row.ap["AP"].baseline, row.limit) for row in rows}
    return {
        words: full.value - limit.max_drop
        for words, (full, limit) in limits.items()
        if words and limit and full and full.value is not None
    }


def featured(rows: Sequence[Row]) -> Row:
    """The row that the report shows first: the largest gain in box AP, else the largest loss."""

    def interest(row: Row) -> tuple[bool, float, float]:
        ap = row.ap["AP"]
        gain, loss = value_of(ap.compensated_minus_quantized), value_of(ap.quantized_minus_baseline)
        return not row.failed, gain or 0, -(loss or 0)

    return max((row for row in rows if row.metrics == "bbox"), key=interest)
