"""How long a run would take on this machine and how much memory: from a pilot, which is the workflow itself.

A run's time and memory depend on the architecture, the size of its input and the machine, and hardly on
what the weights are or what the pictures show (more objects cost a mask head more). So the workflow runs
each model once with random weights on a few generated images, and once on some more: Snakemake's benchmarks
give the cost of a start and of an image. The plan says how many jobs and images there are.
"""

import csv
import dataclasses
import heapq
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.logging import MMLogger

from .config import Search, is_question, resolve, searched_settings
from .config.datasets import PARTS, Part
from .data.loaders import make_loader
from .data.sources import number_of_images
from .detectors.build import random_detector, read_config
from .errors import QwtError
from .evaluation.predict import predict
from .files import read_json, write_json
from .plan import Job, Plan, Stopped, Variant
from .plan.files import UNFINISHED, snakefile
from .plan.run import part_of
from .resources import JOBS
from .runtime import hardware
from .staleness import share_with_scripts
from .steps.export import IMAGES as EXPORT_IMAGES

IMAGES = (2, 8)
"""Least numbers of images of both runs of the pilot. A second more or less of the start of a job, divided by
their difference, is the error of what an image costs."""
SIZE = (480, 640)
"""Height and width of the generated images, those of most images of COCO."""
DETECTIONS = 10
"""On a generated image, at least; an evaluation refuses a detector that finds nothing."""


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
class Pilot:
    """What a pilot has found: costs by model and step, and how many layers of each model are quantized."""

    costs: Mapping[tuple[str, str], Cost]
    layers: Mapping[str, int]


def image_counts(config: Mapping[str, Any], part: Part) -> tuple[int, int]:
    """Numbers of images of both runs; of an evaluation whole batches, if these are large."""
    batch = config["evaluation"]["batch_size"] if part == "evaluation" else 1
    few = max(IMAGES[0], batch)
    return few, few + max(IMAGES[1] - IMAGES[0], batch)


def _score_thresholds(settings: Any, place: str) -> Iterator[str]:
    """Keys of a detector's config below which no detection counts."""
    for key, value in settings.items() if isinstance(settings, Mapping) else ():
        if key == "score_thr":
            yield f"{place}.{key}"
        yield from _score_thresholds(value, f"{place}.{key}")


