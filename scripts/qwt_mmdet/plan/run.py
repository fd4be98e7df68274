"""The detectors, jobs and results of a run."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import Combination, Search, configuration, searched_settings
from ..config.datasets import Part
from ..data.sources import number_of_images
from ..resources import SHARD_IMAGES
from ..staleness import source_hash
from .files import (
    DOCUMENT,
    EXPORTS_TABLE,
    REPORT,
    TABLE,
    Variant,
    chosen_images,
    repeated,
    tradeoff,
    without_repeat,
)
from .rows import KINDS, ExportRow, ResultRow, Stopped

EXPORT_IMAGES = 16
"""Calibration images for the ranges of convolution outputs that only integer kernels quantize."""


def rankings(search: Search) -> int:
    """Number of times that a search quantizes each layer alone."""
    return len(search.weight_candidates()) + len(search.activation_candidates()) - 1


def part_of(step: str) -> Part:
    """Which images a step reads."""
    return "evaluation" if step.startswith("evaluate") else "calibration"


def unique(items: Iterable[Any]) -> list[Any]:
    """The items that are not None, each once."""
    return [item for item in dict.fromkeys(items) if item is not None]


def shards_note(config: Mapping[str, Any], variant: Variant) -> tuple[str, str]:
    """The file that keeps the number of shards of an evaluation, and a hash of the settings that it is valid for.

    A finished evaluation keeps its number of shards, since other input files would cause a rerun.
    """
    entry = config["models"][variant.model]
    quantization, compensation = variant.quantization, variant.compensation
    decides = [
        entry,
        config["datasets"][entry["dataset"]],
        quantization and config["quantization"][without_repeat(quantization)],
        compensation and config["compensation"][compensation],
        config["seed"],
        config["evaluation"]["batch_size"],
        source_hash("evaluate_shard"),
    ]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    return f"{variant.evaluated}/shards.json", digest


@dataclass(frozen=True)
class Job:
    """A job of the workflow that runs a detector. An evaluation is one job, even if it is split into shards.

    Args:
        step: name of its rule. runtime: of an exported file. after: the jobs whose files it reads.
        variant: for ``measure_candidates``, its quantization is the name of the measurement.
    """

    step: str
    variant: Variant
    runtime: str | None = None
    after: tuple["Job", ...] = ()

    @property
    def model(self) -> str:
        return self.variant.model

    @property
    def name(self) -> str:
        """Name of its files under logs/ and benchmarks/, in the folders of the step."""
        evaluated = self.step == "evaluate_baseline"
        names = (self.model, None if evaluated else self.variant.name, self.runtime)
        return "/".join(filter(None, names))

    @property
    def wants_gpu(self) -> bool:
        """Whether it uses a GPU if there is one; exported files run on the CPU."""
        return self.runtime is None and self.step != "export_model"

    @property
    def sharded(self) -> bool:
        """Whether its images may be split over several jobs."""
        return self.step.startswith("evaluate") and self.runtime is None

    @property
    def account(self) -> str | None:
        """The JSON file whose ``provenance`` has the job's time and memory on a GPU; None without."""
        files = {
            "quantize_model": self.variant.calibrated("warmup.json"),
            "fit_compensation": f"{self.variant.evaluated}/compensation.json",
        }
        return f"{self.variant.evaluated}/metrics.json" if self.sharded else files.get(self.step)


