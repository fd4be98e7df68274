"""Mixed-precision search: measure the error of each layer's bits at the heads, and choose a recipe."""

import dataclasses
import hashlib
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from mmdet.models import BaseDetector
from pydantic import TypeAdapter

from ..archives import Finished
from ..config import QuantizationSettings, Search, as_entry, as_plain
from ..config.search import stored_bits
from ..errors import QwtError
from ..evaluation.bootstrap import bootstrap
from ..evaluation.predict import predict
from ..files import read_json, sha256_file, write_atomically, write_json
from ..fingerprint import weights_fingerprint
from ..quantization.calibrate import calibrate
from ..quantization.convert import matching_override, quantize_model, quantized_layers
from ..quantization.size import code_bytes, size_range
from ..record import quantization_of, record_of
from ..search.judge import Loss, LossModel, Scored, cheapest
from ..search.mixed import (
    Choice,
    Measurement,
    ParetoFront,
    Recipe,
    measure_candidates,
    recipe_settings,
)
from ..search.outputs import OutputError, Reference
from ..staleness import source_hash
from .evaluate import check_ground_truth, evaluate_detector
from .inputs import Inputs, Pathlike

logger = logging.getLogger(__name__)

LEAST_SCORED = 10
"""Fewest annotated calibration images to score recipes on."""
ERROR_IMAGES = 24
"""Images of each fold on which the error at the heads is measured."""
RESAMPLES = 1000
"""Of the images, for the interval of a loss."""
ROOM = 0.02
"""Part of a size by which it may differ before a calibration, at most; what is this close is checked after it."""
MUCH_WORSE = 4.0
"""Ratio of the errors of recipes, if no loss of AP was seen with the smaller error."""
_MEASUREMENT = TypeAdapter(Measurement)


class Parts(NamedTuple):
    """Annotation files of calibration images.

    Args:
        scored: all that have annotated objects.
        folds: two pairs: images to calibrate on, and the half of ``scored`` that took no part in it.
    """

    scored: Path
    folds: tuple[tuple[Path, Path], ...]


@contextmanager
def cross_fitting(annotations: Pathlike) -> Iterator[Parts]:
    """Split an annotation file for cross-fitting: each annotated image scores a recipe that others calibrated."""
    content = read_json(annotations, what="annotation file")
    objects = {a["image_id"] for a in content["annotations"] if not a.get("iscrowd")}
    scored = sorted(image["id"] for image in content["images"] if image["id"] in objects)
    everything = {image["id"] for image in content["images"]}
    with tempfile.TemporaryDirectory(prefix="qwt-mmdet-") as folder:

        def write(name: str, wanted: Collection[int]) -> Path:
            part = {
                key: [entry for entry in content[key] if entry[image] in wanted]
                for key, image in (("images", "id"), ("annotations", "image_id"))
            }
            write_json(Path(folder, name), content | part)
            return Path(folder, name)

        halves = {*scored[::2]}, {*scored[1::2]}
        yield Parts(
            write("scored.json", {*scored}),
            tuple(
                (write(f"calibration{n}.json", everything - half), write(f"scored{n}.json", half))
                for n, half in enumerate(halves)
            ),
        )


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
        images: number of images to calibrate and to measure on.
        metrics: types of AP by which recipes will be scored.
        asked: searches that have a size as their limit, by name.
        activation_cache: as of :func:`choose`.
    """
    model = inputs.load()
    inputs.check_evaluation(model)
    plain = QuantizationSettings.from_mapping(settings)
    if asked:
        check_sizes(quantize_model(inputs.load(), plain), asked)
    with cross_fitting(inputs.annotations) as parts:
        for metric in metrics:
            check_scoring(model, parts.scored, metric)
    batches = list(islice(dataclasses.replace(inputs, batch_size=1).loader(model), images))

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
        smallest, largest = size_range(model, bits)
        check_size(name, search, (1 - ROOM) * smallest, (1 + ROOM) * largest)


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
        relative_error: at the heads, the sum of those of its layers. measured_error: of the recipe.
        drop: loss of AP (0 to 1) on the images for scoring.
    """

    index: int
    average_weight_bits: float
    weight_bytes: int
    relative_error: float
    measured_error: float
    drop: float


