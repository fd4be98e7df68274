"""Take every config that MMDetection ships through quantization and compensation: docs/zoo.md.

Weights are random and the image is a small generated one, so this tells what runs, and nothing of AP.
Configs whose models differ in nothing but training, thresholds, anchors or classes are one model and
run once. Results are appended to a file of JSON lines, and what stands there is not run again; remove
a line to repeat it.

    python tests/benchmarks/walk_zoo.py --results zoo.jsonl
    python tests/benchmarks/walk_zoo.py --results zoo.jsonl --table
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import resource
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch._dynamo  # which torch imports when it counts operations: once, not in every process
from mmengine.config import Config
from mmengine.logging import MMLogger
from qwt_mmdet.compensation.fit import fit_compensation
from qwt_mmdet.compensation.state import load_compensation, save_compensation
from qwt_mmdet.config import CompensationSettings, QuantizationSettings
from qwt_mmdet.data.loaders import make_loader
from qwt_mmdet.detectors.build import ZOO, random_detector, read_config
from qwt_mmdet.errors import QwtError
from qwt_mmdet.evaluation.predict import predict
from qwt_mmdet.files import write_json
from qwt_mmdet.fingerprint import settings_fingerprint
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.state import load_warmup, save_warmup
from qwt_mmdet.record import quantization_of, record_of
from qwt_mmdet.runtime import explain
from tabulate import tabulate

SIZES = ((128, 192), (320, 480))
"""Height and width of the image; the larger one for detectors that choose more positions than the smaller
has (DINO: 900)."""

CANDIDATES = 20
"""Proposals and detections of an image."""

MEMORY_GB = 8
"""Models that need more are skipped."""

SECONDS = 600
"""Longest time for a model."""

QUANTIZATION = QuantizationSettings(
    6, 8, scope="detector", weight_range="minmax", rounding="nearest", migrate_scales=False
)
# A scale and a shift per channel: solving linear maps takes longer than all else together.
COMPENSATION = CompensationSettings(kind="affine", ridge=0.01, gate="fit", holdout_fraction=0)

SAME_MODEL = {
    "anchor_generator", "batch_augments", "bbox_coder", "bgr_to_rgb",
    "drop_path_rate", "frozen_stages", "init_cfg", "mean", "norm_eval", "num_classes", "pretrained",
    "reg_decoded_bbox", "requires_grad", "std", "target_stds", "test_cfg", "train_cfg",
}  # fmt: skip
"""Keys of a model's config, beside those of losses, whose values change none of the steps here."""


def structure(node: Any) -> Any:
    """A model's config without the keys of ``SAME_MODEL`` and losses."""
    if isinstance(node, dict):
        kept = [k for k in node if k not in SAME_MODEL and not str(k).startswith("loss")]
        return {key: structure(node[key]) for key in kept}
    return [structure(value) for value in node] if isinstance(node, list | tuple) else node


def small_pipeline(node: Any, size: tuple[int, int]) -> None:
    """Let the resizing and padding steps of a config go to ``size``, but where the model needs theirs."""
    if isinstance(node, dict):
        kind = str(node.get("type"))
        if kind.endswith("Resize") and "scale" in node and node.get("keep_ratio"):
            node["scale"] = size[::-1]
        if kind.endswith("Pad") and node.get("size"):
            node["size"] = (max(size), max(size))
        node = list(node.values())
    if isinstance(node, list | tuple):
        for value in node:
            small_pipeline(value, size)


def few_candidates(node: Any, path: str = "model.test_cfg") -> dict[str, float]:
    """Changes to a config so that it keeps few proposals and detections, but some.

    Random weights give low scores; the number of candidates costs time alone.
    """
    if not isinstance(node, dict):
        return {}
    found = {}
    for key, value in node.items():
        where = f"{path}.{key}"
        if key in ("max_per_img", "nms_pre") and isinstance(value, int):
            found[where] = min(value, CANDIDATES)
        elif key in ("score_thr", "conf_thr"):
            found[where] = 0.0
        found |= few_candidates(value, where)
    return found


def write_image(folder: Path, size: tuple[int, int], classes: tuple[str, ...]) -> Path:
    """Write one picture of noise; return the path of its annotation file."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(folder / "0.png"), picture)
    content = {
        "info": {"image_root": str(folder)},
        "images": [{"id": 0, "file_name": "0.png", "height": size[0], "width": size[1]}],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }
    write_json(folder / "image.json", content)
    return folder / "image.json"


def walk(
    config: str, size: tuple[int, int] = SIZES[0], changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Take a config, with ``changes`` to it, through all steps.

    Returns:
        What happened: layers, blocks, and types of what stayed in full precision.

    Raises:
        QwtError: the config is refused.
    """
    torch.manual_seed(0)
    parsed = read_config(config).model
    options = few_candidates(parsed.get("test_cfg"))
    if "num_proposals" in parsed.get("rpn_head", {}):  # QueryInst needs a result for each proposal
        options = {key: v for key, v in options.items() if not key.endswith("max_per_img")}
    reference = random_detector(config, options | dict(changes or {}))
    record_of(reference).fingerprint = {"model": config, "weights": "random"}
    with tempfile.TemporaryDirectory(prefix="qwt-mmdet-") as name:
        folder = Path(name)
        annotations = write_image(folder, size, reference.dataset_meta["classes"] or ("object",))
        settings: Config = copy.deepcopy(reference.cfg)
        small_pipeline(settings.test_dataloader, size)
        batches = list(make_loader(settings, annotations))
        predict(reference, copy.deepcopy(batches), annotations)
        model = calibrate(quantize_model(copy.deepcopy(reference), QUANTIZATION), batches)
        predict(model, copy.deepcopy(batches), annotations)
        save_warmup(model, folder / "warmup.pth")
        compensation = fit_compensation(model, reference, batches, COMPENSATION)
        save_compensation(model, compensation, folder / "compensation.pth")
        del model
        loaded = load_warmup(copy.deepcopy(reference), folder / "warmup.pth", QUANTIZATION)
        load_compensation(loaded, folder / "compensation.pth")
        results = predict(loaded, batches, annotations).records
    kept = Counter(
        f"{entry.type}: {entry.reason}" for entry in quantization_of(loaded).not_quantized
    )
    assert all(math.isfinite(block.fit.error_after) for block in compensation.blocks)
    return {
        "size": size,
        "layers": sum(hasattr(m, "weight_codes") for m in loaded.modules()),
        "blocks": len(compensation.blocks),
        "first_block": compensation.blocks[0].name,
        "detections": len(results),
        "not_quantized": dict(kept),
    }


