"""The results of a run as numbers: ``summary.csv``, and ``summary.json`` which says more.

The table has one row for each model × quantization × compensation × kind of AP. An empty cell means
that the number is undefined (no objects of that size, nothing to recover, no compensation, or a
variant that was not evaluated).

``model``, ``quantization``, ``compensation``
    names in the config.
``metrics``
    ``bbox`` for box AP, ``segm`` for mask AP.
``weight_bits``, ``activation_bits``, ``scope``
    of the quantization.
``failed``
    in a run that failed: the failed steps that the row needs, and why they failed.
``images``, ``resamples``
    evaluation images, and bootstrap resamples over them.
``{M}_baseline``, ``{M}_quantized``, ``{M}_compensated``
    AP between 0 and 1; M is one of AP, AP50, AP75, APs, APm, APl.
``collapsed_quantized``, ``collapsed_compensated``
    whether the variant finds not one object (box AP 0).
``not_finite_quantized``, ``not_finite_compensated``
    number of its detections with a NaN or an infinity; they count as not made.
``worst_layers``
    of the quantization: those with the lowest signal-to-noise ratios, in dB.
``{M}_quantized_minus_baseline``, ``{M}_compensated_minus_baseline``, ``{M}_compensated_minus_quantized``
    differences; ``…_significant`` says whether the interval excludes 0.
``{M}_recovered``
    (compensated - quantized) / (baseline - quantized), where the loss is significant.
``…_low``, ``…_high``
    ends of the interval of each number above: paired bootstrap over images, 2.5 % of the resamples
    beyond each end. On few images it covers the truth in about 90 % of cases rather than 95 %
    (measured; see ``evaluation.bootstrap``).
``baseline_bytes``, ``quantized_bytes``
    size of all weights before and after quantization.
``layers``, ``not_quantized``
    layers that were quantized, and modules with weights that were not.
``compensation_bytes``, ``compensation_parameters``, ``compensation_multiply_adds``
    what the kept compensation adds; multiply-adds per image.
``compensation_multiply_adds_percent``
    the same in percent of the full-precision backbone's.
``blocks``, ``blocks_kept``
    blocks that were fitted, and those whose compensation the gate kept.

summary.json holds the same rows under ``rows``, the steps that failed in the run under ``failed``, and
besides

``classes``
    one row for each row of the table and each class that has objects: its name (``class``), the
    number of its objects (``annotations``) and of the images that hold them, and the columns of AP
    above, without intervals where there are fewer than five such images.
``rankings``
    the ten classes of each row that lost most by quantization, and that regained most.
``quantizations``
    of each model and quantization: ``not_quantized`` (name, type, reason,
    multiply_adds_percent: its share in the scope, null where it is not known) and, where it was measured,
    ``layer_sqnr`` (name, weight_bits, activation_bits, sqnr_db of each layer and each operand of
    attention; null for bits of weights that there are not, and for the ratio of an exact layer).
"""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..archives import COMPENSATION_FORMAT, WARMUP_FORMAT, read_summary, worst_layers
from ..errors import QwtError
from ..evaluation.bootstrap import CONFIDENCE, Bootstrap, bootstrap
from ..evaluation.coco import AP_METRICS, iou_types
from ..files import read_json, write_atomically, write_json

VARIANTS = ("baseline", "quantized", "compensated")
DIFFERENCES = (
    ("quantized", "baseline"),
    ("compensated", "baseline"),
    ("compensated", "quantized"),
)


RANKED_CLASSES = 10

IMAGES_OF_CLASS = 5
"""Fewer images with objects of a class tell nothing about how its AP varies (one image: not at all)."""

NOTHING = {"value": None, "low": None, "high": None, "significant": None}


