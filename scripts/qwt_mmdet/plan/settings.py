"""The settings that the result of each rule depends on: its ``params`` and some inputs.

Files of the user are no inputs of rules: Snakemake would interpret {x} and <x> in their names.
"""

import os
from collections.abc import Mapping
from typing import Any

from ..config import of_repeat, searched_settings
from ..config.datasets import Part
from ..data.sources import Source, open_source
from ..errors import QwtError
from ..files import is_url
from ..runtime import REFITS
from ..staleness import file_state
from .files import Variant, chosen_images, dataset_folder, measured, without_repeat
from .run import EXPORT_IMAGES, Plan, part_of


def existing(path: str, key: str) -> str:
    """Return a path that a key of the config names; a QwtError if there is no such file."""
    if not os.path.isfile(path):
        raise QwtError(f"{key} is {str(path)!r}, but there is no such file; check the path.")
    return path


class Settings:
    """Params and inputs of rules; most arguments are wildcards."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._config = plan.config

    def entry(self, section: str, key: str | None = None, **wildcard: str) -> Any:
        """The entry of a section that a wildcard names (for any repeat), or the value of its ``key``."""
        (name,) = wildcard.values()
        entry = self._config[section][without_repeat(name)]
        return entry if key is None else entry.get(key)

    def plain(self, quantization: str) -> Mapping[str, Any] | None:
        """Settings of a plain quantization; None where its bits are searched."""
        searched = without_repeat(quantization) in self._plan.searches
        return None if searched else self.searched(quantization)

    def searched(self, quantization: str) -> Mapping[str, Any]:
        """Settings of a quantization; for a search or a measurement, those of the entry named by ``like``."""
        name = without_repeat(quantization)
        name = self._plan.measurements.get(name, name)
        return searched_settings(self._config["quantization"], name)

    def candidates(self, measurement: str) -> dict[str, Any]:
        """Settings, numbers of bits and number of images of a measurement."""
        search = self._plan.searches[self._plan.measurements[without_repeat(measurement)]]
        return {
            "settings": self.searched(measurement),
            "weight_bits": search.weight_candidates(),
            "activation_bits": search.activation_candidates(),
            "images": search.images,
        }

    def measured(self, model: str, quantization: str) -> str | list[str]:
        """The file of the measurement that a search chooses from; an empty list for a plain quantization."""
        measurement = self._plan.measurement(quantization)
        return measured(model, measurement) if measurement else []

    def recipe(self, model: str, quantization: str) -> str | list[str]:
        """The file of a search's recipe; an empty list, which is no input, for a plain quantization."""
        recipe = Variant(model, quantization).calibrated("recipe.yaml")
        return recipe if self._plan.measurement(quantization) else []

    def images(self, part: str, model: str, quantization: str | None) -> str:
        """Annotation file of a model's images, for calibration those of the repeat."""
        repeat = "".join((quantization or "").partition("@")[1:])
        name = part + (repeat if part == "calibration" else "")
        return chosen_images(self._plan.dataset(model), name)

    def images_of(self, step: str, model: str) -> int | None:
        """Number of images that a step runs a model on; None where the config does not tell."""
        count = self._config["datasets"][self._plan.dataset(model)][part_of(step)]["images"]
        limited = self._plan.most_images(step, model) is not None
        return None if count == "all" or limited else count

    def cache_gb(self, step: str, quantization: str | None) -> float:
        """Gigabytes of memory that a step's activation cache may take."""
        refits = step in REFITS and quantization and self.searched(quantization)["refit"] != "none"
        caches = refits or step == "fit_compensation"
        return self._config["activation_cache"]["memory_gb"] if caches else 0.0

    def shards(self, jobs: int, **names: Any) -> list[str]:
        """Files of the detections of an evaluation's shards; none where one job evaluates all images."""
        return self._plan.shards(Variant(**names), jobs)

    def parts(self, model: str, evaluated: str) -> dict[str, str]:
        """Warmup and compensation files of the variant of a shard."""
        return Variant.named(model, evaluated).parts()

    def exported(self, model: str, variant: str) -> dict[str, str]:
        """Files of an exported variant: its parts, and its metrics if it is evaluated."""
        found = Variant.named(model, variant)
        evaluated = found in self._plan.evaluations
        return found.parts() | ({"metrics": f"{found.evaluated}/metrics.json"} if evaluated else {})

    def export(self, model: str, variant: str) -> dict[str, Any]:
        """Export settings of a variant, or of full precision for comparison with a model's variants."""
        entries = {Variant(*r): e for r, e in self._plan.exports.items() if r.model == model}
        entry = entries.get(Variant.named(model, variant)) or next(iter(entries.values()))
        return {
            "opset": entry.opset,
            "weights": entry.weights,
            "input_size": entry.input,
            "images": EXPORT_IMAGES,
        }

    def _source(self, dataset: str, part: str) -> tuple[Source, Part]:
        """Source of a data set, and the part (without the number of a repeat)."""
        settings, meant = of_repeat(self._config["datasets"][dataset], part)
        return open_source(settings, dataset_folder(dataset)), meant

    def part(self, dataset: str, part: str, *, chosen: bool) -> dict[str, Any]:
        """Settings that the annotations of a part depend on, or (``chosen``) the choice of its images."""
        source, meant = self._source(dataset, part)
        return source.choice_settings(meant) if chosen else source.annotation_settings(meant)

    def source_file(self, dataset: str, part: str) -> str:
        """Path of the source of a part's annotations; repeats share it unless images are generated."""
        meant = self._source(dataset, part)[1]
        first, own = (self.part(dataset, name, chosen=False) for name in (meant, part))
        return f"{dataset_folder(dataset)}/{meant if first == own else part}_source.json"

    def local_annotations(self, dataset: str, part: str) -> Any:
        """State of the annotation file of a part, if its data set is a local folder."""
        source, meant = self._source(dataset, part)
        path = source.local_annotations(meant)
        key = f"The annotation file of datasets.{dataset}.{meant}"
        return None if path is None else file_state(existing(path, key))

    def local_checkpoint(self, model: str) -> Any:
        """State of the model's checkpoint, if it is a local file."""
        path = self._config["models"][model]["checkpoint"]
        return None if is_url(path) else file_state(existing(path, f"models.{model}.checkpoint"))

    def supplied_warmup(self, model: str, quantization: str) -> dict[str, Any]:
        """Path and state of the warmup file that the config supplies, if any."""
        path = self._config["models"][model]["warmup"].get(quantization)
        if path is None:
            return {"path": None}
        key = f"models.{model}.warmup.{quantization}"
        return {"path": existing(path, key), "state": file_state(path)}
