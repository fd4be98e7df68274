"""The report of a run: one HTML file without external parts."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..files import read_json, write_atomically
from . import text
from .tables import AP_METRICS, VARIANTS, read_summary

TEMPLATES = Path(__file__).parent / "templates"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def effect_sentence(row: Mapping[str, Any]) -> str:
    """Say in words what one compensation did, from a row of the summary."""
    gain = "AP_compensated_minus_quantized"
    ends = text.interval(row, gain)
    name = row["compensation"]
    if not row[f"{gain}_significant"]:
        return f"{name} changes it by {text.signed(row[gain])}, which is not significant {ends}".rstrip()
    verb = "raises" if row[gain] > 0 else "lowers"
    kept = (
        f", {text.percent(row['AP_compensated'] / row['AP_baseline'])} of the baseline"
        if row["AP_baseline"]
        else ""
    )
    weights = row["compensation_bytes"] / row["quantized_bytes"]
    return (
        f"{name} {verb} it to {text.number(row['AP_compensated'])}{kept} "
        f"({text.signed(row[gain])}, interval {ends[1:-1]}), for {100 * weights:+.1f} % weights"
    )


def answer(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say in words what one quantization cost and what each compensation brought back.

    Args:
        rows: of one model, quantization and kind of AP.
    """
    row = rows[0]
    loss = "AP_quantized_minus_baseline"
    kind = text.KINDS[row["metrics"]]
    if row["AP_baseline"]:
        start = (
            f"{row['quantization']} keeps {text.percent(row['AP_quantized'] / row['AP_baseline'])} of "
            f"the baseline {kind} AP ({text.number(row['AP_quantized'])} of "
            f"{text.number(row['AP_baseline'])})"
        )
    else:
        start = f"{row['quantization']} has {kind} AP {text.number(row['AP_quantized'])}"
    if not row[f"{loss}_significant"]:
        start += ", a difference that is not significant"
    return f"{start}; {'; '.join(effect_sentence(r) for r in rows)}."


def answers(summary: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Sentences of each model, by quantization and kind of AP."""
    result: dict[str, list[str]] = {}
    keys = _unique((row["model"], row["quantization"], row["metrics"]) for row in summary)
    for key in keys:
        rows = [r for r in summary if (r["model"], r["quantization"], r["metrics"]) == key]
        result.setdefault(key[0], []).append(answer(rows))
    return result


def _class_table(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Any] | None:
    """AP by class of all variants of one model; None where the model has no such AP."""
    folders = _unique(row[variant] for row in rows for variant in VARIANTS)
    metrics = {folder: read_json(Path(folder) / "metrics.json") for folder in folders}
    if kind not in metrics[folders[0]]:
        return None
    labels = {}
    for row in rows:
        labels[row["baseline"]] = "baseline"
        labels[row["quantized"]] = row["quantization"]
        labels[row["compensated"]] = f"{row['quantization']} + {row['compensation']}"
    classes = metrics[folders[0]]["per_class"]
    return {
        "kind": text.KINDS[kind],
        "columns": [labels[folder] for folder in folders],
        "rows": [
            {
                "name": name,
                "annotations": entry["annotations"],
                "values": [metrics[folder]["per_class"][name].get(kind) for folder in folders],
            }
            for name, entry in classes.items()
            if entry["annotations"]
        ],
    }


def _model_section(rows: Sequence[Mapping[str, Any]], sentences: Sequence[str]) -> dict[str, Any]:
    """What the template shows of one model."""
    warmups = {row["quantization"]: row["warmup"] for row in rows}
    return {
        "name": rows[0]["model"],
        "answers": sentences,
        "blocks": [
            {
                "title": f"{row['quantization']} + {row['compensation']}",
                "rows": text.read_table(Path(row["compensated"]) / "blocks.csv"),
            }
            for row in rows
        ],
        "not_quantized": {
            name: read_summary(warmup)["not_quantized"] for name, warmup in warmups.items()
        },
        "classes": [
            table for kind in text.KINDS if (table := _class_table(rows, kind)) is not None
        ],
        "provenance": read_json(Path(rows[0]["baseline"]) / "metrics.json")["provenance"],
        "quantizations": {row["quantization"]: row["settings"] for row in rows},
        "compensations": {row["compensation"]: row["compensation_settings"] for row in rows},
    }


def render(
    rows: Sequence[Mapping[str, Any]],
    summary: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> None:
    """Write the report.

    Args:
        rows: as for ``tables.summarize``, with compensation_settings besides.
        summary: the table that ``tables.summarize`` wrote.
        output: the HTML file.

    Raises:
        QwtError: a result file is missing or unreadable.
    """
    table = text.read_table(summary)
    sentences = answers(table)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": text.number,
        "signed": text.signed,
        "percent": text.percent,
        "megabytes": text.megabytes,
    }
    models = _unique(row["model"] for row in rows)
    page = environment.get_template("report.html.j2").render(
        summary=table,
        metrics=AP_METRICS,
        kinds=text.KINDS,
        interval=text.interval,
        number=text.number,
        signed=text.signed,
        percent=text.percent,
        models=[
            _model_section([row for row in rows if row["model"] == model], sentences[model])
            for model in models
        ],
    )
    with write_atomically(output) as partial:
        partial.write_text(page, encoding="utf-8")
