"""How much each layer's quantization alone disturbs what the heads compute, and bits chosen by it."""

import heapq
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models import BaseDetector
from torch import Tensor

from ..config import Override, QuantizationSettings
from ..detectors.forward import head_tensors
from ..errors import QwtError
from ..progress import progress
from ..quantization.calibrate import quantize_weights_alone
from ..quantization.convert import Unit, full_precision, quantized_units, running_order
from ..quantization.layers import QuantizedLayer
from ..quantization.noise import HeadNoise, decibels
from ..quantization.quantizer import ActivationQuantizer
from ..quantization.sequential import Affine
from ..record import quantization_of

LEAST_BITS, MOST_BITS = 2, 8


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one layer alone does.

    Args:
        name: of the layer, or of the attention module whose matrix products are meant.
        weight_bits: None for attention, which has no weights of its own here.
        weights: number of weights.
        relative_noise: noise by signal power at the heads, averaged over their tensors; None where
            nothing that is measured depends on the layer.
        sees_image: whether it is the layer whose activations have ``input_bits``.
    """

    name: str
    weight_bits: int | None
    activation_bits: int
    weights: int
    relative_noise: float | None
    sees_image: bool = False

    @property
    def sqnr_db(self) -> float | None:
        """Signal-to-quantization-noise ratio at the heads in dB; None without any noise."""
        return decibels(self.relative_noise)


@contextmanager
def _computing(layer: QuantizedLayer, compute: Callable[..., Tensor]) -> Iterator[None]:
    """Inside: what a layer multiplies with, ``compute(x, weight, bias)``, is something else."""
    vars(layer)["_compute"] = compute
    try:
        yield
    finally:
        del vars(layer)["_compute"]


@contextmanager
def _quantized_alone(unit: Unit, fitted: Affine | None) -> Iterator[None]:
    """Inside ``full_precision``: let one layer or attention module compute quantized.

    Args:
        fitted: by a refit. Then what their rounding changes is added to the output of the original weights.
    """
    switched: list[QuantizedLayer | ActivationQuantizer]
    with ExitStack() as stack:
        if isinstance(unit, QuantizedLayer) and fitted is not None:
            product, read = unit._compute, unit.input_quantizer.quantized
            rounded = unit.rounded_weight(), unit.effective_bias()

            def add_rounding(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                change = product(read(x), *rounded) - product(x, *fitted)
                return product(x, weight, bias) + change

            stack.enter_context(_computing(unit, add_rounding))
            switched = []
        elif isinstance(unit, QuantizedLayer):
            switched = [unit, unit.input_quantizer]
            stack.callback(setattr, unit.weight, "data", unit.weight.data)
            unit.weight.data = unit.rounded_weight().to(unit.weight.dtype)
        else:
            switched = [*unit.quantizers()]
        for module in switched:
            stack.callback(setattr, module, "enabled", False)
            module.enabled = True
        yield


@torch.no_grad()
def rank_layers(model: BaseDetector, loader: Iterable[dict[str, Any]]) -> list[Sensitivity]:
    """Quantize each layer alone and measure the noise at the heads; the most harmful one first.

    What a sequential refit makes of a layer's weights repairs the layers before it, and alone would be noise. So
    the noise is that of rounding the refit weights, where ``calibrate(…, keep_weights=True)`` has kept them. A
    warmup file has not; then the layers get codes of their original weights, which they keep.

    Args:
        model: from ``load_warmup(…, round_weights=False)`` or ``calibrate(…, keep_weights=True)``.
        loader: calibration batches; each is run once more than there are layers.

    Raises:
        QwtError: no image came.
    """
    about = quantization_of(model)
    if about.settings.refit != "none" and not about.fitted:
        loader = [*loader]
        quantize_weights_alone(model, loader)
    units = {name: unit for name, unit in quantized_units(model).items() if unit.is_calibrated}
    noise = {name: HeadNoise() for name in units}
    images = 0
    with full_precision(model, {}):
        for batch in progress(loader, "Quantizing each layer alone", unit="batch"):
            with running_order(model) as order:
                expected = head_tensors(model, batch)
            images += 1
            for name, unit in units.items():
                with _quantized_alone(unit, about.fitted.get(name)):
                    noise[name].update(expected, head_tensors(model, batch))
    if images == 0:
        raise QwtError("There are no calibration images; choose at least one.")
    ranked = [
        Sensitivity(
            name,
            unit.weight_bits,
            unit.activation_bits,
            unit.weight.numel() if isinstance(unit, QuantizedLayer) else 0,
            noise[name].relative() or None,
            sees_image=name in order[:1],
        )
        for name, unit in units.items()
    ]
    return sorted(ranked, key=lambda entry: -(entry.relative_noise or 0))


@contextmanager
def _exact_alone(unit: Unit, weight: Tensor | None, fitted: Affine | None) -> Iterator[None]:
    """Let one layer or attention module of a model that computes quantized compute in full precision.

    Args:
        weight: of the layer in full precision.
        fitted: by a refit; the layer then computes with these.
    """
    switched: list[QuantizedLayer | ActivationQuantizer]
    with ExitStack() as stack:
        if isinstance(unit, QuantizedLayer):
            assert weight is not None, "a layer has a weight"
            switched = [unit, unit.input_quantizer]
            stack.callback(setattr, unit.weight, "data", unit.weight.data)
            unit.weight.data = weight
            if fitted is not None:
                product = unit._compute
                stack.enter_context(_computing(unit, lambda x, *_: product(x, *fitted)))
        else:
            switched = [*unit.quantizers()]
        for module in switched:
            stack.callback(setattr, module, "enabled", True)
            module.enabled = False
        yield


@torch.no_grad()
def relieve_layers(model: BaseDetector, loader: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Measure how much the noise at the heads falls where one layer of the quantized model is exact, by name.

    Args:
        model: as for :func:`rank_layers`; its weights are rounded afterwards.
        loader: calibration batches; each is run twice more than there are layers.
    """
    units = {name: unit for name, unit in quantized_units(model).items() if unit.is_calibrated}
    fitted = quantization_of(model).fitted
    full: dict[str, Tensor] = {}
    expected = []
    with full_precision(model, {}):
        for batch in loader:
            expected.append((batch, head_tensors(model, batch)))
    for name, unit in units.items():
        if isinstance(unit, QuantizedLayer):
            full[name] = unit.weight.data.clone()
            unit.restore_weight()
    together, noise = HeadNoise(), {name: HeadNoise() for name in units}
    for batch, tensors in progress(expected, "Relieving each layer alone", unit="batch"):
        together.update(tensors, head_tensors(model, batch))
        for name, unit in units.items():
            with _exact_alone(unit, full.get(name), fitted.get(name)):
                noise[name].update(tensors, head_tensors(model, batch))
    return {name: together.relative() - without.relative() for name, without in noise.items()}


