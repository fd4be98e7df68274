"""Evaluate a detector: baseline, quantized or compensated."""

import logging
from collections.abc import Sequence
from typing import Any

from mmdet.models import BaseDetector

from ..archives import worst_layers
from ..data.batches import shard_of
from ..data.loaders import make_loader
from ..detectors.classes import category_ids, log_left_out
from ..detectors.forward import check_precision
from ..errors import QwtError
from ..evaluation.coco import coco_metrics, load_ground_truth
from ..evaluation.predict import Predictions, predict
from ..files import read_json, sha256_file, write_json
from ..record import quantization_of, record_of
from .inputs import Inputs, Pathlike

logger = logging.getLogger(__name__)


def check_ground_truth(model: BaseDetector, annotations: Pathlike) -> None:
    """Check annotations, and that they fit the detector, before hours of work."""
    classes = model.dataset_meta["classes"]
    category_ids(classes, read_json(annotations, what="annotation file"))
    load_ground_truth(annotations, masks=model.with_mask, classes=classes)


def evaluate_detector(
    model: BaseDetector,
    annotations: Pathlike,
    *,
    batch_size: int = 1,
    workers: int = 0,
    found: Predictions | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate a detector on the images of an annotation file.

    Args:
        model: from :func:`qwt_mmdet.load_detector`, quantized and compensated or not.
        annotations: COCO annotation file whose ``info.image_root`` is the image folder.
        found: the detections on the images, if they were run already.

    Returns:
        COCO's metrics (see ``evaluation.coco.coco_metrics``), and the detections as COCO results. The metrics also
        hold ``not_finite``, the number of detections with a NaN or an infinity, which are ignored; and
        ``collapsed``: whether a quantized detector finds no object (box AP 0).

    Raises:
        QwtError: the classes of model and annotations differ, the model is not in float32, or a detector in
            full precision has no detections or some that are not finite.
    """
    classes = model.dataset_meta["classes"]
    quantized = record_of(model).quantization is not None
    check_ground_truth(model, annotations)
    content = read_json(annotations, what="annotation file")
    log_left_out(classes, content, logging.INFO if quantized else logging.WARNING)  # told once
    if found is None:
        check_precision(model)
        loader = make_loader(model.cfg, annotations, batch_size=batch_size, workers=workers)
        found = predict(model, loader, annotations)
    if not quantized and found.not_finite:
        raise QwtError(
            f"{found.not_finite} detections of the full-precision model are NaN or infinite; check "
            "the checkpoint and the preprocessing."
        )
    if not quantized and not found.records:
        raise QwtError(
            "The full-precision model makes no detection, although the images contain objects; check the "
            "checkpoint, the classes and the preprocessing."
        )
    metrics = coco_metrics(annotations, found.records, masks=found.masks, classes=classes)
    metrics["collapsed"] = quantized and metrics["bbox"]["AP"] == 0
    metrics["not_finite"] = found.not_finite
    return metrics, found.records


def evaluate_shard(
    inputs: Inputs,
    *,
    shard: tuple[int, int],
    output: Pathlike,
    warmup: Pathlike | None = None,
    compensation: Pathlike | None = None,
) -> None:
    """Run a detector on ``shard`` (number, from 1, of so many) of the images; write detections for :func:`evaluate`."""
    model = inputs.load(warmup=warmup, compensation=compensation)
    check_ground_truth(model, inputs.annotations)
    count = len(read_json(inputs.annotations, what="annotation file")["images"])
    loader = make_loader(
        model.cfg,
        inputs.annotations,
        batch_size=inputs.batch_size,
        workers=inputs.workers,
        images=shard_of(count, inputs.batch_size, shard),
    )
    found = predict(model, loader, inputs.annotations)
    write_json(output, found._asdict())


def gathered(shards: Sequence[Pathlike]) -> Predictions:
    """The detections on all images, from the files of :func:`evaluate_shard` in their order."""
    parts = [Predictions(**read_json(path, what="shard")) for path in shards]
    return Predictions(
        [record for part in parts for record in part.records],
        sum(part.not_finite for part in parts),
        any(part.masks for part in parts),
    )


def evaluate(
    inputs: Inputs,
    *,
    metrics: Pathlike,
    predictions: Pathlike,
    warmup: Pathlike | None = None,
    compensation: Pathlike | None = None,
    shards: Sequence[Pathlike] = (),
    note: tuple[Pathlike, str] | None = None,
) -> None:
    """Evaluate a detector (baseline, quantized or compensated); writes ``metrics`` and ``predictions``, both or neither.

    Args:
        shards: files of :func:`evaluate_shard`, if the images were run in shards.
        note: file that keeps the number of shards, and a hash of the settings that it is valid for.
    """
    write_evaluation(
        inputs,
        inputs.load(warmup=warmup, compensation=compensation),
        metrics=metrics,
        predictions=predictions,
        found=gathered(shards) if shards else None,
        warmup=None if warmup is None else sha256_file(warmup),
        compensation=None if compensation is None else sha256_file(compensation),
    )
    if note is not None:
        write_json(note[0], {"shards": max(1, len(shards)), "of": note[1]})


def write_evaluation(
    inputs: Inputs,
    model: BaseDetector,
    *,
    metrics: Pathlike,
    predictions: Pathlike,
    found: Predictions | None = None,
    **settings: str | None,
) -> None:
    """Evaluate a detector and write ``metrics`` and ``predictions``, both or neither.

    Args:
        settings: further settings that the result depends on, for its provenance.
    """
    result, records = evaluate_detector(
        model,
        inputs.annotations,
        batch_size=inputs.batch_size,
        workers=inputs.workers,
        found=found,
    )
    result["provenance"] = inputs.provenance(**settings)
    result["provenance"] |= inputs.job.account()
    write_json(predictions, records)
    write_json(metrics, result, indent=1)
    for iou_type in ("bbox", "segm"):
        if iou_type in result:
            logger.info(
                "%s AP %.4f, AP50 %.4f", iou_type, result[iou_type]["AP"], result[iou_type]["AP50"]
            )
    if result["not_finite"]:
        logger.warning("%d detections are NaN or infinite and are ignored.", result["not_finite"])
    if result["collapsed"]:
        logger.warning(
            "The quantized detector collapsed: it finds no object. Layers with the lowest SQNR: %s.",
            worst_layers(quantization_of(model).sqnr_db) or "not measured",
        )
