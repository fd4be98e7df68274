"""How long a run would take on this machine and how much memory: measured on a few images.

A run's time and memory depend on the architecture, the size of its input and the machine, and hardly on
what the weights are or what the pictures show (more objects cost a mask head more). So each step runs
here with random weights on generated images, with two numbers of images; the difference is the cost of
an image.
"""

import dataclasses
import heapq
import math
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
from mmengine.logging import MMLogger

from .compensation.fit import fit_compensation
from .compensation.state import save_compensation
from .config import (
    CompensationSettings,
    QuantizationSettings,
    Search,
    combinations,
    exports,
    is_question,
    searched_settings,
)
from .config.datasets import PARTS, Part
from .data.loaders import make_loader
from .data.sources import number_of_images
from .detectors.build import random_detector
from .devices import peak_gigabytes
from .errors import QwtError
from .evaluation.predict import predict
from .export.benchmark import benchmark
from .export.loading import load_exported
from .export.onnx_file import export_onnx
from .files import write_json
from .plan import Job, Plan
from .quantization.calibrate import calibrate
from .quantization.convert import quantize_model, quantized_units
from .quantization.state import save_warmup
from .resources import default_shards
from .runtime import hardware
from .steps.inputs import load_quantized

IMAGES = (2, 5)
"""Least numbers of images of the two measurements."""
SIZE = (480, 640)
"""Height and width of the generated images, those of most images of COCO."""

STEPS = (
    "evaluate_baseline",
    "quantize_model",
    "evaluate_quantized",
    "fit_compensation",
    "evaluate_compensated",
)
SHARDED = ("evaluate_baseline", "evaluate_quantized", "evaluate_compensated")
SEARCH_STEPS = ("measure_candidates", "choose_recipe")
EXPORT_STEPS = ("export_model", "evaluate_exported", "benchmark_exported")


@dataclass(frozen=True)
class Cost:
    """What a step costs.

    Args:
        seconds: once, whatever the number of images.
        seconds_per_image: for each image, in addition.
        gigabytes: peak memory of the process.
        device_gigabytes: peak memory on the GPU; None without one.
    """

    seconds: float
    seconds_per_image: float
    gigabytes: float
    device_gigabytes: float | None

    def total(self, images: int) -> float:
        """Seconds for ``images`` images."""
        return self.seconds + images * self.seconds_per_image


@dataclass(frozen=True)
class Trial:
    """One model with the settings that its steps are tried with.

    Args:
        folder: holds the weights, the images and what one step leaves for the next.
    """

    folder: Path
    config: str
    config_options: Mapping[str, Any]
    quantization: QuantizationSettings
    compensation: CompensationSettings | None
    device: str
    batch_sizes: Mapping[str, int]
    threads: int
    runtime: str = "onnxruntime"
    search: Search | None = None

    def images(self, part: str) -> tuple[int, int]:
        """Numbers of images of the two measurements: whole batches, if these are large."""
        few = max(IMAGES[0], self.batch_sizes[part])
        return few, few + max(IMAGES[1] - IMAGES[0], self.batch_sizes[part])

    def path(self, name: str) -> Path:
        """Path of a file in the folder."""
        return self.folder / name


def prepare(trial: Trial) -> int:
    """Write random weights and generated images for the other steps; return how many layers are quantized."""
    torch.manual_seed(0)
    MMLogger.get_current_instance().setLevel("ERROR")  # it would list every parameter
    model = random_detector(trial.config, trial.config_options)
    torch.save({"state_dict": model.state_dict()}, trial.path("checkpoint.pth"))
    generator = np.random.default_rng(0)
    classes = model.dataset_meta["classes"]
    content: dict[str, Any] = {
        "info": {"image_root": str(trial.folder)},
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }
    counts = {count for part in PARTS for count in trial.images(part)}
    for number in range(max(counts)):
        noise = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = cv2.resize(noise, SIZE[::-1], interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(trial.path(f"{number}.jpg")), picture)
        content["images"].append(
            {"id": number, "file_name": f"{number}.jpg", "height": SIZE[0], "width": SIZE[1]}
        )
    for count in counts:
        write_json(trial.path(f"{count}.json"), {**content, "images": content["images"][:count]})
    return len(quantized_units(quantize_model(model, trial.quantization)))


