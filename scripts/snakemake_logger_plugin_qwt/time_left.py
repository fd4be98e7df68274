"""How long a run still takes, from the seconds of its finished jobs and of the jobs of earlier runs."""

import csv
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from statistics import fmean


def earlier_seconds(folder: Path) -> dict[str, float]:
    """Mean seconds of each rule's jobs, from the benchmark files ``folder/RULE/….tsv`` that can be read."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for path in folder.rglob("*.tsv"):
        try:
            with open(path, encoding="utf-8", newline="") as stream:
                rows = list(csv.DictReader(stream, delimiter="\t"))
            seconds[path.relative_to(folder).parts[0]] += [float(row["s"]) for row in rows]
        except (OSError, KeyError, TypeError, ValueError):
            continue  # cut off, or another tool's
    return {rule: fmean(values) for rule, values in seconds.items() if values}


def in_words(seconds: float) -> str:
    """A duration, rounded: ``31 s``, ``4 min``, ``2 h 10 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def left_in_words(seconds: float | None) -> str:
    """``about 4 min left``; empty where it is unknown, and when the time is up."""
    return f"about {in_words(seconds)} left" if seconds and seconds >= 0.5 else ""


def _verb(rule: str) -> str:
    return rule.partition("_")[0]


class TimeLeft:
    """The time left of a run.

    A job takes as long as the finished jobs of its rule in this run, or else in earlier runs, or else as those of rules
    with the same verb (``evaluate_baseline`` and ``evaluate_quantized``). If that is known for at least half of the
    remaining jobs, the others are taken to need the mean of these. The sum is divided by the number of jobs that run at
    once, now or on average so far, whichever is larger; the longest job is a lower limit.

    Args:
        counts: jobs of each rule. earlier: mean seconds of a rule's jobs in earlier runs.
    """

    def __init__(self, counts: Mapping[str, int], earlier: Mapping[str, float]) -> None:
        self._waiting = dict(counts)
        self._earlier = earlier
        self._finished: dict[str, list[float]] = defaultdict(list)
        self._running: dict[int, tuple[str, float]] = {}
        self._start: float | None = None

    def begin(self, job: int, rule: str, now: float) -> None:
        """Note the start of a job at ``now``, in seconds."""
        self._start = now if self._start is None else self._start
        self._waiting[rule] = max(0, self._waiting.get(rule, 0) - 1)
        self._running[job] = rule, now

    def finish(self, job: int, now: float) -> None:
        """Note the end of a job that began, at ``now``, in seconds."""
        rule, start = self._running.pop(job)
        self._finished[rule].append(now - start)

    def stop(self, job: int) -> None:
        """Note that a job failed, if it began; its seconds tell nothing."""
        self._running.pop(job, None)

    def _expected(self, rule: str) -> float | None:
        if finished := self._finished.get(rule):
            return fmean(finished)
        if rule in self._earlier:
            return self._earlier[rule]
        alike = [s for name, s in self._finished.items() if _verb(name) == _verb(rule)]
        return fmean(chain.from_iterable(alike)) if alike else None

    def seconds(self, now: float) -> float | None:
        """Seconds left, estimated; None before the start and while too little is known."""
        jobs = [(self._expected(rule), 0.0) for rule, n in self._waiting.items() for _ in range(n)]
        jobs += [(self._expected(rule), now - start) for rule, start in self._running.values()]
        known = [max(0.0, expected - spent) for expected, spent in jobs if expected is not None]
        if self._start is None or not known or 2 * len(known) < len(jobs):
            return None
        spent = sum(map(sum, self._finished.values()))
        spent += sum(now - start for _, start in self._running.values())
        at_once = max(1.0, len(self._running), spent / max(now - self._start, 1e-3))
        return max(fmean(known) * len(jobs) / at_once, *known)
