"""The finished blocks of an unfinished fit, in a file."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..archives import load_archive, save_archive
from ..errors import QwtError
from .result import BlockFit

logger = logging.getLogger(__name__)

FORMAT = "qwt-mmdet unfinished compensation 2"


class Resume:
    """Finished blocks of each pass over the detector, saved after each block.

    Args:
        path: the file; None keeps nothing.
        inputs: everything that the result depends on, as plain values. A file with other inputs is ignored
            and overwritten.
    """

    def __init__(self, path: str | os.PathLike[str] | None, inputs: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.inputs = dict(inputs)
        self._passes: dict[str, list[BlockFit]] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            content = load_archive(self.path, FORMAT, "unfinished compensation")
        except QwtError as error:
            logger.warning("%s Starting from the first block.", error)
            return
        if content["inputs"] != self.inputs:
            logger.info("The unfinished fit in %s had other inputs; starting anew.", self.path)
            return
        self._passes = {
            name: [BlockFit.from_plain(block) for block in blocks]
            for name, blocks in content["passes"].items()
        }

    def finished(self, name: str) -> list[BlockFit]:
        """Finished blocks of pass ``name``, in order."""
        return list(self._passes.get(name, ()))

    def add(self, name: str, block: BlockFit) -> None:
        """Record one more block of pass ``name``."""
        self._passes.setdefault(name, []).append(block)
        if self.path is not None:
            passes = {key: [b.unfinished() for b in blocks] for key, blocks in self._passes.items()}
            save_archive({"format": FORMAT, "inputs": self.inputs, "passes": passes}, self.path)
