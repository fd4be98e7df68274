"""Run a detector on images that have no annotations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from mmdet.apis import inference_detector
from mmdet.visualization import DetLocalVisualizer

from .errors import QwtError
from .evaluation.predict import detections
from .files import write_json
from .pipeline import load_quantized
from .progress import progress


def run_on_images(
    config: str,
    checkpoint: str | Path,
    images: Sequence[Path],
    folder: Path,
    *,
    warmup: str | Path | None = None,
    compensation: str | Path | None = None,
    device: str = "auto",
    score: float = 0.3,
    config_options: Mapping[str, Any] | None = None,
) -> int:
    """Detect on images; write drawings and the results in COCO's format.

    Writes ``folder``/pictures/{number}_{name}.jpg, predictions.json (COCO results; category ids are
    the model's labels from 1) and images.json (ids, names and sizes of images, and categories).

    Args:
        device: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one.
        score: least score of a detection that is drawn; the results hold all.

    Returns:
        The number of detections.

    Raises:
        QwtError: an image cannot be read, or see :func:`load_quantized`.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_quantized(
        config,
        checkpoint,
        warmup=warmup,
        compensation=compensation,
        device=device,
        config_options=config_options,
    )
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
        sample = inference_detector(model, image)
        found += detections(sample.pred_instances, number, list(range(1, len(classes) + 1)))
        height, width = image.shape[:2]
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
