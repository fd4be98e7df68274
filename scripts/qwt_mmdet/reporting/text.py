"""Numbers as people read them, and the table that a run prints when it ends.

Imports nothing heavy: Snakemake's own process prints the table.
"""

import csv
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tabulate import tabulate

KINDS = {"bbox": "box", "segm": "mask"}
NOTHING = "–"


def parse(cell: str) -> float | bool | str | None:
    """Turn a cell of the summary into what it was when it was written."""
    if cell == "":
        return None
    if cell in ("True", "False"):
        return cell == "True"
    try:
        return float(cell)
    except ValueError:
        return cell


NAMES = ("model", "quantization", "compensation", "metrics", "scope")


def read_table(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read summary.csv or blocks.csv; empty cells are None, numbers are floats."""
    with open(path, newline="", encoding="utf-8") as stream:
        return [
            # a name may look like a number
            {key: cell if key in (*NAMES, "name") else parse(cell) for key, cell in row.items()}
            for row in csv.DictReader(stream)
        ]


def number(value: float | None, digits: int = 3) -> str:
    """``0.269``; a dash for None."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """``+0.185``; ``0.000`` without a sign for what rounds to it; a dash for None."""
    if value is None:
        return NOTHING
    return f"{value:+.{digits}f}" if round(value, digits) else number(0, digits)


def percent(value: float | None) -> str:
    """``72 %``; a dash for None."""
    return NOTHING if value is None else f"{100 * value:.0f} %"


def megabytes(value: float | None) -> str:
    """Bytes as ``3.21 MB``; a dash for None."""
    return NOTHING if value is None else f"{value / 1e6:.2f} MB"


def significant_digits(value: float | None) -> str:
    """``0.0123``, ``1.2e-05``; a dash for None."""
    return NOTHING if value is None else f"{value:.3g}"


def multiply_adds(value: float | None) -> str:
    """``77.5 M``, ``4.50 G``; a dash for None."""
    if value is None:
        return NOTHING
    return f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.1f} M"


def duration(seconds: float | None) -> str:
    """``38 s``, ``2.0 min``, ``1.4 h``; a dash for None."""
    if seconds is None:
        return NOTHING
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def interval(
    row: Mapping[str, Any], column: str, form: Callable[[float | None], str] = signed
) -> str:
    """``+0.170 to +0.200``; empty without an interval."""
    low, high = row[f"{column}_low"], row[f"{column}_high"]
    return "" if low is None else f"{form(low)} to {form(high)}"


def _cell(row: Mapping[str, Any], variant: str) -> str:
    collapsed = " collapsed" if row.get(f"collapsed_{variant}") else ""
    return f"{number(row[f'AP_{variant}'])}{collapsed}"


def collapses(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence about each collapsed variant, with the layers to blame."""
    sentences = {}
    for row in rows:
        for variant, name in (
            ("quantized", row["quantization"]),
            ("compensated", f"{row['quantization']} + {row['compensation']}"),
        ):
            if row.get(f"collapsed_{variant}"):
                worst = row["worst_layers"]
                sentences[row["model"], name] = (
                    f"{row['model']} {name} collapsed: it finds not one object. "
                    + (f"Lowest signal-to-noise ratios: {worst}. " if worst else "")
                    + "Give such layers 8 bits with overrides, or raise the bits."
                )
    return list(sentences.values())


def summary_table(path: str | os.PathLike[str]) -> str:
    """Return the results of a run as a table for the terminal.

    Args:
        path: summary.csv.
    """
    rows = read_table(path)
    lines = []
    for row in rows:
        gain = "AP_compensated_minus_quantized"
        mark = "*" if row[f"{gain}_significant"] else " "
        ends = interval(row, gain)
        lines.append(
            [
                row["model"],
                row["quantization"],
                row["compensation"] or NOTHING,
                KINDS[row["metrics"]],
                *(_cell(row, variant) for variant in ("baseline", "quantized", "compensated")),
                f"{signed(row[gain])}{mark} {f'({ends})' if ends else ''}",
                percent(row["AP_recovered"]),
            ]
        )
    headers = [
        "model", "quantization", "compensation", "AP", "baseline", "quantized", "compensated",
        "gain (interval)", "recovered",
    ]  # fmt: skip
    table = tabulate(lines, headers, disable_numparse=True)
    images = ", ".join(sorted({f"{row['images']:.0f}" for row in rows}))
    notes = [
        "gain: compensated minus quantized AP; * the interval excludes 0 "
        f"(paired bootstrap over {images} images)",
        *collapses(rows),
    ]
    return "\n\n".join([table, "\n".join(notes)])
