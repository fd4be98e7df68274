"""The report of a run: a single HTML file without external resources."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..errors import QwtError
from ..evaluation.coco import AP_METRICS, has_masks
from ..evaluation.estimates import Estimate, value_of
from ..files import read_json, write_atomically
from ..plan.rows import ResultRow
from ..runtime import explain
from . import figures, text
from .pictures import RULES, SCORE, Picture, choose_pictures
from .summary import Row, Summary, read_summary

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"

MOST_IMAGES = sum(RULES.values())
PICTURED_IMAGES = 24  # in the whole report, so that it stays below 5 MB
WORST_LAYERS = 10


def guarded(what: str, caller: Callable[[], Markup]) -> Markup:
    """Return a piece of the report, or a sentence in its place if it raises.

    In the templates, every piece that can fail is inside of ``{% call guarded("what it is") %}``. So a failing
    picture, figure or table does not affect the rest. Guarded pieces may be nested.
    """
    try:
        return caller()
    except Exception as error:
        sentence = f"The report cannot show {what}. {explain(error)}"
        logger.warning("%s", sentence)
        logging.getLogger("traceback").info("", exc_info=error)
        return Markup('<p class="missing">{}</p>').format(sentence)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _share_of_baseline(row: Row, estimate: Estimate | None) -> str:
    """``95 % (0.589)``, or only the number without a baseline."""
    value, baseline = value_of(estimate), value_of(row.ap["AP"].baseline)
    if value is None or not baseline:
        return text.number(value)
    return f"{text.percent(value / baseline)} ({text.number(value)})"


def effect_sentence(row: Row) -> str:
    """A sentence about the effect of one compensation."""
    name, ap = row.compensation, row.ap["AP"]
    gain = ap.compensated_minus_quantized
    if row.collapsed_compensated:
        return f"with {name} it finds not one object"
    if gain is None or gain.value is None:
        return f"with {name} it is {_share_of_baseline(row, ap.compensated)}"
    change, ends = text.signed(gain.value), text.interval(gain)
    if not gain.significant:
        sentence = f"{name} changes it by {change}, which is not significant"
        return f"{sentence} ({ends})" if ends else sentence
    verb = "brings" if gain.value > 0 else "lowers"
    assert row.compensation_bytes is not None, "a compensation has a size"
    assert row.quantized_bytes is not None
    weights = row.compensation_bytes / row.quantized_bytes
    return (
        f"{name} {verb} it to {_share_of_baseline(row, ap.compensated)}, a change of {change} "
        f"(interval {ends}), for {100 * weights:+.1f} % weights"
    )


def answer(rows: Sequence[Row]) -> str:
    """A sentence about the loss of one quantization and the gain of each compensation.

    Args:
        rows: of one model, quantization and type of AP.
    """
    row = rows[0]
    ap_type, loss = text.AP_TYPES[row.metrics], row.ap["AP"].quantized_minus_baseline
    quantized, baseline = value_of(row.ap["AP"].quantized), value_of(row.ap["AP"].baseline)
    if row.collapsed_quantized:
        start = f"{row.quantization} collapsed, it finds not one object ({ap_type} AP)"
        if row.worst_layers:
            start += f"; layers with the lowest SQNR: {row.worst_layers}"
    elif quantized is None and row.failed:
        start = f"{row.quantization} has no {ap_type} AP"
    elif quantized is None:
        start = f"{row.quantization} was not evaluated without compensation ({ap_type} AP)"
    elif baseline:
        start = (
            f"{row.quantization} keeps {text.percent(quantized / baseline)} of the baseline {ap_type} AP "
            f"({text.number(quantized)} of {text.number(baseline)})"
        )
    else:
        start = f"{row.quantization} has {ap_type} AP {text.number(quantized)}"
    if loss is not None and not loss.significant:
        start += ", a difference that is not significant"
    effects = [
        f"{' + '.join(filter(None, (r.quantization, r.compensation)))} is not complete "
        f"({r.failed.rstrip('.')})"
        if r.failed
        else effect_sentence(r)
        for r in rows
        if r.compensation is not None or r.failed
    ]
    return "; ".join([start, *effects]) + "."


def featured(rows: Sequence[Row]) -> Row:
    """The row that the report shows first: the largest gain in box AP, else the largest loss."""

    def interest(row: Row) -> tuple[bool, float, float]:
        ap = row.ap["AP"]
        gain, loss = value_of(ap.compensated_minus_quantized), value_of(ap.quantized_minus_baseline)
        return not row.failed, gain or 0, -(loss or 0)

    return max((row for row in rows if row.metrics == "bbox"), key=interest)


def recommendation(rows: Sequence[Row]) -> str | None:
    """A sentence about the Pareto front of box AP against size, and about dominated compensated variants.

    Args:
        rows: of one model.

    Returns:
        None where no variant has both a size and an AP.
    """
    lines = [
        line
        for line in variant_lines([row for row in rows if row.metrics == "bbox"])
        if "title" in line and line["bytes"] is not None and value_of(line["ap"]) is not None
    ]
    front = sorted((li for li in lines if not li["dominated_by"]), key=lambda line: -line["bytes"])
    if not front:
        return None
    best = [
        f"{line['title']} ({line['bytes'] / 1e6:.2f} MB, {text.number(line['ap'].value)})"
        for line in front
    ]
    sentence = f"Best box AP for the size: {', '.join(best)}"
    dominated = [
        f"{line['title']} is dominated by {line['dominated_by']}"
        for line in lines
        if line["dominated_by"] and line["series"] != figures.QUANTIZED
    ]
    return "; ".join([sentence, *dominated]) + "."


def answers(rows: Sequence[Row]) -> list[str]:
    """Sentences about one model: the recommendation, then each quantization and type of AP, the featured one first."""
    first = featured(rows).quantization
    names = sorted(_unique(row.quantization for row in rows), key=lambda name: name != first)
    found = [
        answer(chosen)
        for name in names
        for ap_type in text.AP_TYPES
        if (chosen := [row for row in rows if (row.quantization, row.metrics) == (name, ap_type)])
    ]
    limits = dict.fromkeys(map(text.limit_sentence, rows))
    return [*filter(None, [*limits, recommendation(rows)]), *found]


def _faults(collapsed: bool | None, not_finite: int | None) -> list[str]:
    """Faults of a variant's detections."""
    faults = ["collapsed: finds not one object"] if collapsed else []
    if not_finite:
        faults.append(f"{not_finite} detections are NaN or infinite and are ignored")
    return faults


