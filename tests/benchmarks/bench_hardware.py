"""Images per second and peak memory against batch size: the tables of docs/hardware.md.

python tests/benchmarks/bench_hardware.py
"""

import argparse
from pathlib import Path

from qwt_mmdet.config import QuantizationSettings, as_plain, resolve
from qwt_mmdet.estimate import measure
from qwt_mmdet.plan import Plan
from qwt_mmdet.resources import Cost
from tabulate import tabulate

MODELS = (
    "yolox/yolox_nano_8xb8-300e_coco.py",
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py",
)
# The cheapest quantizer to calibrate: only the evaluations are looked at.
SETTINGS = QuantizationSettings(
    8, 8, weight_range="minmax", activation_range="minmax", rounding="nearest",
    migrate_scales=False, bias_correction=False, refit="none",
)  # fmt: skip


def evaluations(config: str, batch_size: int, *, threads: int, gpu: bool) -> list[Cost]:
    """Costs of the evaluation of a detector in full precision and quantized."""
    content = {
        "datasets": {"images": {"type": "coco", "root": "."}},
        "models": {"detector": {"config": config, "checkpoint": "random", "dataset": "images"}},
        "quantization": {"w8a8": as_plain(SETTINGS)},
        "compensation": {},
        "evaluation": {"batch_size": batch_size},
    }
    costs = measure(Plan(resolve(content)), threads=threads, gpu=gpu)
    return [costs["detector", f"evaluate_{kind}"] for kind in ("baseline", "quantized")]


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
            found = evaluations(
                config, batch_size, threads=options.threads, gpu=options.device == "cuda"
            )
            rates = [1 / cost.seconds_per_image for cost in found]
            memory = [cost.device_gigabytes or cost.gigabytes for cost in found]
            rows.append([Path(config).stem, batch_size, *rates, *memory])
            print(*rows[-1], flush=True)
    headers = (
        "model", "batch size", "images/s", "quantized, images/s", "memory, GB", "quantized, GB",
    )  # fmt: skip
    print(tabulate(rows, headers, tablefmt="pipe", floatfmt=("", "", ".2f", ".2f", ".1f", ".1f")))


if __name__ == "__main__":
    main()
