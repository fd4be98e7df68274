"""What a fit of compensation costs, beside the forward passes that it cannot do without.

Swin-T with random weights, W4A4, on random images. Prints a JSON object; `--check` makes the limits
below an exit status. Each measurement of memory runs in a process of its own.

    python tests/benchmarks/bench_compensation.py --images 4 --check
"""

import argparse
import copy
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmdet.models.backbones import SwinTransformer
from qwt_mmdet.compensation import block_fit
from qwt_mmdet.compensation import fit as fit_module
from qwt_mmdet.compensation.fit import fit_compensation
from qwt_mmdet.compensation.state import save_compensation
from qwt_mmdet.compensation.statistics import BlockStatistics
from qwt_mmdet.config import CompensationSettings, QuantizationSettings
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.record import record_of
from torch import nn

LIMITS = {
    "fit_over_forwards": 1.25,
    "fit_in_full_forwards": 2.8,
    "statistics_and_solve_share": 0.15,
    "memory_growth": 0.05,
}


class Detector(nn.Module):
    """A backbone and what a fit needs of a detector around it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = SwinTransformer(
            embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.0
        )
        record_of(self).fingerprint = {"model": "swin-t", "weights": "random"}

    def data_preprocessor(self, batch: dict[str, Any], training: bool) -> dict[str, Any]:
        return {"inputs": torch.stack(batch["inputs"]), "data_samples": None}


class Images:
    """Random images that are made when they are asked for."""

    def __init__(self, count: int, size: tuple[int, int]) -> None:
        self.count, self.size = count, size

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.count):
            yield {"inputs": [torch.randn(3, *self.size, generator=generator)]}


def models(size: tuple[int, int]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    full = Detector().eval()
    settings = QuantizationSettings(4, 4, activation_range="minmax", refit="none")
    return calibrate(quantize_model(copy.deepcopy(full), settings), Images(1, size)), full


@torch.no_grad()
def forward_seconds(model: nn.Module, images: Images) -> float:
    """Mean time of a forward pass of the backbone, after a first one that does not count."""
    times = []
    for image in (next(iter(images)), *images):
        start = time.perf_counter()
        forward_scope(model, image, "backbone")
        times.append(time.perf_counter() - start)
    return sum(times[1:]) / len(times[1:])


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    return wrapper


def measure_time(size: tuple[int, int], images: int, settings: CompensationSettings) -> dict:
    model, full = models(size)
    data = Images(images, size)
    full_seconds, quantized_seconds = (forward_seconds(m, data) for m in (full, model))
    spent: list[float] = []
    blocks: list[float] = []
    block_fit.fit_forms = timed(block_fit.fit_forms, spent)
    BlockStatistics.update = timed(BlockStatistics.update, spent)
    fit_module.fit_block = timed(fit_module.fit_block, blocks)
    start = time.perf_counter()
    fit_compensation(model, full, data, settings, memory_gb=8)
    total = time.perf_counter() - start
    return {
        "full_forward_s": full_seconds,
        "quantized_forward_s": quantized_seconds,
        "fit_s_per_image": total / images,
        "tracing_and_counting_s": total - sum(blocks),
        "fit_over_forwards": total / images / (full_seconds + quantized_seconds),
        "fit_in_full_forwards": total / images / full_seconds,
        "statistics_and_solve_share": sum(spent) / total,
    }


def measure_memory(
    size: tuple[int, int],
    images: int,
    settings: CompensationSettings,
    memory_gb: float,
    output: Path,
    send: Callable[[float], None],
) -> None:
    model, full = models(size)
    compensation = fit_compensation(
        model, full, Images(images, size), settings, memory_gb=memory_gb
    )
    send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)  # kilobytes on Linux
    save_compensation(model, compensation, output)


def peak_gigabytes(*arguments: Any) -> float:
    """Peak resident memory of a fit in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure_memory, args=(*arguments, sender.send))
    process.start()
    peak = receiver.recv()
    process.join()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344))
    parser.add_argument("--images", type=int, default=4, help="images of the measurement of time")
    parser.add_argument("--memory-images", type=int, nargs=2, default=(8, 32))
    parser.add_argument("--memory-gb", type=float, default=1.0, help="limit of the cache")
    parser.add_argument("--without-memory", action="store_true")
    parser.add_argument("--kind", default="linear")
    parser.add_argument("--target", default="reference")
    parser.add_argument("--check", action="store_true", help="fail beyond the limits")
    options = parser.parse_args()
    size = tuple(options.size)
    # Default recipe but for the share of held-out images, which two images must allow.
    settings = CompensationSettings(
        kind=options.kind,
        target=options.target,
        holdout_fraction=0.25 if options.images > 3 else 0.5,
    )
    result = measure_time(size, options.images, settings)
    if not options.without_memory:
        few, many = options.memory_images
        with tempfile.TemporaryDirectory() as folder:
            limited, unlimited = Path(folder, "limited"), Path(folder, "unlimited")
            peaks = [
                peak_gigabytes(size, count, settings, options.memory_gb, limited)
                for count in (few, many)
            ]
            peak_gigabytes(size, many, settings, 1e3, unlimited)
            result |= {
                "peak_memory_gb": peaks,
                "memory_growth": peaks[1] / peaks[0] - 1,
                "equal_to_unlimited": limited.read_bytes() == unlimited.read_bytes(),
            }
    print(json.dumps(result, indent=1))
    beyond = [key for key, limit in LIMITS.items() if result.get(key, 0) > limit]
    if options.check and (beyond or not result.get("equal_to_unlimited", True)):
        sys.exit(f"Beyond the limits: {', '.join(beyond) or 'results differ'}")


if __name__ == "__main__":
    main()
