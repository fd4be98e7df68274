"""Sensitivity: the error at the heads with one layer quantized, and the gain with one layer left out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models import BaseDetector
from torch import Tensor, nn

from ..errors import QwtError
from ..progress import progress
from ..quantization.calibrate import quantize_weights_alone
from ..quantization.convert import Unit, full_precision, quantized_units
from ..quantization.layers import QuantizedLayer
from ..quantization.sqnr import sqnr_db
from ..quantization.weight_fit import WEIGHT_FITS, Affine
from ..record import quantization_of
from .outputs import OutputError, Reference


@dataclass(frozen=True)
class Sensitivity:
    """The error at the heads where one layer alone is quantized.

    Args:
        name: of the layer, or of the attention module whose matrix products are quantized.
        weight_bits: None for attention; its projections count as layers.
        weights: number of weights.
        relative_error: error power by signal power at the heads, averaged over their tensors; None where the
            heads do not depend on the layer.
    """

    name: str
    weight_bits: int | None
    activation_bits: int
    weights: int
    relative_error: float | None

    @property
    def sqnr_db(self) -> float | None:
        """Signal-to-quantization-noise ratio at the heads in dB; None without any error."""
        return sqnr_db(self.relative_error)


@contextmanager
def _changed(
    unit: Unit,
    enabled: bool,
    weight: Tensor | None = None,
    compute: Callable[..., Tensor] | None = None,
) -> Iterator[None]:
    """Inside: one layer or attention module computes quantized, or in full precision.

    Args:
        weight: of the layer, in place of its own.
        compute: computes ``compute(x, weight, bias)`` in place of the layer's product.
    """
    switched: Sequence[nn.Module] = (
        (unit, unit.input_quantizer) if isinstance(unit, QuantizedLayer) else unit.quantizers()
    )
    with ExitStack() as stack:
        for module in switched:
            stack.callback(setattr, module, "enabled", module.enabled)
            module.enabled = enabled  # type: ignore[assignment]
        if weight is not None and isinstance(unit, QuantizedLayer):
            stack.callback(setattr, unit.weight, "data", unit.weight.data)
            unit.weight.data = weight
        if compute is not None:
            stack.callback(vars(unit).pop, "_compute")
            vars(unit)["_compute"] = compute
        yield


def _quantized_alone(unit: Unit, fitted: Affine | None) -> AbstractContextManager[None]:
    """Inside ``full_precision``: let one layer or attention module compute quantized.

    Args:
        fitted: weights and bias after a refit. Then the original weights compute, and the change of the
            output by rounding the fitted ones is added.
    """
    if not isinstance(unit, QuantizedLayer):
        return _changed(unit, True)
    if fitted is None:
        return _changed(unit, True, unit.rounded_weight().to(unit.weight.dtype))
    product, read = unit._compute, unit.input_quantizer.quantized
    rounded = unit.rounded_weight(), unit.effective_bias()

    def add_rounding(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        change = product(read(x), *rounded) - product(x, *fitted)
        return product(x, weight, bias) + change

    return _changed(unit, False, compute=add_rounding)


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
    if WEIGHT_FITS.find(about.settings.refit).refits and not about.fitted:
        loader = [*loader]
        quantize_weights_alone(model, loader)
    units = {name: unit for name, unit in quantized_units(model).items() if unit.is_calibrated}
    errors = {name: OutputError() for name in units}
    images = 0
    with full_precision(model, {}):
        for batch in progress(loader, "Quantizing each layer alone", unit="batch"):
            reference = Reference.of(model, batch)
            images += 1
            for name, unit in units.items():
                with _quantized_alone(unit, about.fitted.get(name)):
                    errors[name].update(reference, model)
    if images == 0:
        raise QwtError("There are no calibration images; choose at least one.")
    ranked = [
        Sensitivity(
            name,
            unit.weight_bits,
            unit.activation_bits,
            unit.weight.numel() if isinstance(unit, QuantizedLayer) else 0,
            errors[name].relative() or None,
        )
        for name, unit in units.items()
    ]
    return sorted(ranked, key=lambda entry: -(entry.relative_error or 0))


def _left_out(
    unit: Unit, weight: Tensor | None, fitted: Affine | None
) -> AbstractContextManager[None]:
    """Inside: one layer or attention module computes in full precision, with ``weight`` or fitted weights and bias."""
    if not isinstance(unit, QuantizedLayer) or fitted is None:
        return _changed(unit, False, weight)
    product = unit._compute
    return _changed(unit, False, weight, lambda x, *_: product(x, *fitted))


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
    references = []
    with full_precision(model, {}):
        for batch in loader:
            references.append(Reference.of(model, batch))
    for name, unit in units.items():
        if isinstance(unit, QuantizedLayer):
            full[name] = unit.weight.data.clone()
            unit.restore_weight()
    together, without = OutputError(), {name: OutputError() for name in units}
    for reference in progress(references, "Leaving out each layer", unit="batch"):
        together.update(reference, model)
        for name, unit in units.items():
            with _left_out(unit, full.get(name), fitted.get(name)):
                without[name].update(reference, model)
    return {name: together.relative() - error.relative() for name, error in without.items()}
