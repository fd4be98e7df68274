"""Where a result comes from."""

import os
import platform
from importlib.metadata import version
from typing import Any

import mmcv
import mmdet
import mmengine
import numpy as np
import torch

from .. import __version__
from ..files import read_json, sha256_file

Pathlike = str | os.PathLike[str]


def provenance(
    *, checkpoint: Pathlike, annotations: Pathlike, device: str, seed: int, **settings: Any
) -> dict[str, Any]:
    """Where a result comes from: settings, seed, versions, hashes, device and number of images."""
    cuda = device.startswith("cuda")
    return {
        "settings": settings,
        "seed": seed,
        "versions": {
            "qwt_mmdet": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # a class of its own, which archives must not hold
            "mmdet": mmdet.__version__,
            "mmcv": mmcv.__version__,
            "mmengine": mmengine.__version__,
            "pycocotools": version("pycocotools"),
            "numpy": np.__version__,
        },
        "checkpoint_sha256": sha256_file(checkpoint),
        "annotations_sha256": sha256_file(annotations),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "images": len(read_json(annotations, what="annotation file")["images"]),
    }