def variant_lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A line for the baseline, each quantization and each compensation.

    Args:
        rows: of one model and type of AP.
    """
    first = rows[0]
    lines: list[dict[str, Any]] = [
        {
            "variant": "baseline",
            "series": figures.BASELINE,
            "note": "full precision",
            "dominated_by": None,
            "faults": [],
            "ap": first.ap["AP"].baseline,
            # unknown in rows of failed quantizations
            "bytes": next(filter(None, (row.baseline_bytes for row in rows)), None),
            "evaluated": first.seconds.get("evaluate_baseline"),
        }
    ]
    for name in _unique(row.quantization for row in rows):
        chosen = [row for row in rows if row.quantization == name]
        row = chosen[0]
        about = {"quantization": name, "bits": (row.weight_bits, row.activation_bits)}
        lines.append(
            {
                **about,
                "variant": name,
                "title": name,
                "series": figures.QUANTIZED,
                "note": f"W{row.weight_bits} A{row.activation_bits}, {row.scope}",
                "ap": row.ap["AP"].quantized,
                "loss": row.ap["AP"].quantized_minus_baseline,
                "faults": _faults(row.collapsed_quantized, row.not_finite_quantized),
                "bytes": row.quantized_bytes,
                "dominated_by": row.quantized_dominated_by,
                "made": row.seconds.get("quantize_model"),
                "evaluated": row.seconds.get("evaluate_quantized"),
            }
        )
        lines += [
            {
                **about,
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
                "evaluated": row.seconds.get("evaluate_compensated"),
            }
            for row in chosen
            if row.compensation is not None
        ]
    return lines


def _points(lines: Sequence[Mapping[str, Any]]) -> list[figures.Point]:
    """Points of the figures: the variants that were evaluated."""
    return [
        figures.Point(
            quantization=line.get("quantization", ""),
            bits=line.get("bits", (32, 32)),
            series=line["series"],
            value=line["ap"].value,
            low=line["ap"].low,
            high=line["ap"].high,
            megabytes=line["bytes"] / 1e6,
        )
        for line in lines
        if value_of(line["ap"]) is not None and line["bytes"] is not None
    ]


def block_section(row: ResultRow, name: str) -> dict[str, Any]:
    """Errors of the blocks of one compensation, on held-out images if there are any.

    Args:
        name: of the figure.

    Raises:
        QwtError: blocks.csv has no blocks.
    """
    path = Path(row.compensated or "", "blocks.csv")
    blocks = text.read_blocks(path)
    if not blocks:
        raise QwtError(f"{path} has no blocks; delete it and let the workflow make it again.")
    held_out = all(block["holdout"]["error_after"] is not None for block in blocks)
    images = "holdout" if held_out else "fit"
    undrawn = [b["name"] for b in blocks if not figures.has_errors(b, images)]
    return {
        "title": f"{row.quantization} + {row.compensation}",
        "blocks": blocks,
        "kept": sum(bool(block["kept"]) for block in blocks),
        "images": "held-out images" if held_out else "the images of the fit",
        "draw": lambda: figures.block_errors(blocks, images, name),
        "drawn": len(undrawn) < len(blocks),
        "undrawn": undrawn,
    }


def spare(layer: Mapping[str, Any]) -> str | None:
    """Entry of ``overrides`` that gives a layer 8 bits; None where it has 8 bits already.

    An operand of attention, ``backbone.attn (query)``, has no weights; its pattern is the module's name.
    """
    bits = {key: layer[key] for key in ("weight_bits", "activation_bits") if layer[key] is not None}
    if all(value >= 8 for value in bits.values()):
        return None
    pattern = layer["name"].partition(" ")[0]
    return f"- {{{', '.join([f'pattern: {pattern}', *(f'{key}: 8' for key in bits)])}}}"


def _layer_section(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of one quantization, the lowest SQNR first, and modules that are not quantized."""
    measured = [layer for layer in quantization["layer_sqnr"] if layer["sqnr_db"] is not None]
    layers = sorted(measured, key=lambda layer: layer["sqnr_db"])
    most = max([layer["sqnr_db"] for layer in layers], default=0)
    least = min([0, *(layer["sqnr_db"] for layer in layers)])
    return {
        "title": quantization["quantization"],
        "layers": [
            layer
            | {
                "override": spare(layer),
                # the length of a bar, from the smallest ratio (or 0 dB) to the largest
                "share": (layer["sqnr_db"] - least) / ((most - least) or 1),
            }
            for layer in layers
        ],
        "worst": layers[0] if layers else None,
        "not_quantized": quantization["not_quantized"],
    }


