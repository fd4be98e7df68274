"""AP of quantization and compensation recipes on calibration images: how the defaults were chosen.

The images are split in two. Ranges and compensation come from one half and AP from the other, both
ways, and one AP is taken over all detections; so a recipe is judged on images that it has not seen,
and evaluation images stay out of the choice. Weights are not refit (bench_refit.py tries that). Prints
one line per recipe, and appends it to a csv file: what stands there already is not measured again.

    python tests/benchmarks/bench_recipes.py --config workflow/demo/mask-rcnn_swin-xxs-p4-w8_fpn_shapes.py \
        --checkpoint workflow/demo/mask-rcnn_swin-xxs-p4-w8_fpn_shapes.pth --scope detector \
        --annotations results/datasets/shapes/calibration.json --output demo.csv
"""

import argparse
import copy
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from qwt_mmdet.compensation.fit import fit_compensation
from qwt_mmdet.compensation.result import Compensation
from qwt_mmdet.compensation.state import apply_compensation
from qwt_mmdet.config import PRESETS, CompensationSettings, QuantizationSettings, as_entry
from qwt_mmdet.data.loaders import make_loader
from qwt_mmdet.detectors.build import load_detector
from qwt_mmdet.evaluation.coco import coco_metrics, has_masks
from qwt_mmdet.evaluation.predict import predict
from qwt_mmdet.files import read_json, write_json
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from torch import nn

BITS = {f"w{w}a{a}": (w, a) for w, a in ((8, 8), (6, 6), (4, 8), (4, 4), (3, 8), (2, 8))}
COMPENSATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    **{name: as_entry(recipe) for name, recipe in PRESETS.items()},
    "float": {"bits": 32},
    "block": {"target": "block"},
    "downsampling": {"downsampling": True},
    "lowrank 4": {"kind": "lowrank", "rank": 4},
    "half": {"kind": "auto", "max_cost": {"bytes": 2.5, "multiply_adds": 1.5}},
    "double": {"kind": "auto", "max_cost": {"bytes": 10, "multiply_adds": 6}},
    "no holdout": {"ridge": 0.01, "gate": "none", "holdout_fraction": 0},
}
COLUMNS = [
    "bits", "weight_range", "range", "rounding", "bias_correction", "migrate_scales", "compensation",
]  # fmt: skip


def quantizations(
    ranges: list[str], bits: list[str], weight_range: str | None, migrate: bool
) -> Iterator[dict[str, Any]]:
    """Every combination, as a row of the table without its AP.

    Weights have the range of activations (``mse`` for ``repq``) where ``weight_range`` is None.
    """
    for bit, of_activations, *others in itertools.product(
        bits, ranges, ("nearest", "gptq"), (False, True)
    ):
        of_weights = weight_range or of_activations.replace("repq", "mse")
        values = (bit, of_weights, of_activations, *others, migrate, "none")
        yield dict(zip(COLUMNS, values, strict=True))


def settings(row: dict[str, Any], scope: str) -> QuantizationSettings:
    names = ("weight_range", "rounding", "bias_correction", "migrate_scales")
    options = {name: row[name] for name in names}
    bits = BITS[row["bits"]]
    options |= {"scope": scope, "activation_range": row["range"], "refit": "none"}
    return QuantizationSettings(*bits, **options)


def write_subset(content: dict[str, Any], images: list[dict[str, Any]], path: Path) -> Path:
    """Write an annotation file of some of its images."""
    chosen = {image["id"] for image in images}
    objects = [entry for entry in content["annotations"] if entry["image_id"] in chosen]
    write_json(path, {**content, "images": images, "annotations": objects})
    return path


def fit_recipe(model: nn.Module, full: nn.Module, images: Any, name: str) -> Compensation | None:
    """The compensation ``name`` of a quantized model, fitted to ``images``; None for none."""
    recipe = COMPENSATIONS[name]
    if recipe is None:
        return None
    return fit_compensation(model, full, images, CompensationSettings.from_mapping(recipe))


def with_recipe(model: nn.Module, full: nn.Module, images: Any, name: str) -> nn.Module:
    """The quantized model with the compensation ``name`` fitted to ``images``; itself for none."""
    fitted = fit_recipe(model, full, images, name)
    return apply_compensation(copy.deepcopy(model), fitted) if fitted else model


