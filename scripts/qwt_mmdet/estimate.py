"""Estimate of a run's time and memory on this machine, from a pilot run of the workflow.

Time and memory depend on the architecture, the input size and the machine. They hardly depend on weights and
images (more objects cost a mask head more). So the pilot runs each model with random weights, once on a few
generated images and once on some more. Snakemake's benchmarks of both runs give the cost of a start and of an
image. The plan gives the number of jobs and images.
"""

import csv
import dataclasses
import heapq
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmengine.logging import MMLogger

from .config import Search, as_entry, resolve, searched_settings
from .config.datasets import PARTS, Part
from .data.loaders import make_loader
from .data.sources import number_of_images
from .demo.shapes import IMAGE_SIZE
from .detectors.build import random_detector, read_config
from .errors import QwtError
from .evaluation.predict import predict
from .files import read_json, write_json
from .plan import Job, Plan, Stopped, Variant
from .plan.files import UNFINISHED, snakefile
from .plan.run import part_of, rankings
from .resources import JOBS, Cost, MeasuredStep
from .staleness import share_with_scripts

FEW = 2
"""Images of the first run of a pilot."""
LEAST, MOST, SECONDS = 6, 100, 10.0
"""Additional images of the second run: as many as take 10 s on the CPU, from 6 to 100; 100 on a GPU. Start
times vary by about a second; with many images, the resulting error of the cost of an image is small."""
SIZE = (480, 640)
"""Height and width of the generated images, as of most images of COCO; for `shapes`, the size of its images."""
DETECTIONS = 10
"""Fewest detections on a generated image; an evaluation refuses a detector without detections."""


def image_counts(config: Mapping[str, Any], part: Part, more: int) -> tuple[int, int]:
    """Numbers of images of both runs, for evaluations whole batches; the second run has at least ``more`` more."""
    batch = config["evaluation"]["batch_size"] if part == "evaluation" else 1
    return max(FEW, batch), max(FEW, batch) + max(more, batch)


def _score_thresholds(settings: Any, place: str) -> Iterator[str]:
    """Keys of score thresholds in a detector's config."""
    for key, value in settings.items() if isinstance(settings, Mapping) else ():
        if key == "score_thr":
            yield f"{place}.{key}"
        yield from _score_thresholds(value, f"{place}.{key}")


