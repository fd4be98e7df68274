"""Run a detector over images and collect its detections in COCO's results format."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmdet.models import BaseDetector
from mmengine.structures import InstanceData
from pycocotools import mask as mask_api

from ..data.batches import count_images, same_shapes
from ..detectors.classes import category_ids
from ..files import read_json
from ..progress import progress


class Predictions(NamedTuple):
    """Detections of a detector on some images.

    Attributes:
        records: COCO results: image_id, category_id, bbox (x, y, width, height in pixels), score, and segmentation
            (compressed run lengths) with masks.
        not_finite: number of detections with a NaN or an infinity, which are not in ``records``.
        masks: whether the detector predicts masks.
    """

    records: list[dict[str, Any]]
    not_finite: int
    masks: bool


def finite(instances: InstanceData) -> InstanceData:
    """The detections whose box and score are finite numbers."""
    return instances[instances.bboxes.isfinite().all(1) & instances.scores.isfinite()]


def detections(
    instances: InstanceData, image_id: int, label_to_category: Sequence[int | None]
) -> list[dict[str, Any]]:
    """COCO results of one image; detections that are not finite are left out.

    Args:
        instances: mmdet's ``pred_instances``: bboxes [n, 4] (x1, y1, x2, y2 in pixels of the
            original image), scores [n], labels [n], perhaps masks [n, height, width].
        label_to_category: category id of each label; detections of labels without one are left out.
    """
    instances = finite(instances)
    if None in label_to_category:
        known = torch.tensor([category is not None for category in label_to_category])
        instances = instances[known.to(instances.labels.device)[instances.labels]]
    boxes = instances.bboxes.float().cpu().numpy().astype(np.float64)
    scores = instances.scores.float().cpu().numpy().astype(np.float64)
    labels = instances.labels.cpu().numpy()
    boxes[:, 2:] -= boxes[:, :2]
    results = [
        {
            "image_id": image_id,
            "category_id": label_to_category[label],
            "bbox": box.tolist(),
            "score": float(score),
        }
        for box, score, label in zip(boxes, scores, labels, strict=True)
    ]
    if "masks" in instances:
        masks = instances.masks.cpu().numpy().astype(np.uint8)
        # pycocotools takes [height, width, n] in Fortran's order; OpenCV transposes faster than numpy
        columns = np.array([cv2.transpose(mask) for mask in masks]).T
        encoded = mask_api.encode(columns) if len(masks) else []
        for result, rle in zip(results, encoded, strict=True):
            counts = rle["counts"].decode("ascii")
            result["segmentation"] = {"size": list(rle["size"]), "counts": counts}
    return results


@torch.no_grad()
def predict(
    model: BaseDetector,
    loader: Iterable[dict[str, Any]],
    annotations: str | os.PathLike[str],
) -> Predictions:
    """Detections of all images that the loader yields.

    Args:
        model: detector in evaluation mode, with ``dataset_meta["classes"]``.
        loader: batches as mmdet's test step takes them. Only images of one shape run together, so that the
            padding of an image does not depend on its batch.
        annotations: COCO annotation file that defines the category ids.

    Raises:
        QwtError: the classes do not fit.
    """
    content = read_json(annotations, what="annotation file")
    classes = model.dataset_meta["classes"]
    label_to_category = category_ids(classes, content)
    records: list[dict[str, Any]] = []
    not_finite, masks = 0, False

    def samples() -> Iterable[Any]:
        for batch in loader:
            found: list[Any] = [None] * len(batch["inputs"])
            for group in same_shapes(batch):
                images = {key: [value[index] for index in group] for key, value in batch.items()}
                for index, sample in zip(group, model.test_step(images), strict=True):
                    found[index] = sample
            yield from found

    for sample in progress(samples(), "Evaluating", total=count_images(loader)):
        records += detections(sample.pred_instances, sample.img_id, label_to_category)
        not_finite += len(sample.pred_instances) - len(finite(sample.pred_instances))
        masks |= "masks" in sample.pred_instances
    return Predictions(records, not_finite, masks)
