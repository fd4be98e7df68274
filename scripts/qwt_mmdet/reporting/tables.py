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

exports.csv, where detectors are exported, has the fields of ``reporting.summary.ExportedRow``.

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

RANKED_CLASSES = 10

IMAGES_OF_CLASS = 5
"""Fewest images with objects of a class for an interval of its AP."""


def _compare(
    statistics: Bootstrap | None, row: ResultRow, iou_type: str, metric: str | int
) -> Comparison:
    """Compare the variants of a row, whose names in ``statistics`` are their result folders."""
    if statistics is None:
        return Comparison()
    baseline, quantized, compensated = map(row.evaluated().get, KINDS)
    return statistics.compare(baseline, quantized, compensated, iou_type, metric)


def _bit_fields(row: ResultRow, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    """Bits and scope of a row; of a search, the mean bits of its recipe."""
    fields = {key: row.settings[key] for key in ("weight_bits", "activation_bits", "scope")}
    if recipe is not None:
        for key in ("weight_bits", "activation_bits"):
            mean = round(recipe[f"average_{key}"], 2)
            fields[key] = int(mean) if mean.is_integer() else mean
    return fields


def _limit(statistics: Bootstrap | None, row: ResultRow, iou_type: str) -> Limit | None:
    """The loss of a searched quantization, compared with its limit."""
    limit = row.limit
    if statistics is None or limit is None or limit["metric"] != iou_type:
        return None
    folders = row.evaluated()
    if not {"baseline", "quantized"} <= folders.keys():
        return None
    return statistics.limit(folders["baseline"], folders["quantized"], iou_type, limit["max_drop"])


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


def _fault_fields(
    row: ResultRow, metrics: Mapping[str, Mapping[str, Any]], warmup: Mapping[str, Any]
) -> dict[str, Any]:
    """Columns of faults of detections (in any repeat), and the layers with the lowest SQNR."""
    fields: dict[str, Any] = {}
    for key in ("collapsed", "not_finite"):
        for variant in ("quantized", "compensated"):
            folders = row.repeats[variant]
            known = [value for folder in folders if (value := metrics[folder].get(key)) is not None]
            fields[f"{key}_{variant}"] = max(known, default=None)
    ratios = {layer["name"]: layer["sqnr_db"] for layer in warmup.get("layer_sqnr", [])}
    return {**fields, "worst_layers": worst_layers(ratios) or None}


def _seconds(
    row: ResultRow,
    metrics: Mapping[str, Mapping[str, Any]],
    warmup: Mapping[str, Any],
    compensation: Mapping[str, Any],
) -> dict[str, float]:
    """Seconds of the steps behind a row, by rule, if recorded."""
    steps = {f"evaluate_{kind}": metrics[folder] for kind, folder in row.evaluated().items()}
    steps |= {"quantize_model": warmup, "fit_compensation": compensation}
    found = {step: about.get("provenance", {}).get("seconds") for step, about in steps.items()}
    return {step: seconds for step, seconds in found.items() if seconds is not None}


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


def _class_results(
    statistics: Bootstrap | None,
    row: ResultRow,
    iou_type: str,
    categories: Mapping[int, Any],
) -> list[ClassResult]:
    """AP of each class that has objects; ``categories`` as from ``_categories``."""
    results = []
    folder = next(iter(row.evaluated().values()), None)
    for category, about in categories.items():
        if statistics and folder and category in statistics.values[folder][iou_type]:
            ap = _compare(statistics, row, iou_type, category)
            few = about["images"] < IMAGES_OF_CLASS
            results.append(ClassResult(**about, ap=ap.without_intervals() if few else ap))
    return results


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
    "latency_ratio", "integer_share", "version", "rounds", "threads", "hardware", "title",
)  # fmt: skip


def _exported_rows(
    exports: Sequence[ExportRow],
    rows: Sequence[Row],
    statistics: Bootstrap | None,
    masks: bool,
) -> list[ExportedRow]:
    """Rows of the exported detectors of a model, with statistics of the first repeat, which is exported."""
    found = []
    for export, iou_type in itertools.product(exports, iou_types(masks)):
        exported, simulated = export.exported, export.simulated
        sizes = [
            row.compensated_bytes if export.compensation else row.quantized_bytes
            for row in rows
            if row.quantization == export.quantization
            and export.compensation in (None, row.compensation)
        ]
        timed = read_json(export.benchmark, what="benchmark") if export.benchmark else {}
        ap = Comparison()
        if statistics is not None:
            ap = statistics.compare(simulated, exported, None, iou_type, "AP")
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


