"""Tensors that wait between two blocks: on the device, in memory, and on disk beyond limits."""

import ctypes
import shutil
import tempfile
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

RELEASE_INTERVAL = 8
"""Images after which free memory goes back to the system: getting it again takes time."""


def release_free_memory() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc).

    Freed tensors leave holes between those that are kept, and new ones of the same size seldom fit
    into them: the heap grows with every image although no more of it is in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _without_base(tensor: Tensor) -> Tensor:
    """The tensor, or of a view a copy: a view keeps its whole base alive, and is saved with it."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


@dataclass(frozen=True)
class _OnDisk:
    path: Path
    device: torch.device

    def load(self) -> Tensor:
        # Mapped into memory, so that only what is used is read.
        return torch.load(self.path, mmap=True, weights_only=True)


@dataclass(frozen=True)
class _InMemory:
    tensor: Tensor
    device: torch.device
    tier: str


class ActivationCache:
    """A dictionary of nested tuples, lists and dictionaries of tensors, with limits.

    It is a context manager that removes its files, also after an exception. Other values than
    tensors stay in memory as they are. Reading gives copies, which may be changed.

    Args:
        device_gb: tensors of a GPU stay there up to this many gigabytes (10⁹ bytes).
        memory_gb: further ones stay in memory up to this many; the rest is mapped from files in a
            temporary folder.
    """

    def __init__(self, device_gb: float = 4.0, memory_gb: float = 4.0) -> None:
        self._free = {"device": device_gb * 1e9, "memory": memory_gb * 1e9}
        self._entries: dict[Hashable, tuple[list[Any], TreeSpec]] = {}
        self._folder: Path | None = None
        self._written = 0

    def __enter__(self) -> "ActivationCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        """Remove an entry and return it, without a copy where it lies in place already."""
        leaves, spec = self._entries[key]
        values = [
            leaf.tensor.to(leaf.device) if isinstance(leaf, _InMemory) else self._copy(leaf)
            for leaf in leaves
        ]
        del self[key]
        return tree_unflatten(values, spec)

    @staticmethod
    def _copy(leaf: Any) -> Any:
        if isinstance(leaf, _OnDisk):
            return leaf.load().to(leaf.device, copy=True)
        if isinstance(leaf, _InMemory):
            return leaf.tensor.to(leaf.device, copy=True)
        return leaf

    def _put(self, tensor: Tensor) -> _InMemory | _OnDisk:
        """Keep a tensor that nobody else changes, with its values in order."""
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
