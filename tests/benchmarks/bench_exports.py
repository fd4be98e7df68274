"""What exported files are worth: AP, size and latency, beside full precision and what other tools make.

One line for each file and runtime. Latencies are taken in turn in one process, and a ratio is the median over the
rounds. The backbones have random weights, so that theirs are about speed alone. `--nncf` names a Python of another
environment, with nncf and openvino in it; NNCF's files are made there and computed here. A runtime that is not
installed is left out. `detector` alone takes YOLOX-nano and the images of QWT_REAL_COCO, as the tests do.

    python tests/benchmarks/bench_exports.py backbones demo detector --nncf nncf/bin/python
    python tests/benchmarks/bench_exports.py detector --config yolox/yolox_nano_8xb8-300e_coco.py \
        --checkpoint CHECKPOINT --calibration results/datasets/coco_real/calibration.json \
        --evaluation results/datasets/coco_real/evaluation.json --bits w8a8 w7a8 --nncf nncf/bin/python
"""

import argparse
import copy
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir
import torch
from mmdet.structures import DetDataSample
from mmengine.logging import MMLogger
from onnxruntime import quantization
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from onnxruntime.quantization.shape_inference import quant_pre_process
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.data.loaders import make_loader
from qwt_mmdet.demo.shapes import generate_shapes
from qwt_mmdet.detectors.build import load_detector, random_detector
from qwt_mmdet.export.benchmark import Feeds, feeds_of, interleaved, open_detector
from qwt_mmdet.export.description import exported_bytes, graph_files, read_description
from qwt_mmdet.export.loading import load_exported
from qwt_mmdet.export.onnx_file import export_onnx, trace
from qwt_mmdet.export.profile import integer_share
from qwt_mmdet.export.runtimes import RUNTIMES, Graph, Run, open_graph, read_graph, runtime_by_name
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.state import load_warmup
from qwt_mmdet.steps.evaluate import evaluate_detector
from torch import Tensor, nn

RANGE_IMAGES = 8
"""Calibration images that the export gets for what integer kernels quantize beside."""
SIZE = (416, 416)
BACKBONES = {
    "ResNet-50 and FPN": ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "backbone+neck"),
    "Swin-T": ("swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", "backbone"),
}
DEMO = "workflow/demo/mask-rcnn_swin-xxs-p4-w8_fpn_shapes"
STATIC = ("MinMax", "Entropy", "Percentile")
"""Ways of onnxruntime's own static quantization to choose ranges."""


class Maps(nn.Module):
    """The maps of a detector's backbone, and of its neck where `scope` has it."""

    def __init__(self, model: nn.Module, scope: str) -> None:
        super().__init__()
        self.parts = nn.Sequential(*(getattr(model, name) for name in scope.split("+")))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.parts(image))


class Reader(quantization.CalibrationDataReader):
    """Images, for onnxruntime's own static quantization."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images
        self.set_range(0, len(images))

    def __len__(self) -> int:
        return len(self.images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self.waiting = iter(self.images[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.waiting, None)
        return None if image is None else {"image": image[None]}


def other_files(
    full: Path, images: np.ndarray, methods: Iterable[str], nncf: str | None
) -> Iterator[tuple[str, str, Path]]:
    """What other tools make of a file in full precision: their names, runtimes and files."""
    ready = full.with_name("ready.onnx")
    quant_pre_process(full, ready, skip_symbolic_shape=True)
    for method in methods:
        path = full.with_name(f"{method}.onnx")
        quantization.quantize_static(
            ready,
            path,
            Reader(images),
            # images whose activations are in memory at once
            extra_options={"CalibStridedMinMax": math.gcd(len(images), 4)},
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            activation_type=quantization.QuantType.QUInt8,
            calibrate_method=quantization.CalibrationMethod[method],
        )
        yield f"onnxruntime static, {method.lower()}", "onnxruntime", path
    if nncf is not None and find_spec("openvino"):
        stored, path = full.with_name("images.npy"), full.with_name("nncf.xml")
        np.save(stored, images)
        script = str(Path(__file__).with_name("quantize_with_nncf.py"))
        subprocess.run([nncf, script, full, stored, path], check=True, stdout=subprocess.DEVNULL)
        yield "NNCF", "openvino", path


def open_as_it_is(path: Path, runtime: str, overflow: bool) -> Run:
    """Open a file without changes, with the kernels that ours gets if it can have them."""
    if path.suffix == ".onnx":
        found = runtime_by_name(runtime)
        try:
            return found.open(Graph(path.read_bytes(), overflow), 1)
        except Fail as error:  # where layers share weights
            print(f"{path.name} runs with fast kernels alone ({str(error).splitlines()[0][:80]})")
            return found.open(Graph(path.read_bytes(), False), 1)
    import openvino

    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(path, "CPU", options).create_infer_request()
    return lambda inputs: {o.any_name: x for o, x in request.infer(inputs).to_dict().items()}


def file_bytes(path: Path) -> int:
    """Bytes of a file, and of the weights beside it."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if weights.exists() else 0)


