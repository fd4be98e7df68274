"""What is printed at the end of a run: what to do, the table, and why steps failed.

Imports nothing heavy: Snakemake's own process prints it.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from tabulate import tabulate

from ..errors import QwtError
from ..evaluation.estimates import Difference, Estimate, value_of
from ..plan.files import DOCUMENT, REPORT, TABLE, UNFINISHED
from ..plan.rows import Stopped
from ..plan.run import unique
from ..runtime import unusable
from .advice import advice
from .summary import ExportedRow, Row, Summary, read_summary
from .text import (
    AP_TYPES,
    NOTHING,
    collapses,
    equality,
    interval,
    latency_share,
    limit_sentence,
    number,
    overfitted_ranges_of,
    percent,
    plus_minus,
    signed,
    slow_files,
)  # fmt: skip
from .tradeoff import milliseconds

T = TypeVar("T", Row, ExportedRow)


def advice_by_model(summary: Summary) -> list[str]:
    """What to do with each model, as a paragraph."""
    models = unique(row.model for row in summary.rows)
    paragraphs = []
    for model in models:
        rows = [row for row in summary.rows if row.model == model]
        sentences = advice(rows, [row for row in summary.exports if row.model == model])
        if sentences:
            paragraphs.append(
                "\n".join([f"{model}:", *(f"- {sentence}" for sentence in sentences)])
            )
    return paragraphs


def _cell(estimate: Estimate | None, collapsed: bool | None = False) -> str:
    words = [number(value_of(estimate)), plus_minus(estimate), "collapsed" if collapsed else ""]
    return " ".join(filter(None, words))


def _difference(difference: Difference | None) -> str:
    mark, ends = "*" if difference and difference.significant else " ", interval(difference)
    return f"{signed(value_of(difference))}{mark} {ends and f'({ends})'}"


def exports_table(rows: Sequence[ExportedRow]) -> str:
    """Return the exported detectors of a model as a table for the terminal."""
    lines = []
    for row in rows:
        first = row.metrics == rows[0].metrics  # sizes and times are the same for all types of AP
        timed = milliseconds(row, rows)
        latency = NOTHING if timed is None else f"{timed:.1f}"
        size = NOTHING if row.file_bytes is None else f"{row.file_bytes / 1e6:.2f}"
        about = [
            f"{size} ({percent(row.file_share)})",
            f"{latency} ({latency_share(row)})",
            percent(row.integer_share),
        ]
        lines.append(
            [
                row.variant if first else "",
                (row.title or row.runtime) if first else "",
                AP_TYPES[row.metrics],
                number(value_of(row.ap)),
                number(value_of(row.simulated)),
                *(about if first else [""] * 3),
            ]
        )
    headers = ["file", "runtime", "AP", "ONNX", "torch", "MB", "ms", "int."]
    return tabulate(lines, headers, disable_numparse=True)


def results_table(rows: Iterable[Row]) -> str:
    """Return the results of a model as a table for the terminal."""
    rows = [*rows]
    compensated = any(row.compensation for row in rows)
    lines = []
    for row in rows:
        ap = row.ap["AP"]
        line = {
            "variant": row.compensated_name if row.compensation else row.quantization,
            "AP": AP_TYPES[row.metrics],
            "full": _cell(ap.baseline),
            "quantized": _cell(ap.quantized, row.collapsed_quantized),
        }
        if compensated:
            line["with QwT"] = _cell(ap.compensated, row.collapsed_compensated)
            line["gain (interval)"] = _difference(ap.compensated_minus_quantized)
        else:
            line["change (interval)"] = _difference(ap.quantized_minus_baseline)
        lines.append(line)
    return tabulate(lines, headers="keys", disable_numparse=True)


def _by_model(rows: Sequence[T], table: Callable[[list[T]], str]) -> str:
    """A table for each model, below its name where there are several."""
    models = unique(row.model for row in rows)
    found = []
    for model in models:
        own = table([row for row in rows if row.model == model])
        found.append(f"{model}:\n{own}" if len(models) > 1 else own)
    return "\n\n".join(found)


def summary_table(summary: Summary) -> str:
    """Return the results of a run as tables for the terminal, of 80 columns where names are short."""
    images = ", ".join(sorted({str(row.images) for row in summary.rows if row.images}))
    repeats = max(row.repeats for row in summary.rows)
    over = f"{images} images and {repeats} calibrations" if repeats > 1 else f"{images} images"
    test = f" (paired bootstrap over {over})" if images else ""
    notes = [
        f"full: full precision; change: to full; gain: by QwT's compensation; *: its interval excludes 0{test}",
        *(["AP: mean ± standard deviation of these calibrations"] if repeats > 1 else []),
        *collapses(summary.rows),
        *overfitted_ranges_of(summary.quantizations),
        *dict.fromkeys(filter(None, map(limit_sentence, summary.rows))),
    ]
    exported = []
    if summary.exports:
        reduced = any(row.bfloat16_latency_ratio is not None for row in summary.exports)
        exported = [
            _by_model(summary.exports, exports_table),
            "\n".join(
                [
                    f"%: of full precision's file, timed in turns{' (behind /: computed in bfloat16)' * reduced}; int.: part of the multiply-adds that "
                    "is computed with integers",
                    *_equalities(summary.exports),
                    *slow_files(summary.exports),
                    "docs/export.md tells how to run the files.",
                ]
            ),
        ]
    return "\n\n".join([_by_model(summary.rows, results_table), "\n".join(notes), *exported])


def _equalities(rows: Iterable[ExportedRow]) -> list[str]:
    """Whether the AP of files differs from the simulation's in torch."""
    known = [(row, said) for row in rows if (said := equality(row))]
    differ = [
        f"{row.model} {row.variant} in {row.title or row.runtime}: {AP_TYPES[row.metrics]} AP of the file differs "
        "significantly from that in torch"
        for row, said in known
        if said == "differs"
    ]
    same = "No file's AP differs significantly from that in torch"
    return differ or [same] if known else []


