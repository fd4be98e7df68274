"""Mixed-precision search: measure the error of each layer's bits at the heads, and choose a recipe."""

import dataclasses
import hashlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from mmdet.models import BaseDetector
from pydantic import TypeAdapter

from ..archives import Finished
from ..config import QuantizationSettings, Search, as_entry, as_plain
from ..config.search import stored_bits
from ..errors import QwtError
from ..files import read_json, sha256_file, write_atomically, write_json
from ..fingerprint import weights_fingerprint
from ..quantization.calibrate import calibrate
from ..quantization.convert import matching_override, quantize_model, quantized_layers
from ..quantization.size import code_bytes, size_range
from ..record import quantization_of, record_of
from ..search.mixed import (
    Choice,
    Measurement,
    ParetoFront,
    Recipe,
    measure_candidates,
    recipe_settings,
)
from ..staleness import source_hash
from .evaluate import check_ground_truth, evaluate_detector
from .inputs import Inputs, Pathlike

logger = logging.getLogger(__name__)

LEAST_SCORED = 5
"""Fewest images that recipes are scored on, which are half of the annotated calibration images."""
_MEASUREMENT = TypeAdapter(Measurement)


@contextmanager
def split_images(annotations: Pathlike) -> Iterator[tuple[Path, Path]]:
    """Split an annotation file in two: images to calibrate on, and images to score recipes on.

    Every second image with annotated objects is for scoring; all others are for calibration.
    """
    content = read_json(annotations, what="annotation file")
    objects = {a["image_id"] for a in content["annotations"] if not a.get("iscrowd")}
    scored = {image["id"] for image in content["images"] if image["id"] in objects}
    scored = set(sorted(scored)[1::2])
    with tempfile.TemporaryDirectory(prefix="qwt-mmdet-") as folder:
        paths = (Path(folder, "calibration.json"), Path(folder, "scoring.json"))
        for path, wanted in zip(paths, (False, True), strict=True):
            part = {
                key: [entry for entry in content[key] if (entry[image] in scored) == wanted]
                for key, image in (("images", "id"), ("annotations", "image_id"))
            }
            write_json(path, content | part)
        yield paths


def measure(
    inputs: Inputs,
    *,
    settings: Mapping[str, Any],
    weight_bits: Sequence[int],
    activation_bits: Sequence[int],
    images: int,
    output: Pathlike,
    metrics: Iterable[str] = (),
    asked: Mapping[str, Search] | None = None,
    activation_cache: Mapping[str, Any] | None = None,
) -> None:
    """Measure the error of each layer at each number of bits; write ``output`` (.json).

    An interrupted measurement goes on after the numbers of bits in ``{output}.unfinished``.

    Args:
        settings: of a plain quantization, whose bits are replaced.
        images: number of images to calibrate and to measure on; none of them scores recipes.
        metrics: types of AP by which recipes will be scored.
        asked: searches that have a size as their limit, by name.
        activation_cache: as of :func:`choose`.
    """
    model = inputs.load()
    inputs.check_evaluation(model)
    plain = QuantizationSettings.from_mapping(settings)
    if asked:
        check_sizes(quantize_model(inputs.load(), plain), asked)
    with split_images(inputs.annotations) as (calibration, scoring):
        for metric in metrics:
            check_scoring(model, scoring, metric)
        part = dataclasses.replace(inputs, annotations=calibration, batch_size=1)
        batches = list(islice(part.loader(model), images))

    def calibrated(settings: QuantizationSettings) -> BaseDetector:
        model = quantize_model(inputs.load(), settings)
        options = {"noise_images": 0, "keep_weights": True, **(activation_cache or {})}
        return calibrate(model, batches, **options)

    hashes = [weights_fingerprint({"image": batch["inputs"][0]}) for batch in batches]
    unfinished = Path(f"{output}.unfinished")
    fingerprint = record_of(model).fingerprint
    depends_on = _depends_on(
        inputs, "measure_candidates", fingerprint, settings=as_plain(plain), images=hashes
    )
    finished = Finished(unfinished, depends_on)
    found = measure_candidates(calibrated, plain, weight_bits, activation_bits, batches, finished)
    write_json(output, _MEASUREMENT.dump_python(found, mode="json", by_alias=True), indent=1)
    unfinished.unlink(missing_ok=True)