def _folders(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Result folders of all variants that were evaluated, each once."""
    folders = [folder for row in rows for v in VARIANTS if (folder := row[v]) is not None]
    return list(dict.fromkeys(folders))


def _with_interval(column: str, estimate: Mapping[str, Any]) -> dict[str, Any]:
    return {
        column: estimate["value"],
        f"{column}_low": estimate["low"],
        f"{column}_high": estimate["high"],
    }


def _ap_columns(
    statistics: Bootstrap | None, row: Mapping[str, Any], kind: str, metric: str | int, name: str
) -> dict[str, Any]:
    """Columns of one metric (see ``Bootstrap.values``) of one row, under the name of the metric.

    Variants go by their result folders; what was not evaluated has None.
    """
    columns: dict[str, Any] = {}
    for variant in VARIANTS:
        known = row[variant] is not None
        estimate = statistics.estimate(row[variant], kind, metric) if known else NOTHING
        columns |= _with_interval(f"{name}_{variant}", estimate)
    for a, b in DIFFERENCES:
        column = f"{name}_{a}_minus_{b}"
        known = row[a] is not None and row[b] is not None
        difference = statistics.difference(row[a], row[b], kind, metric) if known else NOTHING
        columns |= _with_interval(column, difference)
        columns[f"{column}_significant"] = difference["significant"]
    folders = [row[variant] for variant in VARIANTS]
    recovered = NOTHING if None in folders else statistics.recovered(*folders, kind, metric)
    return columns | _with_interval(f"{name}_recovered", recovered)


def _cost_columns(row: Mapping[str, Any], warmup: Mapping[str, Any]) -> dict[str, Any]:
    compensation: Mapping[str, Any] = {}
    if row["compensated"] is not None:
        path = Path(row["compensated"]) / "compensation.pth"
        compensation = read_summary(path, COMPENSATION_FORMAT, "compensation")["summary"]
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


def _fault_columns(
    row: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]], warmup: Mapping[str, Any]
) -> dict[str, Any]:
    """What is wrong with the detections of a row's variants, and the layers to blame."""
    columns: dict[str, Any] = {}
    for key in ("collapsed", "not_finite"):
        for variant in ("quantized", "compensated"):
            content = metrics.get(row[variant], {})
            columns[f"{key}_{variant}"] = content.get(key)
    ratios = {layer["name"]: layer["sqnr_db"] for layer in warmup.get("layer_sqnr", [])}
    return {**columns, "worst_layers": worst_layers(ratios) or None}


def _check_agreement(folder: str, metrics: Mapping[str, Any], statistics: Bootstrap) -> None:
    """The bootstrap computes AP anew; that it finds the recorded AP proves that files belong together."""
    for kind, by_metric in statistics.values[folder].items():
        # a detector that finds nothing may not show that it has masks
        recorded = metrics[kind]["AP"] if kind in metrics else 0.0
        if recorded is not None and abs(recorded - by_metric["AP"]) > 1e-6:
            raise QwtError(
                f"{folder}: metrics.json says {kind} AP {recorded:.6f}, but predictions.json gives "
                f"{by_metric['AP']:.6f}; delete the folder and run again."
            )


def _class_rows(
    statistics: Bootstrap, row: Mapping[str, Any], kind: str, categories: Mapping[int, Any]
) -> list[dict[str, Any]]:
    """AP of each class that has objects; ``categories`` as from ``_categories``."""
    rows: list[dict[str, Any]] = []
    folders = _folders([row])
    if not folders:
        return rows
    for category, about in categories.items():
        if category not in statistics.values[folders[0]][kind]:
            continue
        columns = _ap_columns(statistics, row, kind, category, "AP")
        if about["images"] < IMAGES_OF_CLASS:
            for column in columns:
                if column.endswith(("_low", "_high")):
                    columns[column] = None
                elif column.endswith("_significant"):
                    columns[column] = False
        rows.append(about | columns)
    return rows


def _ranking(classes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Names of the classes that lost most by quantization and that regained most, most first."""

    def most(column: str, sign: int) -> list[str]:
        changes = [(sign * (entry[column] or 0), entry["class"]) for entry in classes]
        changes.sort(key=lambda change: -change[0])
        return [name for change, name in changes[:RANKED_CLASSES] if change > 0]

    return {
        "lost_most": most("AP_quantized_minus_baseline", -1),
        "regained_most": most("AP_compensated_minus_quantized", 1),
    }


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
            "class": category["name"],
            "annotations": metrics["per_class"][category["name"]]["annotations"],
            "images": len(images.get(category["id"], ())),
        }
        for category in content["categories"]
        if category["name"] in metrics["per_class"]
    }


def _model_summary(
    rows: Sequence[Mapping[str, Any]], *, resamples: int, seed: int, processes: int
) -> dict[str, list[dict[str, Any]]]:
    """What summary.json says of one model; all its variants share the resamples."""
    folders = _folders(rows)
    metrics = {
        folder: read_json(Path(folder) / "metrics.json", what="metrics file") for folder in folders
    }
    masks = any("segm" in content for content in metrics.values())
    # before the bootstrap, which takes long, so that a file that does not fit is noticed at once
    warmups = {
        row["quantization"]: read_summary(row["warmup"], WARMUP_FORMAT, "warmup")["summary"]
        for row in rows
        if row["warmup"] is not None
    }
    costs = [_cost_columns(row, warmups.get(row["quantization"], {})) for row in rows]
    statistics = None
    if folders:
        statistics = bootstrap(
            rows[0]["annotations"],
            {
                folder: read_json(Path(folder) / "predictions.json", what="predictions file")
                for folder in folders
            },
            masks=masks,
            classes=metrics[folders[0]]["per_class"],
            resamples=resamples,
            seed=seed,
            processes=processes,
        )
    for folder in folders:
        _check_agreement(folder, metrics[folder], statistics)
    kinds = iou_types(masks)
    categories = _categories(rows[0]["annotations"], metrics[folders[0]]) if folders else {}
    summary: dict[str, list[dict[str, Any]]] = {
        "rows": [],
        "classes": [],
        "rankings": [],
        "quantizations": [
            {
                "model": rows[0]["model"],
                "quantization": name,
                "not_quantized": warmup["not_quantized"],
                "layer_sqnr": warmup.get("layer_sqnr", []),
            }
            for name, warmup in warmups.items()
        ],
    }
    for row, cost in zip(rows, costs, strict=True):
        for kind in kinds:
            names = {key: row[key] for key in ("model", "quantization", "compensation")}
            names["metrics"] = kind
            columns = {
                **names,
                **{
                    key: row["settings"][key] for key in ("weight_bits", "activation_bits", "scope")
                },
                "failed": "; ".join(row.get("failed", ())) or None,
                "images": statistics.images if statistics else None,
                "resamples": statistics.resamples if statistics else None,
                **_fault_columns(row, metrics, warmups.get(row["quantization"], {})),
            }
            for metric in AP_METRICS:
                columns |= _ap_columns(statistics, row, kind, metric, metric)
            summary["rows"].append(columns | cost)
            classes = _class_rows(statistics, row, kind, categories)
            summary["classes"] += [names | entry for entry in classes]
            summary["rankings"].append(names | _ranking(classes))
    return summary


def summarize(
    rows: Sequence[Mapping[str, Any]],
    table: str | os.PathLike[str],
    document: str | os.PathLike[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
    processes: int = 1,
    failed: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write all results as numbers; this module's docstring describes both files.

    Args:
        rows: one dictionary per combination: model, quantization, compensation (names), settings
            (of the quantization), annotations, warmup (files), and baseline,
            quantized and compensated (folders with metrics.json and predictions.json), or None for
            what was not evaluated. Without compensation, compensation is None too. In a run that
            failed, ``failed`` holds sentences about why, and warmup may be None.
        table: the CSV file.
        document: the JSON file.
        resamples, seed, processes: of the bootstrap.
        failed: the steps of the run that failed, each with step, sentence and log.

    Raises:
        QwtError: a file is missing or unreadable, or metrics and predictions disagree.
    """
    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    summaries = [
        _model_summary(group, resamples=resamples, seed=seed, processes=processes)
        for group in by_model.values()
    ]
    merged = {key: [line for part in summaries for line in part[key]] for key in summaries[0]}
    with (
        write_atomically(table) as partial,
        open(partial, "w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.DictWriter(stream, fieldnames=list(merged["rows"][0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged["rows"])
    write_json(
        document,
        {"confidence": CONFIDENCE, "seed": seed, "failed": list(failed), **merged},
        indent=1,
    )
