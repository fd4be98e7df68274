"""What the templates of the report show of a model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas

from ..errors import QwtError
from ..evaluation.coco import has_masks
from ..files import read_json
from ..plan.rows import ResultRow
from ..plan.run import unique
from . import figures, text
from .advice import advice
from .pictures import Picture, choose_pictures
from .sentences import answers
from .summary import ExportedRow, Row, Summary
from .tradeoff import FULL_PRECISION, milliseconds
from .variants import featured, least_ap, points, timed_points, variant_lines


class Model:
    """The content of the templates for one model. Pieces are made on demand, since each may fail."""

    def __init__(
        self, index: int, combinations: Sequence[ResultRow], summary: Summary, most_images: int
    ) -> None:
        self.name: str = combinations[0].model
        self._id = f"m{index}"  # prefix of the ids of its figures
        self._seed, self._most_images = summary.seed, most_images
        self._rows = [row for row in summary.rows if row.model == self.name]
        self._quantizations = [q for q in summary.quantizations if q["model"] == self.name]
        self.exported = [row for row in summary.exports if row.model == self.name]
        self._combinations = self._featured_first(combinations)
        self.compensated = [row for row in self._combinations if row.repeats["compensated"]]

    def _featured_first(self, rows: Iterable[Any]) -> list[Any]:
        """Rows (of the plan or the summary), of the featured combination first."""
        first = featured(self._rows)
        names = (first.quantization, first.compensation)
        return sorted(rows, key=lambda row: (row.quantization, row.compensation) != names)

    def advice(self) -> list[str]:
        return advice(self._rows, self.exported)

    def answers(self) -> list[str]:
        return [*answers(self._rows), *text.overfitted_ranges_of(self._quantizations)]

    def results(self) -> list[dict[str, Any]]:
        """Rows and lines of each type of AP that the model has."""
        return [
            {
                "ap_type": ap_type,
                "rows": chosen,
                "lines": variant_lines(chosen, self._files(metrics)),
            }
            for metrics, ap_type in text.AP_TYPES.items()
            if (chosen := [row for row in self._rows if row.metrics == metrics])
        ]

    def milliseconds(self, row: ExportedRow) -> float | None:
        """Latency of an exported file (:func:`.tradeoff.milliseconds`)."""
        return milliseconds(row, self.exported)

    def _files(self, metrics: str) -> list[ExportedRow]:
        """The exported files, with their AP of one type."""
        return [row for row in self.exported if row.metrics == metrics]

    def tradeoffs(self) -> list[dict[str, Any]]:
        """Figures of AP against bits, size and (of exported files) latency: type of AP, label and function that draws."""
        found = []
        for result in self.results():
            own = points(result["lines"])
            first = result["rows"][0]
            timed = timed_points(first.ap["AP"].baseline, self._files(first.metrics))
            drawings: list[tuple[str, Callable[..., Any], Any]] = [
                ("bits", figures.ap_by_bits, own)
            ]
            asked = least_ap(result["rows"])
            drawings.append(("size", partial(figures.ap_by_size, asked=asked), own))
            if timed:
                drawings.append(("latency", partial(figures.ap_by_latency, asked=asked), timed))
            found += [
                {
                    "ap_type": result["ap_type"],
                    "label": f"{result['ap_type']} AP against {cost}",
                    "draw": partial(
                        draw, drawn, result["ap_type"], f"{self._id}-{result['ap_type']}-{cost}"
                    ),
                }
                for cost, draw, drawn in drawings
            ]
        return found

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
        first = featured(self._rows).quantization
        quantizations = sorted(self._quantizations, key=lambda q: q["quantization"] != first)
        sections = map(_layer_section, quantizations)
        return [section for section in sections if section["layers"] or section["not_quantized"]]

    def pictures(self) -> list[Picture]:
        row = self._combinations[0]
        folders = row.evaluated()
        if not folders or row.annotations is None:
            raise QwtError("None of its variants was evaluated.")
        found = {
            kind: read_json(Path(folder) / "predictions.json", what="file of predictions")
            for kind, folder in folders.items()
        }
        first = Path(next(iter(folders.values())))
        return choose_pictures(
            row.annotations,
            found,
            _titles(row),
            masks=any(map(has_masks, found.values())),
            classes=read_json(first / "metrics.json", what="metrics file")["per_class"],
            seed=self._seed,
            most=self._most_images,
        )

    def classes(self) -> list[dict[str, Any]]:
        return list(map(_class_section, self._featured_first(self._rows)))

    def timed_on(self) -> list[str]:
        """Sentences about the conditions of the latency measurements."""
        return unique(
            f"Latency with {row.threads} thread{'s' * (row.threads != 1)}, {row.rounds} rounds, on {row.hardware}."
            for row in self.exported
            if row.rounds
        )

    def provenance(self) -> dict[str, Any]:
        """Settings, versions, seeds, hashes, hardware and image lists."""
        rows = self._combinations
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
        jobs = {"evaluated on": unique(map(_computed_on, by_variant.values()))}
        for key in ("hardware", "command"):
            jobs[key] = unique(filter(None, (found.get(key) for found in by_variant.values())))
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
            "jobs": {key: found for key, found in jobs.items() if found},
            "settings": {
                "quantization": {row.quantization: row.settings for row in rows},
                "compensation": {
                    row.compensation: row.compensation_settings for row in rows if row.compensation
                },
            },
            "images": {part: content for part, content in parts.items() if content is not None},
        }


def read_blocks(path: Path) -> list[dict[str, Any]]:
    """The rows of blocks.csv; empty cells are None. A QwtError if there are none."""
    try:
        table = pandas.read_csv(path, dtype={"name": str}, keep_default_na=False, na_values=[""])
    except pandas.errors.EmptyDataError:
        table = pandas.DataFrame()
    if table.empty:
        raise QwtError(f"{path} has no blocks; delete it and let the workflow make it again.")
    return table.astype(object).where(table.notna(), None).to_dict("records")


def block_section(row: ResultRow, name: str) -> dict[str, Any]:
    """Errors of the blocks of one compensation, on held-out images if there are any; ``name`` is the figure's."""
    blocks = read_blocks(Path(row.evaluated()["compensated"], "blocks.csv"))
    held_out = all(block["holdout_error_after"] is not None for block in blocks)
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
    """Entry of ``overrides`` that gives a layer 8 bits; None if it has them already.

    An operand of attention, ``backbone.attn (query)``, has no weights; its pattern is the module's name.
    """
    bits = {key: layer[key] for key in ("weight_bits", "activation_bits") if layer[key] is not None}
    if all(value >= 8 for value in bits.values()):
        return None
    pattern = layer["name"].partition(" ")[0]
    return f"- {{{', '.join([f'pattern: {pattern}', *(f'{key}: {max(8, value)}' for key, value in bits.items())])}}}"


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
        "baseline": FULL_PRECISION,
        "quantized": row.quantization,
        "compensated": f"{row.quantization} + {row.compensation}",
    }
    return {kind: titles[kind] for kind in row.evaluated()}


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
