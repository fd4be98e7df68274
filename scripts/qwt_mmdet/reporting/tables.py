"""The table of all results: ``summary.csv``.

One row for each model × quantization × compensation × kind of AP (``metrics``: bbox or segm).
An empty cell means that the number is undefined (no objects of that size, nothing to recover).

``model``, ``quantization``, ``compensation``
    names in the config.
``metrics``
    ``bbox`` for box AP, ``segm`` for mask AP.
``weight_bits``, ``activation_bits``, ``scope``
    of the quantization.
``images``, ``resamples``
    evaluation images, and bootstrap resamples over them.
``{M}_baseline``, ``{M}_quantized``, ``{M}_compensated``
    AP between 0 and 1; M is one of AP, AP50, AP75, APs, APm, APl.
``{M}_quantized_minus_baseline``, ``{M}_compensated_minus_baseline``, ``{M}_compensated_minus_quantized``
    differences; ``…_significant`` says whether the interval excludes 0.
``{M}_recovered``
    (compensated - quantized) / (baseline - quantized), where the loss is significant.
``…_low``, ``…_high``
    ends of the 95 % interval of each number above: paired bootstrap over images.
``baseline_bytes``, ``quantized_bytes``
    size of all weights before and after quantization.
``layers``, ``not_quantized``
    layers that were quantized, and modules with weights that were not.
``compensation_bytes``, ``compensation_parameters``, ``compensation_multiply_adds``
    what the kept compensation adds; multiply-adds per image.
``blocks``, ``blocks_kept``
    blocks that were fitted, and those whose compensation the gate kept.
"""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import QwtError
from ..evaluation.bootstrap import Bootstrap, bootstrap
from ..evaluation.coco import AP_METRICS
from ..files import read_json, write_atomically

VARIANTS = ("baseline", "quantized", "compensated")
DIFFERENCES = (
    ("quantized", "baseline"),
    ("compensated", "baseline"),
    ("compensated", "quantized"),
)


def read_summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the ``summary`` dictionary of a warmup or compensation file (plain numbers)."""
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise QwtError(
            f"The file {path} cannot be read ({type(error).__name__}); delete it and run again."
        ) from error
    return dict(content["summary"])


def _with_interval(column: str, estimate: Mapping[str, Any]) -> dict[str, Any]:
    return {
        column: estimate["value"],
        f"{column}_low": estimate["low"],
        f"{column}_high": estimate["high"],
    }


def _ap_columns(
    statistics: Bootstrap, row: Mapping[str, Any], kind: str, metric: str
) -> dict[str, Any]:
    """Columns of one metric (AP, AP50, …) of one row; variants go by their result folders."""
    columns: dict[str, Any] = {}
    for variant in VARIANTS:
        estimate = statistics.estimate(row[variant], kind, metric)
        columns |= _with_interval(f"{metric}_{variant}", estimate)
    for a, b in DIFFERENCES:
        column = f"{metric}_{a}_minus_{b}"
        difference = statistics.difference(row[a], row[b], kind, metric)
        columns |= _with_interval(column, difference)
        columns[f"{column}_significant"] = difference["significant"]
    recovered = statistics.recovered(*(row[variant] for variant in VARIANTS), kind, metric)
    return columns | _with_interval(f"{metric}_recovered", recovered)


def _cost_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    warmup = read_summary(row["warmup"])
    compensation = read_summary(Path(row["compensated"]) / "compensation.pth")
    return {
        "baseline_bytes": warmup["baseline_weight_bytes"],
        "quantized_bytes": warmup["weight_bytes"],
        "layers": warmup["layers"],
        "not_quantized": len(warmup["not_quantized"]),
        "compensation_bytes": compensation["bytes"],
        "compensation_parameters": compensation["parameters"],
        "compensation_multiply_adds": compensation["multiply_adds"],
        "blocks": compensation["blocks"],
        "blocks_kept": compensation["kept"],
    }


def _check_agreement(folder: str, metrics: Mapping[str, Any], statistics: Bootstrap) -> None:
    """The bootstrap computes AP anew; that it finds the recorded AP proves that files belong together."""
    for kind, by_metric in statistics.values[folder].items():
        recorded = metrics[kind]["AP"]
        if recorded is not None and abs(recorded - by_metric["AP"]) > 1e-6:
            raise QwtError(
                f"{folder}: metrics.json says {kind} AP {recorded:.6f}, but predictions.json gives "
                f"{by_metric['AP']:.6f}; delete the folder and run again."
            )


def _model_rows(
    rows: Sequence[Mapping[str, Any]], *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Rows of the summary of one model; all its variants share the resamples."""
    folders = list(dict.fromkeys(row[variant] for row in rows for variant in VARIANTS))
    metrics = {
        folder: read_json(Path(folder) / "metrics.json", what="metrics file") for folder in folders
    }
    statistics = bootstrap(
        rows[0]["annotations"],
        {
            folder: read_json(Path(folder) / "predictions.json", what="predictions file")
            for folder in folders
        },
        masks="segm" in metrics[rows[0]["baseline"]],
        resamples=resamples,
        seed=seed,
    )
    for folder in folders:
        _check_agreement(folder, metrics[folder], statistics)
    kinds = list(statistics.values[rows[0]["baseline"]])
    summary = []
    for row in rows:
        costs = _cost_columns(row)
        for kind in kinds:
            columns = {
                **{key: row[key] for key in ("model", "quantization", "compensation")},
                "metrics": kind,
                **{
                    key: row["settings"][key] for key in ("weight_bits", "activation_bits", "scope")
                },
                "images": statistics.images,
                "resamples": statistics.resamples,
            }
            for metric in AP_METRICS:
                columns |= _ap_columns(statistics, row, kind, metric)
            summary.append(columns | costs)
    return summary


def summarize(
    rows: Sequence[Mapping[str, Any]],
    output: str | os.PathLike[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> None:
    """Write the table of all results as CSV; its columns are described in this module.

    Args:
        rows: one dictionary per combination: model, quantization, compensation (names), settings
            (of the quantization), annotations, warmup (files), and baseline, quantized and
            compensated (folders with metrics.json and predictions.json).
        output: the CSV file.
        resamples, seed: of the bootstrap.

    Raises:
        QwtError: a file is missing or unreadable, or metrics and predictions disagree.
    """
    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    summary = [
        line
        for group in by_model.values()
        for line in _model_rows(group, resamples=resamples, seed=seed)
    ]
    with write_atomically(output) as partial, open(partial, "w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(summary[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(summary)
