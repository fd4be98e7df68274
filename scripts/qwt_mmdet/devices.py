"""The device of a step, and torch settings that its result depends on.

Imports torch only in functions, for steps without a detector.
"""

import functools
import glob
import itertools
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import QwtError

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Time between two attempts to lock a GPU."""

_HELD: list[FileLock] = []
"""Locks of the GPUs that this process uses. The system releases them when the process ends."""


@functools.cache
def count_gpus() -> int:
    """Number of NVIDIA GPUs that a process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # CUDA ignores all after the first invalid entry
        names = map(str.strip, visible.split(","))
        return len(list(itertools.takewhile(lambda name: name and name[0] != "-", names)))
    if shutil.which("nvidia-smi") is not None:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False
        )
        return sum(line.startswith("GPU") for line in listed.stdout.splitlines())
    return len(glob.glob("/dev/nvidia[0-9]*"))


def gpu_fault() -> str | None:
    """Why no detector can run on a GPU here; None where one can."""
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU"
    from mmcv.ops import nms

    try:
        nms(torch.tensor([[0.0, 0, 1, 1]]).cuda(), torch.ones(1).cuda(), iou_threshold=0.5)
    except torch.OutOfMemoryError:
        raise  # the operator is there, and explain() knows the remedy
    except RuntimeError as error:
        return (
            f"mmcv's operators do not run on the GPU ({str(error).splitlines()[0].rstrip('.')}); "
            f"install the CUDA toolkit {torch.version.cuda} and run `make clean env`"
        )
    return None


def take_card(cards: Sequence[str], wanted: int | None = None) -> int:
    """Lock a GPU that no other job of this user holds on this machine; wait for one. Return its index.

    The lock is held until the process ends. It is on the GPU's UUID, not on its index in CUDA_VISIBLE_DEVICES, so
    jobs that see different GPUs do not wait for each other.

    Args:
        cards: UUIDs of the GPUs.
        wanted: index of the only GPU to take; None for any.
    """
    folder = Path(tempfile.gettempdir()) / f"qwt-mmdet-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    indices = range(len(cards)) if wanted is None else [wanted]
    locks = {index: FileLock(folder / f"{cards[index]}.lock", blocking=False) for index in indices}
    for attempt in itertools.count():
        for index, lock in locks.items():
            try:
                lock.acquire()
            except Timeout:
                continue
            _HELD.append(lock)
            return index
        if attempt == 0:
            these = "The GPU is" if len(locks) == 1 else f"All {len(locks)} GPUs are"
            logger.warning("%s held by other jobs of this machine; waiting for one to end.", these)
        time.sleep(POLL_SECONDS)
    raise AssertionError("counting has no end")


def choose_device(gpu: int, wanted: str = "auto") -> str:
    """Return the device to compute on, ``"cuda:1"`` or ``"cpu"``, and log it.

    A GPU is locked by :func:`take_card` and set as torch's current device.

    Args:
        gpu: number of GPUs that Snakemake granted to the job (``resources.gpu``).
        wanted: ``device`` of the configuration: auto, cpu, cuda or a GPU (``cuda:1``).

    Raises:
        QwtError: the wanted GPU does not exist, or detectors do not run on it.
    """
    if gpu <= 0 or wanted == "cpu":
        logger.info("Device: CPU (no GPU was found, or --resources gpu=0, or device: cpu)")
        return "cpu"
    import torch

    number = int(wanted[5:]) if wanted.startswith("cuda:") else None
    index = 0
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if number is not None and number >= count:
            raise QwtError(
                f"device is {wanted}, but torch sees {count} GPUs, from cuda:0 on; name another, or change "
                "CUDA_VISIBLE_DEVICES."
            )
        cards = [str(torch.cuda.get_device_properties(card).uuid) for card in range(count)]
        index = take_card(cards, number)
        torch.cuda.set_device(index)
    fault = gpu_fault()
    if fault is not None:
        while _HELD:
            _HELD.pop().release()
        if wanted != "auto":
            raise QwtError(f"device is {wanted}, but {fault}; or set it to cpu.")
        logger.info("Device: CPU (%s)", fault)
        return "cpu"
    logger.info("Device: cuda:%d, %s", index, torch.cuda.get_device_name())
    return f"cuda:{index}"


def peak_gigabytes() -> float:
    """Peak memory of this process in 10^9 bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # macOS counts bytes


def seed_everything(seed: int) -> None:
    """Seed Python's and NumPy's global generators; :func:`set_up_torch` seeds torch's."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)


def use_full_precision() -> None:
    """Disable TF32, which GPUs use for float32 convolutions by default; its mantissa has 10 bits."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def let_threads_sleep() -> None:
    """Let threads of torch that have nothing to do sleep; call it before torch is imported.

    They spin otherwise, on cores that other threads or jobs need. The calibration of a small detector with two
    threads on two cores took five times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def set_up_torch(threads: int, seed: int) -> None:
    """Seed torch, use the granted threads, and prefer precise and deterministic algorithms."""
    # set before the first cuBLAS handle, which reads it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    import torch.utils.deterministic

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    use_full_precision()
    torch.backends.cudnn.benchmark = False
    # a few CUDA operations have no deterministic implementation; they log a warning
    torch.use_deterministic_algorithms(True, warn_only=True)
    # would write all memory twice, to detect reads of uninitialized memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
