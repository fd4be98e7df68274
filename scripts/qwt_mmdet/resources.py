"""Time and memory that a job requests of a cluster, from the measurements of ``qwt-mmdet estimate``.

It imports neither torch nor mmdet, since Snakemake imports it whenever it reads the workflow.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from .errors import QwtError
from .files import read_json, write_json
from .runtime import hardware

ESTIMATE = "results/estimate.json"
"""File of measured costs that the workflow reads; ``qwt-mmdet estimate --save`` writes it."""

TIME_MARGIN = 2.0
"""A node may be half as fast as the machine that was measured."""
MEMORY_MARGIN = 1.25

UNMEASURED_MB = 3000
"""Memory for a step without measured cost: twice that of any detector in docs/hardware.md on a CPU."""

SHARD_IMAGES = 250
"""Fewest images of a shard; with fewer, the start would take too much of a job's time."""
JOBS = "QWT_MMDET_JOBS"
"""Environment variable with the number of parallel jobs, for jobs that read the workflow again."""

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Cost:
    """Cost of a step.

    Args:
        seconds: independent of the number of images. seconds_per_image: for each image, in addition.
        gigabytes: peak memory of the process. device_gigabytes: on the GPU; None without one.
    """

    seconds: Amount
    seconds_per_image: Amount
    gigabytes: Amount
    device_gigabytes: Amount | None = None

    def total(self, images: int) -> float:
        """Seconds for a number of images."""
        return self.seconds + images * self.seconds_per_image


@dataclass(frozen=True, kw_only=True)
class MeasuredStep(Cost):
    """Cost of a step of a model in a run, with the number of ``images`` of a job and the number of ``jobs``."""

    model: str
    step: str
    images: int
    jobs: int = 1

    @property
    def all_seconds(self) -> float:
        """Seconds of all jobs, one after the other."""
        return self.jobs * self.total(self.images)


_STEPS = TypeAdapter(list[MeasuredStep])


def read_estimate(path: str | os.PathLike[str]) -> Mapping[tuple[str, str], MeasuredStep]:
    """Return measured steps by model and step; empty if the file is missing.

    Raises:
        QwtError: the file has another format than ``qwt-mmdet estimate --save`` writes.
    """
    if not os.path.exists(path):
        return {}
    try:
        steps = _STEPS.validate_python(read_json(path, what="estimate")["steps"])
    except (KeyError, TypeError, ValidationError) as error:
        raise QwtError(
            f"{path} is no estimate of this version; delete it, or make it anew with `qwt-mmdet estimate "
            "CONFIG --save`."
        ) from error
    return {(step.model, step.step): step for step in steps}


def save_estimate(found: Sequence[MeasuredStep], path: str | os.PathLike[str]) -> None:
    """Write the file that :func:`read_estimate` reads."""
    steps = [dataclasses.asdict(step) for step in found]
    write_json(path, {"hardware": hardware(), "steps": steps}, indent=1)


def memory_mb(measured: MeasuredStep | None, attempt: int, *, cache_gb: float = 0.0) -> int:
    """Megabytes that a job requests, doubled with each attempt.

    Args:
        cache_gb: size of the job's activation cache, in addition to the measured memory.
    """
    needed = UNMEASURED_MB if measured is None else measured.gigabytes * 1000 * MEMORY_MARGIN
    return math.ceil((needed + cache_gb * 1000) * 2 ** (attempt - 1))


def minutes(measured: MeasuredStep | None, images: int | None, attempt: int) -> int | None:
    """Minutes that a job requests, doubled with each attempt; None if its cost is unknown.

    Args:
        images: number of images of the job; None: as many as in the estimate.
    """
    if measured is None:
        return None
    seconds = measured.total(measured.images if images is None else images)
    return math.ceil(seconds * TIME_MARGIN / 60 * 2 ** (attempt - 1))
