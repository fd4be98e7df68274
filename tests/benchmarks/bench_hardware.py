"""Images per second and peak memory against batch size: the tables of docs/hardware.md.

python tests/benchmarks/bench_hardware.py
"""

import argparse
import tempfile
from pathlib import Path

from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.estimate import Trial, measure_model
from tabulate import tabulate

MODELS = (
    "yolox/yolox_nano_8xb8-300e_coco.py",
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py",
)
STEPS = ("evaluate_baseline", "quantize_model", "evaluate_quantized")
# The cheapest quantizer to calibrate: only the evaluations are looked at.
SETTINGS = QuantizationSettings(
    8, 8, weight_range="minmax", activation_range="minmax", rounding="nearest",
    migrate_scales=False, bias_correction=False,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="configs of MMDetection")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows = []
    for config in options.models:
        for batch_size in options.batch_sizes:
            with tempfile.TemporaryDirectory() as folder:
                batch_sizes = {"evaluation": batch_size, "calibration": 1}
                trial = Trial(
                    Path(folder), config, {}, SETTINGS, None, options.device, batch_sizes,
                    options.threads,
                )  # fmt: skip
                costs = measure_model(trial, STEPS)
            full, quantized = (costs[step] for step in (STEPS[0], STEPS[2]))
            memory = (
                full.gigabytes if full.device_gigabytes is None else full.device_gigabytes,
                quantized.gigabytes
                if quantized.device_gigabytes is None
                else quantized.device_gigabytes,
            )
            rates = [1 / cost.seconds_per_image for cost in (full, quantized)]
            rows.append([Path(config).stem, batch_size, *rates, *memory])
            print(*rows[-1], flush=True)
    headers = (
        "model", "batch size", "images/s", "quantized, images/s", "memory, GB", "quantized, GB",
    )  # fmt: skip
    print(tabulate(rows, headers, tablefmt="pipe", floatfmt=("", "", ".2f", ".2f", ".1f", ".1f")))


if __name__ == "__main__":
    main()
