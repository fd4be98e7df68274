"""Sensitivity: the error at the heads with one layer quantized, and the gain with one layer left out."""

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
from ..quantization.quantizer import ActivationQuantizer
from ..quantization.sequential import Affine
from ..quantization.sqnr import HeadError, sqnr_db
from ..record import quantization_of

LEAST_BITS, MOST_BITS = 2, 8


@dataclass(frozen=True)
class Sensitivity:
    """The error at the heads where one layer alone is quantized.

    Args:
        name: of the layer, or of the attention module whose matrix products are quantized.
        weight_bits: None for attention; its projections count as layers.
        weights: number of weights.
        relative_error: error power by signal power at the heads, averaged over their tensors; None where the
            heads do not depend on the layer.
        sees_image: whether it is the layer whose activations have ``input_bits``.
    """

    name: str
    weight_bits: int | None
    activation_bits: int
    weights: int
    relative_error: float | None
    sees_image: bool = False

    @property
    def sqnr_db(self) -> float | None:
        """Signal-to-quantization-noise ratio at the heads in dB; None without any error."""
        return sqnr_db(self.relative_error)


@contextmanager
def _computing(layer: QuantizedLayer, compute: Callable[..., Tensor]) -> Iterator[None]:
    """Inside: a layer computes ``compute(x, weight, bias)`` in place of its own product."""
    vars(layer)["_compute"] = compute
    try:
        yield
    finally:
        del vars(layer)["_compute"]


@contextmanager
def _quantized_alone(unit: Unit, fitted: Affine | None) -> Iterator[None]:
    """Inside ``full_precision``: let one layer or attention module compute quantized.

    Args:
        fitted: weights and bias after a refit. Then the original weights compute, and the change of the
            output by rounding the fitted ones is added.
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
    """Quantize each layer alone and measure the error at the heads; the largest first.

    Refit weights also correct the errors of earlier layers, which do not occur here. So only the rounding of the
    refit weights counts, where ``calibrate(…, keep_weights=True)`` has kept these. A warmup file lacks them: then
    the layers get, and keep, codes of their original weights.

    Args:
        model: from ``load_warmup(…, round_weights=False)`` or ``calibrate(…, keep_weights=True)``.
        loader: calibration batches; each runs once in full precision and once per layer.

    Raises:
        QwtError: no image came.
    """
    about = quantization_of(model)
    if about.settings.refit != "none" and not about.fitted:
        loader = [*loader]
        quantize_weights_alone(model, loader)
    units = {name: unit for name, unit in quantized_units(model).items() if unit.is_calibrated}
    errors = {name: HeadError() for name in units}
    images = 0
    with full_precision(model, {}):
        for batch in progress(loader, "Quantizing each layer alone", unit="batch"):
            with running_order(model) as order:
                expected = head_tensors(model, batch)
            images += 1
            for name, unit in units.items():
                with _quantized_alone(unit, about.fitted.get(name)):
                    errors[name].update(expected, head_tensors(model, batch))
    if images == 0:
        raise QwtError("There are no calibration images; choose at least one.")
    ranked = [
        Sensitivity(
            name,
            unit.weight_bits,
            unit.activation_bits,
            unit.weight.numel() if isinstance(unit, QuantizedLayer) else 0,
            errors[name].relative() or None,
            sees_image=name in order[:1],
        )
        for name, unit in units.items()
    ]
    return sorted(ranked, key=lambda entry: -(entry.relative_error or 0))


@contextmanager
def _left_out(unit: Unit, weight: Tensor | None, fitted: Affine | None) -> Iterator[None]:
    """Let one layer or attention module of a quantized model compute in full precision.

    Args:
        weight: the layer's weight in full precision.
        fitted: weights and bias after a refit, used in place of ``weight``.
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
def leave_one_out_gains(model: BaseDetector, loader: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Measure how much the relative error at the heads falls where one layer is in full precision, by name.

    Args:
        model: as for :func:`rank_layers`; its weights are rounded afterwards.
        loader: calibration batches; each runs twice, and once per layer.
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
    together, without = HeadError(), {name: HeadError() for name in units}
    for batch, tensors in progress(expected, "Leaving out each layer", unit="batch"):
        together.update(tensors, head_tensors(model, batch))
        for name, unit in units.items():
            with _left_out(unit, full.get(name), fitted.get(name)):
                without[name].update(tensors, head_tensors(model, batch))
    return {name: together.relative() - error.relative() for name, error in without.items()}


def choose_bits(ranked: Iterable[Sensitivity], average_bits: float) -> dict[str, int]:
    """Weight bits of each layer that make the sum of the errors small, for an average bit width.

    The power of a layer's error is taken to fall by 6 dB per bit (uniform quantization). Errors of several
    layers are taken to add up. Then giving the next bit to the layer that gains most per weight is optimal,
    but for the last few bits (marginal analysis: Shoham and Gersho, 1988).

    Args:
        ranked: layers without weights or without a measured error keep their bits and do not count.
        average_bits: per weight, 2 to 8.

    Raises:
        QwtError: ``average_bits`` is out of range.
    """
    if not LEAST_BITS <= average_bits <= MOST_BITS:
        raise QwtError(
            f"average_bits is {average_bits}; it must be from {LEAST_BITS} to {MOST_BITS}."
        )
    layers = {
        entry.name: (entry.weights, entry.weight_bits, entry.relative_error)
        for entry in ranked
        if entry.weight_bits is not None and entry.relative_error
    }
    chosen = dict.fromkeys(layers, LEAST_BITS)
    left = (average_bits - LEAST_BITS) * sum(weights for weights, *_ in layers.values())

    def gain(name: str) -> float:
        weights, bits, error = layers[name]
        return 0.75 * error * 4.0 ** (bits - chosen[name]) / weights

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
    """The settings with an override for every layer whose weight bits change.

    The activation bits of the layer change by as much, within 2 to 8; those of the image do not change.
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
