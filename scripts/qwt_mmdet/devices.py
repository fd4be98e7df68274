"""Where a step computes, and what of torch's state decides its result.

Imports torch only where it is needed: steps without a detector do without it.
"""

import logging
import os
import random
import shutil

logger = logging.getLogger(__name__)


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, found out without torch."""
    return shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidia0")


def gpu_fault() -> str | None:
    """Say why no detector can run on a GPU here, or return None where one can."""
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


def choose_device(gpu: int) -> str:
    """Return ``"cuda"`` when a GPU was granted and detectors run on it, else ``"cpu"``; log which.

    Args:
        gpu: GPUs that Snakemake granted to the job (``resources.gpu``).
    """
    if gpu <= 0:
        logger.info("Device: CPU (no GPU was found, or --resources gpu=0)")
        return "cpu"
    fault = gpu_fault()
    if fault is not None:
        logger.info("Device: CPU (%s)", fault)
        return "cpu"
    import torch

    logger.info("Device: %s", torch.cuda.get_device_name())
    return "cuda"


def seed_everything(seed: int) -> None:
    """Seed Python's and NumPy's global generators; :func:`set_up_torch` seeds torch's."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)


def use_full_precision() -> None:
    """Let float32 be float32 on every GPU: no TF32, whose 10 bits convolutions have by default."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def set_up_torch(threads: int, seed: int) -> None:
    """Seed torch, use the granted threads, and prefer precise and deterministic algorithms."""
    # cuBLAS reads this when its first handle is made
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch
    import torch.utils.deterministic

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    use_full_precision()
    torch.backends.cudnn.benchmark = False
    # a few CUDA operations have no deterministic form; they warn into the log
    torch.use_deterministic_algorithms(True, warn_only=True)
    # finds reads of uninitialized memory at the price of writing all memory twice
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
