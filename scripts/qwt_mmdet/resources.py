"""What a job asks a cluster for: minutes and megabytes, from what ``qwt-mmdet estimate`` measured; and into
how many jobs an evaluation is split.

Light on purpose (no torch, no mmdet): Snakemake asks whenever it reads the workflow.
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
"""Where the workflow looks for costs; ``qwt-mmdet estimate --save`` writes them."""

TIME_MARGIN = 2.0
"""A node may be half as fast as the machine that was measured."""
MEMORY_MARGIN = 1.25

UNMEASURED_MB = 3000
"""For a step whose cost is not known: twice what any detector of docs/hardware.md takes on a CPU."""

SHARD_IMAGES = 250
"""Images of a shard at least: with fewer, the start of a job would be too much of its time."""
JOBS = "QWT_MMDET_JOBS"
"""Environment variable with the number of jobs that run side by side, for jobs that read the workflow again."""

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Cost:
    """What a step costs.

    Args:
        seconds: once, whatever the number of images. seconds_per_image: for each image, in addition.
        gigabytes: peak memory of the process. device_gigabytes: on the GPU; None without one.
    """

    seconds: Amount
    seconds_per_image: Amount
    gigabytes: Amount
    device_gigabytes: Amount | None = None

    def total(self, images: int) -> float:
        """Seconds for so many images."""
        return self.seconds + images * self.seconds_per_image


@dataclass(frozen=True, kw_only=True)
class MeasuredStep(Cost):
    """What a step of a model costs in a run: ``images`` of each job, and the number of ``jobs``."""

    model: str
    step: str
    images: int
    jobs: int = 1

    @property
    def all_seconds(self) -> float:
        """For all jobs, one after the other."""
        return self.jobs * self.total(self.images)


_STEPS = TypeAdapter(list[MeasuredStep])


def read_estimate(path: str | os.PathLike[str]) -> Mapping[tuple[str, str], MeasuredStep]:
    """Return measured steps by model and step; none where the file is missing.

    Raises:
        QwtError: the file is not as ``qwt-mmdet estimate --save`` writes it.
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
    """Write what :func:`read_estimate` reads."""
    steps = [dataclasses.asdict(step) for step in found]
    write_json(path, {"hardware": hardware(), "steps": steps}, indent=1)


def memory_mb(measured: MeasuredStep | None, attempt: int, *, cache_gb: float = 0.0) -> int:
    """Megabytes that a job asks for, twice as many with each attempt.

    Args:
        cache_gb: what the job may keep in memory beyond what was measured.
    """
    needed = UNMEASURED_MB if measured is None else measured.gigabytes * 1000 * MEMORY_MARGIN
    return math.ceil((needed + cache_gb * 1000) * 2 ** (attempt - 1))


def minutes(measured: MeasuredStep | None, images: int | None, attempt: int) -> int | None:
    """Minutes that a job asks for, twice as many with each attempt; None where its cost is not known.

    Args:
        images: of the job; None for as many as when it was measured.
    """
    if measured is None:
        return None
    seconds = measured.total(measured.images if images is None else images)
    return math.ceil(seconds * TIME_MARGIN / 60 * 2 ** (attempt - 1))
