"""The finished rounds of an unfinished search, in a file."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import QwtError
from ..files import read_json, write_json

logger = logging.getLogger(__name__)


class FinishedRounds:
    """The loss of AP of evaluated recipes, by their indices on the Pareto front; saved after each round.

    Args:
        path: the file; None keeps nothing.
        inputs: everything that the losses depend on, as plain values. A file with other inputs is ignored and
            overwritten.
    """

    def __init__(self, path: str | os.PathLike[str] | None, inputs: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.inputs = dict(inputs)
        self.drops: dict[int, float] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            content = read_json(self.path, what="unfinished search")
        except QwtError as error:
            logger.warning("%s Starting from the first round.", error)
            return
        if not isinstance(content, dict) or content.get("inputs") != self.inputs:
            logger.info("The unfinished search in %s had other inputs; starting anew.", self.path)
            return
        self.drops = {int(index): drop for index, drop in content["drops"].items()}
        logger.info("Going on after %d finished rounds", len(self.drops))

    def add(self, index: int, drop: float) -> None:
        """Record the loss of AP of recipe ``index``."""
        self.drops[index] = drop
        if self.path is not None:
            write_json(self.path, {"inputs": self.inputs, "drops": self.drops}, indent=1)
