"""How well a search predicts errors and losses, and whether compensation is a better use of bytes than bits.

The bits of a detector's layers are measured on 4 calibration images, as ``measure_candidates`` does. Recipes that are
spread evenly over the Pareto front (in the logarithm of their error) are calibrated on images of one half of the
calibration images. Prints for each the predicted error at the heads, the one on images of the other half, and the loss of
AP on evaluation images; then the rank correlations (Spearman). A search's predicted loss rises with the predicted error, so
both have the same ranks. Nothing is to be chosen by the losses on evaluation images.

Then it prints, for 4-bit weights, the error on the other half without and with compensations that are kept whatever they
do at the heads (``gate: fit``), and that of a recipe of the same bytes.

    python tests/benchmarks/bench_search.py --config yolox/yolox_nano_8xb8-300e_coco.py --checkpoint CHECKPOINT \
        --scope detector --annotations results/datasets/coco_real/calibration.json \
        --evaluation results/datasets/coco_real/evaluation.json --output recipes.csv
"""

import copy
import math
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from bench_recipes import Trial, calibration_parser
from qwt_mmdet.compensation.fit import fit_compensation
from qwt_mmdet.compensation.state import apply_compensation
from qwt_mmdet.config import CompensationSettings, MaxCost, QuantizationSettings, Search
from qwt_mmdet.data.batches import single_images
from qwt_mmdet.evaluation.coco import coco_metrics
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.search.mixed import ParetoFront, measure_candidates, recipe_settings
from qwt_mmdet.search.outputs import OutputError, Reference
from torch import nn

MEASURED = 4
"""Images on which the candidates are measured."""
BUDGETS = (1.0, 5.0)
"""Of compensations, in percent of the backbone's bytes and of its multiply-adds."""


class Recipes:
    """Calibrates recipes on images of one half, and judges them on the other half and on evaluation images."""

    def __init__(self, trial: Trial, images: int) -> None:
        (fit, judge), *_ = trial.folds
        self.trial = trial
        self.fit = list(islice(single_images(trial.loader(fit)), images))
        self.judge = list(islice(single_images(trial.loader(judge)), images))

    def calibrated(self, settings: QuantizationSettings) -> nn.Module:
        model = quantize_model(copy.deepcopy(self.trial.model), settings)
        return calibrate(model, self.fit, noise_images=0)

    def error(self, model: nn.Module) -> float:
        """The relative error at the heads, on images that took no part in the calibration."""
        error = OutputError()
        for image in self.judge:
            error.update(Reference.of(self.trial.model, image), model)
        return error.relative()

    def compensated(self, model: nn.Module, percent: float) -> tuple[float, int]:
        """The error with a compensation within a budget, and its bytes."""
        budget = MaxCost(bytes=percent, multiply_adds=percent)
        settings = CompensationSettings(kind="auto", gate="fit", max_cost=budget)
        fitted = fit_compensation(model, self.trial.model, self.fit, settings)
        error = self.error(apply_compensation(copy.deepcopy(model), fitted))
        return error, fitted.summary()["bytes"]


def spread(errors: list[float], number: int) -> list[int]:
    """Indices of recipes whose errors are spread evenly in the logarithm, without repeats."""
    wanted = np.geomspace(errors[0], errors[-1], number)
    return sorted({int(np.argmin([abs(math.log(e / w)) for e in errors])) for w in wanted})


def main() -> None:
    parser = calibration_parser(__doc__)
    parser.add_argument("--evaluation", type=Path, required=True, help="a run's evaluation.json")
    parser.add_argument("--output", type=Path, required=True, help="csv file of the recipes")
    parser.add_argument("--recipes", type=int, default=12)
    parser.add_argument("--fit", type=int, default=24, help="images of each half that are used")
    options = parser.parse_args()
    search = Search.__dataclass_fields__["candidates"].default
    plain = QuantizationSettings(8, 8, scope=options.scope, grids="integer")
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(options, Path(folder))
        recipes = Recipes(trial, options.fit)

        def unrounded(settings: QuantizationSettings) -> nn.Module:
            model = quantize_model(copy.deepcopy(trial.model), settings)
            batches = recipes.fit[:MEASURED]
            return calibrate(model, batches, noise_images=0, keep_weights=True)

        measured = measure_candidates(unrounded, plain, search, [8], recipes.fit[:MEASURED])

        def ap(model: Any) -> float:
            found = trial.found(model, options.evaluation)
            classes = trial.model.dataset_meta["classes"]
            return coco_metrics(options.evaluation, found, masks=False, classes=classes)["bbox"][
                "AP"
            ]

        front = ParetoFront(measured.layers, "bytes")
        errors = front.relative_errors()
        full = ap(trial.model)
        print(f"full precision: AP {full:.4f}", flush=True)
        rows = []
        for index in spread(errors, options.recipes):
            model = recipes.calibrated(recipe_settings(plain, front[index]))
            size = front[index].bytes + measured.fixed_bytes
            drop = full - ap(model)
            rows.append([size / 1e6, errors[index], recipes.error(model), drop])
            print(
                "{:.3f} MB, error predicted {:.5f} measured {:.5f}, loss {:.4f}".format(*rows[-1]),
                flush=True,
            )
        table = pd.DataFrame(rows, columns=["mb", "predicted", "measured", "loss"])
        table.to_csv(options.output, index=False)
        print("rank correlations:", table.corr("spearman").round(3).loc["predicted"].to_dict())
        four = replace(plain, weight_bits=4)
        model = recipes.calibrated(four)
        codes = sum(layer.weights for layer in measured.layers) / 2
        print(f"W4: error {recipes.error(model):.5f}", flush=True)
        for percent in BUDGETS:
            error, size = recipes.compensated(model, percent)
            recipe = front.within(codes + size)
            instead = recipes.error(recipes.calibrated(recipe_settings(plain, recipe)))
            print(
                f"for {size} bytes more: error {error:.5f} with compensation, {instead:.5f} with bits", flush=True
            )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
