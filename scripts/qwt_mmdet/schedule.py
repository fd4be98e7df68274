"""The jobs of a run that run a detector, and how long they take side by side."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .config import combinations, exports, is_question

BENCHMARK = "benchmark_exported"


@dataclass(frozen=True)
class Job:
    """One job.

    Args:
        variant: tells the jobs of one step of a model apart.
        after: the jobs whose files it reads.
    """

    model: str
    step: str
    variant: str = ""
    after: tuple["Job", ...] = ()

    @property
    def wants_gpu(self) -> bool:
        """Whether it takes a GPU where there is one; exported files run on the CPU."""
        return not self.step.endswith(("exported", "export_model"))


def planned_jobs(config: Mapping[str, Any]) -> list[Job]:
    """The jobs of a run, those that others wait for first. Each evaluation is one job.

    Args:
        config: resolved config of the workflow.
    """
    jobs: dict[Job, None] = {}
    exported = exports(config)

    def add(*fields: Any) -> Job:
        job = Job(*fields)
        if job.step not in config["skip"]:
            jobs[job] = None
        return job

    for row in combinations(config):
        add(row.model, "evaluate_baseline")
        for repeat in range(1, config["repeats"] + 1):
            name = f"{row.quantization}@{repeat}"
            answer: tuple[Job, ...] = ()
            if is_question(config["quantization"][row.quantization]):
                candidates = add(row.model, "measure_candidates", name)
                answer = (add(row.model, "choose_recipe", name, (candidates,)),)
            made = quantized = add(row.model, "quantize_model", name, answer)
            add(row.model, "evaluate_quantized", name, (quantized,))
            if row.compensation:
                name += f"/{row.compensation}"
                made = add(row.model, "fit_compensation", name, (quantized,))
                add(row.model, "evaluate_compensated", name, (made,))
            if repeat > 1:
                continue
            for source, target in ((made, row), (quantized, row._replace(compensation=None))):
                if target not in exported:
                    continue
                full = add(row.model, "export_model", "baseline")
                graph = add(row.model, "export_model", source.variant, (source,))
                for runtime in exported[target].runtime:
                    variant = f"{source.variant}/{runtime}"
                    add(row.model, "evaluate_exported", variant, (graph,))
                    add(row.model, BENCHMARK, variant, (graph, full))
    return list(jobs)


def wall_seconds(
    seconds: Mapping[Job, Sequence[float]], slots: int, gpus: int | None = None
) -> float:
    """How long jobs take when as many as possible run at a time, the first ones first.

    Args:
        seconds: of each job, for each of the parts (shards) that it is split into.
        slots: jobs that run at a time. gpus: of these, those that run a detector in torch; None for any number.
    """
    waiting = [(job, cost) for job, costs in seconds.items() for cost in costs]
    left = {job: len(costs) for job, costs in seconds.items()}
    running: list[tuple[float, int, Job]] = []
    now, on_gpus, number = 0.0, 0, 0
    while waiting or running:
        for entry in list(waiting):
            job, cost = entry
            takes = gpus is not None and job.wants_gpu
            ready = not any(left.get(other) for other in job.after)
            if len(running) < slots and ready and not (takes and on_gpus >= (gpus or 1)):
                waiting.remove(entry)
                on_gpus += takes
                number += 1
                heapq.heappush(running, (now + cost, number, job))
        now, _, job = heapq.heappop(running)
        left[job] -= 1
        on_gpus -= gpus is not None and job.wants_gpu
    return now
