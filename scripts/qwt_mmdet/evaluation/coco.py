"""COCO's official box and mask metrics, as pycocotools computes them."""

import contextlib
import io
import logging
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..data.annotations import read_annotations
from ..errors import QwtError

logger = logging.getLogger(__name__)


class Averaged(NamedTuple):
    """The only IoU threshold (None: all ten) and the size class, as COCOeval names it, that an AP averages over."""

    iou: float | None = None
    area: str = "all"


AP_METRICS = {
    "AP": Averaged(),
    "AP50": Averaged(iou=0.5),
    "AP75": Averaged(iou=0.75),
    "APs": Averaged(area="small"),
    "APm": Averaged(area="medium"),
    "APl": Averaged(area="large"),
}
"""COCO's averages of precision, by name."""

AR_METRICS = ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""Names of the averages of recall, which are COCOeval's last six summary numbers."""

IMAGES_AT_ONCE = 500
"""Images that are matched at a time; only small arrays of them are kept."""

MATCHED_KEYS = {"bbox": "bbox", "segm": "segmentation"}
"""The key of a prediction that each IoU type compares."""


def iou_types(masks: bool) -> tuple[str, ...]:
    """IoU types that are evaluated: boxes always, masks where the model predicts them."""
    return ("bbox", "segm") if masks else ("bbox",)


def has_masks(predictions: Iterable[dict[str, Any]]) -> bool:
    """Whether COCO results come from a model that predicts masks."""
    return any("segmentation" in record for record in predictions)


def load_ground_truth(
    annotations: str | os.PathLike[str], *, masks: bool, classes: Collection[str] | None = None
) -> COCO:
    """Read and check a COCO annotation file.

    COCOeval marks a missing match by id 0. So a file with an annotation 0 is numbered again from 1.

    Args:
        masks: whether the masks will be needed.
        classes: names of the categories that are evaluated; None: all. Objects of others are left out.

    Raises:
        QwtError: the file is missing, malformed or inconsistent, or has no objects (crowd regions do not count).
    """
    content = read_annotations(annotations, masks=masks)
    if classes is not None:
        content["categories"] = [c for c in content["categories"] if c["name"] in classes]
        kept = {category["id"] for category in content["categories"]}
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] in kept]
    if all(annotation["iscrowd"] for annotation in content["annotations"]):
        raise QwtError(
            f"The annotation file {annotations} has no ground truth objects; evaluate on images that "
            "contain some."
        )
    if any(annotation["id"] == 0 for annotation in content["annotations"]):
        logger.warning("%s has an annotation with id 0; numbering them from 1.", annotations)
        for number, annotation in enumerate(content["annotations"], start=1):
            annotation["id"] = number
    ground_truth = COCO()
    ground_truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth.createIndex()
    return ground_truth


def _check_mask(where: str, segmentation: Any, image: dict[str, Any]) -> None:
    if not isinstance(segmentation, dict) or not isinstance(
        segmentation.get("counts"), str | bytes
    ):
        raise QwtError(
            f"{where} has no compressed RLE mask; evaluate a mask detector, or boxes only."
        )
    size, expected = list(segmentation["size"]), [image["height"], image["width"]]
    if size != expected:
        raise QwtError(f"{where} has a mask of {size}, the image has {expected} (height, width).")


def check_predictions(
    ground_truth: COCO, predictions: Sequence[dict[str, Any]], *, masks: bool
) -> None:
    """Check that predictions can be a detector's result on these images.

    Raises:
        QwtError: a prediction is of an unknown image or category, has a number that is not finite, or
            (``masks``) has no mask of its image's size.
    """
    for record in predictions:
        image_id = record.get("image_id")
        if image_id not in ground_truth.imgs:
            raise QwtError(
                f"A prediction is of image {image_id}, which is not in the annotation file; "
                "evaluate on the images of that file."
            )
        where = f"A prediction of image {image_id}"
        category = record.get("category_id")
        if category not in ground_truth.cats:
            raise QwtError(
                f"{where} has category {category}, which is not in the annotation file; "
                "the model's classes must be those of the dataset."
            )
        for key in ("score", "bbox"):
            if key not in record:
                raise QwtError(
                    f"{where} has no {key!r}; write predictions in COCO's results format."
                )
        if not all(math.isfinite(number) for number in (record["score"], *record["bbox"])):
            raise QwtError(
                f"{where} has score {record['score']} and box {list(record['bbox'])}; numbers that "
                "are not finite mean that the model overflowed, so check the quantization ranges."
            )
        if masks:
            _check_mask(where, record.get("segmentation"), ground_truth.imgs[image_id])


