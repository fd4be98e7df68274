"""The results of a run as numbers: ``summary.csv``, and ``summary.json`` with more details.

The table has one row for each model × quantization × compensation × type of AP. An empty cell is undefined (no
objects of that size, no loss to recover, no compensation, or a variant that was not evaluated).

``model``, ``quantization``, ``compensation``
    names in the config.
``metrics``
    ``bbox`` for box AP, ``segm`` for mask AP.
``weight_bits``, ``activation_bits``, ``scope``
    of the quantization; of a search, mean bits over weights and over multiply-adds.
``failed``
    in a failed run: the failed steps that the row needs, with their errors.
``images``, ``resamples``
    evaluation images, and bootstrap resamples over them.
``repeats``
    number of calibrations (and compensations), each on other images. Above 1, every AP of the quantized and the
    compensated detector is the mean, and ``…_spread`` is its standard deviation between repeats. Sizes, blocks,
    layers and seconds are those of the first repeat.
``{M}_baseline``, ``{M}_quantized``, ``{M}_compensated``
    AP between 0 and 1; M is one of AP, AP50, AP75, APs, APm, APl.
``collapsed_quantized``, ``collapsed_compensated``
    whether the variant finds no object (box AP 0).
``not_finite_quantized``, ``not_finite_compensated``
    number of detections with a NaN or an infinity, which are ignored.
``worst_layers``
    layers of the quantization with the lowest signal-to-quantization-noise ratios, in dB.
``{M}_quantized_minus_baseline``, ``{M}_compensated_minus_baseline``, ``{M}_compensated_minus_quantized``
    differences; ``…_significant`` says whether the interval excludes 0.
``{M}_recovered``
    (compensated - quantized) / (baseline - quantized), where the loss is significant.
``…_low``, ``…_high``
    ends of the interval of each number above: paired bootstrap over images, 2.5 % of the resamples beyond each
    end. With repeats, each resample also draws the repeats. On few images the interval covers the true value in
    about 90 % of cases rather than 95 % (measured; see ``evaluation.bootstrap``).
``baseline_bytes``, ``quantized_bytes``
    size of all weights before and after quantization; docs/report.md says what it counts.
``layers``, ``not_quantized``
    layers that were quantized, and modules with weights that were not.
``compensation_bytes``, ``compensation_parameters``, ``compensation_multiply_adds``
    cost of the kept compensation; multiply-adds per image.
``compensation_multiply_adds_percent``
    the same in percent of the full-precision backbone's.
``blocks``, ``blocks_kept``
    number of fitted blocks, and of those whose compensation was kept.
``quantized_dominated_by``, ``compensated_dominated_by``
    the best other variant of the model that is at most as large and at least as good; empty on the Pareto front
    of AP against size.

exports.csv, where detectors are exported, has the fields of ``reporting.summary.ExportedRow``. tradeoff.csv of each model has
the columns of ``reporting.tradeoff``.

summary.json holds the same rows, in which ``ap`` has these numbers by metric, each as value, low and high
(differences also ``significant``). For its further fields see ``reporting.summary``.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas

from ..archives import COMPENSATION_FORMAT, WARMUP_FORMAT, read_summary, worst_layers
from ..errors import QwtError
from ..evaluation.bootstrap import CONFIDENCE, Bootstrap, bootstrap
from ..evaluation.coco import AP_METRICS, iou_types
from ..evaluation.estimates import Comparison, Limit, value_of
from ..files import read_json, write_atomically
from ..plan.rows import KINDS, ExportRow, Failure, ResultRow
from .summary import ClassResult, ExportedRow, Row, Summary, with_dominance
from .tradeoff import columns, lines

RANKED_CLASSES = 10

IMAGES_OF_CLASS = 5
"""Fewest images with objects of a class for an interval of its AP."""


def _bit_fields(row: ResultRow, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    """Bits and scope of a row; of a search, the mean bits of its recipe."""
    fields = {key: row.settings[key] for key in ("weight_bits", "activation_bits", "scope")}
    if recipe is not None:
        for key in ("weight_bits", "activation_bits"):
            mean = round(recipe[f"average_{key}"], 2)
            fields[key] = int(mean) if mean.is_integer() else mean
    return fields


def _cost_fields(
    warmup: Mapping[str, Any], compensation: Mapping[str, Any]
) -> dict[str, int | float | None]:
    """Columns of sizes and costs, from the summaries of a row's archives."""
    return {
        "baseline_bytes": warmup.get("baseline_weight_bytes"),
        "quantized_bytes": warmup.get("weight_bytes"),
        "layers": warmup.get("layers"),
        "not_quantized": len(warmup["not_quantized"]) if warmup else None,
        **{
            f"compensation_{key}": compensation.get(key)
            for key in ("bytes", "parameters", "multiply_adds", "multiply_adds_percent")
        },
        "blocks": compensation.get("blocks"),
        "blocks_kept": compensation.get("kept"),
    }


