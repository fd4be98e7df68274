"""What is printed at the end of a run: what to do, the table, and why steps failed.

Imports nothing heavy: Snakemake's own process prints it.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from tabulate import tabulate

from ..errors import QwtError
from ..evaluation.estimates import Estimate, value_of
from ..plan.files import DOCUMENT, REPORT, TABLE, UNFINISHED
from ..plan.rows import Stopped
from ..plan.run import unique
from ..runtime import unusable
from .advice import advice
from .summary import ExportedRow, Summary, read_summary
from .text import (
    AP_TYPES,
    NOTHING,
    collapses,
    equality,
    interval,
    latency_share,
    limit_sentence,
    megabytes,
    number,
    overfitted_ranges_of,
    percent,
    plus_minus,
    signed,
    slow_files,
)  # fmt: skip


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


def exports_table(rows: Iterable[ExportedRow]) -> str:
    """Return the exported detectors of a run as a table for the terminal."""
    lines = [
        [
            row.model,
            row.variant,
            row.title or row.runtime,
            AP_TYPES[row.metrics],
            number(value_of(row.ap)),
            number(value_of(row.simulated)),
            equality(row) or NOTHING,
            megabytes(row.file_bytes),
            percent(row.file_share),
            NOTHING if row.milliseconds is None else f"{row.milliseconds:.1f} ms",
            latency_share(row),
            percent(row.integer_share),
        ]
        for row in rows
    ]
    headers = [
        "model", "exported", "runtime", "AP", "file", "simulated", "", "size", "of full", "latency",
        "of full", "in integers",
    ]  # fmt: skip
    return tabulate(lines, headers, disable_numparse=True)


def summary_table(summary: Summary) -> str:
    """Return the results of a run as a table for the terminal."""
    lines = []
    for row in summary.rows:
        ap, gain = row.ap["AP"], row.ap["AP"].compensated_minus_quantized
        mark, ends = "*" if gain and gain.significant else " ", interval(gain)
        lines.append(
            {
                "model": row.model,
                "quantization": row.quantization,
                "compensation": row.compensation or NOTHING,
                "AP": AP_TYPES[row.metrics],
                "baseline": _cell(ap.baseline),
                "quantized": _cell(ap.quantized, row.collapsed_quantized),
                "compensated": _cell(ap.compensated, row.collapsed_compensated),
                "gain (interval)": f"{signed(value_of(gain))}{mark} {ends and f'({ends})'}",
                "recovered": percent(value_of(ap.recovered)),
            }
        )
    table = tabulate(lines, headers="keys", disable_numparse=True)
    images = ", ".join(sorted({str(row.images) for row in summary.rows if row.images}))
    repeats = max(row.repeats for row in summary.rows)
    over = f"{images} images and {repeats} calibrations" if repeats > 1 else f"{images} images"
    notes = [
        f"gain: compensated minus quantized AP; * the interval excludes 0 (paired bootstrap over {over})",
        *(["AP: mean ± standard deviation of these calibrations"] if repeats > 1 else []),
        *collapses(summary.rows),
        *overfitted_ranges_of(summary.quantizations),
        *dict.fromkeys(filter(None, map(limit_sentence, summary.rows))),
    ]
    exported = []
    if summary.exports:
        reduced = any(row.bfloat16_latency_ratio is not None for row in summary.exports)
        exported = [
            exports_table(summary.exports),
            "of full: of the same model's file in full precision"
            f"{' (behind /: computed in bfloat16)' * reduced}; in integers: multiply-adds that the runtime computes "
            "with integers",
            *slow_files(summary.exports),
        ]
    return "\n\n".join([table, "\n".join(notes), *exported])


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