def report(
    files: dict[str, tuple[int, Callable[[Feeds], Any], str]], feeds: Feeds, title: str
) -> None:
    """Time files in turn, the first of which is in full precision, and print a line for each.

    Args:
        files: bytes, run and what else is to be said, by name.
    """
    sizes, runs, notes = zip(*files.values(), strict=True)
    rounds = interleaved(list(runs), feeds)
    for index, (name, size, note) in enumerate(zip(files, sizes, notes, strict=True)):
        ratio = median(seconds[index] / seconds[0] for seconds in rounds)
        milliseconds = 1000 * median(seconds[index] for seconds in rounds)
        print(
            f"{title}, {name}: {milliseconds:.1f} ms ({ratio:.2f}), {size / 1e6:.2f} MB "
            f"({size / sizes[0]:.2f}){note}",
            flush=True,
        )


def in_integers(path: Path, runtime: str, feed: dict[str, np.ndarray]) -> str:
    of = runtime_by_name(runtime)
    share = integer_share(of.kernels(read_graph(path), feed))
    return f", {share:.1%} of the multiply-adds in integers" if share is not None else ""


def backbone(name: str, runtimes: list[str], nncf: str | None) -> None:
    """Speed of a backbone with random weights at W8A8."""
    config, scope = BACKBONES[name]
    torch.manual_seed(0)
    model = random_detector(config)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data.uniform_(0.5, 1.5)  # those of last norms in residual blocks start at 0
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.8, 1.2)
    images = torch.randn(3, 3, *SIZE)
    meta = {"img_shape": SIZE, "batch_input_shape": SIZE, "pad_shape": SIZE, "ori_shape": SIZE}
    sample = DetDataSample(metainfo={**meta, "scale_factor": (1.0, 1.0)})
    pixels = (images * 58 + 115).clamp(0, 255).byte()
    batches = [{"inputs": [image], "data_samples": [sample]} for image in pixels]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        full, ours = Path(folder, "full.onnx"), Path(folder, "ours.onnx")
        network = Maps(model, scope).eval()
        names = [f"map_{level}" for level in range(len(network(images[:1])))]
        onnx_ir.save(trace(network, {"image": images[:1]}, names), full)
        settings = QuantizationSettings(
            8, 8, scope=scope, grids="integer", rounding="nearest", refit="none"
        )
        calibrate(quantize_model(model, settings), batches, noise_images=0)
        network = Maps(model, scope).eval()
        graph = trace(network, {"image": images[:1]}, names, images=images.split(1), maps=names)
        onnx_ir.save(graph, ours)
        others = list(other_files(full, images.numpy(), STATIC[:1], nncf))
        feeds = [{"image": images[:1].numpy()}]
        for runtime in runtimes:
            overflow = read_graph(ours).overflow
            opened = {"full precision": (full, open_graph(full, runtime))}
            opened["ours"] = (ours, open_graph(ours, runtime))
            for tool, where, path in others:
                if where == runtime:
                    opened[tool] = (path, open_as_it_is(path, runtime, overflow))
            files = {
                key: (
                    file_bytes(path),
                    lambda feeds, run=run: run(feeds[0]),
                    in_integers(path, runtime, feeds[0]) if key == "ours" else "",
                )
                for key, (path, run) in opened.items()
            }
            report(files, feeds, f"{name} {runtime}")