def write_images(
    folder: Path, part: Part, count: int, classes: Sequence[str], size: tuple[int, int]
) -> Path:
    """Write generated images with one object each; return their annotation file, PART-COUNT.json."""
    images = []
    for number in range(1, count + 1):
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        name = f"{part}-{number}.png"
        picture = cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / name), np.roll(picture, PARTS.index(part), axis=2))
        images.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
    corners = [100, 100, 150, 100, 150, 150, 100, 150]
    thing = {"category_id": 1, "bbox": [100, 100, 50, 50], "area": 2500, "segmentation": [corners]}
    content = {
        "info": {"image_root": str(folder)},
        "images": images,
        "annotations": [{**thing, "id": i, "image_id": i} for i in range(1, count + 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }
    write_json(path := folder / f"{part}-{count}.json", content)
    return path


class Inputs(NamedTuple):
    """Inputs of a model's pilot: folder with checkpoint.pth and images, config options, image counts of both runs."""

    folder: Path
    options: Mapping[str, Any]
    counts: Mapping[Part, tuple[int, int]]


def write_inputs(config: Mapping[str, Any], name: str, folder: Path, *, gpu: bool) -> Inputs:
    """Write random weights and generated images for the model ``name`` of a resolved config."""
    folder.mkdir(parents=True)
    model = config["models"][name]
    own = config["datasets"][model["dataset"]]["type"] == "shapes"
    size = (IMAGE_SIZE, IMAGE_SIZE) if own else SIZE
    options = dict(model["config_options"])
    settings = read_config(model["config"], options).model.get("test_cfg")
    thresholds = list(_score_thresholds(settings, "model.test_cfg"))
    torch.manual_seed(0)
    MMLogger.get_current_instance().setLevel("ERROR")  # it would list every parameter
    detector = random_detector(model["config"], options | dict.fromkeys(thresholds, 0.0))
    torch.save({"state_dict": detector.state_dict()}, folder / "checkpoint.pth")
    classes = detector.dataset_meta["classes"]
    one = write_images(folder, "evaluation", 1, classes, size)
    start = time.perf_counter()
    found = predict(detector, make_loader(detector.cfg, one), one).records
    more = MOST if gpu else int(SECONDS / (time.perf_counter() - start))
    counts = {part: image_counts(config, part, min(max(more, LEAST), MOST)) for part in PARTS}
    for part, numbers in counts.items():
        for count in numbers:
            write_images(folder, part, count, classes, size)
    scores = sorted((record["score"] for record in found), reverse=True)[:DETECTIONS]
    options |= dict.fromkeys(thresholds, 0.9 * scores[-1]) if scores else {}
    return Inputs(folder, options, counts)


def pilot_config(plan: Plan, inputs: Mapping[str, Inputs], run: int) -> dict[str, Any]:
    """The config of one run of a pilot: 0 with few images, 1 with many.

    Each model has its first quantization and compensation, or those that are exported first. In place of a
    search, its plain settings are used.
    """
    config, targets, exports = plan.config, [], []
    content: dict[str, Any] = {"datasets": {}, "models": {}, "quantization": {}}
    for name in dict.fromkeys(row.model for row in plan.combinations):
        first = next(row for row in plan.combinations if row.model == name)
        tried = next((row for row in plan.exports if row.model == name), first)
        own, path = inputs[name], config["models"][name]["config"]
        content["datasets"][name] = {"type": "coco", "root": str(own.folder)} | {
            part: {
                "annotations": f"{part}-{counts[run]}.json", "image_folder": ".", "images": "all",
                "split": part,
            }
            for part, counts in own.counts.items()
        }  # fmt: skip
        content["models"][name] = {
            "config": os.path.abspath(path) if os.path.exists(path) else path,
            "checkpoint": str(own.folder / "checkpoint.pth"),
            "dataset": name,
            "config_options": own.options,
        }
        settings = searched_settings(config["quantization"], tried.quantization)
        content["quantization"][tried.quantization] = settings
        names = {"model": [name], "quantization": [tried.quantization]}
        compensation = tried.compensation or first.compensation
        targets.append(names | ({"compensation": [compensation]} if compensation else {}))
        if how := plan.exports.get(tried):
            exports.append(as_entry(how) | names | {"runtime": how.runtime[:1]})
            if tried.compensation:
                exports[-1]["compensation"] = [tried.compensation]
    compensations = {
        name: entry | ({"holdout_fraction": 0.5} if entry["holdout_fraction"] else {})
        for name, entry in config["compensation"].items()
    }  # so that few images can be split
    return {
        **{key: value for key, value in config.items() if key not in ("repeats", "skip")},
        **content,
        "compensation": compensations,
        "evaluation": {**config["evaluation"], "shards": 1},
        "targets": targets,
        "export": exports,
    }


def run_pilot(pilot: Plan, folder: Path, *, threads: int, gpu: bool) -> None:
    """Run the workflow's detector jobs in a folder, one at a time."""
    folder.mkdir()
    write_json(folder / "config.yaml", pilot.config)  # JSON is YAML
    share_with_scripts()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", *pilot.detector_results()),
            *("--snakefile", str(snakefile()), "--directory", str(folder), "--nocolor"),
            *("--workflow-profile", "none"),
            *("--configfile", str(folder / "config.yaml"), "--cores", str(threads)),
            *("--default-resources", "pilot=1", "--resources", "pilot=1", f"gpu={int(gpu)}"),
        ],
        env={name: value for name, value in os.environ.items() if name != JOBS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stdout.strip()
        if (note := folder / UNFINISHED).is_file():
            said = " ".join(f"{one.step}: {one.sentence}" for one in Stopped.read(note).failed)
        raise QwtError(f"With random weights and generated images, the workflow fails. {said}")


def job_cost(job: Job, folder: Path) -> Cost:
    """Time and memory of a job of a run, for all its images."""
    with open(folder / "benchmarks" / job.step / f"{job.name}.tsv", encoding="utf-8") as stream:
        (row,) = csv.DictReader(stream, delimiter="\t")
    known = read_json(folder / job.account)["provenance"] if job.account else {}
    memory = float(row["max_rss"]) if row["max_rss"] not in ("-", "NA") else 0.0  # it was too short
    return Cost(float(row["s"]), 0.0, memory * 2**20 / 1e9, known.get("device_gigabytes"))


def cost_by_images(few: Sequence[Cost], many: Sequence[Cost], counts: tuple[int, int]) -> Cost:
    """The cost of a start and of an image, from a step's jobs with few and with many images."""
    start, end = (fmean(cost.seconds for cost in costs) for costs in (few, many))
    per_image = max(0.0, (end - start) / (counts[1] - counts[0]))
    return Cost(
        max(0.0, start - counts[0] * per_image),
        per_image,
        max(cost.gigabytes for cost in (*few, *many)),
        max((c.device_gigabytes for c in (*few, *many) if c.device_gigabytes), default=None),
    )


def measure(plan: Plan, *, threads: int, gpu: bool) -> dict[tuple[str, str], Cost]:
    """Run the pilot of a plan; return the cost of each step, by model and step."""
    with tempfile.TemporaryDirectory(prefix="qwt-mmdet-") as name:
        inputs = {
            model: write_inputs(plan.config, model, Path(name, "inputs", model), gpu=gpu)
            for model in dict.fromkeys(row.model for row in plan.combinations)
        }
        found: list[dict[tuple[str, str], list[Cost]]] = []
        for run, folder in enumerate((Path(name, "few"), Path(name, "many"))):
            pilot = Plan(resolve(pilot_config(plan, inputs, run)))
            run_pilot(pilot, folder, threads=threads, gpu=gpu)
            found.append(defaultdict(list))
            for job in pilot.jobs:
                found[-1][job.model, job.step].append(job_cost(job, folder))
        few, many = found
        costs = {
            key: cost_by_images(few[key], many[key], inputs[key[0]].counts[part_of(key[1])])
            for key in few
        }
        for row in pilot.rows:
            if search := plan.costliest_search(row.model):
                warmup = folder / Variant(row.model, row.quantization).calibrated("warmup.json")
                layers = read_json(warmup)["summary"]["layers"]
                costs |= search_costs(search, row.model, layers, costs)
    return costs


def search_costs(
    search: Search, model: str, layers: int, costs: Mapping[tuple[str, str], Cost]
) -> dict[tuple[str, str], Cost]:
    """Costs of the two steps of a search, from those of the steps that it repeats.

    The search is not part of the pilot: it would take longer than all other steps. Each ranking calibrates the
    detector, and runs it once in full precision and once per quantized layer. Each round calibrates a recipe on
    each half of the images and scores it on the other one.
    """
    steps = ("evaluate_baseline", "quantize_model", "evaluate_quantized")
    full, calibration, quantized = (costs[model, step] for step in steps)
    times, rounds = rankings(search), search.rounds if search.smallest else 0
    measured = dataclasses.replace(
        calibration,
        seconds=full.seconds + times * calibration.seconds,
        seconds_per_image=times * calibration.seconds_per_image
        + (times + 1) * (layers + 1) * full.seconds_per_image,
    )
    chosen = dataclasses.replace(
        calibration,
        seconds=full.seconds + 2 * rounds * (calibration.seconds + quantized.seconds),
        seconds_per_image=bool(rounds) * full.seconds_per_image
        + rounds * (calibration.seconds_per_image + quantized.seconds_per_image),
    )
    return {(model, "measure_candidates"): measured, (model, "choose_recipe"): chosen}


def images_of(dataset: Mapping[str, Any], part: Part) -> int:
    """Number of images of a part of a resolved data set."""
    count = number_of_images(dataset, part)
    if count is None:
        raise QwtError(
            f"The number of images of the split {dataset[part]['split']} is not known before its annotations "
            "are fetched; give a number in place of all."
        )
    return count


def estimate_run(plan: Plan, *, threads: int = 1, gpu: bool = False) -> list[MeasuredStep]:
    """Estimate the detector steps of a run, model by model.

    The pilot runs each model with one quantization and one compensation; others cost about as much.

    Args:
        threads: of each job. gpu: whether detectors run on a GPU.

    Raises:
        QwtError: the number of images is not known, a model cannot be built, or a step of the pilot fails.
    """
    counted = Counter((job.model, job.step) for job in plan.jobs)
    datasets = {model: plan.config["datasets"][plan.dataset(model)] for model, _ in counted}
    images = {key: images_of(datasets[key[0]], part_of(key[1])) for key in counted}
    costs = measure(plan, threads=threads, gpu=gpu)
    found = []
    models = list(datasets)
    for (model, step), jobs in sorted(counted.items(), key=lambda item: models.index(item[0][0])):
        count, most = images[model, step], plan.most_images(step, model)
        count = count if most is None else min(count, most)
        cost = dataclasses.asdict(costs[model, step])
        found.append(MeasuredStep(**cost, model=model, step=step, images=count, jobs=jobs))
    return found


def run_seconds(
    plan: Plan, found: Sequence[MeasuredStep], slots: int, gpus: int | None = None
) -> tuple[float, float]:
    """Seconds from start to end of a run with parallel jobs, and the sum over its jobs.

    Args:
        slots: number of parallel jobs. gpus: number of parallel jobs that use a GPU; None for any number.
    """
    costs = {(one.model, one.step): one for one in found}
    at_once = slots if gpus is None else min(slots, gpus)
    seconds = {}
    for job in plan.jobs:
        one = costs[job.model, job.step]
        parts = plan.split(job.model, at_once) if job.sharded else 1
        seconds[job] = [one.total(math.ceil(one.images / parts))] * parts
    return wall_seconds(seconds, slots, gpus), sum(map(sum, seconds.values()))


def wall_seconds(
    seconds: Mapping[Job, Sequence[float]], slots: int, gpus: int | None = None
) -> float:
    """Seconds from start to end of parallel jobs that start in their order as soon as they can.

    Args:
        seconds: of each job, for each of its shards. slots, gpus: see :func:`run_seconds`.
    """
    waiting = [(job, cost) for job, costs in seconds.items() for cost in costs]
    left = {job: len(costs) for job, costs in seconds.items()}
    running: list[tuple[float, int, Job]] = []
    now, order = 0.0, itertools.count()

    def can_start(job: Job) -> bool:
        on_gpus = sum(other.wants_gpu for *_, other in running)
        no_card = gpus is not None and job.wants_gpu and on_gpus >= max(gpus, 1)
        return len(running) < slots and not no_card and not any(map(left.get, job.after))

    while waiting or running:
        for job, cost in list(waiting):
            if can_start(job):
                waiting.remove((job, cost))
                heapq.heappush(running, (now + cost, next(order), job))
        now, _, job = heapq.heappop(running)
        left[job] -= 1
    return now