def _titles(row: ResultRow) -> dict[str, str]:
    """Names in the report of a combination's evaluated variants."""
    titles = {
        "baseline": "baseline",
        "quantized": row.quantization,
        "compensated": f"{row.quantization} + {row.compensation}",
    }
    return {kind: titles[kind] for kind in row.evaluated()}


def _pictures(row: ResultRow, seed: int, most: int) -> list[Picture]:
    folders = row.evaluated()
    if not folders or row.annotations is None:
        raise QwtError("None of its variants was evaluated.")
    found = {
        kind: read_json(Path(folder) / "predictions.json", what="file of predictions")
        for kind, folder in folders.items()
    }
    masks = any(map(has_masks, found.values()))
    metrics = read_json(Path(next(iter(folders.values()))) / "metrics.json", what="metrics file")
    return choose_pictures(
        row.annotations, found, _titles(row),
        masks=masks, classes=metrics["per_class"], seed=seed, most=most,
    )  # fmt: skip


def _class_section(row: Row) -> dict[str, Any]:
    """AP by class of a row, and the classes with the largest loss and gain."""
    classes = {entry.name: entry for entry in row.classes}
    rankings = [
        ("lost most", "quantized_minus_baseline", row.lost_most),
        ("regained most", "compensated_minus_quantized", row.regained_most),
    ]
    title = " + ".join(filter(None, (row.quantization, row.compensation)))
    return {
        "title": f"{title}, {text.AP_TYPES[row.metrics]} AP",
        "compensated": row.compensation is not None,
        "classes": row.classes,
        "rankings": [
            {
                "title": title,
                "changes": [(classes[name], getattr(classes[name].ap, change)) for name in names],
            }
            for title, change, names in rankings
            if names
        ],
    }


