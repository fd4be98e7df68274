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
    categories = generator.integers(1, CLASSES + 1, (images, detections))
    scores = generator.random((images, detections))
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": c, "name": str(c)} for c in range(1, CLASSES + 1)]
    records = []
    for image in range(images):
        content["images"].append(
            {"id": image, "height": SIZE[0], "width": SIZE[1], "file_name": f"{image}.jpg"}
        )
        for place, (box, category, score) in enumerate(
            zip(boxes[image].tolist(), categories[image].tolist(), scores[image], strict=True)
        ):
            polygons = hexagon(*box)
            record = {"image_id": image, "category_id": category, "bbox": box}
            if place < 7:
                content["annotations"].append(
                    {**record, "id": len(content["annotations"]) + 1, "iscrowd": 0}
                    | {"area": box[2] * box[3] * 0.75, "segmentation": polygons}
                )
            records.append(
                {**record, "score": float(score), "segmentation": compressed(polygons, *SIZE)}
            )
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
            annotations = Path(folder) / "annotations.json"
            annotations.write_text(json.dumps(content))
            path = Path(folder) / "predictions.json"
            path.write_text(json.dumps(records))
            del content, records
            started = time.process_time()
            bootstrap(
                annotations,
                {str(variant): path for variant in range(arguments.variants)},
                masks=True,
                resamples=arguments.resamples,
            )
            seconds = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(f"{images} images, {arguments.variants} variants: {seconds:.0f} s, {peak:.2f} GB")


if __name__ == "__main__":
    main()