class Plan:
    """What a resolved config asks for; ``stopped`` is the state of a failed run.

    Attributes:
        searches: the searches of the config, by name.
        measurements: name of one of the searches that choose from a measurement, by the measurement's name.
    """

    def __init__(self, config: Mapping[str, Any], stopped: Stopped | None = None) -> None:
        self.config = config
        self.stopped = stopped or Stopped()
        asked = configuration(config)
        self.combinations, self.exports = asked.combinations(), asked.exports()
        self.searches = {n: e for n, e in asked.quantization.items() if isinstance(e, Search)}
        self.measurements = {search.measurement: name for name, search in self.searches.items()}

    def dataset(self, model: str) -> str:
        """Name of a model's data set."""
        return self.config["models"][model]["dataset"]

    def _evaluated(self, combination: Combination, repeat: int = 1) -> dict[str, Variant]:
        """The variants of a combination that are evaluated, by kind."""
        model, name, compensation = combination
        quantization = repeated(name, repeat)
        found = [Variant(model), Variant(model, quantization)]
        found += [Variant(model, quantization, compensation)] if compensation else []
        return {v.kind: v for v in found if f"evaluate_{v.kind}" not in self.config["skip"]}

    @cached_property
    def evaluations(self) -> list[Variant]:
        """The variants that are evaluated, each once, by combination and repeat."""
        return unique(
            variant
            for combination in self.combinations
            for repeat in range(1, self.config["repeats"] + 1)
            for variant in self._evaluated(combination, repeat).values()
        )

    @cached_property
    def jobs(self) -> list[Job]:
        """The jobs that run a detector; each comes after the jobs that it waits for."""
        found: dict[Job, None] = {}

        def add(*fields: Any) -> Job:
            job = Job(*fields)
            found[job] = None
            return job

        def making(variant: Variant) -> tuple[Job, ...]:
            """Add the jobs that make the files of a variant; return the last one, or none in full precision."""
            model, quantization = variant.model, variant.quantization
            if quantization is None:
                return ()
            if variant.compensation:
                before = making(Variant(model, quantization))
                return (add("fit_compensation", variant, None, before),)
            recipe: tuple[Job, ...] = ()
            if measurement := self.measurement(quantization):
                measuring = add("measure_candidates", Variant(model, measurement))
                recipe = (add("choose_recipe", variant, None, (measuring,)),)
            return (add("quantize_model", variant, None, recipe),)

        evaluations = {v: add(f"evaluate_{v.kind}", v, None, making(v)) for v in self.evaluations}

        def export(variant: Variant) -> Job:
            evaluation = (evaluations[variant],) if variant in evaluations else ()
            return add("export_model", variant, None, (*making(variant), *evaluation))

        for combination, entry in self.exports.items():
            full, exported = export(Variant(combination.model)), export(Variant(*combination))
            for runtime in entry.runtime:
                add("evaluate_exported", exported.variant, runtime, (exported,))
                add("benchmark_exported", exported.variant, runtime, (exported, full))
        return list(found)

    def costliest_search(self, model: str) -> Search | None:
        """The search of a model with the most numbers of bits to measure; None without a search."""
        names = {row.quantization for row in self.combinations if row.model == model}
        searches = [search for name, search in self.searches.items() if name in names]
        return max(searches, key=rankings, default=None)

    def most_images(self, step: str, model: str) -> int | None:
        """Most images of its part that a step runs a model on; None for all of them."""
        search = self.costliest_search(model)
        most = {"export_model": EXPORT_IMAGES, "benchmark_exported": 0}
        return most.get(step, search.images if search and step == "measure_candidates" else None)

    def measurement(self, quantization: str) -> str | None:
        """Name of the measurement that a search (perhaps of a repeat) chooses from; None without a search."""
        name, *repeat = quantization.partition("@")
        return (
            "".join([self.searches[name].measurement, *repeat]) if name in self.searches else None
        )

    def _choosing(self, model: str, measurement: str) -> dict[str, Search]:
        """The searches of a model that choose from a measurement, by name."""
        wanted = {row.quantization for row in self.combinations if row.model == model}
        return {
            name: search
            for name, search in self.searches.items()
            if name in wanted and search.measurement == without_repeat(measurement)
        }

    def scored(self, model: str, measurement: str) -> set[str]:
        """The types of AP by which recipes from a measurement are scored."""
        searches = self._choosing(model, measurement).values()
        return {search.smallest.metric for search in searches if search.smallest}

    def asked_sizes(self, model: str, measurement: str) -> dict[str, Search]:
        """The searches that choose from a measurement and have a size in megabytes as their limit, by name."""
        searches = self._choosing(model, measurement).items()
        return {name: s for name, s in searches if s.best and s.best.max_size_mb}

    def _names(self, combination: Combination, **more: str | None) -> dict[str, str | None]:
        """The wildcards of the jobs that a combination needs; see :meth:`.rows.Stopped.causes`."""
        model, quantization, _ = combination
        names = {"dataset": self.dataset(model), "measurement": self.measurement(quantization)}
        return {**combination._asdict(), **names, **more}

    def split(self, model: str, jobs: int) -> int:
        """Number of shards of a new evaluation, so that ``jobs`` jobs at a time are busy; 1 if images are not counted."""
        chosen, each = self.config["evaluation"]["shards"], jobs // len(self.evaluations)
        if chosen != "auto":
            return int(chosen)
        dataset = self.config["datasets"][self.dataset(model)]
        images = number_of_images(dataset, "evaluation") if each > 1 else 0
        return max(1, min(each, (images or 0) // SHARD_IMAGES))

    def shards(self, variant: Variant, jobs: int) -> list[str]:
        """Files of the shards of an evaluation: as many as in an earlier run, else :meth:`split`; none for one."""
        path, current = shards_note(self.config, variant)
        count = None
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            note = json.loads(Path(path).read_text(encoding="utf-8"))
            count = int(note["shards"]) if note["of"] == current else None
        count = count or self.split(variant.model, jobs)
        numbers = range(1, count + 1) if count > 1 else ()
        return [f"{variant.evaluated}/shards/{number}-of-{count}.json" for number in numbers]

    @cached_property
    def rows(self) -> list[ResultRow]:
        """The rows of all combinations, for summary and report."""
        return [self._row(combination) for combination in self.combinations]

    def _row(self, combination: Combination) -> ResultRow:
        model, quantization, compensation = combination
        first, searched = Variant(*combination), quantization in self.searches
        finished = self.stopped.finished
        wanted: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for repeat in range(1, self.config["repeats"] + 1):
            for kind, variant in self._evaluated(combination, repeat).items():
                wanted[kind] += [variant.evaluated] if variant.evaluated not in wanted[kind] else []
        found = {
            kind: [folder for folder in folders if finished(folder, "metrics.json")]
            for kind, folders in wanted.items()
        }
        names = self._names(combination, variant=None)
        entry = self.config["quantization"][quantization]
        return ResultRow(
            **combination._asdict(),
            dataset=self.dataset(model),
            failed=self.stopped.causes(names) if found != wanted else [],
            settings=searched_settings(self.config["quantization"], quantization),
            recipe=finished(first.calibrated("recipe.json")) if searched else None,
            asked=entry.get("smallest") or entry.get("best") or {},
            compensation_settings=self.config["compensation"].get(compensation),
            annotations=finished(chosen_images(self.dataset(model), "evaluation")),
            repeats=found,
            warmup=finished(first.calibrated("warmup.pth")),
        )

    @cached_property
    def export_rows(self) -> list[ExportRow]:
        """The rows of all exported detectors in all runtimes, for summary and report."""
        rows = []
        finished = self.stopped.finished
        for combination, entry in self.exports.items():
            variant = Variant(*combination)
            simulated = self._evaluated(combination).get(variant.kind)
            for runtime in entry.runtime:
                folder = f"{variant.exported}/{runtime}"
                exported = finished(folder, "metrics.json")
                benchmark = finished(f"{folder}/benchmark.json")
                names = self._names(combination, runtime=runtime, variant=variant.name)
                row = ExportRow(
                    *(*combination, runtime, exported, benchmark),
                    simulated=finished(simulated.evaluated, "metrics.json") if simulated else None,
                    failed=self.stopped.causes(names) if None in (exported, benchmark) else [],
                )
                rows.append(row)
        return rows

    @property
    def tradeoffs(self) -> dict[str, str]:
        """The table of AP against costs of each model."""
        return {row.model: tradeoff(row.model) for row in self.rows}

    def result_files(self, *names: str, kinds: Iterable[str] = KINDS) -> list[str]:
        """Files with these names in all result folders, each once."""
        folders = unique(f for row in self.rows for kind in kinds for f in row.repeats[kind])
        return [f"{folder}/{name}" for folder in folders for name in names]

    def row_files(self, key: str, suffix: str | None = None) -> list[str]:
        """The values (paths) of a field of all result rows, each once; ``suffix`` replaces their own."""
        found = unique(getattr(row, key) for row in self.rows)
        return [os.path.splitext(path)[0] + suffix for path in found] if suffix else found

    def exported_files(self) -> list[str]:
        """Files of exported detectors that summary and report read."""
        folders = [row.exported for row in self.export_rows if row.exported]
        found = [f"{f}/{n}" for f in folders for n in ("metrics.json", "predictions.json")]
        return [*found, *(row.benchmark for row in self.export_rows if row.benchmark)]

    def annotation_files(self) -> list[str]:
        """The annotation files of the chosen images of all data sets that are evaluated on."""
        paths = self.row_files("annotations")
        others = [path.replace("evaluation.json", "calibration.json") for path in paths]
        return unique(map(self.stopped.finished, [*paths, *others]))

    def detector_results(self) -> list[str]:
        """All files of jobs that run a detector."""
        exported = [Variant(*row) for row in self.exports]
        exported += [Variant(variant.model) for variant in exported]
        fitted = ("compensation.pth", "compensation.json", "blocks.csv")
        return [
            *self.result_files("metrics.json", "predictions.json"),
            *self.result_files(*fitted, kinds=["compensated"]),
            *self.row_files("recipe"),
            *self.row_files("recipe", ".yaml"),
            *(f"{v.exported}/model.{end}" for v in unique(exported) for end in ("onnx", "json")),
            *self.exported_files(),
            *self.row_files("warmup", ".json"),
            *(self.row_files("warmup") if self.config["keep_warmup"] else []),
        ]

    def results(self) -> list[str]:
        """All files that the config asks for; missing ones are made again."""
        tables = [TABLE, DOCUMENT, REPORT, *([EXPORTS_TABLE] if self.exports else [])]
        return [*tables, *self.annotation_files(), *self.detector_results()]