def _load(trial: Trial, step: str) -> Any:
    files = {
        "evaluate_quantized": ("warmup",),
        "fit_compensation": ("warmup",),
        "evaluate_compensated": ("warmup", "compensation"),
        "export_model": ("warmup", "compensation") if trial.compensation else ("warmup",),
    }.get(step, ())
    return load_quantized(
        trial.config,
        trial.path("checkpoint.pth"),
        device=trial.device,
        config_options=trial.config_options,
        **{name: trial.path(f"{name}.pth") for name in files},
    )


def part_of(step: str) -> Part:
    """Which images a step reads."""
    return "evaluation" if step.startswith("evaluate") else "calibration"


def _run(trial: Trial, step: str, count: int) -> float:
    """Seconds that a step takes for ``count`` images, from the loaded model on."""
    graph = trial.path("model.onnx")
    if step == "benchmark_exported":
        start = time.perf_counter()
        benchmark(graph, graph, trial.runtime)
        return time.perf_counter() - start
    model = _load(trial, step)
    if step == "evaluate_exported":
        model = load_exported(graph, trial.runtime).model
    annotations, part = trial.path(f"{count}.json"), part_of(step)
    loader = make_loader(model.cfg, annotations, batch_size=trial.batch_sizes[part])
    if step == "quantize_model":
        quantize_model(model, trial.quantization)
    elif step == "fit_compensation":
        reference = _load(trial, "evaluate_baseline")
    start = time.perf_counter()
    if part == "evaluation":
        predict(model, loader, annotations)
    elif step == "quantize_model":
        calibrate(model, loader, noise_images=1)
        save_warmup(model, trial.path("warmup.pth"))
    elif step == "export_model":
        export_onnx(model, graph, calibration=loader)
    elif trial.compensation is not None:
        fitted = fit_compensation(model, reference, loader, trial.compensation)
        save_compensation(model, fitted, trial.path("compensation.pth"))
    if trial.device != "cpu":
        torch.cuda.synchronize(trial.device)
    return time.perf_counter() - start


def measure(trial: Trial, step: str) -> Cost:
    """Run a step with few and with more images; made for a process of its own."""
    torch.set_num_threads(trial.threads)
    _load(trial, step)
    starting = time.time() - psutil.Process().create_time()  # imports included
    counts = trial.images(part_of(step))
    _run(trial, step, counts[0])  # the first run is slower
    few, many = (_run(trial, step, count) for count in counts)
    per_image = max(0.0, (many - few) / (counts[1] - counts[0]))
    on_device = None
    if trial.device != "cpu":
        on_device = torch.cuda.max_memory_allocated(trial.device) / 1e9
    return Cost(
        seconds=starting + max(0.0, few - counts[0] * per_image),
        seconds_per_image=per_image,
        gigabytes=peak_gigabytes(),
        device_gigabytes=on_device,
    )


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, whose peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def measure_model(trial: Trial, steps: Sequence[str] = STEPS) -> dict[str, Cost]:
    """Costs of the steps that a model goes through, in their order.

    Raises:
        QwtError: the config cannot be built, or the model cannot be quantized or compensated.
    """
    layers = _in_process(prepare, trial)
    costs = {step: _in_process(measure, trial, step) for step in steps if step not in SEARCH_STEPS}
    return costs | (search_costs(trial.search, layers, costs) if trial.search else {})


def rankings(search: Search) -> int:
    """How often a search quantizes each layer alone."""
    return len({*search.candidates}) + len(search.activation_candidates()) - 1


def search_costs(search: Search, layers: int, costs: Mapping[str, Cost]) -> dict[str, Cost]:
    """Costs of the two steps of a search, from those of the steps that it repeats.

    Args:
        layers: number of those that are quantized.
    """
    full, calibration, quantized = (costs[step] for step in STEPS[:3])
    times, rounds = rankings(search), search.rounds if search.smallest else 0
    measured = dataclasses.replace(
        calibration,
        seconds=full.seconds + times * calibration.seconds,
        seconds_per_image=times * calibration.seconds_per_image
        + (times + 1) * (layers + 1) * full.seconds_per_image,
    )
    # A half of the images calibrates the recipe of each round, and it is scored on the others.
    chosen = dataclasses.replace(
        calibration,
        seconds=full.seconds + rounds * (calibration.seconds + quantized.seconds),
        seconds_per_image=bool(rounds) * full.seconds_per_image / 2
        + rounds * (calibration.seconds_per_image + quantized.seconds_per_image) / 2,
    )
    return dict(zip(SEARCH_STEPS, (measured, chosen), strict=True))


