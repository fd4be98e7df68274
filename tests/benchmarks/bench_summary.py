"""Time and memory of the bootstrap over many detections with masks.

    python tests/benchmarks/bench_summary.py --images 5000 --variants 1

Made-up detections of 80 classes; each variant is a file of its own, as the workflow leaves it. Variants are read
one at a time, so their number costs time alone.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from qwt_mmdet.evaluation.bootstrap import bootstrap
from random_detections import compressed, hexagon

SIZE = (480, 640)
CLASSES = 80


def made_up(images: int, detections: int, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Annotations with 7 objects per image, as COCO has them, and detections near them and elsewhere."""
    generator = np.random.default_rng(seed)
    boxes = generator.uniform(0, 200, (images, detections, 4)) + np.array([0, 0, 20, 20])
    categories = generator.integers(1, CLASSES + 1, (images, detections)).tolist()
    scores = generator.random((images, detections)).tolist()
    size = {"height": SIZE[0], "width": SIZE[1]}
    content: dict[str, Any] = {
        "images": [{"id": image, "file_name": f"{image}.jpg", **size} for image in range(images)],
        "annotations": [],
        "categories": [{"id": c, "name": str(c)} for c in range(1, CLASSES + 1)],
    }
    records = []
    for image, place in np.ndindex(images, detections):
        box, polygons = boxes[image, place].tolist(), hexagon(*boxes[image, place].tolist())
        record = {"image_id": image, "category_id": categories[image][place], "bbox": box}
        if place < 7:
            number, area = len(content["annotations"]) + 1, box[2] * box[3] * 0.75
            more = {"id": number, "iscrowd": 0, "area": area, "segmentation": polygons}
            content["annotations"].append({**record, **more})
        mask = compressed(polygons, *SIZE)
        records.append({**record, "score": scores[image][place], "segmentation": mask})
    return content, records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1250, 2500, 5000])
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--variants", type=int, default=1)
    parser.add_argument("--resamples", type=int, default=100)
    arguments = parser.parse_args()
    for images in sorted(arguments.images):
        with tempfile.TemporaryDirectory() as folder:
            content, records = made_up(images, arguments.detections, 0)
            annotations, path = Path(folder) / "annotations.json", Path(folder) / "predictions.json"
            annotations.write_text(json.dumps(content))
            path.write_text(json.dumps(records))
            del content, records
            variants = {str(variant): path for variant in range(arguments.variants)}
            started = time.process_time()
            bootstrap(annotations, variants, masks=True, resamples=arguments.resamples)
            seconds = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(f"{images} images, {arguments.variants} variants: {seconds:.0f} s, {peak:.2f} GB")


if __name__ == "__main__":
    main()
