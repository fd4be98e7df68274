"""What exported files are worth: AP, size and latency against the simulation and against full precision.

One line for each number of bits and runtime. The simulation and the file are evaluated on the same images;
latencies of both files are taken in turn, in one process, and their ratio is the median over the rounds.

    python tests/benchmarks/bench_exports.py --config yolox/yolox_nano_8xb8-300e_coco.py \
        --checkpoint CHECKPOINT --calibration results/datasets/coco_real/calibration.json \
        --evaluation results/datasets/coco_real/evaluation.json --bits w8a8 w7a8 --runtimes onnxruntime openvino
"""

import argparse
import copy
import re
import tempfile
from itertools import islice
from pathlib import Path

from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.data.loaders import make_loader
from qwt_mmdet.detectors.build import load_detector
from qwt_mmdet.export.benchmark import benchmark
from qwt_mmdet.export.loading import load_exported
from qwt_mmdet.export.onnx_file import export_onnx
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.steps.evaluate import evaluate_detector

RANGE_IMAGES = 8
"""Calibration images that the export gets for what integer kernels quantize beside."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--config", "--checkpoint", "--calibration", "--evaluation"):
        parser.add_argument(name, required=True)
    parser.add_argument("--bits", nargs="+", default=["w8a8"], metavar="wWaA")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime"])
    parser.add_argument("--grids", default="integer", choices=("any", "integer"))
    parser.add_argument("--scope", default="detector")
    options = parser.parse_args()

    model = load_detector(options.config, options.checkpoint)
    loader = make_loader(model.cfg, options.calibration)
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder, "full.onnx")
        export_onnx(model, full)
        for bits in options.bits:
            weight_bits, activation_bits = map(int, re.findall(r"\d+", bits))
            settings = QuantizationSettings(
                weight_bits, activation_bits, scope=options.scope, grids=options.grids
            )
            quantized = calibrate(quantize_model(copy.deepcopy(model), settings), loader)
            path = Path(folder, f"{bits}.onnx")
            export_onnx(quantized, path, calibration=islice(loader, RANGE_IMAGES))
            simulated, _ = evaluate_detector(quantized, options.evaluation)
            for runtime in options.runtimes:
                found, _ = evaluate_detector(load_exported(path, runtime).model, options.evaluation)
                timed = benchmark(path, full, runtime)
                share = timed["integer_share"]
                print(
                    f"{bits} {runtime}: box AP {found['bbox']['AP']:.4f} "
                    f"(simulated {simulated['bbox']['AP']:.4f}), file {timed['file_bytes'] / 1e6:.2f} MB "
                    f"({timed['file_bytes'] / timed['full_precision_file_bytes']:.2f}), latency "
                    f"{timed['latency_ratio']:.2f} of full precision, "
                    f"{'unknown' if share is None else f'{share:.0%}'} of the multiply-adds in integers",
                    flush=True,
                )


if __name__ == "__main__":
    main()
