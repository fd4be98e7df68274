"""Bits for each layer: what every choice does to the heads, what it costs, and which choices are best.

The noise of several layers at the heads is taken to add up. Then the recipes that have the least noise for
their cost follow from each layer's own choices: a layer takes the next bits where they bring most for their
cost (marginal analysis: Shoham and Gersho, 1988, which is the Lagrangian's answer for each multiplier).
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..config import Override, QuantizationSettings
from ..detectors.forward import head_tensors
from ..errors import QwtError
from ..quantization.convert import matching_override, quantized_units
from ..quantization.layers import QuantizedLayer
from ..quantization.noise import count_multiply_adds
from ..quantization.state import summarize_quantization
from .sensitivity import Sensitivity, rank_layers, relieve_layers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A layer, or the matrix products of attention, whose bits are to be chosen.

    Args:
        weights: number of weights; 0 for attention.
        multiply_adds_percent: its share in those of everything that is searched.
        weight_noise: noise by signal power at the heads by bits of the weights, the activations having the
            most bits and all other layers being exact; empty for attention.
        activation_noise: the same by bits of the activations, the weights having the most bits.
        relief: what the noise of the detector with the fewest bits of weights everywhere falls by when this
            layer alone is exact.
    """

    name: str
    weights: int
    multiply_adds_percent: float
    weight_noise: Mapping[int, float]
    activation_noise: Mapping[int, float]
    relief: float

    def noise(self, weight_bits: int | None, activation_bits: int) -> float:
        """Estimate of the noise that the layer adds to a detector of mixed bits.

        It is the mean of what both ways say: alone in an exact detector, and in the detector with the fewest
        bits, where what comes of other layers hides a part of it or makes it larger.
        """
        both = self.activation_noise.get(activation_bits, 0.0)
        if weight_bits is not None:
            most = max(self.activation_noise, default=activation_bits)
            both = self.weight_noise[weight_bits] + both - self.activation_noise.get(most, 0.0)
        return max(both, 0.0) * self._context()

    def _context(self) -> float:
        if self.weight_noise:
            alone = self.weight_noise[min(self.weight_noise)]
        else:
            alone = self.activation_noise[max(self.activation_noise)]
        return (1 + max(self.relief, 0.0) / alone) / 2 if alone else 1.0


@dataclass(frozen=True)
class Choice:
    """Bits of a layer (no weight bits for attention), and what they do and cost.

    Args:
        bytes: of the codes of its weights.
        bit_operations: multiply-adds times the bits of both factors, in percent of those of everything that is
            searched at W8A8.
    """

    weight_bits: int | None
    activation_bits: int
    noise: float
    bytes: float
    bit_operations: float


@dataclass(frozen=True)
class Recipe:
    """A choice for every layer, by name."""

    choices: Mapping[str, Choice]

    @property
    def noise(self) -> float:
        """Noise by signal power at the heads, as the sum over the layers says."""
        return sum(choice.noise for choice in self.choices.values())

    @property
    def bytes(self) -> float:
        """Of the codes of all weights that were searched."""
        return sum(choice.bytes for choice in self.choices.values())

    @property
    def bit_operations(self) -> float:
        """In percent of W8A8's."""
        return sum(choice.bit_operations for choice in self.choices.values())


@dataclass(frozen=True)
class Measurement:
    """What a search knows of a detector.

    Args:
        fixed_bytes: of all weights but the codes of those that are searched, with scales and zero points.
    """

    candidates: list[Candidate]
    fixed_bytes: float


def measure_candidates(
    calibrated: Callable[[QuantizationSettings], nn.Module],
    settings: QuantizationSettings,
    weight_bits: Iterable[int],
    activation_bits: Iterable[int],
    images: Sequence[dict[str, Any]],
) -> Measurement:
    """Measure the noise of each layer at each number of bits, alone and among layers with few bits.

    Layers that overrides of the settings name, and those that the heads do not notice, keep their bits. A layer
    whose activations do not follow the settings' bits (the first one has ``input_bits``) has the choices that
    it was measured with.

    Args:
        calibrated: returns the detector with these settings, calibrated, whose weights are not rounded yet.
        settings: of which all but the bits holds.
        images: batches to measure on; each is run about once for each layer and number of bits.

    Raises:
        QwtError: there is no layer or no number of bits to search.
    """
    widths, activations = sorted({*weight_bits}), sorted({*activation_bits})
    if not widths or not activations:
        raise QwtError("A search needs a number of bits for weights and one for activations.")

    def ranked(weight_bits: int, activation_bits: int) -> tuple[nn.Module, dict[str, Sensitivity]]:
        model = calibrated(
            replace(settings, weight_bits=weight_bits, activation_bits=activation_bits)
        )
        logger.info("Measuring W%dA%d", weight_bits, activation_bits)
        return model, {entry.name: entry for entry in rank_layers(model, images)}

    by_activations, by_weights = [], []
    for bits in activations:
        model, found = ranked(widths[-1], bits)
        by_activations.append(found)
    by_weights.append(found)
    for bits in widths[-2::-1]:
        model, found = ranked(bits, activations[-1])
        by_weights.append(found)
    relief = relieve_layers(model, images)
    units = quantized_units(model)
    names = [
        name
        for name, entry in found.items()
        if entry.relative_noise and matching_override(name, settings.overrides) is None
    ]
    if not any(isinstance(units[name], QuantizedLayer) for name in names):
        raise QwtError(
            "There is no layer whose bits could be searched: overrides name all of them, or none of them reaches "
            "the heads; change overrides or scope of the entry that `like` names."
        )
    candidates = []
    for name, share in _own_multiply_adds(model, names, images[0]).items():
        unit = units[name]
        layer = unit if isinstance(unit, QuantizedLayer) else None
        candidates.append(
            Candidate(
                name,
                layer.weight.numel() if layer else 0,
                share,
                _noise_by("weight_bits", name, by_weights) if layer else {},
                _noise_by("activation_bits", name, by_activations),
                relief[name],
            )
        )
    fixed = summarize_quantization(model)["weight_bytes"]
    fixed -= sum(candidate.weights for candidate in candidates) * widths[0] / 8
    # What is not searched gets the settings' own bits in the end.
    for name, unit in units.items():
        if name not in names and isinstance(unit, QuantizedLayer) and unit.is_calibrated:
            override = matching_override(name, settings.overrides)
            bits = (override and override.weight_bits) or settings.weight_bits
            fixed += unit.weight.numel() * (bits - unit.weight_bits) / 8
    return Measurement(candidates, fixed)


