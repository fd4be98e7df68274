"""Rows that summary and report read: one for each combination, and one for each exported detector."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from ..files import read_json, write_json
from .files import without_repeat

KINDS = ("baseline", "quantized", "compensated")


@dataclass(frozen=True)
class ResultRow:
    """A combination: its names, its settings and its results.

    Args:
        failed: in a run that failed, sentences about why something is missing.
        settings: of the quantization; for a search, those of the entry named by ``like``.
        recipe: file with the result of a search. asked: its ``smallest`` or ``best``; empty without a search.
        annotations: file of the evaluation images. warmup: file of the first repeat.
        repeats: folders with metrics.json and predictions.json, one for each repeat, by kind (``KINDS``); none
            where it was not evaluated.
    """

    model: str
    quantization: str
    compensation: str | None
    dataset: str
    failed: Sequence[str]
    settings: Mapping[str, Any]
    recipe: str | None
    asked: Mapping[str, Any]
    compensation_settings: Mapping[str, Any] | None
    annotations: str | None
    repeats: Mapping[str, Sequence[str]]
    warmup: str | None

    def evaluated(self) -> dict[str, str]:
        """Result folders of the evaluated variants of the first repeat, by kind."""
        return {kind: self.repeats[kind][0] for kind in KINDS if self.repeats[kind]}


@dataclass(frozen=True)
class ExportRow:
    """An exported detector in a runtime; what is missing is None, for the reasons in ``failed``.

    Args:
        exported: folder with metrics.json and predictions.json of the file. benchmark: file of its latency.
        simulated: folder of the same detector in PyTorch.
    """

    model: str
    quantization: str
    compensation: str | None
    runtime: str
    exported: str | None
    benchmark: str | None
    simulated: str | None
    failed: Sequence[str] = ()


@dataclass(frozen=True)
class Failure:
    """A failed job: rule and wildcards as ``step``, and the ``sentence`` at the end of its log."""

    step: str
    wildcards: Mapping[str, str]
    log: str
    sentence: str


@dataclass(frozen=True)
class Stopped:
    """The state of a failed run: its failed jobs, and the files that it did not make."""

    failed: Sequence[Failure] = ()
    pending: Sequence[str] = ()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Stopped":
        """Read what :meth:`write` wrote."""
        return TypeAdapter(cls).validate_python(read_json(path, what="note of failures"))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        write_json(path, dataclasses.asdict(self), indent=1)

    def finished(self, path: str, name: str = "") -> str | None:
        """Return a path; None if it, or the file of this name in it, was not made."""
        return None if (f"{path}/{name}" if name else path) in self.pending else path

    def causes(self, names: Mapping[str, str | None]) -> list[str]:
        """Sentences about the failed jobs that a result needs.

        Args:
            names: values of its wildcards, a quantization without the number of a repeat. A job may have others.
        """
        return [
            f"{job.step}: {job.sentence}"
            for job in self.failed
            if all(names.get(k, v) in (v, without_repeat(v)) for k, v in job.wildcards.items())
        ] or ["the run stopped before it"]