def check_sizes(model: BaseDetector, asked: Mapping[str, Search]) -> None:
    """Refuse sizes that no recipe of a quantized model, not calibrated yet, can have.

    Raises:
        QwtError: names the key, and the sizes that there are.
    """
    overrides = quantization_of(model).settings.overrides
    for name, search in asked.items():
        bits = {}
        for layer, own in quantized_layers(model).items():
            if matching_override(layer, overrides) is None:
                possible = sorted([own.weight_bits, *search.weight_candidates()])
                low, high = (stored_bits(b, search.storage) for b in (possible[0], possible[-1]))
                bits[layer] = low, high
        check_size(name, search, *size_range(model, bits))


def check_size(name: str, search: Search, smallest: float, largest: float) -> None:
    """Refuse a size that is not between these, in bytes."""
    assert search.best is not None, "the search has a budget"
    asked = search.best.max_size_mb
    if asked is not None and not smallest <= asked * 1e6 <= largest:
        raise QwtError(
            f"quantization.{name}.best.max_size_mb is {asked:g}, but recipes of its candidates have from "
            f"{smallest / 1e6:.3g} to {largest / 1e6:.3g} MB; choose a size in between, other candidates or a larger scope."
        )


def _depends_on(
    inputs: Inputs, step: str, fingerprint: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Everything that the parts of a search depend on, as plain values."""
    return {
        **more,
        "detector": fingerprint,
        "seed": inputs.seed,
        "device": inputs.job.device.partition(":")[0],  # any card can go on
        "code": source_hash(step),
    }


@dataclass(frozen=True)
class Round:
    """A recipe that was calibrated and evaluated.

    Args:
        index: of the recipe on the Pareto front.
        drop: loss of AP (0 to 1) on the images for scoring.
    """

    index: int
    average_weight_bits: float
    weight_bytes: int
    relative_error: float
    drop: float


@dataclass(frozen=True)
class Chooser:
    """Chooses the recipe of a search.

    Args:
        name: of the quantization.
        settings: of the plain quantization whose bits are replaced.
    """

    name: str
    search: Search
    settings: QuantizationSettings
    measurement: Measurement

    def front(self) -> ParetoFront:
        objective = {"size": "bytes"}.get(self.search.objective, self.search.objective)
        return ParetoFront(self.measurement.layers, objective, self.search.storage)

    def weight_bytes(self, recipe: Recipe) -> int:
        """Bytes of the detector, as its report will say."""
        return round(recipe.bytes + self.measurement.fixed_bytes)

    def average_weight_bits(self, recipe: Recipe) -> float:
        """Bits per weight that the searched layers take."""
        return 8 * recipe.bytes / sum(c.weights for c in self.measurement.layers)

    def within_budget(self) -> Recipe:
        """The recipe with the smallest error within the budget of ``search.best``.

        Raises:
            QwtError: no recipe is so small, or all are smaller.
        """
        best, front = self.search.best, self.front()
        assert best is not None, "the search has a budget"
        if best.average_weight_bits is not None:
            weights = sum(c.weights for c in self.measurement.layers)
            return front.within(code_bytes(weights, best.average_weight_bits))
        assert best.max_size_mb is not None, "one of both is given"
        check_size(self.name, self.search, *(self.weight_bytes(front[index]) for index in (0, -1)))
        return front.within(best.max_size_mb * 1e6 - self.measurement.fixed_bytes)

    def smallest(
        self,
        inputs: Inputs,
        unfinished: Path | None = None,
        activation_cache: Mapping[str, Any] | None = None,
    ) -> tuple[Recipe, list[Round]]:
        """The cheapest recipe that loses at most ``search.smallest.max_drop``, by bisection of the Pareto front.

        Each round calibrates a recipe on one part of the images and scores it on the other. The next recipe has
        the mean SQNR (in dB) of those that are left.

        Args:
            unfinished: file that keeps the finished rounds.

        Raises:
            QwtError: the detector lacks the metric, or too few images have annotations.
        """
        limit, front = self.search.smallest, self.front()
        assert limit is not None, "the search has a limit"
        errors = front.relative_errors()
        low, high = 0, len(front) - 1  # the recipe is one of these
        rounds: list[Round] = []
        with split_images(inputs.annotations) as (calibration, scoring):
            scorer = Scorer(inputs, calibration, scoring, limit.metric, activation_cache)
            finished = self._finished(unfinished, inputs, scorer)
            while low < high and len(rounds) < self.search.rounds:
                middle = (errors[low] * errors[high]) ** 0.5
                index = next(i for i in range(low, high + 1) if errors[i] <= middle)
                index = min(index, high - 1)
                recipe = front[index]
                if str(index) not in finished.results:
                    finished.add(str(index), scorer.drop(recipe_settings(self.settings, recipe)))
                drop = finished.results[str(index)]
                average, size = self.average_weight_bits(recipe), self.weight_bytes(recipe)
                rounds.append(Round(index, average, size, recipe.relative_error, drop))
                low, high = (low, index) if drop <= limit.max_drop else (index + 1, high)
                self._log(rounds, scorer)
        best = best_round(rounds, limit.max_drop)
        if best is None:
            logger.warning(
                "No recipe that was tried loses less than %g; the largest is taken.", limit.max_drop
            )
        return front[best.index if best else -1], rounds

    def _finished(self, path: Pathlike | None, inputs: Inputs, scorer: "Scorer") -> Finished:
        """The losses of AP of evaluated recipes, by their indices on the Pareto front."""
        if path is None:
            return Finished()
        digest = hashlib.sha256(_MEASUREMENT.dump_json(self.measurement))
        content = read_json(inputs.annotations, what="annotation file")
        root = Path(content["info"]["image_root"])
        images = [root / image["file_name"] for image in content["images"]]
        for file in (inputs.annotations, *images):
            digest.update(sha256_file(file).encode())
        depends_on = _depends_on(
            inputs, "choose_recipe", scorer.fingerprint, search=as_plain(self.search),
            settings=as_plain(self.settings), candidates_and_images=digest.hexdigest(),
        )  # fmt: skip
        return Finished(path, depends_on)

    def _log(self, rounds: Sequence[Round], scorer: "Scorer") -> None:
        assert self.search.smallest is not None
        last, best = rounds[-1], best_round(rounds, self.search.smallest.max_drop)
        logger.info(
            "Round %d of %d: %.2f bits per weight, %.2f MB: AP falls by %.4f of %.3f on %d calibration images; "
            "best so far: %s",
            len(rounds), self.search.rounds, last.average_weight_bits, last.weight_bytes / 1e6, last.drop,
            scorer.baseline, scorer.images, f"{best.weight_bytes / 1e6:.2f} MB" if best else "none",
        )  # fmt: skip


def best_round(rounds: Sequence[Round], max_drop: float) -> Round | None:
    """The round of the cheapest recipe that lost at most ``max_drop``, if any."""
    return min((r for r in rounds if r.drop <= max_drop), key=lambda r: r.index, default=None)


def check_scoring(model: BaseDetector, scoring: Path, metric: str) -> int:
    """Check that recipes can be scored on an annotation file; return its number of images.

    Raises:
        QwtError: too few images have annotations, these do not fit the detector, or it lacks the metric.
    """
    images = len(read_json(scoring)["images"])
    if images < LEAST_SCORED:
        raise QwtError(
            f"Recipes would be scored on {images} images: half of the calibration images that have annotations. "
            f"`smallest` needs {LEAST_SCORED} at least, and hundreds to tell small losses from chance; choose more "
            "calibration images, or ask for `best` with a size."
        )
    if metric == "segm" and not model.with_mask:
        raise QwtError("smallest.metric is segm, but this detector has no masks; use bbox.")
    check_ground_truth(model, scoring)
    return images


class Scorer:
    """Calibrates recipes on some images and scores them on others.

    Attributes:
        baseline: AP of the full-precision detector.
        fingerprint: of the detector.
        images: number of images for scoring.

    Raises:
        QwtError: the detector lacks the metric, or too few images have annotations.
    """

    def __init__(
        self,
        inputs: Inputs,
        calibration: Path,
        scoring: Path,
        metric: str,
        activation_cache: Mapping[str, Any] | None,
    ) -> None:
        self._calibration = dataclasses.replace(inputs, annotations=calibration)
        self._scoring = dataclasses.replace(inputs, annotations=scoring)
        self._metric, self._cache = metric, activation_cache or {}
        model = inputs.load()
        self.images = check_scoring(model, scoring, metric)
        self.fingerprint = record_of(model).fingerprint
        self.baseline = self._ap(model)
        if not self.baseline:
            raise QwtError(
                f"The full-precision detector has no {metric} AP on the {self.images} calibration images that "
                "recipes are scored on, so nothing can be lost; check their annotations."
            )

    def _ap(self, model: BaseDetector) -> float:
        scoring = self._scoring
        metrics, _ = evaluate_detector(model, scoring.annotations, workers=scoring.workers)
        return float(metrics.get(self._metric, {}).get("AP") or 0.0)

    def drop(self, settings: QuantizationSettings) -> float:
        """Loss of AP of the detector with these settings."""
        model = quantize_model(self._calibration.load(), settings)
        calibrate(model, self._calibration.loader(model), noise_images=0, **self._cache)
        return self.baseline - self._ap(model)


def _as_json(item: Choice | Round) -> dict[str, Any]:
    """The fields, with the relative error under the key that the file has for it."""
    fields = dataclasses.asdict(item).items()
    return {"noise" if key == "relative_error" else key: value for key, value in fields}


def choose(
    inputs: Inputs,
    *,
    name: str,
    search: Mapping[str, Any],
    settings: Mapping[str, Any],
    candidates: Pathlike,
    recipe: Pathlike,
    summary: Pathlike,
    activation_cache: Mapping[str, Any] | None = None,
) -> None:
    """Choose a recipe; write it as a config entry (``recipe``, .yaml) and its details (``summary``, .json).

    An interrupted search goes on after the rounds in ``{summary}.unfinished``.

    Args:
        name: of the quantization.
        search: fields of :class:`..config.Search`.
        settings: of the plain quantization whose bits are replaced.
        candidates: the file that :func:`measure` wrote.
        activation_cache: limits {device_gb, memory_gb} of the activations that a refit caches.
    """
    chooser = Chooser(
        name,
        Search(**search),
        QuantizationSettings.from_mapping(settings),
        _MEASUREMENT.validate_python(read_json(candidates, what="measurement")),
    )
    rounds: list[Round] = []
    unfinished = Path(f"{summary}.unfinished")
    if chooser.search.best is not None:
        chosen = chooser.within_budget()
    else:
        chosen, rounds = chooser.smallest(inputs, unfinished, activation_cache)
    average, size = chooser.average_weight_bits(chosen), chooser.weight_bytes(chosen)
    note = f"# {average:.2f} bits per weight on average, {size / 1e6:.2f} MB. It can stand under `quantization:`.\n"
    entry = {f"{name}-recipe": as_entry(recipe_settings(chooser.settings, chosen))}
    layers = {layer.name: layer for layer in chooser.measurement.layers}
    about = {
        "average_weight_bits": average,
        "average_activation_bits": sum(
            c.activation_bits * layers[name].multiply_adds_percent / 100
            for name, c in chosen.choices.items()
        ),
        "weight_bytes": size,
        "bit_operations_percent": chosen.bit_operations,
        "noise": chosen.relative_error,
        "rounds": [_as_json(r) for r in rounds],
        "layers": [
            {
                "name": name,
                "weights": layers[name].weights,
                "multiply_adds_percent": layers[name].multiply_adds_percent,
                **_as_json(choice),
            }
            for name, choice in chosen.choices.items()
        ],
        **inputs.job.account(),
    }
    with write_atomically(recipe) as partial:
        partial.write_text(note + yaml.safe_dump(entry, sort_keys=False), encoding="utf-8")
    write_json(summary, about, indent=1)
    unfinished.unlink(missing_ok=True)
    logger.info("%s: %.2f bits per weight on average, %.2f MB", name, average, size / 1e6)
