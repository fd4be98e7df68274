"""The report of a run: one HTML file without external parts."""

import csv
import logging
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..errors import QwtError
from ..evaluation.coco import AP_METRICS, has_masks
from ..files import read_json, write_atomically
from ..runtime import explain
from . import figures, text
from .pictures import RULES, SCORE, Picture, choose_pictures

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"

LOSS, GAIN = "AP_quantized_minus_baseline", "AP_compensated_minus_quantized"
MOST_IMAGES = sum(RULES.values())
PICTURED_IMAGES = 24  # in the whole report, so that it stays below 5 MB
WORST_LAYERS = 10

Row = Mapping[str, Any]


def part(what: str, caller: Callable[[], Markup]) -> Markup:
    """Show a part of the report, or a sentence in its place where that fails.

    All that can fail stands in the templates within ``{% call part("what it is") %}``, so that no
    picture, figure or table costs more than itself. Parts may hold parts.
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


def _select(rows: Iterable[Row], **names: Any) -> list[Row]:
    """Rows whose columns have these values."""
    return [row for row in rows if all(row[key] == value for key, value in names.items())]


def _share_of_baseline(row: Row, column: str) -> str:
    """``95 % (0.589)``, or only the number where there is no baseline."""
    value = text.number(row[column])
    return (
        f"{text.percent(row[column] / row['AP_baseline'])} ({value})"
        if row["AP_baseline"]
        else value
    )


def effect_sentence(row: Row) -> str:
    """Say in words what one compensation did, from a row of the summary."""
    ends = text.interval(row, GAIN)
    name = row["compensation"]
    if row.get("collapsed_compensated"):
        return f"with {name} it finds not one object"
    if row[GAIN] is None:
        return f"with {name} it is {_share_of_baseline(row, 'AP_compensated')}"
    if not row[f"{GAIN}_significant"]:
        change = f"{name} changes it by {text.signed(row[GAIN])}, which is not significant"
        return f"{change} ({ends})" if ends else change
    verb = "brings" if row[GAIN] > 0 else "lowers"
    reached = _share_of_baseline(row, "AP_compensated")
    weights = row["compensation_bytes"] / row["quantized_bytes"]
    return (
        f"{name} {verb} it to {reached}, a change of {text.signed(row[GAIN])} (interval {ends}), "
        f"for {100 * weights:+.1f} % weights"
    )


def answer(rows: Sequence[Row]) -> str:
    """Say in words what one quantization cost and what each compensation brought back.

    Args:
        rows: of one model, quantization and kind of AP.
    """
    row = rows[0]
    kind = text.KINDS[row["metrics"]]
    if row.get("collapsed_quantized"):
        start = f"{row['quantization']} collapsed, it finds not one object ({kind} AP)"
        if row["worst_layers"]:
            start += f"; lowest signal-to-noise ratios of layers: {row['worst_layers']}"
    elif row["AP_quantized"] is None and row.get("failed"):
        start = f"{row['quantization']} has no {kind} AP"
    elif row["AP_quantized"] is None:
        start = f"{row['quantization']} was not evaluated without compensation ({kind} AP)"
    elif row["AP_baseline"]:
        start = (
            f"{row['quantization']} keeps {text.percent(row['AP_quantized'] / row['AP_baseline'])} of "
            f"the baseline {kind} AP ({text.number(row['AP_quantized'])} of "
            f"{text.number(row['AP_baseline'])})"
        )
    else:
        start = f"{row['quantization']} has {kind} AP {text.number(row['AP_quantized'])}"
    if row[f"{LOSS}_significant"] is False:
        start += ", a difference that is not significant"
    effects = [
        f"{' + '.join(filter(None, names))} is not complete ({r['failed'].rstrip('.')})"
        if (names := (r["quantization"], r["compensation"])) and r.get("failed")
        else effect_sentence(r)
        for r in rows
        if r["compensation"] is not None or r.get("failed")
    ]
    return "; ".join([start, *effects]) + "."


def featured(rows: Sequence[Row]) -> Row:
    """The row that the report shows first: the largest gain in box AP, else the largest loss."""
    boxes = _select(rows, metrics="bbox")
    return max(boxes, key=lambda row: (not row.get("failed"), row[GAIN] or 0, -(row[LOSS] or 0)))


def answers(rows: Sequence[Row]) -> list[str]:
    """Sentences about one model, by kind of AP and quantization, the featured one first."""
    first = featured(rows)["quantization"]
    names = sorted(_unique(row["quantization"] for row in rows), key=lambda name: name != first)
    return [
        answer(chosen)
        for name in names
        for kind in text.KINDS
        if (chosen := _select(rows, quantization=name, metrics=kind))
    ]


def seconds(rule: str, *wildcards: str) -> float | None:
    """Running time of a step, from what Snakemake measured; None where it did not."""
    path = Path("benchmarks", rule, *wildcards[:-1], f"{wildcards[-1]}.tsv")
    if not path.is_file():
        return None
    with open(path, newline="", encoding="utf-8", errors="replace") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    measured = text.parse(rows[-1].get("s") or "") if rows else None
    return measured if isinstance(measured, float) else None


def _estimate(row: Row, column: str) -> dict[str, Any]:
    """A number, the ends of its interval, and whether it is a difference that is significant."""
    return {
        "value": row[column],
        "low": row[f"{column}_low"],
        "high": row[f"{column}_high"],
        "significant": row.get(f"{column}_significant"),
    }


def _faults(row: Row, variant: str) -> list[str]:
    """What is wrong with a variant's detections."""
    faults = []
    if row.get(f"collapsed_{variant}"):
        faults.append("collapsed: finds not one object")
    if lost := row.get(f"not_finite_{variant}"):
        faults.append(f"{lost} detections are NaN or infinite and do not count")
    return faults