def detector(
    files: tuple[str, str, str, str], options: argparse.Namespace, runtimes: list[str]
) -> None:
    """AP, size and speed of a whole detector.

    Args:
        files: config, checkpoint, and the images of calibration and evaluation.
    """
    config, checkpoint, calibration, evaluation = files
    model = load_detector(config, checkpoint)
    loader = make_loader(model.cfg, calibration)
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder, "full.onnx")
        export_onnx(model, full)
        feeds = feeds_of(read_description(full))
        baseline = evaluate_detector(model, evaluation)[0]["bbox"]["AP"]
        ours = {}
        for bits in options.bits:
            weight_bits, activation_bits = map(int, re.findall(r"\d+", bits))
            settings = QuantizationSettings(
                weight_bits,
                activation_bits,
                scope="detector",
                grids=options.grids,
                refit=options.refit,
            )
            quantized = copy.deepcopy(model)
            if options.warmup:
                load_warmup(quantized, options.warmup)
            else:
                calibrate(quantize_model(quantized, settings), loader)
            path = Path(folder, f"{bits}.onnx")
            export_onnx(quantized, path, calibration=islice(loader, RANGE_IMAGES))
            simulated = evaluate_detector(quantized, evaluation)[0]["bbox"]["AP"]
            ours[bits] = path, simulated
        others = []
        if len(feeds) == 1 and options.others:  # one graph
            batches = (model.data_preprocessor(batch, False)["inputs"] for batch in loader)
            images = torch.cat(list(batches)).numpy()
            others = list(other_files(full, images, STATIC, options.nncf))
        for runtime in runtimes:
            timed = {
                "full precision": (
                    exported_bytes(full, read_description(full)),
                    open_detector(graph_files(full, read_description(full)), runtime, 1),
                    f", box AP {baseline:.4f} in torch",
                )
            }
            for bits, (path, simulated) in ours.items():
                exported = load_exported(path, runtime).model
                found = evaluate_detector(exported, evaluation)[0]["bbox"]["AP"]
                timed[f"ours {bits}"] = (
                    exported_bytes(path, read_description(path)),
                    open_detector(graph_files(path, read_description(path)), runtime, 1),
                    f", box AP {found:.4f} (simulated {simulated:.4f})"
                    + in_integers(path, runtime, feeds[0]),
                )
            for tool, where, path in others:
                if where != runtime:
                    continue
                run = open_as_it_is(path, runtime, overflow=True)
                exported = load_exported(full, runtime).model
                exported.extract_feat.run = run
                found = evaluate_detector(exported, evaluation)[0]["bbox"]["AP"]
                timed[tool] = (
                    file_bytes(path),
                    lambda feeds, run=run: run(feeds[0]),
                    f", box AP {found:.4f}",
                )
            report(timed, feeds, f"{Path(config).stem} {runtime}")


def rooted(annotations: Path, images: Path, folder: str) -> str:
    """A copy of an annotation file that tells where the images are."""
    content = json.loads(annotations.read_text())
    content["info"] = {**content.get("info", {}), "image_root": str(images)}
    copy_of_it = Path(folder, annotations.name)
    copy_of_it.write_text(json.dumps(content))
    return str(copy_of_it)


REAL_COCO = Path(
    os.environ.get("QWT_REAL_COCO", Path(__file__).parents[3] / "shared" / "coco_real")
).resolve()


def real_sample(folder: str) -> tuple[str, str, str, str]:
    """Config, checkpoint, and images of calibration and evaluation of the real sample."""
    images = (
        rooted(REAL_COCO / "annotations" / f"instances_{split}.json", REAL_COCO / split, folder)
        for split in ("train2017", "val2017")
    )
    checkpoint = str(REAL_COCO / "yolox_nano_coco_mmdet.pth")
    return "yolox/yolox_nano_8xb8-300e_coco.py", checkpoint, *images


def demo_images(folder: str) -> tuple[str, str]:
    """Images of the demo's kind that the workflow does not use, for calibration and for evaluation."""
    generate_shapes(folder, seed=77, images={"calibration": 64, "val": 100})
    first, second = (
        rooted(Path(folder, "annotations", f"instances_{split}.json"), Path(folder, split), folder)
        for split in ("calibration", "val")
    )
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=("backbones", "demo", "detector"))
    for name in ("--config", "--checkpoint", "--calibration", "--evaluation"):
        parser.add_argument(name, help="of the detector")
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--warmup", help="of the detector with these bits, instead of calibrating")
    parser.add_argument("--bits", nargs="+", default=["w8a8"], metavar="wWaA")
    parser.add_argument("--grids", default="integer", choices=("any", "integer"))
    parser.add_argument("--refit", default="sequential", choices=("none", "sequential"))
    parser.add_argument(
        "--others", action="store_true", help="time and evaluate other tools' files, too"
    )
    parser.add_argument("--nncf", metavar="PYTHON", help="of an environment that has nncf")
    options = parser.parse_args()
    MMLogger.get_current_instance().setLevel("ERROR")  # it would list every parameter
    runtimes = [name for name in RUNTIMES if find_spec(name)]
    if "backbones" in options.what:
        for name in options.backbones:
            backbone(name, runtimes, options.nncf)
    if "demo" in options.what:
        with tempfile.TemporaryDirectory() as folder:
            files = f"{DEMO}.py", f"{DEMO}.pth", *demo_images(folder)
            detector(files, options, runtimes)
    if "detector" in options.what:
        files = options.config, options.checkpoint, options.calibration, options.evaluation
        with tempfile.TemporaryDirectory() as folder:
            if not any(files) and not REAL_COCO.is_dir():
                print(f"detector: left out, as there is no real COCO sample in {REAL_COCO}")
                return
            files = files if any(files) else real_sample(folder)
            if None in files:
                parser.error(
                    "a detector needs --config, --checkpoint, --calibration and --evaluation"
                )
            detector(files, options, runtimes)


if __name__ == "__main__":
    main()
