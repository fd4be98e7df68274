"""A cache of activations: on the device and in memory up to limits, beyond these on disk."""

import ctypes
import shutil
import tempfile
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

RELEASE_INTERVAL = 8
"""Images after which freed memory is returned to the system; more often would cost time."""


def release_free_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    Freed tensors leave holes in the heap that new tensors seldom fit into. So it would grow with every image.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _without_base(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it is a view: a view keeps its whole base alive, and is saved with it."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


@dataclass(frozen=True)
class _OnDisk:
    path: Path
    device: torch.device


@dataclass(frozen=True)
class _InMemory:
    tensor: Tensor
    device: torch.device
    tier: str


class ActivationCache:
    """A dictionary of nested tuples, lists and dictionaries of tensors, with limits.

    It is a context manager that removes its files, also after an exception. Values other than tensors are
    kept in memory. Reading returns copies, which may be changed.

    Args:
        device_gb: gigabytes (10⁹ bytes) of a GPU's tensors that stay on it.
        memory_gb: gigabytes of further tensors that stay in memory. The rest is mapped from files in a
            temporary folder.
    """

    def __init__(self, device_gb: float = 4.0, memory_gb: float = 4.0) -> None:
        self._free = {"device": device_gb * 1e9, "memory": memory_gb * 1e9}
        self._entries: dict[Hashable, tuple[list[Any], TreeSpec]] = {}
        self._folder: Path | None = None
        self._written = 0

    def __enter__(self) -> "ActivationCache":
        return self

    def __exit__(self, *_: object) -> None:
        self._entries.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __setitem__(self, key: Hashable, value: Any) -> None:
        if key in self:
            del self[key]
        leaves, spec = tree_flatten(value)
        leaves = [self._put(v) if isinstance(v, Tensor) else v for v in leaves]
        self._entries[key] = leaves, spec

    def __getitem__(self, key: Hashable) -> Any:
        leaves, spec = self._entries[key]
        return tree_unflatten([self._copy(leaf) for leaf in leaves], spec)

    def __delitem__(self, key: Hashable) -> None:
        for leaf in self._entries.pop(key)[0]:
            if isinstance(leaf, _InMemory):
                self._free[leaf.tier] += leaf.tensor.nbytes
            elif isinstance(leaf, _OnDisk):
                leaf.path.unlink()

    def pop(self, key: Hashable) -> Any:
        """Remove an entry and return it."""
        value = self[key]
        del self[key]
        return value

    @staticmethod
    def _copy(leaf: Any) -> Any:
        if isinstance(leaf, _OnDisk):
            # Mapped into memory, so that only the parts in use are read.
            mapped = torch.load(leaf.path, mmap=True, weights_only=True)
            return mapped.to(leaf.device, copy=True)
        if isinstance(leaf, _InMemory):
            return leaf.tensor.to(leaf.device, copy=True)
        return leaf

    def _put(self, tensor: Tensor) -> _InMemory | _OnDisk:
        """Keep a tensor that will not be changed elsewhere."""
        device = tensor.device
        tiers = ("memory",) if device.type == "cpu" else ("device", "memory")
        for tier in tiers:
            if tensor.nbytes <= self._free[tier]:
                self._free[tier] -= tensor.nbytes
                kept = tensor if tier == "device" else tensor.cpu()
                return _InMemory(_without_base(kept), device, tier)
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="qwt-mmdet-"))
        path = self._folder / f"{self._written}.pt"
        self._written += 1
        torch.save(_without_base(tensor.cpu()), path)
        return _OnDisk(path, device)