@dataclass(frozen=True)
class Answer:
    """The chosen recipe of a search for a loss, and what was tried.

    Args:
        loss: predicted.
        images: number of images for scoring. images_to_tell: see :meth:`..search.judge.Loss.images_to_tell`.
    """

    recipe: Recipe
    rounds: list[Round]
    loss: Loss
    images: int
    images_to_tell: int | None


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
    ) -> Answer:
        """The cheapest recipe whose predicted loss is at most ``search.smallest.max_drop``, with the asked confidence.

        Each round scores a recipe by cross-fitting; the loss is predicted from all rounds
        (:class:`..search.judge.LossModel`). The first recipes are the largest one and one in the middle. The next one is
        what the fit would choose; or one with a larger error, if no loss was seen yet.

        Args:
            unfinished: file that keeps the finished rounds.

        Raises:
            QwtError: the detector lacks the metric, or too few images have annotations.
        """
        limit, front = self.search.smallest, self.front()
        assert limit is not None, "the search has a limit"
        errors = front.relative_errors()
        scored: dict[int, Scored] = {}
        index: int | None = len(errors) - 1
        with cross_fitting(inputs.annotations) as parts:
            scorer = Scorer(inputs, parts, limit.metric, activation_cache)
            finished = self._finished(unfinished, inputs, scorer)
            while index is not None and len(scored) < self.search.rounds:
                if str(index) not in finished.results:
                    settings = recipe_settings(self.settings, front[index])
                    finished.add(str(index), scorer.score(settings))
                scored[index] = Scored(errors[index], **finished.results[str(index)])
                model = LossModel([*scored.values()], limit.confidence)
                losses = [model.loss(error) for error in errors]
                chosen = cheapest(losses, limit.max_drop)
                self._log(self._round(front, index, scored[index]), losses[chosen], scorer)
                index = self._next(chosen, scored, errors, seen=model.is_seen)
        loss = losses[chosen]
        images = loss.images_to_tell(scorer.images, limit.max_drop)
        if loss.high > limit.max_drop:
            logger.warning(
                "%d images cannot show that any recipe loses at most %g; the largest is taken. %s",
                scorer.images, limit.max_drop,
                f"About {images} annotated images would tell." if images
                else "Its predicted loss is above the limit; take more candidates, or a larger limit.",
            )  # fmt: skip
        rounds = [self._round(front, index, one) for index, one in scored.items()]
        return Answer(front[chosen], rounds, loss, scorer.images, images)

    def _round(self, front: ParetoFront, index: int, scored: Scored) -> Round:
        recipe = front[index]
        sizes = self.average_weight_bits(recipe), self.weight_bytes(recipe)
        return Round(index, *sizes, scored.estimate, scored.error, scored.drop)

    @staticmethod
    def _next(
        chosen: int, scored: Mapping[int, Scored], errors: Sequence[float], *, seen: bool
    ) -> int | None:
        """The recipe to score next; None where nothing more is to be learned."""
        if len(scored) == 1 and len(errors) > 1:  # the largest one is scored
            middle = (errors[0] + errors[-1]) / 2
            return next(
                (i for i, error in enumerate(errors[:-1]) if error <= middle), len(errors) - 2
            )
        if not seen and 0 not in scored:
            wanted = MUCH_WORSE * max(one.estimate for one in scored.values())
            return next((i for i in reversed(range(len(errors))) if errors[i] >= wanted), 0)
        return None if chosen in scored else chosen

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

    def _log(self, last: Round, loss: Loss, scorer: "Scorer") -> None:
        logger.info(
            "%.2f bits per weight, %.2f MB: AP falls by %.4f of %.3f on %d calibration images; the "
            "recipe for the limit would lose %.4f (%.4f to %.4f)",
            last.average_weight_bits, last.weight_bytes / 1e6, last.drop, scorer.baseline, scorer.images, loss.value,
            loss.low, loss.high,
        )  # fmt: skip


