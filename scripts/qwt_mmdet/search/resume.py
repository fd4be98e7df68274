"""The finished parts of an unfinished search, in a file."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import QwtError
from ..files import read_json, write_json

logger = logging.getLogger(__name__)


class Finished:
    """Results of the finished parts of a step, as plain values by name; saved after each part.

    Args:
        path: the file; None keeps nothing.
        inputs: everything that the results depend on, as plain values. A file with other inputs is ignored and
            overwritten.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, inputs: Mapping[str, Any] | None = None
    ) -> None:
        self.path = None if path is None else Path(path)
        self.inputs = dict(inputs or {})
        self.results: dict[str, Any] = {}
        if self.path is None or not self.path.exists():
            return
        try:
            content = read_json(self.path, what="unfinished search")
        except QwtError as error:
            logger.warning("%s Starting from the first part.", error)
            return
        if not isinstance(content, dict) or content.get("inputs") != self.inputs:
            logger.info("The unfinished search in %s had other inputs; starting anew.", self.path)
            return
        self.results = content["results"]
        logger.info("Going on after what is finished: %s", ", ".join(self.results))

    def add(self, name: str, result: Any) -> None:
        """Record the result of a part."""
        self.results[name] = result
        if self.path is not None:
            write_json(self.path, {"inputs": self.inputs, "results": self.results}, indent=1)