def _outcome(config: str) -> dict[str, Any]:
    for size in SIZES:
        try:
            return {"result": "works", **walk(config, size)}
        except Exception as error:  # a walk goes on
            sentence = explain(error)
            outcome = {"result": "refused", "sentence": sentence}
            if "ran out of memory" in sentence:
                outcome = {"result": "skipped", "sentence": f"over {MEMORY_GB} GB"}
            elif sentence.startswith("Unexpected"):
                outcome |= {"result": "fails", "traceback": traceback.format_exc()}
        if outcome["result"] != "fails":
            return outcome
    return outcome


def _run(config: str, outcome: Callable[[str], dict[str, Any]], sender: Any) -> None:
    limit = MEMORY_GB * 2**30
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    MMLogger.get_current_instance().setLevel("ERROR")
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
        sender.send(outcome(config))


def run_alone(config: str, outcome: Callable[[str], dict[str, Any]] = _outcome) -> dict[str, Any]:
    """Walk one config in a process of its own, within the limits of memory and time."""
    context = multiprocessing.get_context("fork")  # imports take longer than a small model
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(config, outcome, sender))
    start = time.monotonic()
    process.start()
    sender.close()
    try:
        found = (
            receiver.recv()
            if receiver.poll(SECONDS)
            else {"result": "skipped", "sentence": f"over {SECONDS} seconds"}
        )
    except EOFError:
        found = {"result": "skipped", "sentence": f"over {MEMORY_GB} GB (killed)"}
    process.kill()
    process.join()
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def models() -> list[tuple[list[str], str | None]]:
    """Configs that are one model, and why they are refused where reading tells already.

    One model of each folder comes first, then a second one.
    """
    refused, same = [], defaultdict(list)
    for path in sorted(ZOO.glob("*/*.py")):
        if path.parent.name == "_base_":
            continue
        config = str(path.relative_to(ZOO))
        try:
            parsed = read_config(config)
        except QwtError as error:
            refused.append(([config], str(error)))
            continue
        pipeline = [step["type"] for step in parsed.get("test_pipeline", [])]
        same[settings_fingerprint([structure(parsed.model.to_dict()), pipeline])].append(config)
    rounds: Counter[str] = Counter()
    ordered = []
    for configs in same.values():
        folder = configs[0].partition("/")[0]
        ordered.append((rounds[folder], configs))
        rounds[folder] += 1
    return refused + [(configs, None) for _, configs in sorted(ordered)]


def table(results: Path) -> str:
    """Counts, and one row per config, as Markdown."""
    rows, configs, ran = [], Counter(), Counter()
    for line in results.read_text().splitlines():
        entry = json.loads(line)
        ran[entry["result"]] += 1
        configs[entry["result"]] += len(entry["configs"])
        note = entry.get("sentence") or f"{entry['layers']} layers, {entry['blocks']} blocks"
        rows += [[config, entry["result"], note] for config in entry["configs"]]
    summary = [[key, configs[key], ran[key]] for key in sorted(configs)]
    headers = ("result", "configs", "of so many models"), ("config", "result", "what was found")
    tables = zip((summary, sorted(rows)), headers, strict=True)
    return "\n\n".join(tabulate(*content, tablefmt="pipe") for content in tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--table", action="store_true", help="print what the file holds, and end")
    parser.add_argument("--shard", default="1/1", help="2/3 runs the second third of the models")
    parser.add_argument("--only", default="", help="run configs whose names contain this")
    options = parser.parse_args()
    if options.table:
        print(table(options.results))
        return
    done = set()
    if options.results.exists():
        lines = options.results.read_text().splitlines()
        done = {config for line in lines for config in json.loads(line)["configs"]}
    part, parts = map(int, options.shard.split("/"))
    for configs, refusal in models()[part - 1 :: parts]:
        if not any(options.only in config for config in configs) or done.intersection(configs):
            continue
        outcome = {"result": "refused", "sentence": refusal} if refusal else run_alone(configs[0])
        with open(options.results, "a") as stream:
            stream.write(json.dumps({"configs": configs, **outcome}) + "\n")
        print(configs[0], outcome["result"], outcome.get("sentence", "")[:200], flush=True)


if __name__ == "__main__":
    main()