def _noise_by(
    key: str, name: str, measured: Iterable[Mapping[str, Sensitivity]]
) -> dict[int, float]:
    """Noise of a layer by the bits that it had, in rising order."""
    entries = [found[name] for found in measured]
    return dict(sorted((getattr(entry, key), entry.relative_noise or 0.0) for entry in entries))


def _own_multiply_adds(
    model: nn.Module, names: Sequence[str], image: dict[str, Any]
) -> dict[str, float]:
    """Share of each module in the multiply-adds of all of them in percent, without those inside of it."""
    with count_multiply_adds(model, names) as shares, torch.no_grad():
        head_tensors(model, image)
    own = {
        name: shares.get(name, 0.0)
        - sum(shares.get(inner, 0.0) for inner in names if inner.startswith(f"{name}."))
        for name in names
    }
    total = sum(own.values())
    return {name: 100 * share / total for name, share in own.items()}


def _choices(candidate: Candidate) -> list[Choice]:
    """What a layer can be, the cheapest first."""
    return [
        Choice(
            weight_bits,
            activation_bits,
            candidate.noise(weight_bits, activation_bits),
            candidate.weights * (weight_bits or 0) / 8,
            candidate.multiply_adds_percent
            * (weight_bits or activation_bits)
            * activation_bits
            / 64,
        )
        for weight_bits in (*sorted(candidate.weight_noise),) or (None,)
        for activation_bits in sorted(candidate.activation_noise)
    ]


class Front:
    """The recipes that have the least noise for their cost, the cheapest first.

    Args:
        objective: what counts as cost: ``bytes`` or ``bit_operations``.
    """

    def __init__(self, candidates: Iterable[Candidate], objective: str) -> None:
        self._objective = objective
        self._cheapest: dict[str, Choice] = {}
        steps: list[tuple[float, int, str, Choice]] = []
        for candidate in candidates:
            hull = _lower_hull(_choices(candidate), objective)
            self._cheapest[candidate.name] = hull[0]
            for number, (before, after) in enumerate(itertools.pairwise(hull)):
                extra = getattr(after, objective) - getattr(before, objective)
                steps.append(((after.noise - before.noise) / extra, number, candidate.name, after))
        self._steps = sorted(steps, key=lambda step: step[:3])

    def __len__(self) -> int:
        return len(self._steps) + 1

    def __getitem__(self, index: int) -> Recipe:
        """The recipe after so many steps from the cheapest one."""
        steps = self._steps[: index if index >= 0 else len(self) + index]
        return Recipe(self._cheapest | {name: choice for *_, name, choice in steps})

    def noise(self) -> list[float]:
        """The noise of each recipe, which falls."""
        gains = []
        choices = dict(self._cheapest)
        for *_, name, choice in self._steps:
            gains.append(choice.noise - choices[name].noise)
            choices[name] = choice
        return list(itertools.accumulate(gains, initial=self[0].noise))

    def within(self, budget: float) -> Recipe:
        """The recipe with the least noise whose cost is at most ``budget``, but for the last few bits.

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
    """The choices on the lower convex hull of noise over cost, from the cheapest to that with the least noise."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (getattr(c, objective), c.noise)):
        if hull and choice.noise >= hull[-1].noise:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1], objective) >= _slope(
            hull[-1], choice, objective
        ):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(before: Choice, after: Choice, objective: str) -> float:
    """What the noise changes by for a unit of the cost; infinite where the cost is the same."""
    extra = float(getattr(after, objective) - getattr(before, objective))
    return (after.noise - before.noise) / extra if extra else -math.inf


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
