"""How much the AP of a recipe depends on which calibration images it was given.

Quantizes and compensates on random subsets of the calibration images, with the default settings, and
prints AP on the evaluation images for each. It chooses nothing: it tells which differences between
recipes are luck.

    python tests/benchmarks/bench_scatter.py --config yolox/yolox_nano_8xb8-300e_coco.py \
        --checkpoint CHECKPOINT --calibration results/datasets/coco_real/calibration.json \
        --evaluation results/datasets/coco_real/evaluation.json
"""

import argparse
import copy
import random
import tempfile
from pathlib import Path

import pandas as pd
import torch
from bench_recipes import BITS, COMPENSATIONS, detector_parser, with_recipe, write_subset
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.data.loaders import make_loader
from qwt_mmdet.detectors.build import load_detector
from qwt_mmdet.evaluation.coco import coco_metrics, has_masks
from qwt_mmdet.evaluation.predict import predict
from qwt_mmdet.files import read_json
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from torch import nn


def measure(options: argparse.Namespace, full: nn.Module, subset: Path) -> dict[str, float]:
    """Box AP by recipe, calibrated on the images of ``subset``."""
    images = make_loader(full.cfg, subset)
    quantization = QuantizationSettings(
        *BITS[options.bits], scope=options.scope, refit=options.refit
    )
    quantized = calibrate(quantize_model(copy.deepcopy(full), quantization), images)
    result = {}
    for name in options.recipes:
        model = with_recipe(quantized, full, images, name)
        images_to_judge = make_loader(full.cfg, options.evaluation)
        found = predict(model, images_to_judge, options.evaluation).records
        result[name] = coco_metrics(options.evaluation, found, masks=has_masks(found))["bbox"]["AP"]
    return result


def main() -> None:
    parser = detector_parser(__doc__)
    parser.add_argument("--calibration", required=True, help="a run's calibration.json")
    parser.add_argument("--evaluation", required=True, help="a run's evaluation.json")
    parser.add_argument("--bits", choices=BITS, default="w6a6")
    parser.add_argument("--refit", default="sequential", choices=("none", "sequential"))
    parser.add_argument("--subsets", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.9, help="of the calibration images")
    recipes = {"choices": COMPENSATIONS, "default": ["none", "paper", "qwt"]}
    parser.add_argument("--recipes", nargs="+", **recipes)
    options = parser.parse_args()
    full = load_detector(options.config, options.checkpoint, device="cpu")
    content = read_json(options.calibration, what="annotation file")
    images = content["images"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.subsets):
            chosen = random.Random(seed).sample(images, round(options.share * len(images)))
            chosen.sort(key=lambda image: image["id"])
            subset = write_subset(content, chosen, Path(folder, f"{seed}.json"))
            rows.append(measure(options, full, subset))
            print(seed, *(f"{name} {ap:.4f}" for name, ap in rows[-1].items()), flush=True)
    print(pd.DataFrame(rows).agg(["mean", "min", "max"]).round(4).to_string())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
