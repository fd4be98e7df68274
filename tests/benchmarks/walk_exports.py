"""Export the architectures of the quantizer's tests, and compare ONNX Runtime with torch: docs/export.md.

Weights are random and the image is a small generated one: this tells which detectors have a graph, and whether it
computes the same. Each head gets the same input in both. In full precision that is a matter of float32's last bits.
With `--quantized` (W8A8) rounding makes a step of what is a tie, and networks with random weights enlarge it from layer
to layer; so the simulation is also compared with itself, computed with other convolution kernels of torch (without
oneDNN). Results are appended to a file of JSON lines, and what stands there is not run again; remove a line to repeat
it.

    python tests/benchmarks/walk_exports.py --results exports.jsonl
    python tests/benchmarks/walk_exports.py --results exports.jsonl --quantized
    python tests/benchmarks/walk_exports.py --results exports.jsonl --table
"""

import argparse
import copy
import functools
import json
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.data.loaders import make_loader
from qwt_mmdet.detectors.build import random_detector, read_config
from qwt_mmdet.errors import QwtError
from qwt_mmdet.export.cut import check_exportable, cut_of
from qwt_mmdet.export.loading import load_exported
from qwt_mmdet.export.onnx_file import export_onnx
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from walk_zoo import SIZES, few_candidates, run_alone, small_pipeline, write_image

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from test_architectures import ALWAYS, FAMILIES, ZOO

QUANTIZATION = QuantizationSettings(
    8, 8, scope="detector", grids="integer", weight_range="minmax", activation_range="minmax",
    rounding="nearest", migrate_scales=False, refit="none",
)  # fmt: skip


def difference(actual: Any, expected: Any) -> float:
    """‖actual − expected‖ / ‖expected‖ of the worst tensor that the heads return."""
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    tensors = [(found, wanted) for found, wanted in pairs if isinstance(wanted, Tensor)]
    assert all(found.shape == wanted.shape for found, wanted in tensors)
    return max(float((found - wanted).norm() / wanted.norm()) for found, wanted in tensors)


def heads(model: nn.Module, image: Tensor, regions: Iterable[tuple[str, Any]]) -> list[Any]:
    """What the heads return: the dense one for an image, the others for maps of regions."""
    first, _maps = cut_of(model).first(image)
    return [first, *(model.get_submodule(name)(*inputs.values()) for name, inputs in regions)]


@torch.no_grad()
def walk(config: str, size: tuple[int, int], *, quantized: bool) -> dict[str, Any]:
    """Export a detector, run it and compare.

    Raises:
        QwtError: it is refused.
    """
    torch.manual_seed(0)
    changes = few_candidates(read_config(config).model.get("test_cfg"))
    model = random_detector(config, changes | (ALWAYS | ZOO | FAMILIES)[config])
    check_exportable(model)
    with tempfile.TemporaryDirectory(prefix="qwt-mmdet-") as name:
        folder = Path(name)
        annotations = write_image(folder, size, model.dataset_meta["classes"])
        settings = copy.deepcopy(model.cfg)
        small_pipeline(settings.test_dataloader, size)
        batches = list(make_loader(settings, annotations))
        if quantized:
            calibrate(quantize_model(model, QUANTIZATION), copy.deepcopy(batches))
        image = model.data_preprocessor(batches[0], False)["inputs"]
        export_onnx(model, folder / "model.onnx", size=tuple(image.shape[2:]), dynamic=False)
        exported = load_exported(folder / "model.onnx").model
    regions = list(cut_of(model).regions(image).items())
    expected = heads(model, image, regions)
    with torch.backends.mkldnn.flags(enabled=False):
        again = heads(model, image, regions)
    return {
        "graphs": 1 + len(regions),
        "difference": difference(heads(exported, image, regions), expected),
        "of_itself": difference(again, expected),
    }


def outcome(quantized: bool, config: str) -> dict[str, Any]:
    """What :func:`walk` finds, or why it finds nothing."""
    for size in SIZES:
        try:
            return {"result": "exports", **walk(config, size, quantized=quantized)}
        except QwtError as error:
            failure = {"result": "refused", "sentence": str(error)}
            if not str(error).startswith("torch cannot"):  # where the image may be too small
                return failure
        except Exception:  # the image may be too small
            failure = {"result": "fails", "sentence": traceback.format_exc()}
    return failure


def table(results: Path) -> str:
    """One row per config, as Markdown."""
    entries: dict[str, dict[bool, dict[str, Any]]] = {}
    for line in results.read_text().splitlines():
        entry = json.loads(line)
        entries.setdefault(entry["config"], {})[entry["quantized"]] = entry
    rows = []
    for config in [config for config in ALWAYS | ZOO | FAMILIES if config in entries]:
        full, quantized = (entries[config].get(key, {}) for key in (False, True))
        entry = full or quantized
        row = [config, entry["result"], entry.get("graphs", "")]
        row.append(f"{full['difference']:.0e}" if "difference" in full else "")
        keys = ("difference", "of_itself")
        row.append(" / ".join(f"{quantized[key]:.4f}" for key in keys if key in quantized))
        why = entry.get("sentence", "").partition(":")[0].partition(",")[0]
        rows.append([*row, why])
    headers = ("config", "result", "graphs", "full precision", "W8A8 / of itself", "why not")
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--quantized", action="store_true", help="quantize the detectors (W8A8)")
    parser.add_argument("--table", action="store_true", help="print what the file holds, and end")
    parser.add_argument("--only", default="", help="run configs whose names contain this")
    options = parser.parse_args()
    if options.table:
        print(table(options.results))
        return
    done = set()
    if options.results.exists():
        lines = [json.loads(line) for line in options.results.read_text().splitlines()]
        done = {entry["config"] for entry in lines if entry["quantized"] == options.quantized}
    for config in ALWAYS | ZOO | FAMILIES:
        if options.only in config and config not in done:
            found = run_alone(config, functools.partial(outcome, options.quantized))
            entry = {"config": config, "quantized": options.quantized, **found}
            with open(options.results, "a") as stream:
                stream.write(json.dumps(entry) + "\n")
            print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
