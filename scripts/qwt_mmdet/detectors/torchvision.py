"""What it takes to import packages beside each other that were not built for each other."""

import contextlib
import importlib.util
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def importable_torchvision() -> Iterator[None]:
    """Let ``import torchvision`` pass beside a CPU torch; timm and mmengine's Runner import it.

    PyPI's torchvision is built for CUDA: beside a CPU torch its operators are missing, and its
    import describes them all the same. Inside of this context they are declared; nothing calls them.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        for name in ("nms", "qnms") if torch.version.cuda is None else ():
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        yield
    finally:
        del library


# mmdet.models imports mmpretrain where that is installed, and mmpretrain imports torchvision.
if importlib.util.find_spec("mmpretrain") is not None:
    with importable_torchvision():
        import torchvision  # noqa: F401
