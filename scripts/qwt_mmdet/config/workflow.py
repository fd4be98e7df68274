"""The whole configuration, and checks across its sections."""

import importlib.util
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import (
    Discriminator,
    Field,
    Strict,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from ..errors import check_installed, suggestion
from .compensation import CompensationSettings
from .datasets import Dataset
from .export import Export, OwnRuntime
from .models import Model
from .names import Name
from .quantization import QuantizationSettings
from .reading import check_values
from .search import Search, can_be, is_search
from .section import Flag, Gigabytes, Nested, Seed, Text, raise_problems, section, sentences, shown

RESERVED_NAMES: dict[str, tuple[str, ...]] = {
    "datasets": (),
    "models": (
        "datasets",
        "train_demo",
        "summary.csv",
        "summary.json",
        "exports.csv",
        "report.html",
    ),
    "quantization": (
        "baseline",
        "candidates",
        "checkpoint.pth",
        "checkpoint.pth.download",
        "config_files.json",
    ),
    "compensation": (
        "quantized",
        "warmup.pth",
        "warmup.json",
        "sensitivity.csv",
        "recipe.yaml",
        "recipe.json",
        "model.onnx",
        "model.json",
        "graphs.json",
        *get_args(OwnRuntime),
    ),
}
"""Names that would collide with other files under results/, in lower case."""

Evaluation = Literal["evaluate_baseline", "evaluate_quantized"]
"""Evaluations that can be skipped."""

WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@section
class Loading:
    """How images are read."""

    batch_size: Annotated[int, Strict(), Field(ge=1, le=4096)] = 1
    """Number of images that are read at a time. In an evaluation, images of one shape run together."""
    workers: Annotated[int, Strict(), Field(ge=0, le=1024)] = 2
    """Number of processes that read images; at most the rule's threads."""
    shards: Annotated[int, Strict(), Field(ge=1, le=10_000)] | Literal["auto"] = "auto"
    """For `evaluation` only: number of jobs that share the images of an evaluation, in whole batches. The result
    is the same. `auto`: as many as can run in parallel, each with at least 250 images. A finished evaluation is
    not repeated."""


@section
class ActivationCache:
    """Limits of the cache of activations, for fits of compensations and for `refit: sequential`.

    They do not change results. Activations beyond the limits are cached in a temporary folder (see TMPDIR).
    """

    device_gb: Gigabytes = 4.0
    """Largest size on the GPU in gigabytes."""
    memory_gb: Gigabytes = 4.0
    """Largest size in memory in gigabytes."""


@section
class Sensitivity:
    """Settings of `snakemake sensitivity`."""

    images: Annotated[int, Strict(), Field(ge=1, le=1_000_000)] = 8
    """Calibration images on which each layer is quantized alone."""


@section
class Bootstrap:
    """Settings of the paired bootstrap over evaluation images, for 95 % intervals."""

    resamples: Annotated[int, Strict(), Field(ge=100, le=100_000)] = 1000
    """Number of resamples."""


@section
class Targets:
    """Combinations to compute: the product of three lists."""

    model: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Names of models. Omitted: all of them."""
    quantization: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Names of quantizations. Omitted: all of them."""
    compensation: tuple[Text, ...] | None = None
    """Names of compensations. Omitted: all of them. An empty list: none."""


class Combination(NamedTuple):
    """Names of the three entries that a result belongs to; None for no compensation."""

    model: str
    quantization: str
    compensation: str | None


Quantization = Annotated[
    Annotated[
        Annotated[QuantizationSettings, Tag("QuantizationSettings")]
        | Annotated[Search, Tag("Search")],
        Discriminator(lambda entry: "Search" if is_search(entry) else "QuantizationSettings"),
    ],
    Nested,
]

SECTIONS = ("models", "quantization", "compensation")
"""The sections of a combination's entries, in the order of its fields."""


@section
class Configuration:
    """Models, data sets, quantizations and compensations of a run.

    Names of entries are free; they are folder names under results/. Relative paths are relative to the folder
    that Snakemake runs in.
    """

    datasets: Annotated[dict[Name, Dataset], Field(min_length=1)]
    """Images in COCO format, by name."""
    models: Annotated[dict[Name, Annotated[Model, Nested]], Field(min_length=1)]
    """Trained MMDetection detectors, by name."""
    quantization: Annotated[dict[Name, Quantization], Field(min_length=1)]
    """Quantization settings, or searches of the bits, by name."""
    compensation: dict[Name, Annotated[CompensationSettings, Nested]]
    """Compensation settings, by name; `{}`: no compensation."""
    seed: Seed = 0
    """Seed of the random numbers of steps (not of the choice of images)."""
    device: Annotated[str, Strict(), Field(pattern=r"\A(auto|cpu|cuda(:\d{1,2})?)\z")] = "auto"
    """Device of detectors: `auto` (a GPU if there is one), `cpu`, `cuda` (fails without a GPU) or one GPU, such as
    `cuda:1`. Each job takes a GPU that no other job of this machine uses, and waits for one.
    `--resources gpu=N` lets N jobs use GPUs at a time."""
    repeats: Annotated[int, Strict(), Field(ge=1, le=100)] = 1
    """Number of calibrations and compensations, each on other calibration images. Above 1, every AP is a mean, and
    its interval includes the variation between calibration images. Exports are of the first repeat."""
    targets: Annotated[tuple[Annotated[Targets, Nested], ...], Field(min_length=1)] | None = None
    """Combinations to compute. Omitted: every model with every quantization and every compensation."""
    export: tuple[Annotated[Export, Nested], ...] = ()
    """Detectors to write as ONNX files, which are then evaluated and timed. The last entry that names a detector
    is used."""
    skip: tuple[Evaluation, ...] = ()
    """Evaluations to leave out; comparisons with them are then missing in table and report."""
    keep_warmup: Flag = True
    """Keep warmup files. Without them each change of a compensation causes another calibration."""
    max_download_gb: Annotated[float, Strict(), Field(ge=0, le=1000)] = 20.0
    """Largest download of a checkpoint or an annotation file in gigabytes. The limit of an image follows from its
    width and height."""
    calibration: Annotated[Loading, Nested] = Field(default_factory=Loading)
    """How calibration images are read. It does not change results: each image runs alone."""
    evaluation: Annotated[Loading, Nested] = Field(default_factory=Loading)
    """How evaluation images are read. Another batch size causes another evaluation, since it changes rounding
    errors."""
    activation_cache: Annotated[ActivationCache, Nested] = Field(default_factory=ActivationCache)
    """Limits of the cache of activations, for fits of compensations and for `refit: sequential`."""
    sensitivity: Annotated[Sensitivity, Nested] = Field(default_factory=Sensitivity)
    """Settings of `snakemake sensitivity`."""
    bootstrap: Annotated[Bootstrap, Nested] = Field(default_factory=Bootstrap)
    """Settings of the paired bootstrap over evaluation images, for 95 % intervals."""

    @model_validator(mode="before")
    @classmethod
    def _searches_for_files(cls, values: Any) -> Any:
        """A search for a size counts what a file stores, if it is exported and can be asked of a file.

        Nothing of the values was checked before.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("quantization"), Mapping):
            return values
        exports = values.get("export")
        named = [
            entry.get("quantization")
            for entry in (exports if isinstance(exports, Sequence) else ())
            if isinstance(entry, Mapping) and entry.get("weights", "packed") == "packed"
        ]
        found = dict(values["quantization"])
        for name, entry in found.items():
            if not isinstance(entry, Mapping) or not is_search(entry) or "storage" in entry:
                continue
            of_file = {**entry, "storage": "onnx"}
            is_exported = any(n is None or (isinstance(n, Sequence) and name in n) for n in named)
            if is_exported and entry.get("objective", "size") == "size" and can_be(of_file):
                found[name] = of_file
        return {**values, "quantization": found}

    @model_validator(mode="after")
    def _agree(self) -> "Configuration":
        problems = [*self._folders(), *self._references(), *self._nothing_evaluated()]
        problems += self._sharded_calibration()
        problems = problems or [*self._export_problems(), *self._repeat_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _folders(self) -> Iterator[str]:
        """Names that cannot be folders beside the others; macOS and Windows ignore case."""
        runtimes = tuple(name.lower() for entry in self.export for name in entry.runtime)
        for key, reserved in RESERVED_NAMES.items():
            taken = reserved + runtimes if key == "compensation" else reserved
            seen: dict[str, str] = {}
            for name in getattr(self, key):
                other = seen.setdefault(name.lower(), name)
                if other != name:
                    yield (
                        f"{key}: the names {other!r} and {name!r} differ in case alone, so one would "
                        "overwrite the other on macOS and Windows; rename one."
                    )
                if name.lower() in taken:
                    yield f"{key}.{name}: the name {name!r} is taken by the workflow; choose another."
                if WINDOWS_DEVICE.fullmatch(name):
                    yield f"{key}.{name}: {name!r} is a device on Windows; choose another name."

    def _references(self) -> Iterator[str]:
        """Names that refer to an entry of another section."""
        for name, model in self.models.items():
            yield from self._unknown(f"models.{name}.dataset", "datasets", [model.dataset])
            yield from self._unknown(f"models.{name}.warmup", "quantization", model.warmup)
            for quantization in model.warmup:
                if isinstance(self.quantization.get(quantization), Search):
                    yield (
                        f"models.{name}.warmup.{quantization} supplies a finished calibration, but "
                        f"quantization.{quantization} is a search; replace it by the recipe of the file, or remove "
                        "the file."
                    )
        for name, entry in self.quantization.items():
            if isinstance(entry, Search) and entry.like is not None:
                plain = [n for n, e in self.quantization.items() if not isinstance(e, Search)]
                if entry.like not in plain:
                    yield (
                        f"quantization.{name}.like names {shown(entry.like)}, which is not a plain entry of "
                        f"quantization{suggestion(entry.like, plain) or '.'} Known: "
                        f"{', '.join(plain) or 'none'}."
                    )
        for name in ("targets", "export"):
            for index, target in enumerate(getattr(self, name) or ()):
                for key, section_name in zip(Combination._fields, SECTIONS, strict=True):
                    named = getattr(target, key) or ()
                    yield from self._unknown(f"{name}[{index}].{key}", section_name, named)

    def _unknown(self, key: str, section_name: str, names: Iterable[str]) -> Iterator[str]:
        known = list(getattr(self, section_name))
        for name in names:
            if name not in known:
                yield (
                    f"{key} names {shown(name)}, which is not an entry of {section_name}"
                    f"{suggestion(name, known) or '.'} Known: {', '.join(known)}."
                )

    def _sharded_calibration(self) -> Iterator[str]:
        if self.calibration.shards not in (1, "auto"):
            yield "calibration.shards must be 1, as a calibration is one job; remove it."

    def _nothing_evaluated(self) -> Iterator[str]:
        if not self.compensation and "evaluate_quantized" in self.skip:
            yield (
                "compensation is empty and skip names evaluate_quantized, so no quantized detector "
                "would be evaluated; add a compensation or do not skip."
            )

    def _export_problems(self) -> Iterator[str]:
        """Entries that export nothing, and files of one model with different settings."""
        exported = self.exports()
        for index, entry in enumerate(self.export):
            if entry not in exported.values():
                yield (
                    f"export[{index}] exports nothing: targets do not compute its detectors, or later entries "
                    "replace it; add them to targets, or remove the entry."
                )
        first: dict[str, Export] = {}
        for (model, *_), entry in exported.items():
            other = first.setdefault(model, entry)
            for key in ("opset", "input"):
                values = [getattr(about, key) for about in (other, entry)]
                if values[0] != values[1]:
                    yield (
                        f"export: for the model {model}, {key} is both {values[0]!r} and {values[1]!r}; use one "
                        "value, as all files are compared with one file in full precision."
                    )

    def _repeat_problems(self) -> Iterator[str]:
        """Settings that contradict repeats on other calibration images."""
        if self.repeats == 1:
            return
        for name, model in self.models.items():
            for quantization in model.warmup:
                yield (
                    f"repeats is {self.repeats}, but models.{name}.warmup.{quantization} supplies a single "
                    "calibration; remove it, or set repeats: 1."
                )
            if getattr(self.datasets[model.dataset].calibration, "images", None) == "all":
                yield (
                    f"repeats is {self.repeats}, but datasets.{model.dataset}.calibration.images is all, so all "
                    "repeats would use the same images; give a number, or set repeats: 1."
                )

    def combinations(self) -> list[Combination]:
        """The combinations that are asked for, each once, in the configuration's order."""
        found: dict[Combination, None] = {}
        for target in self.targets or (Targets(),):
            named = [getattr(target, key) for key in Combination._fields]
            choices = [
                (list(getattr(self, section_name)) if names is None else names) or [None]
                for names, section_name in zip(named, SECTIONS, strict=True)
            ]
            found.update(dict.fromkeys(itertools.starmap(Combination, itertools.product(*choices))))
        return list(found)

    def exports(self) -> dict[Combination, Export]:
        """The export entry of each exported combination, in the configuration's order."""
        found: dict[Combination, Export] = {}
        for row, entry in itertools.product(self.combinations(), self.export):
            if all(
                getattr(row, key) in (getattr(entry, key) or (getattr(row, key),))
                for key in Combination._fields
            ):
                found[row if entry.compensation else row._replace(compensation=None)] = entry
        return found


_CONFIGURATION = TypeAdapter(Configuration)


def parse(config: Mapping[str, Any]) -> Configuration:
    """Check a config as it was read from a file.

    Raises:
        QwtError: one line for each problem, naming the key, the value and what is allowed.
    """
    check_values(config)
    try:
        parsed = _CONFIGURATION.validate_python(config)
    except ValidationError as error:
        raise_problems(sentences(error, Configuration))
    raise_problems(
        problem
        for name, model in parsed.models.items()
        for problem in model_config_problems(f"models.{name}.config", model.config)
    )
    if zoo_folder() is not None:  # the steps run in this environment
        for runtime in sorted({name for entry in parsed.export for name in entry.runtime}):
            check_installed(runtime.partition("-")[0])  # onnxruntime-cuda: of onnxruntime
    return parsed


def resolve(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with all defaults filled in, as plain values; keys have one order.

    Raises:
        QwtError: see :func:`parse`.
    """
    return _CONFIGURATION.dump_python(parse(config), mode="json", exclude_none=True)


def configuration(config: Mapping[str, Any]) -> Configuration:
    """Return a resolved config as its sections, without checks of files."""
    return _CONFIGURATION.validate_python(config)


def zoo_folder() -> Path | None:
    """Folder of the configs in the installed MMDetection; None without MMDetection."""
    specification = importlib.util.find_spec("mmdet")  # finds the package without importing it
    if specification is None or not specification.submodule_search_locations:
        return None
    folder = Path(specification.submodule_search_locations[0]) / ".mim" / "configs"
    return folder if folder.is_dir() else None


def model_config_problems(key: str, location: str) -> Iterator[str]:
    """A sentence if a model's config is neither a file nor in MMDetection."""
    zoo = zoo_folder()
    if os.path.isfile(location) or zoo is None or os.path.isfile(zoo / location):
        return
    known = [str(path.relative_to(zoo)) for path in zoo.glob("*/*.py")]
    hint = suggestion(location, known)
    yield (
        f"{key} is {shown(location)}, which is neither a file nor a config in MMDetection"
        f"{hint or '; check the name, which has the form yolox/yolox_nano_8xb8-300e_coco.py.'}"
    )
