"""Imports that need help: packages not built for each other, and what mmdet loads and never calls."""

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
"""Modules of mmengine that train on many GPUs, with the registry and the name of what they hold. They
import torch.distributed.fsdp and .optim, and so sympy."""

DEFERRED: Mapping[str, Sequence[str]] = {
    **{module: [name] for module, (_, name) in TRAINERS.items()},
    "mmdet.utils.mot_error_visualize": ["imshow_mot_errors"],  # it imports matplotlib.pyplot
    "scipy.linalg": [],  # of tracking
    "scipy.optimize": ["linear_sum_assignment"],  # of training
    "scipy.sparse": ["csr_matrix"],  # of the metric of CrowdHuman, as the next one
    "scipy.sparse.csgraph": ["maximum_bipartite_matching"],
}
"""Modules that mmdet brings along and no detector uses on images, with what is imported from them by
name. They took a quarter of the time in which a step starts."""


def _deferred(module: str, function: str) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*arguments, **options)

    call.__name__ = call.__qualname__ = function
    return call


def _submodules(module: ModuleType) -> dict[str, ModuleType]:
    return {name: value for name, value in vars(module).items() if isinstance(value, ModuleType)}


def _real(stand_in: ModuleType) -> ModuleType:
    """Import the module that was stood in for; submodules that are there already are its own then."""
    if sys.modules.get(stand_in.__name__) is stand_in:
        del sys.modules[stand_in.__name__]
    real = importlib.import_module(stand_in.__name__)
    vars(real).update(_submodules(stand_in))
    return real


def _stand_in(name: str, functions: Sequence[str]) -> ModuleType:
    """A module with these functions, which import the real one when they are called.

    Its submodules can be imported. Any other attribute imports the real module at once, but for
    ``__file__`` and its like, which ``inspect`` asks all modules for.
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
    """Import modules only when one of their functions is called, where they are imported in this context.

    After it, an import finds the real modules, as it did before; those that were there already stay.

    Args:
        modules: names of functions that are imported from each module by name.
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
        importlib.import_module("torchvision")


def import_mmdet() -> None:
    """Import mmdet, ahead of whoever would import it with all that it brings along.

    What is deferred works when it is needed; only ``isinstance`` with a class that was deferred does not,
    where mmengine or mmdet had imported it by name.
    """
    if "mmdet.models" in sys.modules:
        return
    with deferred(DEFERRED):
        importlib.import_module("mmdet.models")
    for module, (registry, _) in TRAINERS.items():
        # where the registry looks for what it does not know yet
        known = getattr(importlib.import_module("mmengine.registry"), registry)
        known._locations.append(module)
        known._imported = False