def choose_bits(ranked: Iterable[Sensitivity], average_bits: float) -> dict[str, int]:
    """Weight bits of each layer that make the sum of the noise small, for an average bit width.

    A layer's noise is taken to fall by 6 dB per bit (uniform quantization), and the noise of several
    layers to add up. Then giving the next bit to the layer that gains most per weight is optimal
    but for the last few bits (marginal analysis: Shoham and Gersho, 1988).

    Args:
        ranked: layers without weights or without measured noise keep their bits and do not count.
        average_bits: per weight, 2 to 8.

    Raises:
        QwtError: ``average_bits`` is out of range.
    """
    if not LEAST_BITS <= average_bits <= MOST_BITS:
        raise QwtError(
            f"average_bits is {average_bits}; it must be from {LEAST_BITS} to {MOST_BITS}."
        )
    layers = {
        entry.name: (entry.weights, entry.weight_bits, entry.relative_noise)
        for entry in ranked
        if entry.weight_bits is not None and entry.relative_noise
    }
    chosen = dict.fromkeys(layers, LEAST_BITS)
    left = (average_bits - LEAST_BITS) * sum(weights for weights, *_ in layers.values())

    def gain(name: str) -> float:
        weights, bits, noise = layers[name]
        return 0.75 * noise * 4.0 ** (bits - chosen[name]) / weights

    queue = [(-gain(name), name) for name in layers]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        weights, *_ = layers[name]
        if weights > left:
            continue
        left -= weights
        chosen[name] += 1
        if chosen[name] < MOST_BITS:
            heapq.heappush(queue, (-gain(name), name))
    return chosen


def mixed_precision(
    settings: QuantizationSettings, ranked: list[Sensitivity], chosen: dict[str, int]
) -> QuantizationSettings:
    """The settings with an override for every layer whose bits change.

    A layer's activations keep their distance from its weights' bits (8 at most, 2 at least); the image keeps
    its bits.
    """
    overrides = []
    for entry in ranked:
        if entry.weight_bits is None:  # of attention
            continue
        bits = chosen.get(entry.name, entry.weight_bits)
        if bits == entry.weight_bits:
            continue
        distance = entry.activation_bits - entry.weight_bits
        activation_bits = min(MOST_BITS, max(LEAST_BITS, bits + distance))
        if entry.sees_image:
            activation_bits = entry.activation_bits
        overrides.append(Override(entry.name, bits, activation_bits))
    values = {**vars(settings), "overrides": (*settings.overrides, *overrides)}
    return QuantizationSettings(**values)