class Trial:
    """A detector and two halves of its calibration images."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.model = load_detector(options.config, options.checkpoint, device="cpu")
        content = read_json(options.annotations, what="annotation file")
        images = content["images"][: options.images]
        self.all = write_subset(content, images, folder / "all.json")
        halves = [
            write_subset(content, images[half::2], folder / f"half{half}.json") for half in (0, 1)
        ]
        self.folds = [halves, halves[::-1]]
        self.scope = options.scope
        self.quantized: tuple[QuantizationSettings, list[nn.Module]] | None = None

    def loader(self, annotations: Path) -> Any:
        return make_loader(self.model.cfg, annotations, batch_size=4)

    def found(self, model: nn.Module, annotations: Path) -> list[dict[str, Any]]:
        return predict(model, self.loader(annotations), annotations).records

    def metrics(self, found: list[dict[str, Any]]) -> dict[str, float]:
        metrics = coco_metrics(self.all, found, masks=has_masks(found))
        return {kind: metrics[kind]["AP"] for kind in ("bbox", "segm") if kind in metrics}

    def baseline(self) -> dict[str, float]:
        return self.metrics(self.found(self.model, self.all))

    def models(self, row: dict[str, Any]) -> list[nn.Module]:
        """The quantized models of both folds; the last ones are kept for the next row."""
        chosen = settings(row, self.scope)
        if self.quantized is None or self.quantized[0] != chosen:
            models = [
                calibrate(quantize_model(copy.deepcopy(self.model), chosen), self.loader(fit))
                for fit, _ in self.folds
            ]
            self.quantized = chosen, models
        return self.quantized[1]

    def measure(self, row: dict[str, Any]) -> dict[str, float]:
        found = []
        for model, (fit, judge) in zip(self.models(row), self.folds, strict=True):
            model = with_recipe(model, self.model, self.loader(fit), row["compensation"])
            found += self.found(model, judge)
        return self.metrics(found)


def detector_parser(description: str) -> argparse.ArgumentParser:
    """Options of a script that tries recipes on a detector."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--scope", default="backbone")
    return parser


def calibration_parser(description: str) -> argparse.ArgumentParser:
    """Options of a script with a :class:`Trial`."""
    parser = detector_parser(description)
    parser.add_argument("--annotations", required=True, help="a run's calibration.json")
    parser.add_argument("--images", type=int, help="use the first ones only")
    return parser


def main() -> None:
    parser = calibration_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ranges", nargs="+", default=["minmax", "percentile", "mse", "repq"])
    parser.add_argument("--weight-range", help="another one than that of activations")
    parser.add_argument("--bits", nargs="+", choices=BITS, default=list(BITS)[:5])
    parser.add_argument("--migrate-scales", action="store_true", help="for convolutions' inputs")
    parser.add_argument("--rounding", choices=("nearest", "gptq"), help="only this one")
    base = "try the compensations on this base instead: gptq true"
    parser.add_argument("--compensation", nargs=2, metavar=("ROUNDING", "BIAS"), help=base)
    parser.add_argument("--recipes", nargs="+", choices=COMPENSATIONS, help="only these of them")
    options = parser.parse_args()
    rows = list(
        quantizations(options.ranges, options.bits, options.weight_range, options.migrate_scales)
    )
    if options.rounding:
        rows = [row for row in rows if row["rounding"] == options.rounding]
    if options.compensation:
        rounding, bias = options.compensation
        base = {"rounding": rounding, "bias_correction": bias == "true"}
        rows = [
            {**row, "compensation": name}
            for row in rows
            if row.items() >= base.items()
            for name in options.recipes or COMPENSATIONS
        ]
    done = pd.read_csv(options.output) if options.output.exists() else pd.DataFrame()
    known = set(map(tuple, done[COLUMNS].itertuples(index=False))) if len(done) else set()
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(options, Path(folder))
        baseline = trial.baseline()
        print("baseline", *(f"{kind} {ap:.4f}" for kind, ap in baseline.items()), flush=True)
        for row in rows:
            if tuple(row.values()) in known:
                continue
            start = time.perf_counter()
            result = trial.measure(row)
            line = {**row, **result, **{f"baseline_{k}": v for k, v in baseline.items()}}
            new = not options.output.exists()
            pd.DataFrame([line]).to_csv(options.output, mode="a", header=new, index=False)
            aps = (f"{kind} {ap:.4f}" for kind, ap in result.items())
            print(*row.values(), *aps, f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
