"""Tensors that wait between two blocks, in memory up to a limit and on disk beyond."""

import shutil
import tempfile
from collections.abc import Hashable
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


class ActivationCache:
    """A dictionary of tensors with a memory limit; a context manager that removes its files.

    Args:
        memory_gb: tensors beyond this many gigabytes (10⁹ bytes) go to a temporary folder.
    """

    def __init__(self, memory_gb: float = 4.0) -> None:
        self.limit = memory_gb * 1e9
        self.used = 0
        self._memory: dict[Hashable, Tensor] = {}
        self._files: dict[Hashable, Path] = {}
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
        self._memory.clear()
        self._files.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._memory or key in self._files

    def __setitem__(self, key: Hashable, value: Tensor) -> None:
        if key in self:
            del self[key]
        size = value.numel() * value.element_size()
        if self.used + size <= self.limit:
            self._memory[key] = value
            self.used += size
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="qwt-mmdet-"))
        path = self._folder / f"{self._written}.pt"
        self._written += 1
        # A view would be saved with its whole storage.
        torch.save(value.contiguous().clone(), path)
        self._files[key] = path

    def __getitem__(self, key: Hashable) -> Tensor:
        if key in self._memory:
            return self._memory[key]
        return torch.load(self._files[key], weights_only=True)

    def __delitem__(self, key: Hashable) -> None:
        if key in self._memory:
            value = self._memory.pop(key)
            self.used -= value.numel() * value.element_size()
        else:
            self._files.pop(key).unlink()
