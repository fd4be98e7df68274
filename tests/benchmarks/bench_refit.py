"""What a sequential refit of weights and biases is worth, and what compensation is worth on top of either.

The calibration images are split in two; a detector is calibrated on one half and judged on the other, both
ways (as in bench_recipes.py). Prints for each number of bits and each variant the AP over all images, the
signal-to-noise ratio of the heads' outputs on the images of the calibration and on the others, the bytes of the
compensation in percent of the quantized backbone, and the processor time of calibration and fit.

    python tests/benchmarks/bench_refit.py --config yolox/yolox_nano_8xb8-300e_coco.py \
        --checkpoint CHECKPOINT --annotations results/datasets/coco_real/calibration.json

With ``--evaluation results/datasets/coco_real/evaluation.json`` it calibrates on all of them and judges on
these; nothing is to be chosen by that.
"""

import copy
import itertools
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_recipes import BITS, COMPENSATIONS, Trial, calibration_parser, fit_recipe
from qwt_mmdet.compensation.state import apply_compensation
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.detectors.forward import head_tensors
from qwt_mmdet.evaluation.coco import coco_metrics, has_masks
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.sqnr import HeadError, sqnr_db
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
    noise = HeadError()
    for batch in loader:
        noise.update(head_tensors(full, batch), head_tensors(model, batch))
    return sqnr_db(noise.relative()) or math.inf


def measure(
    trial: Trial, settings: QuantizationSettings, compensations: list[str], folds: list[list[Path]]
) -> dict[str, list[tuple[Any, ...]]]:
    """By compensation, for each fold: detections on its second file of images, fitted to the first; dB at the
    heads on the first and on the second file, bytes of the compensation in percent, seconds."""
    results: dict[str, list[tuple[Any, ...]]] = {name: [] for name in compensations}
    for fit, judge in folds:
        start = time.process_time()
        model = calibrate(quantize_model(copy.deepcopy(trial.model), settings), trial.loader(fit))
        calibrated = time.process_time() - start
        for name in compensations:
            start = time.process_time()
            fitted = fit_recipe(model, trial.model, trial.loader(fit), name)
            seconds = calibrated + time.process_time() - start
            judged = apply_compensation(copy.deepcopy(model), fitted) if fitted else model
            size = fitted.summary()["bytes_percent"] if fitted else 0.0
            noise = [
                noise_at_heads(trial.model, judged, trial.loader(file)) for file in (fit, judge)
            ]
            results[name].append((trial.found(judged, judge), *noise, size, seconds))
    return results


def main() -> None:
    parser = calibration_parser(__doc__)
    parser.add_argument("--evaluation", type=Path, help="a run's evaluation.json")
    parser.add_argument("--grids", default="any", choices=("any", "integer"))
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
                settings = QuantizationSettings(
                    *BITS[bits], scope=options.scope, grids=options.grids, **VARIANTS[name]
                )
                results = measure(trial, settings, options.compensations, folds)
                for compensation, outcomes in results.items():
                    records, *numbers = zip(*outcomes, strict=True)
                    found = list(itertools.chain(*records))
                    metrics = coco_metrics(judged, found, masks=has_masks(found))
                    aps = (f"{k} {metrics[k]['AP']:.4f}" for k in ("bbox", "segm") if k in metrics)
                    own, noise, size, seconds = (sum(values) / len(values) for values in numbers)
                    print(
                        f"{bits:5} {name:15} {compensation:12}", *aps,
                        f"{own:.1f} dB on its images, {noise:.1f} dB on others, {size:.1f} % of the bytes, {seconds:.0f} s",
                        flush=True,
                    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
