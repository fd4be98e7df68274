"""What a sequential refit of weights and biases is worth, against calibration of each layer for itself.

The calibration images are split in two; a detector is calibrated on one half and judged on the other, both
ways (as in bench_recipes.py). Prints for each number of bits and each variant the AP over all images, the
signal-to-noise ratio of the heads' outputs, and the processor time of calibration.

    python tests/benchmarks/bench_refit.py --config yolox/yolox_nano_8xb8-300e_coco.py \
        --checkpoint CHECKPOINT --annotations results/datasets/coco_real/calibration.json

With ``--evaluation results/datasets/coco_real/evaluation.json`` it calibrates on all of them and judges on
these; nothing is to be chosen by that.
"""

import argparse
import copy
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_recipes import BITS, COMPENSATIONS, Trial, with_recipe
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.evaluation.coco import coco_metrics, has_masks
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.noise import SignalNoise
from qwt_mmdet.search.sensitivity import head_tensors
from torch import nn

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"refit": "none"},
    **{
        f"sequential {weighting}": {"refit": "sequential", "refit_weighting": weighting}
        for weighting in (0.0, 0.5, 0.8)
    },
}


@torch.no_grad()
def noise_at_heads(full: nn.Module, model: nn.Module, loader: Any) -> float:
    """Signal-to-noise ratio in dB: noise by signal power, averaged over the tensors of the heads."""
    noise: list[SignalNoise] = []
    for batch in loader:
        expected, found = head_tensors(full, batch), head_tensors(model, batch)
        noise = noise or [SignalNoise() for _ in expected]
        for total, *outputs in zip(noise, expected, found, strict=True):
            total.update(*outputs)
    return -10 * math.log10(sum(total.noise / total.signal for total in noise) / len(noise))


def measure(
    trial: Trial, settings: QuantizationSettings, compensation: str, folds: list[list[Path]]
) -> tuple[list[dict[str, Any]], list[float], list[float]]:
    """Detections on the second image file of each fold, calibrated on the first; dB and seconds."""
    found, decibels, seconds = [], [], []
    for fit, judge in folds:
        start = time.process_time()
        model = calibrate(quantize_model(copy.deepcopy(trial.model), settings), trial.loader(fit))
        model = with_recipe(model, trial.model, trial.loader(fit), compensation)
        seconds.append(time.process_time() - start)
        decibels.append(noise_at_heads(trial.model, model, trial.loader(judge)))
        found += trial.found(model, judge)
    return found, decibels, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--annotations", required=True, help="a run's calibration.json")
    parser.add_argument("--evaluation", type=Path, help="a run's evaluation.json")
    parser.add_argument("--images", type=int, help="use the first ones only")
    parser.add_argument("--scope", default="backbone")
    parser.add_argument("--bits", nargs="+", choices=BITS, default=["w4a4", "w4a8", "w6a6"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--compensations", nargs="+", choices=COMPENSATIONS, default=["none"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(options, Path(folder))
        folds, judged = trial.folds, trial.all
        if options.evaluation:
            folds, judged = [[trial.all, options.evaluation]], options.evaluation
        for bits in options.bits:
            for name in options.variants:
                settings = QuantizationSettings(*BITS[bits], scope=options.scope, **VARIANTS[name])
                for compensation in options.compensations:
                    found, decibels, seconds = measure(trial, settings, compensation, folds)
                    metrics = coco_metrics(judged, found, masks=has_masks(found))
                    aps = (f"{k} {metrics[k]['AP']:.4f}" for k in ("bbox", "segm") if k in metrics)
                    mean = sum(decibels) / len(decibels)
                    print(
                        f"{bits:5} {name:15} {compensation:17}", *aps,
                        f"{mean:.1f} dB {sum(seconds) / len(seconds):.0f} s", flush=True,
                    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
