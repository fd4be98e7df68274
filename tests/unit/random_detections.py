"""Random COCO annotations and detections with everything that makes COCO evaluation intricate."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

WIDTH, HEIGHT = 260, 200


def hexagon(x: float, y: float, width: float, height: float) -> list[list[float]]:
    """COCO polygon of a hexagon that fills three quarters of a box."""
    left, right, top, bottom = x, x + width, y, y + height
    third, two_thirds = x + width / 4, x + 3 * width / 4
    middle = y + height / 2
    return [[third, top, two_thirds, top, right, middle, two_thirds, bottom, third, bottom, left, middle]]  # fmt: skip


def compressed(polygons: list[list[float]], height: int = HEIGHT, width: int = WIDTH) -> dict:
    """RLE of polygons, as a detector's results hold it."""
    rle = mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def random_detections(
    *, images: int, detections: int, classes: int, seed: int, scores: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Annotations and predictions, boxes and masks.

    There are small, medium and large objects, crowd regions, images without objects or detections,
    and a last class that has detections but no objects.

    Args:
        detections: number per image (of all classes).
        scores: number of distinct scores; None for scores without ties.
    """
    generator = np.random.default_rng(seed)

    def box() -> list[float]:
        size = np.exp(generator.uniform(np.log(10), np.log(180), 2))
        corner = generator.uniform(0, np.array([WIDTH, HEIGHT]) - size)
        return [*corner.tolist(), *size.tolist()]

    annotations: list[dict[str, Any]] = []
    predictions: list[dict[str, Any]] = []
    for image in range(images):
        objects = []
        for _ in range(0 if image == 1 else generator.integers(0, 9)):
            shape, category = box(), int(generator.integers(1, classes))
            segmentation = hexagon(*shape)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + 3 * image,
                    "category_id": category,
                    "bbox": shape,
                    "area": float(mask_utils.area(compressed(segmentation))),
                    "segmentation": segmentation,
                    "iscrowd": int(generator.random() < 0.1),
                }
            )
            objects.append((shape, category))
        for _ in range(0 if image == 2 else detections):
            shape, category = box(), int(generator.integers(1, classes + 1))
            if objects and generator.random() < 0.6:
                target, category = objects[generator.integers(len(objects))]
                shape = (np.array(target) * generator.uniform(0.9, 1.1, 4)).tolist()
            score = float(generator.random())
            predictions.append(
                {
                    "image_id": 10 + 3 * image,
                    "category_id": category,
                    "bbox": shape,
                    "score": score if scores is None else round(score * (scores - 1)) / scores,
                    "segmentation": compressed(hexagon(*shape)),
                }
            )
    content = {
        "images": [
            {"id": 10 + 3 * image, "width": WIDTH, "height": HEIGHT, "file_name": f"{image}.png"}
            for image in range(images)
        ],
        "annotations": annotations,
        "categories": [{"id": c, "name": f"class {c}"} for c in range(1, classes + 1)],
    }
    return content, predictions


def write(folder: Path, content: dict[str, Any], name: str = "annotations.json") -> Path:
    """Write an annotation file and return its path."""
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def one_object(box: list[float], **changes: Any) -> dict[str, Any]:
    """Annotations of one image with one object of one class."""
    annotation = {
        "id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3],
        "segmentation": hexagon(*box), "iscrowd": 0,
    }  # fmt: skip
    return {
        "images": [{"id": 1, "width": WIDTH, "height": HEIGHT, "file_name": "1.png"}],
        "annotations": [{**annotation, **changes}],
        "categories": [{"id": 1, "name": "cat"}],
    }


def detection(box: list[float], score: float, **changes: Any) -> dict[str, Any]:
    """A prediction for ``one_object``."""
    record = {"image_id": 1, "category_id": 1, "bbox": box, "score": score}
    return {**record, "segmentation": compressed(hexagon(*box)), **changes}