def check_scoring(model: BaseDetector, scoring: Path, metric: str) -> int:
    """Check that recipes can be scored on an annotation file; return its number of images.

    Raises:
        QwtError: too few images have annotations, these do not fit the detector, or it lacks the metric.
    """
    images = len(read_json(scoring)["images"])
    if images < LEAST_SCORED:
        raise QwtError(
            f"Recipes would be scored on {images} images: the calibration images that have annotations. `smallest` needs "
            f"{LEAST_SCORED} at least, and hundreds to tell small losses from chance; choose more calibration images, or "
            "ask for `best` with a size."
        )
    if metric == "segm" and not model.with_mask:
        raise QwtError("smallest.metric is segm, but this detector has no masks; use bbox.")
    check_ground_truth(model, scoring)
    return images


class Scorer:
    """Calibrates recipes on some images and scores them on others, in two folds.

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
        parts: Parts,
        metric: str,
        activation_cache: Mapping[str, Any] | None,
    ) -> None:
        self._inputs, self._parts, self._metric = inputs, parts, metric
        self._cache = activation_cache or {}
        self._model = inputs.load()
        self.images = check_scoring(self._model, parts.scored, metric)
        self.fingerprint = record_of(self._model).fingerprint
        metrics, self._found = evaluate_detector(self._model, parts.scored, workers=inputs.workers)
        self.baseline = float(metrics.get(metric, {}).get("AP") or 0.0)
        if not self.baseline:
            raise QwtError(
                f"The full-precision detector has no {metric} AP on the {self.images} calibration images that "
                "recipes are scored on, so nothing can be lost; check their annotations."
            )

    def _on(self, annotations: Path, **changes: Any) -> Iterable[dict[str, Any]]:
        """Batches of the images of a file."""
        return dataclasses.replace(self._inputs, annotations=annotations, **changes).loader(
            self._model
        )

    def score(self, settings: QuantizationSettings) -> dict[str, Any]:
        """Error at the heads of the detector with these settings, its loss of AP, and that under each resample."""
        error, found = OutputError(), []
        for calibration, scored in self._parts.folds:
            model = quantize_model(self._inputs.load(), settings)
            calibrate(model, self._on(calibration), noise_images=0, **self._cache)
            found += predict(model, self._on(scored), scored).records
            for image in islice(self._on(scored, batch_size=1), ERROR_IMAGES):
                error.update(Reference.of(self._model, image), model)
        ap = bootstrap(
            self._parts.scored,
            {"full": self._found, "recipe": found},
            masks=self._metric == "segm",
            classes=self._model.dataset_meta["classes"],
            resamples=RESAMPLES,
            seed=self._inputs.seed,
        )
        full, recipe = (ap.samples[name][self._metric]["AP"] for name in ("full", "recipe"))
        drop = ap.difference("full", "recipe", self._metric, "AP").value or 0.0
        return {"error": error.relative(), "drop": drop, "drops": (full - recipe).tolist()}


def _as_json(item: Choice | Round) -> dict[str, Any]:
    """The fields, with relative errors under the keys that the file has for them."""
    fields = dataclasses.asdict(item).items()
    names = {"relative_error": "noise", "measured_error": "measured_noise"}
    return {names.get(key, key): value for key, value in fields}


def _predicted(answer: Answer) -> dict[str, Any]:
    """The predicted loss of a recipe, for its summary."""
    return {
        **dataclasses.asdict(answer.loss),
        "images": answer.images,
        "images_to_tell": answer.images_to_tell,
    }


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
    answer: Answer | None = None
    unfinished = Path(f"{summary}.unfinished")
    if chooser.search.best is not None:
        chosen = chooser.within_budget()
    else:
        answer = chooser.smallest(inputs, unfinished, activation_cache)
        chosen = answer.recipe
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
        "rounds": [_as_json(r) for r in answer.rounds] if answer else [],
        "loss": answer and _predicted(answer),
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