def variant_lines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The baseline, each quantization and each compensation, a line each.

    Args:
        rows: of one model and kind of AP.
    """
    model, first = rows[0]["model"], rows[0]
    lines = [
        {
            "variant": "baseline",
            "series": figures.BASELINE,
            "note": "full precision",
            "faults": [],
            "ap": _estimate(first, "AP_baseline"),
            # not known from a quantization that failed
            "bytes": next(filter(None, (row["baseline_bytes"] for row in rows)), None),
            "evaluated": seconds("evaluate_baseline", model),
        }
    ]
    for name in _unique(row["quantization"] for row in rows):
        chosen = _select(rows, quantization=name)
        row = chosen[0]
        bits = f"W{row['weight_bits']} A{row['activation_bits']}, {row['scope']}"
        lines.append(
            {
                "variant": name,
                "series": figures.QUANTIZED,
                "quantization": name,
                "bits": (row["weight_bits"], row["activation_bits"]),
                "note": bits,
                "ap": _estimate(row, "AP_quantized"),
                "loss": _estimate(row, LOSS),
                "faults": _faults(row, "quantized"),
                "bytes": row["quantized_bytes"],
                "made": seconds("quantize_model", model, name),
                "evaluated": seconds("evaluate_quantized", model, name),
            }
        )
        for row in chosen:
            compensation = row["compensation"]
            if compensation is None:
                continue
            lines.append(
                {
                    "variant": f"+ {compensation}",
                    "series": compensation,
                    "quantization": name,
                    "bits": (row["weight_bits"], row["activation_bits"]),
                    "note": f"{row['blocks_kept']:.0f} of {row['blocks']:.0f} blocks"
                    if row["blocks"] is not None
                    else "not fitted",
                    "ap": _estimate(row, "AP_compensated"),
                    "loss": _estimate(row, "AP_compensated_minus_baseline"),
                    "faults": _faults(row, "compensated"),
                    "gain": _estimate(row, GAIN),
                    "recovered": _estimate(row, "AP_recovered"),
                    "bytes": row["quantized_bytes"] + row["compensation_bytes"]
                    if row["blocks"] is not None
                    else None,
                    "multiply_adds": row["compensation_multiply_adds"],
                    "multiply_adds_percent": row["compensation_multiply_adds_percent"],
                    "made": seconds("fit_compensation", model, name, compensation),
                    "evaluated": seconds("evaluate_compensated", model, name, compensation),
                }
            )
    return lines


def _points(lines: Sequence[Mapping[str, Any]]) -> list[figures.Point]:
    """What the figures show of the variants that were evaluated."""
    return [
        figures.Point(
            quantization=line.get("quantization", ""),
            bits=line.get("bits", (32, 32)),
            series=line["series"],
            value=line["ap"]["value"],
            low=line["ap"]["low"],
            high=line["ap"]["high"],
            megabytes=line["bytes"] / 1e6,
        )
        for line in lines
        if line["ap"]["value"] is not None and line["bytes"] is not None
    ]


def block_section(combination: Row, name: str) -> dict[str, Any]:
    """Errors of the blocks of one compensation, on held-out images where there are some.

    Args:
        name: of the figure.

    Raises:
        QwtError: blocks.csv has no blocks.
    """
    path = Path(combination["compensated"]) / "blocks.csv"
    blocks = text.read_table(path)
    if not blocks:
        raise QwtError(f"{path} has no blocks; delete it and let the workflow make it again.")
    held_out = all(block["holdout_error_after"] is not None for block in blocks)
    images = "holdout" if held_out else "fit"
    undrawn = [b["name"] for b in blocks if not figures.has_errors(b, images)]
    return {
        "title": f"{combination['quantization']} + {combination['compensation']}",
        "blocks": blocks,
        "kept": sum(bool(block["kept"]) for block in blocks),
        "images": "held-out images" if held_out else "the images of the fit",
        "draw": lambda: figures.block_errors(blocks, images, name),
        "drawn": len(undrawn) < len(blocks),
        "undrawn": undrawn,
    }


def spare(layer: Mapping[str, Any]) -> str | None:
    """Entry of ``overrides`` that keeps a layer at 8 bits; None where it has them already.

    An operand of attention, ``backbone.attn (query)``, has no weights; it goes by its module's name.
    """
    bits = {key: layer[key] for key in ("weight_bits", "activation_bits") if layer[key] is not None}
    if all(value >= 8 for value in bits.values()):
        return None
    pattern = layer["name"].partition(" ")[0]
    return f"- {{{', '.join([f'pattern: {pattern}', *(f'{key}: 8' for key in bits)])}}}"


def _layer_section(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of one quantization, the largest error first, and what was not quantized."""
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