def _images(annotations: Path) -> dict[str, Any] | None:
    """Names and source of the images of an annotation file."""
    if not annotations.is_file():
        return None
    content = read_json(annotations, what="annotation file")
    return {
        "source": {key: value for key, value in content["info"].items() if value not in (None, [])},
        "names": [image["file_name"] for image in content["images"]],
    }


def _computed_on(provenance: Mapping[str, Any]) -> str:
    """Device, and settings that affect the last digits of a result."""
    known = {
        "cpu_capability": "{} kernels on the processor",
        "threads": "{} threads",
        "tf32": "TF32 {}",
    }
    shown = {**provenance, "tf32": "on" if provenance.get("tf32") else "off"}
    return ", ".join(
        [provenance["device"], *(t.format(shown[k]) for k, t in known.items() if k in provenance)]
    )


def _provenance(rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Settings, versions, seeds, hashes, hardware and image lists of one model."""
    by_variant = {
        _titles(row)[kind]: read_json(Path(folder) / "metrics.json")["provenance"]
        for row in rows
        for kind, folder in row.evaluated().items()
    }
    if not by_variant or rows[0].annotations is None:
        raise QwtError("None of its variants was evaluated.")
    annotations = Path(rows[0].annotations)
    parts = {
        part: _images(annotations.with_name(f"{part}.json"))
        for part in ("calibration", "evaluation")
    }
    return {
        "first": next(iter(by_variant.values())),
        "hashes": {
            title: {
                key: value
                for key in ("warmup", "compensation")
                if (value := provenance.get("settings", {}).get(key))
            }
            for title, provenance in by_variant.items()
        },
        "jobs": {
            "evaluated on": _unique(map(_computed_on, by_variant.values())),
            **{
                key: found
                for key in ("hardware", "command")
                if (found := _unique(filter(None, (p.get(key) for p in by_variant.values()))))
            },
        },
        "settings": {
            "quantization": {row.quantization: row.settings for row in rows},
            "compensation": {
                row.compensation: row.compensation_settings
                for row in rows
                if row.compensation is not None
            },
        },
        "images": {part: content for part, content in parts.items() if content is not None},
    }


class Model:
    """The content of the templates for one model. Pieces are made on demand, since each may fail."""

    def __init__(
        self,
        index: int,
        combinations: Sequence[ResultRow],
        summary: Summary,
        most_images: int,
    ) -> None:
        self.name: str = combinations[0].model
        self._id = f"m{index}"  # prefix of the ids of its figures
        self._summary = summary
        self._most_images = most_images
        self._rows = [row for row in summary.rows if row.model == self.name]
        self.exported = [row for row in summary.exports if row.model == self.name]
        self._first = featured(self._rows)
        first = (self._first.quantization, self._first.compensation)
        self._combinations = sorted(
            combinations, key=lambda row: (row.quantization, row.compensation) != first
        )
        self.compensated = [row for row in self._combinations if row.compensated is not None]

    def answers(self) -> list[str]:
        own = [entry for entry in self._summary.quantizations if entry["model"] == self.name]
        return [*answers(self._rows), *text.overfitted_ranges_of(own)]

    def results(self) -> list[dict[str, Any]]:
        """Rows and lines of each type of AP that the model has."""
        return [
            {"ap_type": ap_type, "rows": chosen, "lines": variant_lines(chosen)}
            for metrics, ap_type in text.AP_TYPES.items()
            if (chosen := [row for row in self._rows if row.metrics == metrics])
        ]

    def tradeoffs(self) -> list[dict[str, Any]]:
        """Figures of AP against bits and against size: label and function that draws."""
        return [
            {
                "label": f"{result['ap_type']} AP against {cost}",
                "draw": lambda draw=draw, result=result, cost=cost: draw(
                    _points(result["lines"]),
                    result["ap_type"],
                    f"{self._id}-{result['ap_type']}-{cost}",
                ),
            }
            for result in self.results()
            for cost, draw in (("bits", figures.ap_by_bits), ("size", figures.ap_by_size))
        ]

    def blocks(self) -> list[dict[str, Any]]:
        """Compensations: title and function that reads the errors of the blocks."""
        return [
            {
                "title": f"{row.quantization} + {row.compensation}",
                "section": lambda row=row, number=number: block_section(
                    row, f"{self._id}-blocks{number}"
                ),
            }
            for number, row in enumerate(self.compensated)
        ]

    def layers(self) -> list[dict[str, Any]]:
        """Quantizations with measured layers or modules that are not quantized."""
        quantizations = sorted(
            (entry for entry in self._summary.quantizations if entry["model"] == self.name),
            key=lambda entry: entry["quantization"] != self._first.quantization,
        )
        sections = map(_layer_section, quantizations)
        return [section for section in sections if section["layers"] or section["not_quantized"]]

    def pictures(self) -> list[Picture]:
        return _pictures(self._combinations[0], self._summary.seed, self._most_images)

    def classes(self) -> list[dict[str, Any]]:
        first = (self._first.quantization, self._first.compensation)
        rows = sorted(self._rows, key=lambda row: (row.quantization, row.compensation) != first)
        return [_class_section(row) for row in rows]

    def timed_on(self) -> list[str]:
        """Sentences about the conditions of the latency measurements."""
        return _unique(
            f"Latency with {row.threads} thread{'s' * (row.threads != 1)}, {row.rounds} rounds, on {row.hardware}."
            for row in self.exported
            if row.rounds
        )

    def provenance(self) -> dict[str, Any]:
        return _provenance(self._combinations)


def render(
    rows: Sequence[ResultRow],
    document: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> None:
    """Write the report.

    Args:
        rows: as for ``tables.summarize``.
        document: the JSON file that ``tables.summarize`` wrote.
        output: the HTML file.

    Raises:
        QwtError: the summary is missing or unreadable. Other failures are shown as sentences in the report.
    """
    summary = read_summary(document)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    forms = (
        text.number, text.signed, text.percent, text.megabytes, text.multiply_adds,
        text.duration, text.significant_digits,
    )  # fmt: skip
    environment.filters |= {form.__name__: form for form in forms}
    functions = (*forms, text.interval, text.plus_minus, text.equality, guarded)
    environment.globals |= {function.__name__: function for function in functions}
    models = _unique(row.model for row in rows)
    most_images = max(min(MOST_IMAGES, PICTURED_IMAGES // len(models)), 1)
    page = environment.get_template("report.html.j2").render(
        models=[
            Model(index, [row for row in rows if row.model == model], summary, most_images)
            for index, model in enumerate(models)
        ],
        metrics=AP_METRICS,
        images=_unique(row.images for row in summary.rows if row.images),
        resamples=max(row.resamples or 0 for row in summary.rows),
        repeats=max(row.repeats for row in summary.rows),
        failed=summary.failed,
        seed=summary.seed,
        score=SCORE,
        worst_layers=WORST_LAYERS,
        runtimes=text.RUNTIMES,
        metric_names=text.AP_TYPES,
    )
    with write_atomically(output) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")