def last_error(
    log: str | os.PathLike[str], *, since: float, folders: Iterable[str | os.PathLike[str]] = ()
) -> str:
    """The sentence at the end of a failed step's log.

    Args:
        since: start time of the run in seconds; older logs are ignored.
        folders: to which the step or Snakemake writes. Without a sentence, the cause may be one of them.
    """
    path = Path(log)
    if path.is_file() and path.stat().st_mtime >= since - 1:
        content = path.read_text(encoding="utf-8", errors="replace")
        entry = r" ERROR qwt_mmdet\.runtime: (.+?)(?=\n\d{4}-\d\d-\d\d |\Z)"
        if sentences := re.findall(entry, content, re.DOTALL):
            return " ".join(sentences[-1].split())
    return unusable(folders) or (
        "It ended without a message; it was probably killed, perhaps for lack of memory."
    )


def run_summary(folder: str | os.PathLike[str] = ".") -> str:
    """The text at the end of a run in a folder: the table, failed steps, and paths of the results."""
    results = {name: Path(folder, file) for name, file in (("Table", TABLE), ("Report", REPORT))}
    paragraphs = []
    document = Path(folder, DOCUMENT)
    if document.is_file():
        try:
            summary = read_summary(document)
            paragraphs += [*advice_by_model(summary), summary_table(summary)]
        except QwtError as error:
            paragraphs.append(str(error))
    note = Path(folder, UNFINISHED)
    if note.is_file():
        failed = Stopped.read(note).failed
        lines = [f"{entry.step}: {entry.sentence} ({entry.log})" for entry in failed]
        paragraphs.append("\n".join([f"Failed steps: {len(failed)}", *lines]))
    found = [f"{name}: {path}" for name, path in results.items() if path.is_file()]
    return "\n\n".join([*paragraphs, "\n".join(found)])
