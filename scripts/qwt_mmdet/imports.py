"""Special imports: packages that are not built for each other, and modules that mmdet imports but does not need."""

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

import torch

TRAINERS: Mapping[str, tuple[str, str]] = {
    "mmengine._strategy.fsdp": ("STRATEGIES", "FSDPStrategy"),
    "mmengine.model.wrappers.fully_sharded_distributed": (
        "MODEL_WRAPPERS",
        "MMFullyShardedDataParallel",
    ),
    "mmengine.optim.optimizer.zero_optimizer": ("OPTIMIZERS", "ZeroRedundancyOptimizer"),
}
"""Modules of mmengine for training on many GPUs, with the registry and the name of their class. They import
torch.distributed.fsdp and .optim, and so sympy."""

DEFERRED: Mapping[str, Sequence[str]] = {
    **{module: [name] for module, (_, name) in TRAINERS.items()},
    "mmdet.utils.mot_error_visualize": ["imshow_mot_errors"],  # it imports matplotlib.pyplot
    "scipy.linalg": [],  # of tracking
    "scipy.optimize": ["linear_sum_assignment"],  # of training
    "scipy.sparse": ["csr_matrix"],  # of the metric of CrowdHuman, as the next one
    "scipy.sparse.csgraph": ["maximum_bipartite_matching"],
}
"""Modules that mmdet imports and no detector needs for images, with the functions that are imported from them by
name. They took a quarter of the start time of a step."""


def _deferred(module: str, function: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*arguments, **options)

    call.__name__ = call.__qualname__ = function
    return call


def _submodules(module: ModuleType) -> dict[str, ModuleType]:
    return {name: value for name, value in vars(module).items() if isinstance(value, ModuleType)}


def _real(stand_in: ModuleType) -> ModuleType:
    """Import the module that a stand-in replaces, with the submodules that the stand-in has already."""
    if sys.modules.get(stand_in.__name__) is stand_in:
        del sys.modules[stand_in.__name__]
    real = importlib.import_module(stand_in.__name__)
    vars(real).update(_submodules(stand_in))
    return real


def _stand_in(name: str, functions: Sequence[str]) -> ModuleType:
    """A stand-in for a module with these functions, which import the real module when they are called.

    Its submodules can be imported. Access to any other attribute imports the real module, except for ``__file__``
    and similar ones, which ``inspect`` reads of all modules.
    """
    module = ModuleType(name)

    def attribute(wanted: str) -> Any:
        if wanted == "__path__":
            package = importlib.import_module(name.rpartition(".")[0])
            spec = PathFinder.find_spec(name, package.__path__)
            if spec is not None and spec.submodule_search_locations is not None:
                return spec.submodule_search_locations
        if wanted.startswith("__"):
            raise AttributeError(wanted)
        return getattr(_real(module), wanted)

    vars(module).update({function: _deferred(name, function) for function in functions})
    vars(module)["__getattr__"] = attribute
    return module


@contextlib.contextmanager
def deferred(modules: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Inside: imports of these modules are deferred until one of their functions is called.

    Afterwards imports find the real modules again. Modules that were imported before are not deferred.

    Args:
        modules: names of the functions that are imported from each module by name.
    """
    stand_ins = {
        name: _stand_in(name, functions)
        for name, functions in modules.items()
        if name not in sys.modules
    }
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
                if _submodules(module):
                    _real(module)


@contextlib.contextmanager
def importable_torchvision() -> Iterator[None]:
    """Inside: ``import torchvision`` works with a CPU torch; timm and mmengine's Runner import it.

    PyPI's torchvision is built for CUDA. With a CPU torch its operators are missing, but its import refers to
    them. So they are declared inside of this context; nothing calls them.
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
        importlib.import_module("torchvision")


def import_mmdet() -> None:
    """Import mmdet without the modules that it does not need, before any other import of it.

    Deferred functions work when they are called. Only ``isinstance`` with a deferred class does not work in code
    of mmengine or mmdet that has imported it by name.
    """
    if "mmdet.models" in sys.modules:
        return
    with deferred(DEFERRED):
        importlib.import_module("mmdet.models")
    for module, (registry, _) in TRAINERS.items():
        # the registry imports its locations when it does not know a name
        known = getattr(importlib.import_module("mmengine.registry"), registry)
        known._locations.append(module)
        known._imported = False