def _model_summary(
    rows: Sequence[ResultRow],
    exports: Sequence[ExportRow],
    *,
    resamples: int,
    seed: int,
    processes: int,
) -> tuple[list[Row], list[dict[str, Any]], list[ExportedRow]]:
    """Rows, quantizations and exports of one model; all its variants share the resamples."""
    # of the evaluated variants, by the folder of the first repeat
    repeats = {
        folder: row.repeats[kind] for row in rows for kind, folder in row.evaluated().items()
    }
    folders = list(dict.fromkeys(folder for named in repeats.values() for folder in named))
    folders += [row.exported for row in exports if row.exported is not None]
    metrics = {
        folder: read_json(Path(folder) / "metrics.json", what="metrics file") for folder in folders
    }
    masks = any("segm" in content for content in metrics.values())
    # before the long bootstrap, so that unreadable files are noticed at once
    warmups = {
        row.quantization: read_summary(row.warmup, WARMUP_FORMAT, "warmup")
        for row in rows
        if row.warmup is not None
    }
    compensations = {
        folder: read_summary(Path(folder) / "compensation.pth", COMPENSATION_FORMAT, "compensation")
        for row in rows
        if (folder := row.evaluated().get("compensated"))
    }
    recipes = {
        row.quantization: read_json(row.recipe, what="recipe")
        for row in rows
        if row.recipe is not None
    }
    statistics = single = None
    categories: dict[int, dict[str, Any]] = {}
    annotations = rows[0].annotations
    if folders and annotations is not None:
        single = bootstrap(
            annotations,
            {folder: Path(folder) / "predictions.json" for folder in folders},
            masks=masks,
            classes=metrics[folders[0]]["per_class"],
            resamples=resamples,
            seed=seed,
            processes=processes,
        )
        for folder in folders:
            _check_agreement(folder, metrics[folder], single)
        statistics = single.with_repeats(repeats)
        categories = _categories(annotations, metrics[folders[0]])
    found = []
    for row in rows:
        warmup = warmups.get(row.quantization, {})
        compensation = compensations.get(row.evaluated().get("compensated", ""), {})
        quantized = warmup.get("summary", {})
        fields = {
            **{key: getattr(row, key) for key in ("model", "quantization", "compensation")},
            **_bit_fields(row, recipes.get(row.quantization)),
            "failed": "; ".join(row.failed) or None,
            "images": statistics.images if statistics else None,
            "resamples": statistics.resamples if statistics else None,
            **_fault_fields(row, metrics, quantized),
            **_cost_fields(quantized, compensation.get("summary", {})),
            "repeats": max(1, *map(len, row.repeats.values())),
            "seconds": _seconds(row, metrics, warmup, compensation),
        }
        for iou_type in iou_types(masks):
            classes = _class_results(statistics, row, iou_type, categories)
            found.append(
                Row(
                    **fields,
                    metrics=iou_type,
                    ap={
                        metric: _compare(statistics, row, iou_type, metric) for metric in AP_METRICS
                    },
                    limit=_limit(statistics, row, iou_type),
                    classes=classes,
                    lost_most=_most_changed(classes, "quantized_minus_baseline", -1),
                    regained_most=_most_changed(classes, "compensated_minus_quantized", 1),
                )
            )
    quantizations = [
        {
            "model": rows[0].model,
            "quantization": name,
            "not_quantized": warmup["summary"]["not_quantized"],
            "layer_sqnr": warmup["summary"].get("layer_sqnr", []),
            "range_check": warmup["summary"].get("range_check"),
            "recipe": recipes.get(name),
        }
        for name, warmup in warmups.items()
    ]
    found = with_dominance(found)
    return found, quantizations, _exported_rows(exports, found, single, masks)


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
) -> None:
    """Write all results as numbers; this module's docstring describes both files.

    Args:
        rows: of the plan. Rows of one model share an annotation file.
        table: the CSV file. document: the JSON file. exports_table: the CSV file of the exports, if there are any.
        resamples, seed, processes: of the bootstrap.
        failed: the steps of the run that failed.

    Raises:
        QwtError: a file is missing or unreadable, or metrics and predictions disagree.
    """
    by_model = [
        _model_summary(
            [row for row in rows if row.model == model],
            [row for row in exports if row.model == model],
            resamples=resamples,
            seed=seed,
            processes=processes,
        )
        for model in dict.fromkeys(row.model for row in rows)
    ]
    found = [row for of_model, _, _ in by_model for row in of_model]
    quantizations = [entry for _, of_model, _ in by_model for entry in of_model]
    exported = [row for _, _, of_model in by_model for row in of_model]
    _write_csv(table, found)
    if exports_table is not None:
        _write_csv(exports_table, exported)
    Summary(CONFIDENCE, seed, list(failed), found, quantizations, exported).write(document)


def _write_csv(path: str | os.PathLike[str], rows: Sequence[Row] | Sequence[ExportedRow]) -> None:
    columns = [row.columns() for row in rows]
    with write_atomically(path) as partial:
        pandas.DataFrame(columns, dtype=object).to_csv(partial, index=False)
