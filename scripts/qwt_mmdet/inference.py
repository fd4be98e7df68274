"""Run a detector on images that have no annotations."""

import logging
from collections.abc import Sequence
from pathlib import Path

import cv2
import torch
from mmcv.transforms import Compose
from mmdet.models import BaseDetector
from mmdet.visualization import DetLocalVisualizer
from mmengine.dataset import pseudo_collate
from mmengine.registry import DefaultScope

from .data.loaders import inference_pipeline, unprepared
from .errors import QwtError
from .evaluation.predict import detections, finite
from .files import write_json
from .progress import progress

logger = logging.getLogger(__name__)


def run_on_images(
    model: BaseDetector, images: Sequence[Path], folder: Path, *, score: float = 0.3
) -> int:
    """Detect on images; write drawings and the results in COCO's format.

    Images go through the model's own test pipeline, which also reads them.
    Writes ``folder``/pictures/{number}_{name}.jpg, predictions.json (COCO results; category ids are
    the model's labels from 1) and images.json (ids, names and sizes of images, and categories).

    Args:
        model: from ``load_detector``, quantized and compensated or not.
        score: least score of drawn detections; the results hold all.

    Returns:
        The number of detections.

    Raises:
        QwtError: an image cannot be read or prepared.
    """
    with DefaultScope.overwrite_default_scope("mmdet"):
        pipeline = Compose(inference_pipeline(model.cfg))
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = model.dataset_meta
    classes = model.dataset_meta["classes"]
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    found, entries = [], []
    for number, path in enumerate(progress(images, "Detecting"), start=1):
        image = cv2.imread(str(path))
        if image is None:
            raise QwtError(f"The image {path} cannot be read; convert it to JPEG or PNG.")
        height, width = image.shape[:2]
        try:
            data = pipeline({"img_path": str(path), "img_id": number})
        except cv2.error as error:
            raise unprepared(path, width, height, error) from error
        with torch.no_grad():
            (sample,) = model.test_step(pseudo_collate([data]))
        instances = finite(sample.pred_instances)
        if lost := len(sample.pred_instances) - len(instances):
            logger.warning("%s: %d detections are NaN or infinite and left out.", path, lost)
            sample.pred_instances = instances
        found += detections(sample.pred_instances, number, list(range(1, len(classes) + 1)))
        entries.append({"id": number, "file_name": str(path), "height": height, "width": width})
        visualizer.add_datasample(
            path.name,
            cv2.cvtColor(image, cv2.COLOR_BGR2RGB),
            sample.cpu(),
            draw_gt=False,
            pred_score_thr=score,
            out_file=str(pictures / f"{number:05d}_{path.stem}.jpg"),
        )
    categories = [{"id": label, "name": name} for label, name in enumerate(classes, start=1)]
    write_json(folder / "predictions.json", found)
    write_json(folder / "images.json", {"images": entries, "categories": categories}, indent=1)
    return len(found)