def write_inputs(model: Mapping[str, Any], folder: Path, counts: Iterable[int]) -> dict[str, Any]:
    """Write random weights, and generated images with an object each, as a data set in COCO's format.

    Args:
        model: its entry in the config.
        folder: gets checkpoint.pth, and for each part and number of images PART-NUMBER.json.

    Returns:
        The entry's ``config_options`` with which the detector finds something.

    Raises:
        QwtError: the config cannot be built.
    """
    config, options = model["config"], dict(model["config_options"])
    thresholds = list(
        _score_thresholds(read_config(config, options).model.get("test_cfg"), "model.test_cfg")
    )
    torch.manual_seed(0)
    MMLogger.get_current_instance().setLevel("ERROR")  # it would list every parameter
    detector = random_detector(config, options | dict.fromkeys(thresholds, 0.0))
    torch.save({"state_dict": detector.state_dict()}, folder / "checkpoint.pth")
    generator = np.random.default_rng(0)
    classes = detector.dataset_meta["classes"]
    box, corners = [100, 100, 50, 50], [100, 100, 150, 100, 150, 150, 100, 150]
    thing = {"category_id": 1, "bbox": box, "area": 2500, "segmentation": [corners], "iscrowd": 0}
    for part in PARTS:
        images = []
        for number in range(1, max(counts) + 1):
            noise = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            name = f"{part}-{number}.jpg"
            picture = cv2.resize(noise, SIZE[::-1], interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(folder / name), picture)
            images.append({"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
        for count in {1, *counts}:
            content = {
                "info": {"image_root": str(folder)},
                "images": images[:count],
                "annotations": [{**thing, "id": i, "image_id": i} for i in range(1, count + 1)],
                "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
            }
            write_json(folder / f"{part}-{count}.json", content)
    one = folder / "evaluation-1.json"
    found = predict(detector, make_loader(detector.cfg, one), one).records if thresholds else []
    scores = sorted((record["score"] for record in found), reverse=True)[:DETECTIONS]
    return options | (dict.fromkeys(thresholds, 0.9 * scores[-1]) if scores else {})


def pilot_config(
    plan: Plan, folder: Path, options: Mapping[str, Any], counts: Mapping[Part, int]
) -> dict[str, Any]:
    """The config of one run of a pilot.

    Each model has the first of its quantizations and compensations, or what is exported first. Of a question
    the settings are taken that all but the bits have.

    Args:
        folder: holds for each model a folder of :func:`write_inputs`.
        options: what that returned, by model. counts: images by part.
    """
    config, targets, export = plan.config, [], []
    content: dict[str, Any] = {"datasets": {}, "models": {}, "quantization": {}}
    for name in dict.fromkeys(row.model for row in plan.combinations):
        exported = next((row for row in plan.exports if row.model == name), None)
        first = next(row for row in plan.combinations if row.model == name)
        tried = exported or first
        root, path = folder / name, config["models"][name]["config"]
        content["datasets"][name] = {"type": "coco", "root": str(root)} | {
            part: {
                "annotations": f"{part}-{count}.json", "image_folder": ".", "images": "all",
                "split": part,
            }
            for part, count in counts.items()
        }  # fmt: skip
        content["models"][name] = {
            "config": os.path.abspath(path) if os.path.exists(path) else path,
            "checkpoint": str(root / "checkpoint.pth"),
            "dataset": name,
            "config_options": options[name],
        }
        settings = searched_settings(config["quantization"], tried.quantization)
        content["quantization"][tried.quantization] = settings
        names = {"model": [name], "quantization": [tried.quantization]}
        compensation = tried.compensation or first.compensation
        targets.append(names | ({"compensation": [compensation]} if compensation else {}))
        if exported:
            how = plan.exports[exported]
            names |= {"compensation": [exported.compensation]} if exported.compensation else {}
            export.append({**names, "runtime": how.runtime[:1], "opset": how.opset})
            export[-1] |= {"input": how.input} if how.input else {}
    compensations = {
        name: entry | ({"holdout_fraction": 0.5} if entry["holdout_fraction"] else {})
        for name, entry in config["compensation"].items()
    }  # few images must allow a split
    kept = ("device", "seed", "calibration", "activation_cache", "max_download_gb")
    return content | {
        **{key: config[key] for key in kept},
        "compensation": compensations,
        "evaluation": {**config["evaluation"], "shards": 1},
        "targets": targets,
        "export": export,
    }


def run_workflow(content: Mapping[str, Any], folder: Path, *, threads: int, gpu: bool) -> None:
    """Run the workflow in a folder, one job at a time, as far as detectors run in it.

    Raises:
        QwtError: a step failed; says what it said.
    """
    folder.mkdir()
    write_json(folder / "config.yaml", content)  # JSON is YAML
    share_with_scripts()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", *Plan(content).detector_results()),
            *("--snakefile", str(snakefile()), "--directory", str(folder), "--nocolor"),
            *("--configfile", str(folder / "config.yaml"), "--cores", str(threads)),
            *("--default-resources", "pilot=1", "--resources", "pilot=1", f"gpu={int(gpu)}"),
        ],
        env={name: value for name, value in os.environ.items() if name != JOBS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    note = folder / UNFINISHED
    if note.is_file():
        failed = [f"{one.step}: {one.sentence}" for one in Stopped.read(note).failed]
        raise QwtError(f"With random weights and generated images, {' '.join(failed)}")
    if done.returncode:
        raise QwtError(f"The workflow could not run:\n{done.stdout.strip()}")


def job_cost(job: Job, folder: Path) -> Cost:
    """What a job of a run took, for all its images."""
    path = folder / "benchmarks" / job.step / f"{job.name}.tsv"
    with open(path, newline="", encoding="utf-8") as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    known = read_json(folder / job.account)["provenance"] if job.account else {}
    memory = float(row["max_rss"]) if row["max_rss"] not in ("-", "NA") else 0.0  # it was too short
    return Cost(float(row["s"]), 0.0, memory * 2**20 / 1e9, known.get("device_gigabytes"))


def measure(plan: Plan, *, threads: int, gpu: bool) -> Pilot:
    """Run the pilot of a plan.

    Args:
        threads: of each job. gpu: whether detectors run on one.

    Raises:
        QwtError: see :func:`write_inputs` and :func:`run_workflow`.
    """
    both = {part: image_counts(plan.config, part) for part in PARTS}
    counts = {count for numbers in both.values() for count in numbers}
    found: dict[tuple[str, str], list[tuple[Cost, Cost]]] = {}
    layers = {}
    with tempfile.TemporaryDirectory(prefix="qwt-mmdet-") as name:
        root, options = Path(name), {}
        for model in dict.fromkeys(row.model for row in plan.combinations):
            (root / "inputs" / model).mkdir(parents=True)
            entry = plan.config["models"][model]
            options[model] = write_inputs(entry, root / "inputs" / model, counts)
        for index, run in enumerate(("few", "many")):
            images = {part: numbers[index] for part, numbers in both.items()}
            content = resolve(pilot_config(plan, root / "inputs", options, images))
            run_workflow(content, root / run, threads=threads, gpu=gpu)
        pilot = Plan(content)
        for job in pilot.jobs:
            costs = job_cost(job, root / "few"), job_cost(job, root / "many")
            found.setdefault((job.model, job.step), []).append(costs)
        for row in pilot.combinations:
            summary = root / "many" / Variant(row.model, row.quantization).calibrated("warmup.json")
            layers[row.model] = read_json(summary)["summary"]["layers"]
    return Pilot({key: _line(jobs, *both[part_of(key[1])]) for key, jobs in found.items()}, layers)


def _line(jobs: Sequence[tuple[Cost, Cost]], few: int, many: int) -> Cost:
    """The cost of a start and of an image, from jobs of one step with few and with many images."""
    starts, ends = (fmean(costs[index].seconds for costs in jobs) for index in (0, 1))
    per_image = max(0.0, (ends - starts) / (many - few))
    devices = [one.device_gigabytes for costs in jobs for one in costs if one.device_gigabytes]
    return Cost(
        seconds=max(0.0, starts - few * per_image),
        seconds_per_image=per_image,
        gigabytes=max(one.gigabytes for costs in jobs for one in costs),
        device_gigabytes=max(devices, default=None),
    )


def rankings(search: Search) -> int:
    """How often a search quantizes each layer alone."""
    return len({*search.candidates}) + len(search.activation_candidates()) - 1


def search_costs(search: Search, layers: int, costs: Mapping[str, Cost]) -> dict[str, Cost]:
    """Costs of the two steps of a search, from those of the steps that it repeats.

    They do not grow with the images alone, and to try them would take longer than all other steps. Each ranking
    calibrates the detector, and runs it once for each layer and once exact; each round calibrates a recipe on a
    half of the images and scores it on the others.

    Args:
        layers: number of those that are quantized.
        costs: of evaluate_baseline, quantize_model and evaluate_quantized.
    """
    full, calibration = costs["evaluate_baseline"], costs["quantize_model"]
    quantized = costs["evaluate_quantized"]
    times, rounds = rankings(search), search.rounds if search.smallest else 0
    measured = dataclasses.replace(
        calibration,
        seconds=full.seconds + times * calibration.seconds,
        seconds_per_image=times * calibration.seconds_per_image
        + (times + 1) * (layers + 1) * full.seconds_per_image,
    )
    chosen = dataclasses.replace(
        calibration,
        seconds=full.seconds + rounds * (calibration.seconds + quantized.seconds),
        seconds_per_image=bool(rounds) * full.seconds_per_image / 2
        + rounds * (calibration.seconds_per_image + quantized.seconds_per_image) / 2,
    )
    return {"measure_candidates": measured, "choose_recipe": chosen}


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


def estimate_run(plan: Plan, *, threads: int = 1, gpu: bool = False) -> list[StepCost]:
    """Estimate the steps of a run that compute, model by model.

    Each model is tried with one quantization and one compensation; others cost about as much. Of several
    searches the one with the most candidates counts.

    Args:
        threads: of each job. gpu: whether detectors run on one.

    Raises:
        QwtError: see :func:`images_of` and :func:`measure`.
    """
    counted = Counter((job.model, job.step) for job in plan.jobs)
    datasets = {model: plan.config["datasets"][plan.dataset(model)] for model, _ in counted}
    images = {key: images_of(datasets[key[0]], part_of(key[1])) for key in counted}
    pilot = measure(plan, threads=threads, gpu=gpu)
    found = []
    for model in datasets:
        costs = {step: cost for (name, step), cost in pilot.costs.items() if name == model}
        entries = (
            plan.config["quantization"][row.quantization]
            for row in plan.combinations
            if row.model == model
        )
        searches = [Search(**entry) for entry in entries if is_question(entry)]
        # what does not read all images of its part
        most = {"export_model": EXPORT_IMAGES, "benchmark_exported": 0}
        if searches:
            search = max(searches, key=rankings)
            most["measure_candidates"] = search.images
            costs |= search_costs(search, pilot.layers[model], costs)
        for (name, step), jobs in counted.items():
            if name == model:
                count = images[name, step]
                count = min(count, most.get(step, count))
                found.append(StepCost(model, step, jobs, count, costs[step]))
    return found


def run_seconds(
    plan: Plan, found: Sequence[StepCost], slots: int, gpus: int | None = None
) -> tuple[float, float]:
    """Seconds from start to end of a run whose jobs run side by side, and the sum over its jobs.

    Args:
        found: what :func:`estimate_run` returns for the plan.
        slots: jobs that run at a time. gpus: of these, those that need a GPU; None for any number.
    """
    costs = {(one.model, one.step): one for one in found}
    at_once = slots if gpus is None else min(slots, gpus)
    seconds = {}
    for job in plan.jobs:
        one = costs[job.model, job.step]
        parts = plan.split(job.model, at_once) if job.sharded else 1
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
