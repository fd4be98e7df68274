"""Mixed-precision search: the error and the cost of each layer's bits, and their Pareto front.

Errors of several layers are taken to add up at the heads. Then the Pareto front follows from each layer's own
choices: the next bits go to the layer whose error falls most for their cost (marginal analysis: Shoham and
Gersho, 1988; equal to minimizing the Lagrangian for each multiplier).
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from ..archives import Finished
from ..config import Override, QuantizationSettings
from ..config.search import Storage, stored_bits
from ..errors import QwtError
from ..quantization.convert import matching_override, own_bits, quantized_layers
from ..quantization.size import code_bytes, detector_bytes
from ..quantization.sqnr import count_multiply_adds
from .outputs import Reference, outputs
from .sensitivity import Sensitivity, leave_one_out_gains, rank_layers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchedLayer:
    """A layer, or the matrix products of attention, whose bits are to be chosen.

    All errors are relative: error power by signal power at the heads. The JSON keys are the fields' aliases.

    Args:
        weights: number of weights; 0 for attention.
        multiply_adds_percent: its share in those of everything that is searched.
        weight_errors: error by bits of the weights, with the most bits for activations, all other layers in
            full precision; empty for attention.
        activation_errors: the same by bits of the activations, with the most bits for weights.
        leave_one_out_gain: how much the error of the detector with the fewest weight bits falls when this layer
            alone is in full precision.
    """

    name: str
    weights: int
    multiply_adds_percent: float
    weight_errors: Annotated[Mapping[int, float], Field(alias="weight_noise")]
    activation_errors: Annotated[Mapping[int, float], Field(alias="activation_noise")]
    leave_one_out_gain: Annotated[float, Field(alias="relief")]

    def relative_error(self, weight_bits: int | None, activation_bits: int) -> float:
        """Estimate of the error that the layer adds to a detector of mixed precision.

        It is the mean of two errors. One is measured with only this layer quantized. The other is the
        leave-one-out gain, in which the errors of other layers hide or amplify this one's.
        """
        both = self.activation_errors.get(activation_bits, 0.0)
        if weight_bits is not None:
            most = max(self.activation_errors, default=activation_bits)
            both = self.weight_errors[weight_bits] + both - self.activation_errors.get(most, 0.0)
        if self.weight_errors:
            alone = self.weight_errors[min(self.weight_errors)]
        else:
            alone = self.activation_errors[max(self.activation_errors)]
        context = (1 + max(self.leave_one_out_gain, 0.0) / alone) / 2 if alone else 1.0
        return max(both, 0.0) * context


@dataclass(frozen=True)
class Choice:
    """Bits of a layer (no weight bits for attention), with their relative error and their cost.

    Args:
        bytes: that the codes of its weights take.
        bit_operations: multiply-adds times the bits of both factors, in percent of the total of all searched
            layers at W8A8.
    """

    weight_bits: int | None
    activation_bits: int
    relative_error: float
    bytes: float
    bit_operations: float


@dataclass(frozen=True)
class Recipe:
    """The result of a search: a choice for every searched layer, by name."""

    choices: Mapping[str, Choice]

    @property
    def relative_error(self) -> float:
        """Estimated relative error at the heads: the sum over the layers."""
        return sum(choice.relative_error for choice in self.choices.values())

    @property
    def bytes(self) -> float:
        """Bytes of the codes of all searched weights."""
        return sum(choice.bytes for choice in self.choices.values())

    @property
    def bit_operations(self) -> float:
        """Bit operations in percent of those at W8A8."""
        return sum(choice.bit_operations for choice in self.choices.values())


@dataclass(frozen=True)
class Measurement:
    """What a search has measured of a detector.

    Args:
        fixed_bytes: of the detector but for the codes of searched weights.
    """

    layers: Annotated[list[SearchedLayer], Field(alias="candidates")]
    fixed_bytes: float


def measure_candidates(
    calibrated: Callable[[QuantizationSettings], nn.Module],
    settings: QuantizationSettings,
    weight_bits: Iterable[int],
    activation_bits: Iterable[int],
    images: Sequence[dict[str, Any]],
    finished: Finished | None = None,
) -> Measurement:
    """Measure the error of each layer at each number of bits, and its leave-one-out gain at the fewest.

    A layer is not searched if an override names it or the outputs do not depend on it.

    Args:
        calibrated: returns the calibrated detector of some settings, its weights not rounded yet.
        settings: the plain quantization whose bits are replaced.
        images: batches to measure on; each runs about once per layer and number of bits.
        finished: what an interrupted measurement has finished, which is not measured again.

    Raises:
        QwtError: there is no layer to search.
    """
    widths, activations = sorted({*weight_bits}), sorted({*activation_bits})
    finished = finished or Finished()
    pairs = [(widths[-1], bits) for bits in activations]
    pairs += [(bits, activations[-1]) for bits in widths[-2::-1]]
    measured = []
    for pair in pairs:
        name = "W{}A{}".format(*pair)
        if name not in finished.results or pair == pairs[-1]:  # what follows needs the last one
            model = calibrated(replace(settings, weight_bits=pair[0], activation_bits=pair[1]))
        if name not in finished.results:
            logger.info("Measuring %s", name)
            finished.add(name, [asdict(entry) for entry in rank_layers(model, images)])
        measured.append({entry["name"]: Sensitivity(**entry) for entry in finished.results[name]})
    by_activations, by_weights = measured[: len(activations)], measured[len(activations) - 1 :]
    found = measured[-1]
    gains = leave_one_out_gains(model, images)
    names = [
        name
        for name, entry in found.items()
        if entry.relative_error and matching_override(name, settings.overrides) is None
    ]
    if not any(found[name].weights for name in names):
        raise QwtError(
            "There is no layer whose bits could be searched: overrides name all layers, or the heads depend on none; "
            "change overrides or scope of the entry that `like` names."
        )
    layers = [
        SearchedLayer(
            name,
            found[name].weights,
            share,
            _errors_by("weight_bits", name, by_weights) if found[name].weights else {},
            _errors_by("activation_bits", name, by_activations),
            gains[name],
        )
        for name, share in _own_multiply_adds(model, names, images[0]).items()
    ]
    own = {name: own_bits(name, settings)[0] for name in quantized_layers(model)}
    return Measurement(layers, detector_bytes(model, own | dict.fromkeys(names, 0)))


def _errors_by(
    key: str, name: str, measured: Iterable[Mapping[str, Sensitivity]]
) -> dict[int, float]:
    """Relative errors of a layer by the bits that it had, in rising order."""
    entries = [found[name] for found in measured]
    return dict(sorted((getattr(entry, key), entry.relative_error or 0.0) for entry in entries))


def _own_multiply_adds(
    model: nn.Module, names: Sequence[str], image: dict[str, Any]
) -> dict[str, float]:
    """Each module's percentage of the multiply-adds of all ``names``; without those of modules inside of it."""
    proposals = Reference.of(model, image).proposals
    with count_multiply_adds(model, names) as shares:
        outputs(model, image, proposals)
    own = {
        name: shares.get(name, 0.0)
        - sum(shares.get(inner, 0.0) for inner in names if inner.startswith(f"{name}."))
        for name in names
    }
    total = sum(own.values())
    return {name: 100 * share / total for name, share in own.items()}


