"""Latency of an exported detector in a runtime, beside the same detector in full precision."""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from ..errors import QwtError
from .description import exported_bytes, graph_files, read_description
from .profile import integer_share
from .runtimes import Arrays, Runtime, open_graph, read_graph, runtime_by_name

WARM_UP = 3
ROUNDS = (5, 30)
"""Fewest and most rounds."""
SECONDS = 20.0
"""Time after which no further round starts, if the fewest are done."""


Feeds = list[Arrays]
"""Inputs of each graph of a detector."""


class Seconds(NamedTuple):
    """What a run took: by the clock, and of the processor. Other jobs of a machine lengthen the former alone."""

    latency: float
    processor: float


def feeds_of(description: dict[str, Any]) -> Feeds:
    """Random inputs: an image, and for each head of a second stage the largest number of regions."""
    shapes = [{description["input"]["name"]: (1, 3, *description["input"]["size"])}]
    shapes += [
        {name: (head["most_regions"], *shape) for name, shape in head["inputs"].items()}
        for head in description["region_heads"].values()
    ]
    random = np.random.default_rng(0)
    return [
        {name: random.normal(size=shape).astype(np.float32) for name, shape in entry.items()}
        for entry in shapes
    ]


def open_detector(
    files: Iterable[str | os.PathLike[str]], runtime: str | Runtime, threads: int
) -> Callable[[Feeds], object]:
    """A function that runs all graphs of an exported detector, one after the other."""
    runs = [open_graph(file, runtime, threads=threads) for file in files]
    return lambda feeds: [run(feed) for run, feed in zip(runs, feeds, strict=True)]


def interleaved(runs: list[Callable[[Feeds], object]], feeds: Feeds) -> list[list[Seconds]]:
    """Seconds of each run in each round, [rounds][runs]; every second round runs in reversed order."""
    for run in runs * WARM_UP:
        run(feeds)
    started = time.perf_counter()
    rounds: list[list[Seconds]] = []
    while len(rounds) < ROUNDS[0] or (
        len(rounds) < ROUNDS[1] and time.perf_counter() - started < SECONDS
    ):
        order = range(len(runs)) if len(rounds) % 2 else reversed(range(len(runs)))
        found = {}
        for index in order:
            latency, processor = time.perf_counter(), time.process_time()
            runs[index](feeds)
            found[index] = Seconds(time.perf_counter() - latency, time.process_time() - processor)
        rounds.append([found[index] for index in range(len(runs))])
    return rounds


def medians(rounds: list[list[Seconds]], index: int, of: str = "") -> dict[str, float]:
    """Milliseconds of a run, under names that start with ``of``."""
    return {
        f"{of}milliseconds": 1000 * statistics.median(r[index].latency for r in rounds),
        f"{of}processor_milliseconds": 1000 * statistics.median(r[index].processor for r in rounds),
    }


def ratios(rounds: list[list[Seconds]], index: int, of: str = "") -> dict[str, float]:
    """Times of the first run divided by those of another one, under names that start with ``of``."""
    return {
        f"{of}latency_ratio": statistics.median(r[0].latency / r[index].latency for r in rounds),
        f"{of}processor_ratio": statistics.median(
            r[0].processor / r[index].processor for r in rounds
        ),
    }


def benchmark(
    quantized: str | os.PathLike[str],
    full_precision: str | os.PathLike[str],
    runtime: str,
    *,
    threads: int = 1,
) -> dict[str, Any]:
    """Compare a quantized file with the file of the same model in full precision, in this process.

    Returns:
        Bytes of both files; medians over the rounds of their ``milliseconds`` for an image with the most regions, by
        the clock and (``processor_…``) of the processor; ``latency_ratio`` and ``processor_ratio``, the medians of the
        rounds' ratios; the same (``bfloat16_…``) beside full precision computed in bfloat16, where the runtime does so on
        this processor unless it is asked not to; ``integer_share``, the part of the multiply-adds that the runtime
        computes with integers; and the conditions of the measurement.

    Raises:
        QwtError: a file is missing or damaged, they are of different models, or the runtime fails.
    """
    files = [quantized, full_precision]
    about = [read_description(path) for path in files]
    if about[0]["fingerprint"] != about[1]["fingerprint"]:
        raise QwtError(
            f"{quantized} and {full_precision} were made from different models or weights, so their "
            "latencies cannot be compared; export both again."
        )
    found = runtime_by_name(runtime)
    feeds = feeds_of(about[0])
    graphs = [graph_files(path, entry) for path, entry in zip(files, about, strict=True)]
    opened = [open_detector(paths, found, threads) for paths in graphs]
    reduced = found.in_bfloat16()
    if reduced is not None:
        opened.append(open_detector(graphs[1], reduced, threads))
    rounds = interleaved(opened, feeds)
    kernels = (
        kernel
        for file, feed in zip(graphs[0], feeds, strict=True)
        for kernel in found.kernels(read_graph(file), feed)
    )
    return {
        "runtime": runtime,
        "title": found.title,
        "version": found.version,
        "threads": threads,
        "image": about[0]["input"]["size"],
        "rounds": len(rounds),
        "file_bytes": exported_bytes(quantized, about[0]),
        "full_precision_file_bytes": exported_bytes(full_precision, about[1]),
        **medians(rounds, 0),
        **medians(rounds, 1, "full_precision_"),
        **ratios(rounds, 1),
        **(
            {}
            if reduced is None
            else medians(rounds, 2, "bfloat16_") | ratios(rounds, 2, "bfloat16_")
        ),
        "integer_share": integer_share(kernels),
    }