def _titles(combination: Row) -> dict[str, str]:
    """What each variant of a combination that was evaluated is called in the report."""
    quantization, compensation = combination["quantization"], combination["compensation"]
    titles = {
        "baseline": "baseline",
        "quantized": quantization,
        "compensated": f"{quantization} + {compensation}",
    }
    return {variant: title for variant, title in titles.items() if combination[variant] is not None}


def _pictures(combination: Row, seed: int, most: int) -> list[Picture]:
    titles = _titles(combination)
    if not titles:
        raise QwtError("None of its variants was evaluated.")
    found = {
        variant: read_json(
            Path(combination[variant]) / "predictions.json", what="file of predictions"
        )
        for variant in titles
    }
    masks = any(map(has_masks, found.values()))
    metrics = read_json(Path(combination[next(iter(titles))]) / "metrics.json", what="metrics file")
    return choose_pictures(
        combination["annotations"], found, titles,
        masks=masks, classes=metrics["per_class"], seed=seed, most=most,
    )  # fmt: skip


def _class_sections(
    rows: Sequence[Row], summary: Mapping[str, Sequence[Row]]
) -> list[dict[str, Any]]:
    """AP by class of each combination, and the classes that lost and regained most."""
    sections = []
    for row in rows:
        names = {key: row[key] for key in ("model", "quantization", "compensation", "metrics")}
        classes = {entry["class"]: entry for entry in _select(summary["classes"], **names)}
        (ranking,) = _select(summary["rankings"], **names)
        title = " + ".join(filter(None, (row["quantization"], row["compensation"])))
        sections.append(
            {
                "title": f"{title}, {text.KINDS[row['metrics']]} AP",
                "compensated": row["compensation"] is not None,
                "classes": list(classes.values()),
                "rankings": [
                    {
                        "title": f"{verb} most",
                        "column": column,
                        "classes": [classes[name] for name in ranking[f"{verb}_most"]],
                    }
                    for verb, column in (("lost", LOSS), ("regained", GAIN))
                    if ranking[f"{verb}_most"]
                ],
            }
        )
    return sections


def _images(annotations: Path) -> dict[str, Any] | None:
    """Names of the images of an annotation file and where they come from."""
    if not annotations.is_file():
        return None
    content = read_json(annotations, what="annotation file")
    return {
        "source": {key: value for key, value in content["info"].items() if value not in (None, [])},
        "names": [image["file_name"] for image in content["images"]],
    }


def _computed_on(provenance: Mapping[str, Any]) -> str:
    """Device, and what else decides the last digits of a result."""
    known = {
        "cpu_capability": "{} kernels on the processor",
        "threads": "{} threads",
        "tf32": "TF32 {}",
    }
    shown = {**provenance, "tf32": "on" if provenance.get("tf32") else "off"}
    return ", ".join(
        [provenance["device"], *(t.format(shown[k]) for k, t in known.items() if k in provenance)]
    )


def _provenance(combinations: Sequence[Row]) -> dict[str, Any]:
    """Settings, versions, seeds, hashes, hardware and image lists of one model."""
    variants = {
        title: row[variant] for row in combinations for variant, title in _titles(row).items()
    }
    by_variant = {
        title: read_json(Path(folder) / "metrics.json")["provenance"]
        for title, folder in variants.items()
    }
    if not by_variant:
        raise QwtError("None of its variants was evaluated.")
    annotations = Path(combinations[0]["annotations"])
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
        "devices": _unique(_computed_on(provenance) for provenance in by_variant.values()),
        "settings": {
            "quantization": {row["quantization"]: row["settings"] for row in combinations},
            "compensation": {
                row["compensation"]: row["compensation_settings"]
                for row in combinations
                if row["compensation"] is not None
            },
        },
        "images": {part: content for part, content in parts.items() if content is not None},
    }