def _choices(layer: SearchedLayer, storage: Storage) -> list[Choice]:
    """All combinations of bits that a layer can get, the fewest first."""
    return [
        Choice(
            weight_bits,
            activation_bits,
            layer.relative_error(weight_bits, activation_bits),
            code_bytes(layer.weights, stored_bits(weight_bits, storage) if weight_bits else 0),
            layer.multiply_adds_percent * (weight_bits or activation_bits) * activation_bits / 64,
        )
        for weight_bits in (*sorted(layer.weight_errors),) or (None,)
        for activation_bits in sorted(layer.activation_errors)
    ]


class ParetoFront:
    """The recipes with the smallest error for their cost, the cheapest first.

    Args:
        objective: the cost: ``bytes`` or ``bit_operations``.
        storage: what a weight takes: its ``bits``, or as in exported files (``onnx``).
    """

    def __init__(
        self, layers: Iterable[SearchedLayer], objective: str, storage: Storage = "bits"
    ) -> None:
        self._objective = objective
        self._cheapest: dict[str, Choice] = {}
        steps: list[tuple[float, int, str, Choice]] = []
        for layer in layers:
            hull = _lower_hull(_choices(layer, storage), objective)
            self._cheapest[layer.name] = hull[0]
            for number, (before, after) in enumerate(itertools.pairwise(hull)):
                steps.append((_slope(before, after, objective), number, layer.name, after))
        self._steps = sorted(steps, key=lambda step: step[:3])

    def __len__(self) -> int:
        return len(self._steps) + 1

    def __getitem__(self, index: int) -> Recipe:
        """The recipe ``index`` steps from the cheapest one; negative: from the end."""
        steps = self._steps[: index if index >= 0 else len(self) + index]
        return Recipe(self._cheapest | {name: choice for *_, name, choice in steps})

    def relative_errors(self) -> list[float]:
        """The relative error of each recipe, in falling order."""
        gains = []
        choices = dict(self._cheapest)
        for *_, name, choice in self._steps:
            gains.append(choice.relative_error - choices[name].relative_error)
            choices[name] = choice
        return list(itertools.accumulate(gains, initial=self[0].relative_error))

    def within(self, budget: float) -> Recipe:
        """The recipe with nearly the smallest error whose cost is at most ``budget`` (greedy for the last bits).

        Raises:
            QwtError: the cheapest one costs more.
        """
        choices = dict(self._cheapest)
        left = budget - getattr(Recipe(choices), self._objective)
        if left < 0:
            raise QwtError("The budget is below the cost of the smallest recipe.")
        for *_, name, choice in self._steps:
            extra = getattr(choice, self._objective) - getattr(choices[name], self._objective)
            if extra <= left:
                left -= extra
                choices[name] = choice
        return Recipe(choices)


def _lower_hull(choices: Iterable[Choice], objective: str) -> list[Choice]:
    """The choices on the lower convex hull of error over cost, from the cheapest to the smallest error."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (getattr(c, objective), c.relative_error)):
        if hull and choice.relative_error >= hull[-1].relative_error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1], objective) >= _slope(
            hull[-1], choice, objective
        ):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(before: Choice, after: Choice, objective: str) -> float:
    """Change of the error per unit of cost; −∞ where the cost is the same."""
    extra = float(getattr(after, objective) - getattr(before, objective))
    return (after.relative_error - before.relative_error) / extra if extra else -math.inf


def recipe_settings(settings: QuantizationSettings, recipe: Recipe) -> QuantizationSettings:
    """The settings with an override for every layer whose bits the recipe changes."""
    overrides = []
    for name, choice in recipe.choices.items():
        bits = {
            key: chosen
            for key in ("weight_bits", "activation_bits")
            if (chosen := getattr(choice, key)) not in (None, getattr(settings, key))
        }
        if bits:
            overrides.append(Override(name, **bits))
    return replace(settings, overrides=(*settings.overrides, *overrides))