def images_of(dataset: Mapping[str, Any], part: Part) -> int:
    """How many images the ``calibration`` or ``evaluation`` part of a resolved data set has.

    Raises:
        QwtError: it is all images of an annotation file that cannot be read here.
    """
    count = number_of_images(dataset, part)
    if count is None:
        raise QwtError(
            f"The number of images of the split {dataset[part]['split']} is not known before its annotations "
            "are fetched; give a number in the place of all."
        )
    return count


@dataclass(frozen=True)
class StepCost:
    """What one step of a run costs, for all its jobs together.

    Args:
        jobs: how often the step runs. images: of each job.
    """

    model: str
    step: str
    jobs: int
    images: int
    cost: Cost

    @property
    def seconds(self) -> float:
        """For all jobs, one after the other."""
        return self.jobs * self.cost.total(self.images)


def save_estimate(found: Sequence[StepCost], path: str | os.PathLike[str]) -> None:
    """Write what the rules ask a cluster for (see :mod:`qwt_mmdet.resources`)."""
    steps = [
        {"model": one.model, "step": one.step, "images": one.images, **dataclasses.asdict(one.cost)}
        for one in found
    ]
    write_json(path, {"hardware": hardware(), "steps": steps}, indent=1)


def estimate_run(
    config: Mapping[str, Any],
    *,
    device: str,
    threads: int = 1,
) -> list[StepCost]:
    """Estimate the steps of a run that compute, model by model.

    Each model is tried with the first of its quantizations and compensations; others cost about as
    much. Of several searches the one with the most candidates counts.

    Args:
        config: resolved config of the workflow.
        device: ``cpu`` or a card, ``cuda:0``.
        threads: of each step.

    Raises:
        QwtError: see :func:`images_of` and :func:`measure_model`.
    """
    rows = combinations(config)
    jobs = Counter((job.model, job.step) for job in Plan(config).jobs)
    found = []
    for name in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == name]
        exported = {row: about for row, about in exports(config).items() if row.model == name}
        tried = next(iter(exported), own[0])
        entry = config["models"][name]
        quantizations = config["quantization"]
        quantization = QuantizationSettings.from_mapping(
            searched_settings(quantizations, tried.quantization)
        )
        entries = (quantizations[row.quantization] for row in own)
        searches = [Search(**entry) for entry in entries if is_question(entry)]
        search = max(searches, key=rankings, default=None)
        compensation = None
        if own[0].compensation:
            compensation = CompensationSettings.from_mapping(
                config["compensation"][own[0].compensation]
            )
            if compensation.holdout_fraction:  # few images must allow a split
                compensation = dataclasses.replace(compensation, holdout_fraction=0.5)
        with tempfile.TemporaryDirectory(prefix="qwt-mmdet-") as folder:
            trial = Trial(
                Path(folder),
                entry["config"],
                entry["config_options"],
                quantization,
                compensation,
                device,
                {part: config[part]["batch_size"] for part in PARTS},
                threads,
                next((about.runtime[0] for about in exported.values()), "onnxruntime"),
                search,
            )
            steps: tuple[str, ...] = STEPS if compensation else STEPS[:3]
            steps += (SEARCH_STEPS if search else ()) + (EXPORT_STEPS if exported else ())
            costs = measure_model(trial, steps)
        dataset = config["datasets"][entry["dataset"]]
        for step, cost in costs.items():
            if step in config["skip"]:
                continue
            images = images_of(dataset, part_of(step))
            if step == "measure_candidates" and search:
                images = min(images, search.images)
            found.append(StepCost(name, step, jobs[name, step], images, cost))
    return found


def run_seconds(
    config: Mapping[str, Any], found: Sequence[StepCost], slots: int, gpus: int | None = None
) -> tuple[float, float]:
    """Seconds from start to end of a run whose jobs run side by side, and the sum over its jobs.

    Args:
        config: resolved config of the workflow. found: what :func:`estimate_run` returns for it.
        slots: jobs that run at a time. gpus: of these, those that need a GPU; None for any number.
    """
    costs = {(one.model, one.step): one for one in found}
    jobs = Plan(config).jobs
    shards = config["evaluation"]["shards"]
    evaluations = sum(job.step in SHARDED for job in jobs)
    seconds = {}
    for job in jobs:
        one, parts = costs[job.model, job.step], 1
        if job.step in SHARDED:
            at_once = slots if gpus is None else min(slots, gpus)
            parts = default_shards(one.images, evaluations, at_once) if shards == "auto" else shards
        seconds[job] = [one.cost.total(math.ceil(one.images / parts))] * parts
    return wall_seconds(seconds, slots, gpus), sum(map(sum, seconds.values()))


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