def hardware() -> str:
    """Processor, cores, memory and system of this machine."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{processor}, {os.cpu_count()} logical cores, {memory:.0f} GiB memory, "
        f"{platform.system()} {platform.release()}"
    )


class Model:
    """What the templates show of one model. A part is made when it is asked for: it may fail."""

    def __init__(
        self, index: int, combinations: Sequence[Row], summary: Mapping[str, Any], most_images: int
    ) -> None:
        self.name: str = combinations[0]["model"]
        self._id = f"m{index}"  # keeps the ids of its figures apart
        self._summary = summary
        self._most_images = most_images
        self._first = featured(_select(summary["rows"], model=self.name))
        self._rows = sorted(
            _select(summary["rows"], model=self.name), key=lambda row: not self._is_featured(row)
        )
        self._combinations = sorted(combinations, key=lambda row: not self._is_featured(row))
        self.compensated = [row for row in self._combinations if row["compensated"] is not None]

    def _is_featured(self, row: Row) -> bool:
        return all(row[key] == self._first[key] for key in ("quantization", "compensation"))

    def answers(self) -> list[str]:
        return answers(_select(self._summary["rows"], model=self.name))

    def results(self) -> list[dict[str, Any]]:
        """Rows and lines of each kind of AP that the model has."""
        rows = _select(self._summary["rows"], model=self.name)
        return [
            {"kind": kind, "rows": chosen, "lines": variant_lines(chosen)}
            for metrics, kind in text.KINDS.items()
            if (chosen := _select(rows, metrics=metrics))
        ]

    def tradeoffs(self) -> list[dict[str, Any]]:
        """Figures of AP against bits and against size: their label, and what draws them."""
        return [
            {
                "label": f"{result['kind']} AP against {cost}",
                "draw": lambda draw=draw, result=result, cost=cost: draw(
                    _points(result["lines"]), result["kind"], f"{self._id}-{result['kind']}-{cost}"
                ),
            }
            for result in self.results()
            for cost, draw in (("bits", figures.ap_by_bits), ("size", figures.ap_by_size))
        ]

    def blocks(self) -> list[dict[str, Any]]:
        """Compensations: their title, and what reads the errors of their blocks."""
        return [
            {
                "title": f"{row['quantization']} + {row['compensation']}",
                "section": lambda row=row, number=number: block_section(
                    row, f"{self._id}-blocks{number}"
                ),
            }
            for number, row in enumerate(self.compensated)
        ]

    def layers(self) -> list[dict[str, Any]]:
        """Quantizations of which a layer was measured or left out."""
        quantizations = sorted(
            _select(self._summary["quantizations"], model=self.name),
            key=lambda entry: entry["quantization"] != self._first["quantization"],
        )
        sections = map(_layer_section, quantizations)
        return [section for section in sections if section["layers"] or section["not_quantized"]]

    def pictures(self) -> list[Picture]:
        return _pictures(self._combinations[0], self._summary["seed"], self._most_images)

    def classes(self) -> list[dict[str, Any]]:
        return _class_sections(self._rows, self._summary)

    def provenance(self) -> dict[str, Any]:
        return _provenance(self._combinations)


def render(
    rows: Sequence[Row],
    document: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> None:
    """Write the report.

    Args:
        rows: as for ``tables.summarize``, with compensation_settings besides.
        document: the JSON file that ``tables.summarize`` wrote.
        output: the HTML file.

    Raises:
        QwtError: the summary is missing or unreadable. Of all else a sentence tells, in its place, why
            it is not shown.
    """
    summary = read_json(document, what="summary")
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
    functions = (*forms, text.interval, part, hardware)
    environment.globals |= {function.__name__: function for function in functions}
    models = _unique(row["model"] for row in rows)
    most_images = max(min(MOST_IMAGES, PICTURED_IMAGES // len(models)), 1)
    page = environment.get_template("report.html.j2").render(
        models=[
            Model(index, _select(rows, model=model), summary, most_images)
            for index, model in enumerate(models)
        ],
        metrics=AP_METRICS,
        images=_unique(row["images"] for row in summary["rows"] if row["images"]),
        resamples=max(row["resamples"] or 0 for row in summary["rows"]),
        failed=summary.get("failed", []),
        seed=summary["seed"],
        score=SCORE,
        worst_layers=WORST_LAYERS,
        # the workflow leaves it there for its jobs
        command=os.environ.get("QWT_MMDET_COMMAND"),
    )
    with write_atomically(output) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")
