"""What quantization costs on a Swin-T backbone: time of a forward pass and of calibration, memory.

Run by hand, `make bench`; prints one line per figure. Ratios of medians of pairs in one process, since
absolute times say little on a machine with other jobs.
"""

import argparse
import copy
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmdet.models.backbones import SwinTransformer
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.quantization.calibrate import PASSES, calibrate, fit_weights
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.grid_rounding import COMPILE_VARIABLE
from qwt_mmdet.quantization.weight_fit import Calibration
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from tiny import TinyDetector, batches

SETTINGS = QuantizationSettings(
    4, 4, weight_range="minmax", activation_range="repq", rounding="nearest", refit="none"
)


def random_backbone() -> nn.Module:
    """A detector that is a Swin-T backbone with random weights."""
    torch.manual_seed(0)
    backbone = SwinTransformer(drop_path_rate=0.0)
    backbone.init_weights()
    return TinyDetector(backbone).eval()


@torch.no_grad()
def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def forward_ratio(size: tuple[int, int], pairs: int) -> None:
    full, (batch,) = random_backbone(), batches(1, size)
    model = calibrate(quantize_model(copy.deepcopy(full), SETTINGS), [batch])
    for mode, asked in (("never", 1.35), ("always", 1.20)):
        os.environ[COMPILE_VARIABLE] = mode
        seconds(lambda: forward_scope(model, batch, "backbone"))  # compiles
        ratios = []
        for _ in range(pairs):
            plain = seconds(lambda: forward_scope(full, batch, "backbone"))
            ratios.append(seconds(lambda: forward_scope(model, batch, "backbone")) / plain)
        how = "compiled" if mode == "always" else "in place"
        print(
            f"W4A4 (repq) forward / full precision, {how}: {statistics.median(ratios):.2f} "
            f"(asked: at most {asked:.2f}; {pairs} pairs, {min(ratios):.2f} to {max(ratios):.2f})"
        )
    del os.environ[COMPILE_VARIABLE]


@torch.no_grad()
def find_ranges(run: Calibration) -> None:
    """The first passes of a calibration."""
    for run_pass in PASSES[: PASSES.index(fit_weights)]:
        run_pass(run)


def calibration_ratio(size: tuple[int, int], count: int) -> None:
    full, images = random_backbone(), batches(count, size)
    seconds(lambda: forward_scope(full, images[0], "backbone"))
    plain = seconds(lambda: [forward_scope(full, image, "backbone") for image in images])
    model = quantize_model(copy.deepcopy(full), SETTINGS)
    ranges = seconds(lambda: find_ranges(Calibration(model, images)))
    print(
        f"ranges (repq) / ({count} full-precision forwards): {ranges / plain:.2f} (asked: at most 1.5)"
    )
    model = quantize_model(copy.deepcopy(full), SETTINGS)
    everything = seconds(lambda: calibrate(model, images))
    print(f"the whole calibration, with bias correction and report: {everything / plain:.2f}")


@torch.no_grad()
def peak_after_calibration(size: tuple[int, int], count: int) -> None:
    """Prints the peak resident memory of this process in KiB; made for a process of its own."""
    model, (image,) = quantize_model(random_backbone(), SETTINGS), batches(1, size)
    if count:
        calibrate(model, [image] * count)  # one image: the memory measured is that of calibration
    else:
        forward_scope(random_backbone(), image, "backbone")  # in full precision
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def memory_ratio(size: tuple[int, int]) -> None:
    start = peak("0", size)
    few, many = peak("4", size), peak("32", size)
    print(
        f"extra memory of calibration, 32 images / 4 images: {(many - start) / (few - start):.3f} "
        "(asked: at most 1.05)"
    )


def peak(count: str, size: tuple[int, int]) -> int:
    command = [sys.executable, __file__, "--peak", count, "--size", *map(str, size)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(output.splitlines()[-1])  # mmengine warns on standard output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--images", type=int, default=16, help="of the calibration's time")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = tuple(options.size)
    if options.peak is not None:
        peak_after_calibration(size, options.peak)
        return
    memory_ratio(size)  # first: a process inherits its parent's peak
    forward_ratio(size, options.pairs)
    calibration_ratio(size, options.images)


if __name__ == "__main__":
    main()