def match_detections(
    ground_truth: COCO,
    predictions: Sequence[dict[str, Any]],
    iou_type: str,
    *,
    images: Sequence[int] | None = None,
) -> COCOeval:
    """Match checked predictions to the ground truth (COCOeval.evaluate), for ``bbox`` or ``segm``.

    Only the compared shape is passed on: COCO would take the area of a mask from the detection's box, but the official
    size classes of masks use mask areas.

    Args:
        images: ids of the images to match; None: all.

    Returns:
        The evaluator with its ``evalImgs``, not yet accumulated. ``predictions`` do not change.
    """
    keys = ("image_id", "category_id", "score", MATCHED_KEYS[iou_type])
    with contextlib.redirect_stdout(io.StringIO()):
        if predictions:
            detections = ground_truth.loadRes(
                [{key: record[key] for key in keys} for record in predictions]
            )
        else:  # which loadRes does not take
            detections = COCO()
            detections.dataset = {**ground_truth.dataset, "annotations": []}
            detections.createIndex()
        evaluator = COCOeval(ground_truth, detections, iou_type)
        if images is not None:
            evaluator.params.imgIds = list(images)
        evaluator.evaluate()
    return evaluator


def match_in_chunks(
    ground_truth: COCO, predictions: Sequence[dict[str, Any]], iou_type: str
) -> Iterator[COCOeval]:
    """Match as :func:`match_detections` does, some images at a time, in the order of their ids.

    This saves memory: an evaluator of all images takes several times the memory of the predictions.
    """
    by_image: dict[int, list[dict[str, Any]]] = {}
    for record in predictions:
        by_image.setdefault(record["image_id"], []).append(record)
    images = sorted(ground_truth.imgs)
    for start in range(0, len(images), IMAGES_AT_ONCE):
        chunk = images[start : start + IMAGES_AT_ONCE]
        records = [record for image in chunk for record in by_image.get(image, ())]
        yield match_detections(ground_truth, records, iou_type, images=chunk)


def _average_precision(evaluator: COCOeval, iou: float | None, area: str) -> float | None:
    """Mean over IoU and recall thresholds and the categories that have objects, 100 detections."""
    size_class = evaluator.params.areaRngLbl.index(area)
    precision = evaluator.eval["precision"][:, :, :, size_class, -1]
    if iou is not None:
        precision = precision[np.isclose(evaluator.params.iouThrs, iou)]
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None


def coco_metrics(
    annotations: str | os.PathLike[str],
    predictions: Sequence[dict[str, Any]],
    *,
    masks: bool,
    classes: Collection[str] | None = None,
) -> dict[str, Any]:
    """Return COCO's metrics of a detector's predictions on all images of an annotation file.

    Args:
        predictions: COCO results records: image_id, category_id, bbox [x, y, width, height] in
            pixels, score and, with ``masks``, segmentation (compressed RLE).
        masks: evaluate masks besides boxes.
        classes: names of the categories that are evaluated; None: all.

    Returns:
        ``{"bbox": {metric: value}, "segm": the same with masks, "per_class": {name: {"bbox": AP, "segm": AP with masks,
        "annotations": number of objects that are not crowd regions}}, "images": number of images}``. The metrics are
        ``AP_METRICS`` and ``AR_METRICS``, between 0 and 1, and None where there is no object for them.

    Raises:
        QwtError: see ``load_ground_truth`` and ``check_predictions``.
    """
    ground_truth = load_ground_truth(annotations, masks=masks, classes=classes)
    check_predictions(ground_truth, predictions, masks=masks)
    objects = Counter(
        annotation["category_id"]
        for annotation in ground_truth.dataset["annotations"]
        if not annotation["iscrowd"]
    )
    per_class: dict[str, dict[str, Any]] = {
        category["name"]: {"annotations": objects[identifier]}
        for identifier, category in sorted(ground_truth.cats.items())
    }
    result: dict[str, Any] = {}
    for iou_type in iou_types(masks):
        evaluator = match_detections(ground_truth, predictions, iou_type)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator.accumulate()
            evaluator.summarize()
        recalls = zip(AR_METRICS, evaluator.stats[-len(AR_METRICS) :], strict=True)
        result[iou_type] = {
            **{name: _average_precision(evaluator, *over) for name, over in AP_METRICS.items()},
            **{name: None if value == -1 else float(value) for name, value in recalls},
        }
        precision = evaluator.eval["precision"]  # [IoU, recall, category, area, detections]
        for index, identifier in enumerate(evaluator.params.catIds):
            values = precision[:, :, index, 0, -1]
            average = float(values.mean()) if np.all(values > -1) else None
            per_class[ground_truth.cats[identifier]["name"]][iou_type] = average
    return {**result, "per_class": per_class, "images": len(ground_truth.imgs)}
