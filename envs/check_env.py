"""Proves that the environment works: every pin installed, mmcv's compiled operators running.

Prints the versions that matter and the device; exits with 1 and one sentence otherwise.
"""

import re
import sys
from importlib import metadata
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


class EnvironmentFault(Exception):
    """What is wrong with the environment, in one sentence."""


def pinned_versions(text: str) -> dict[str, str]:
    """Name and version of each pin in a requirements file; extras and comments are left out."""
    pins = re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==(\S+)", text, flags=re.MULTILINE)
    return dict(pins)


def check_pins(pins: dict[str, str]) -> None:
    """Compare the installed versions with the pins; a local part (`+cpu`) may differ."""
    wrong = []
    for name, version in pins.items():
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed = "missing"
        if installed != version and installed.partition("+")[0] != version:
            wrong.append(f"{name} is {installed} instead of {version}")
    if wrong:
        raise EnvironmentFault(f"{REQUIREMENTS.name} is not fulfilled: {'; '.join(wrong)}")


def run_operators(device: str) -> None:
    """Run the two compiled operators that every detector needs and check what they return."""
    import torch
    from mmcv.ops import RoIAlign, nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]], device=device)
    scores = torch.tensor([0.9, 0.8, 0.7], device=device)
    kept = nms(boxes, scores, iou_threshold=0.5)[1].tolist()
    if kept != [0, 2]:  # the second box overlaps the first by 0.81
        raise EnvironmentFault(f"mmcv.ops.nms kept boxes {kept} instead of [0, 2] on {device}")

    # Bilinear samples of f(x, y) = x average to the x of each bin's centre.
    image = torch.arange(8.0, device=device).expand(1, 1, 8, 8).contiguous()
    region = torch.tensor([[0.0, 1, 1, 5, 5]], device=device)
    pooled = RoIAlign(output_size=2, sampling_ratio=2, aligned=False)(image, region)
    expected = torch.tensor([2.0, 4.0], device=device).expand(1, 1, 2, 2)
    if not torch.allclose(pooled, expected):
        raise EnvironmentFault(f"mmcv.ops.RoIAlign returned {pooled.tolist()} on {device}")


def check_operators() -> str:
    """Run the operators on the CPU, and on the GPU where torch sees one.

    Returns:
        The device that detectors can run on, for people.
    """
    import torch

    try:
        run_operators("cpu")
    except (ImportError, OSError, RuntimeError) as error:
        raise EnvironmentFault(
            f"mmcv's operators do not run with torch {torch.__version__} ({error}); "
            "mmcv has to be compiled against this torch"
        ) from error
    if not torch.cuda.is_available():
        return "cpu"
    try:
        run_operators("cuda")
    except RuntimeError:
        return (
            "cpu (there is a GPU, but mmcv was compiled without CUDA: install the CUDA toolkit "
            f"{torch.version.cuda} and run `make clean env`, or run with --resources gpu=0)"
        )
    return f"cuda ({torch.cuda.get_device_name()})"


def main() -> int:
    try:
        check_pins(pinned_versions(REQUIREMENTS.read_text(encoding="utf-8")))
        device = check_operators()
    except EnvironmentFault as fault:
        print(f"Environment: {fault}.", file=sys.stderr)
        return 1
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "mmcv", "mmdet"))
    print(f"Environment: {versions}; mmcv.ops.nms and RoIAlign run; device: {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