def _check_agreement(folder: str, metrics: Mapping[str, Any], statistics: Bootstrap) -> None:
    """Check that the bootstrap's AP on all images equals the recorded AP, so that the files belong together."""
    for iou_type, by_metric in statistics.values[folder].items():
        # metrics of a mask detector without detections may lack masks
        recorded = metrics[iou_type]["AP"] if iou_type in metrics else 0.0
        if recorded is not None and abs(recorded - by_metric["AP"]) > 1e-6:
            raise QwtError(
                f"{folder}: metrics.json says {iou_type} AP {recorded:.6f}, but predictions.json gives "
                f"{by_metric['AP']:.6f}; delete the folder and run again."
            )


def _most_changed(classes: Sequence[ClassResult], difference: str, sign: int) -> list[str]:
    """Names of the classes whose difference (a field of Comparison) rose most, or fell most with ``sign`` -1."""
    changes = {
        entry.name: sign * (value_of(getattr(entry.ap, difference)) or 0) for entry in classes
    }
    ranked = sorted(changes, key=lambda name: -changes[name])[:RANKED_CLASSES]
    return [name for name in ranked if changes[name] > 0]


def _categories(
    annotations: str | os.PathLike[str], metrics: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """Name, number of objects, and number of images with objects of each evaluated category id."""
    content = read_json(annotations, what="annotation file")
    images: dict[int, set[int]] = {}
    for annotation in content["annotations"]:
        if not annotation.get("iscrowd"):
            images.setdefault(annotation["category_id"], set()).add(annotation["image_id"])
    return {
        category["id"]: {
            "name": category["name"],
            "annotations": metrics["per_class"][category["name"]]["annotations"],
            "images": len(images.get(category["id"], ())),
        }
        for category in content["categories"]
        if category["name"] in metrics["per_class"]
    }


BENCHMARK_FIELDS = (
    "file_bytes", "full_precision_file_bytes", "milliseconds", "full_precision_milliseconds",
    "latency_ratio", "processor_ratio", "bfloat16_latency_ratio", "integer_share", "version", "rounds",
    "threads", "hardware", "title",
)  # fmt: skip


class _Model:
    """The results of one model; all its variants share the resamples, drawn ``as_asked``."""

    def __init__(
        self, rows: Sequence[ResultRow], exports: Sequence[ExportRow], **as_asked: int
    ) -> None:
        self._rows, self._exports = rows, exports
        # of the evaluated variants, by the folder of the first repeat
        repeats = {
            folder: row.repeats[kind] for row in rows for kind, folder in row.evaluated().items()
        }
        folders = list(dict.fromkeys(folder for named in repeats.values() for folder in named))
        folders += [row.exported for row in exports if row.exported is not None]
        self._metrics = {
            folder: read_json(Path(folder) / "metrics.json", what="metrics file")
            for folder in folders
        }
        masks = any("segm" in content for content in self._metrics.values())
        self._iou_types = iou_types(masks)
        # before the long bootstrap, so that unreadable files are noticed at once
        self._warmups = {
            row.quantization: read_summary(row.warmup, WARMUP_FORMAT, "warmup")
            for row in rows
            if row.warmup is not None
        }
        self._compensations = {
            folder: read_summary(
                Path(folder) / "compensation.pth", COMPENSATION_FORMAT, "compensation"
            )
            for row in rows
            if (folder := row.evaluated().get("compensated"))
        }
        self._recipes = {
            row.quantization: read_json(row.recipe, what="recipe")
            for row in rows
            if row.recipe is not None
        }
        self._single: Bootstrap | None = None  # of single repeats, since the first one is exported
        self._statistics: Bootstrap | None = None
        self._categories: dict[int, dict[str, Any]] = {}
        annotations = rows[0].annotations
        if folders and annotations is not None:
            self._single = bootstrap(
                annotations,
                {folder: Path(folder) / "predictions.json" for folder in folders},
                masks=masks,
                classes=self._metrics[folders[0]]["per_class"],
                **as_asked,
            )
            for folder in folders:
                _check_agreement(folder, self._metrics[folder], self._single)
            self._statistics = self._single.with_repeats(repeats)
            self._categories = _categories(annotations, self._metrics[folders[0]])

    def rows(self) -> list[Row]:
        """A row for each combination and type of AP."""
        found = []
        for row in self._rows:
            fields = self._fields(row)
            for iou_type in self._iou_types:
                classes = self._classes(row, iou_type)
                found.append(
                    Row(
                        **fields,
                        metrics=iou_type,
                        ap={metric: self._compare(row, iou_type, metric) for metric in AP_METRICS},
                        limit=self._limit(row, iou_type),
                        classes=classes,
                        lost_most=_most_changed(classes, "quantized_minus_baseline", -1),
                        regained_most=_most_changed(classes, "compensated_minus_quantized", 1),
                    )
                )
        return with_dominance(found)

    def _fields(self, row: ResultRow) -> dict[str, Any]:
        """The fields of a row that do not depend on the type of AP."""
        warmup = self._warmups.get(row.quantization, {})
        compensation = self._compensations.get(row.evaluated().get("compensated", ""), {})
        quantized = warmup.get("summary", {})
        steps = {f"evaluate_{k}": self._metrics[folder] for k, folder in row.evaluated().items()}
        steps |= {"quantize_model": warmup, "fit_compensation": compensation}
        seconds = {
            step: about.get("provenance", {}).get("seconds") for step, about in steps.items()
        }
        return {
            **{key: getattr(row, key) for key in ("model", "quantization", "compensation")},
            **_bit_fields(row, self._recipes.get(row.quantization)),
            "failed": "; ".join(row.failed) or None,
            "images": self._statistics.images if self._statistics else None,
            "resamples": self._statistics.resamples if self._statistics else None,
            **self._faults(row),
            "worst_layers": worst_layers(
                {layer["name"]: layer["sqnr_db"] for layer in quantized.get("layer_sqnr", [])}
            )
            or None,
            **_cost_fields(quantized, compensation.get("summary", {})),
            "repeats": max(1, *map(len, row.repeats.values())),
            "asked": {**row.asked},
            "seconds": {step: value for step, value in seconds.items() if value is not None},
        }

    def _faults(self, row: ResultRow) -> dict[str, Any]:
        """Columns of faults of detections, in any repeat."""
        faults: dict[str, Any] = {}
        for key in ("collapsed", "not_finite"):
            for variant in ("quantized", "compensated"):
                found = [self._metrics[folder].get(key) for folder in row.repeats[variant]]
                known = [value for value in found if value is not None]
                faults[f"{key}_{variant}"] = max(known, default=None)
        return faults

    def _compare(self, row: ResultRow, iou_type: str, metric: str | int) -> Comparison:
        """Compare the variants of a row, whose names in the statistics are their result folders."""
        if self._statistics is None:
            return Comparison()
        baseline, quantized, compensated = map(row.evaluated().get, KINDS)
        return self._statistics.compare(baseline, quantized, compensated, iou_type, metric)

    def _limit(self, row: ResultRow, iou_type: str) -> Limit | None:
        """The loss of a searched quantization, compared with its limit."""
        baseline, quantized, _ = map(row.evaluated().get, KINDS)
        if row.asked.get("metric") != iou_type:
            return None
        if self._statistics is None or baseline is None or quantized is None:
            return None
        return self._statistics.limit(baseline, quantized, iou_type, row.asked["max_drop"])

    def _classes(self, row: ResultRow, iou_type: str) -> list[ClassResult]:
        """AP of each class that has objects."""
        results = []
        folder = next(iter(row.evaluated().values()), None)
        for category, about in self._categories.items():
            if (
                self._statistics
                and folder
                and category in self._statistics.values[folder][iou_type]
            ):
                ap = self._compare(row, iou_type, category)
                few = about["images"] < IMAGES_OF_CLASS
                results.append(ClassResult(**about, ap=ap.without_intervals() if few else ap))
        return results

    def quantizations(self) -> list[dict[str, Any]]:
        """What the summary says of each quantization; see :class:`.summary.Summary`."""
        return [
            {
                "model": self._rows[0].model,
                "quantization": name,
                "not_quantized": warmup["summary"]["not_quantized"],
                "layer_sqnr": warmup["summary"].get("layer_sqnr", []),
                "range_check": warmup["summary"].get("range_check"),
                "recipe": self._recipes.get(name),
            }
            for name, warmup in self._warmups.items()
        ]

    def exports(self, rows: Sequence[Row]) -> list[ExportedRow]:
        """Rows of the exported detectors, whose sizes are in the model's ``rows``."""
        found = []
        for export, iou_type in itertools.product(self._exports, self._iou_types):
            sizes = [
                row.compensated_bytes if export.compensation else row.quantized_bytes
                for row in rows
                if row.quantization == export.quantization
                and export.compensation in (None, row.compensation)
            ]
            timed = read_json(export.benchmark, what="benchmark") if export.benchmark else {}
            ap = Comparison()
            if self._single is not None:
                variants = (export.simulated, export.exported, None)
                ap = self._single.compare(*variants, iou_type, "AP")
            found.append(
                ExportedRow(
                    export.model,
                    export.quantization,
                    export.compensation,
                    export.runtime,
                    metrics=iou_type,
                    failed="; ".join(export.failed) or None,
                    ap=ap.quantized,
                    simulated=ap.baseline,
                    exported_minus_simulated=ap.quantized_minus_baseline,
                    computed_bytes=sizes[0],
                    **{key: timed.get(key) for key in BENCHMARK_FIELDS},
                )
            )
        return found


def summarize(
    rows: Sequence[ResultRow],
    table: str | os.PathLike[str],
    document: str | os.PathLike[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
    processes: int = 1,
    failed: Sequence[Failure] = (),
    exports: Sequence[ExportRow] = (),
    exports_table: str | os.PathLike[str] | None = None,
    tradeoffs: Mapping[str, str | os.PathLike[str]] | None = None,
) -> None:
    """Write all results as numbers; this module's docstring describes both files.

    Args:
        rows: of the plan. Rows of one model share an annotation file.
        table: the CSV file. document: the JSON file. exports_table: the CSV file of the exports, if there are any.
        tradeoffs: CSV files of AP against costs, by model.
        resamples, seed, processes: of the bootstrap.
        failed: the steps of the run that failed.

    Raises:
        QwtError: a file is missing or unreadable, or metrics and predictions disagree.
    """
    found: list[Row] = []
    quantizations: list[dict[str, Any]] = []
    exported: list[ExportedRow] = []
    for name in dict.fromkeys(row.model for row in rows):
        model = _Model(
            [row for row in rows if row.model == name],
            [row for row in exports if row.model == name],
            resamples=resamples,
            seed=seed,
            processes=processes,
        )
        found += (own := model.rows())
        quantizations += model.quantizations()
        exported += model.exports(own)
    _write_csv(table, [row.columns() for row in found])
    if exports_table is not None:
        _write_csv(exports_table, [row.columns() for row in exported])
    for name, path in (tradeoffs or {}).items():
        rows_of = [row for row in found if row.model == name]
        files_of = [row for row in exported if row.model == name]
        _write_csv(path, columns(lines(rows_of, files_of)))
    Summary(CONFIDENCE, seed, list(failed), found, quantizations, exported).write(document)


def _write_csv(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with write_atomically(path) as partial:
        pandas.DataFrame(rows, dtype=object).to_csv(partial, index=False)
