"""What a sequential refit of weights and biases is worth, and what compensation is worth on top of either.

The calibration images are split in two; a detector is calibrated on one half and judged on the other, both
ways (as in bench_recipes.py). Prints for each number of bits and each variant the AP over all images, the
agreement (AP of the detections when those of the full-precision detector with scores above 0.3 are the truth, which
needs no annotations and varies less), the relative error of the heads' outputs on the images of the calibration and on the others, there also weighted by
the full-precision detector's scores, the bytes of the compensation in percent of the quantized backbone, and the
processor time of calibration and fit.

    python tests/benchmarks/bench_refit.py --config yolox/yolox_nano_8xb8-300e_coco.py \
        --checkpoint CHECKPOINT --annotations results/datasets/coco_real/calibration.json

With ``--held-out 25`` the last 25 images judge what the others made, at the heads alone. With ``--evaluation
results/datasets/coco_real/evaluation.json`` it calibrates on all of them and judges on these; nothing is to be chosen
by that.
"""

import copy
import itertools
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_recipes import (
    BITS,
    COMPENSATIONS,
    Trial,
    calibration_parser,
    fit_recipe,
    write_subset,
)
from qwt_mmdet.compensation.state import apply_compensation
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.data.batches import single_images
from qwt_mmdet.detectors.forward import head_tensors
from qwt_mmdet.evaluation.coco import coco_metrics, has_masks
from qwt_mmdet.files import read_json
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.scores import level_scores, score_map, scores_at
from qwt_mmdet.quantization.sqnr import HeadError, sqnr_db
from torch import Tensor, nn

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"refit": "none"},
    **{
        f"sequential {weighting}": {"refit": "sequential", "refit_weighting": weighting}
        for weighting in (0.0, 0.5, 0.8)
    },
}

CONFIDENT = 0.3


def weighted(tensors: list[Tensor], scores: Tensor) -> list[Tensor]:
    """Outputs of heads times the root of a score's share of the mean, so that error power counts by scores."""
    found = []
    for tensor in tensors:
        share = scores_at(scores, (1, *tensor.shape[2:]))
        found.append(tensor * (share / share.mean()).sqrt().view(tensor.shape[2:]))
    return found


@torch.no_grad()
def error_at_heads(full: nn.Module, model: nn.Module, loader: Any) -> tuple[float, float]:
    """Error by signal power, averaged over the tensors of the heads: of all positions alike, and by scores."""
    plain, scored = HeadError(), HeadError()
    for image in single_images(loader):
        pair = head_tensors(full, image), head_tensors(model, image)
        plain.update(*pair)
        levels = level_scores(full, image)
        if levels is not None:
            scores = score_map(levels)
            scored.update(*(weighted(tensors, scores) for tensors in pair))
    return plain.relative(), scored.relative()


def confident(trial: Trial, judged: Path, folder: Path) -> Path:
    """Annotations that are the full-precision detector's detections with scores above 0.3."""
    content = read_json(judged, what="annotation file")
    found = [r for r in trial.found(trial.model, judged) if r["score"] > CONFIDENT]
    content["annotations"] = [
        {**r, "id": number, "area": r["bbox"][2] * r["bbox"][3], "iscrowd": 0}
        for number, r in enumerate(found, start=1)
    ]
    return write_subset(content, content["images"], folder / "confident.json")


def measure(
    trial: Trial,
    settings: QuantizationSettings,
    compensations: list[str],
    folds: list[list[Path]],
    *,
    heads_only: bool,
) -> dict[str, list[tuple[Any, ...]]]:
    """By compensation, for each fold: detections on its second file of images, fitted to the first; error at the
    heads on the first and on the second file, plain and by scores; bytes of the compensation in percent, seconds."""
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
            errors = [
                error
                for file in (fit, judge)
                for error in error_at_heads(trial.model, judged, trial.loader(file))
            ]
            found = [] if heads_only else trial.found(judged, judge)
            results[name].append((found, *errors, size, seconds))
    return results


def main() -> None:
    parser = calibration_parser(__doc__)
    parser.add_argument("--evaluation", type=Path, help="a run's evaluation.json")
    parser.add_argument("--held-out", type=int, help="number of images that judge the heads")
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
        if options.held_out:
            content = read_json(trial.all, what="annotation file")
            parts = content["images"][: -options.held_out], content["images"][-options.held_out :]
            names = Path(folder, "fit.json"), Path(folder, "judge.json")
            folds = [[write_subset(content, *part) for part in zip(parts, names, strict=True)]]
        truth = None if options.held_out else confident(trial, judged, Path(folder))
        for bits in options.bits:
            for name in options.variants:
                settings = QuantizationSettings(
                    *BITS[bits], scope=options.scope, grids=options.grids, **VARIANTS[name]
                )
                results = measure(
                    trial, settings, options.compensations, folds, heads_only=bool(options.held_out)
                )
                for compensation, outcomes in results.items():
                    records, *numbers = zip(*outcomes, strict=True)
                    found = list(itertools.chain(*records))
                    means = (sum(values) / len(values) for values in numbers)
                    own, _, others, scored, size, seconds = means
                    metrics = {}
                    if not options.held_out:
                        metrics = coco_metrics(judged, found, masks=has_masks(found))
                    aps = [f"{k} {metrics[k]['AP']:.4f}" for k in ("bbox", "segm") if k in metrics]
                    if truth is not None:
                        agreement = coco_metrics(truth, found, masks=False)["bbox"]["AP"]
                        aps.append(f"agreement {agreement:.4f}")
                    print(
                        f"{bits:5} {name:15} {compensation:12}", *aps,
                        f"error {own:.4f} ({sqnr_db(own) or math.inf:.1f} dB) on its images,",
                        f"{others:.4f} ({sqnr_db(others) or math.inf:.1f} dB) on others, there by scores {scored:.4f},",
                        f"{size:.1f} % of the bytes, {seconds:.0f} s", flush=True,
                    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
