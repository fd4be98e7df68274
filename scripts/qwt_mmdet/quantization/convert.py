"""Turn a detector into a quantized one, and calibrate it on images."""

import contextlib
import fnmatch
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mmcv.cnn.bricks import wrappers
from torch import nn

from ..errors import QwtError
from ..progress import progress
from ..settings import Override, QuantizationSettings
from .attention import ATTENTION, QuantizedAttention
from .layers import ActivationQuantizer, InputMeans, QuantizedConv2d, QuantizedLinear
from .ranges import RangeObserver

logger = logging.getLogger(__name__)

# Exact classes only: a subclass with a forward of its own would lose it.
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv2d: QuantizedConv2d,
    wrappers.Linear: QuantizedLinear,
    wrappers.Conv2d: QuantizedConv2d,
}


UNITS = (QuantizedLinear, QuantizedConv2d, QuantizedAttention)
"""What is quantized: layers, and the matrix products of attention."""


@dataclass(frozen=True)
class NotQuantized:
    """A module with weights or matrix products that stays in full precision, and why."""

    name: str
    type: str
    reason: str


def in_scope(name: str, scope: str) -> bool:
    """Tell whether the module called ``name`` belongs to ``scope`` (see QuantizationSettings)."""
    if scope == "detector":
        return not name.startswith("data_preprocessor")
    return name.split(".")[0] in scope.split("+")


def _matching_override(name: str, overrides: tuple[Override, ...]) -> Override | None:
    matches = [entry for entry in overrides if fnmatch.fnmatchcase(name, entry.pattern)]
    return matches[-1] if matches else None


def _is_opaque(module: nn.Module) -> bool:
    """Modules that use their children's weights without calling the children."""
    return isinstance(module, nn.MultiheadAttention)


def quantize_model(model: nn.Module, settings: QuantizationSettings) -> nn.Module:
    """Exchange the layers in scope for quantized ones, in place; they need :func:`calibrate` next.

    Args:
        model: an mmdet detector in full precision.

    Returns:
        ``model`` itself, with ``quantization_settings`` and ``not_quantized`` set on it.

    Raises:
        QwtError: an override matches no layer, or the scope holds no layer to quantize.
    """
    if hasattr(model, "quantization_settings"):
        raise QwtError("This model is quantized already; load it again in full precision first.")
    candidates: list[tuple[str, nn.Module]] = []
    not_quantized: list[NotQuantized] = []
    opaque: list[str] = []
    for name, module in model.named_modules():
        if not in_scope(name, settings.scope) or any(name.startswith(f"{o}.") for o in opaque):
            continue
        kind = type(module).__name__
        if _is_opaque(module):
            opaque.append(name)
            reason = "attention class without a registered quantized form"
            not_quantized.append(NotQuantized(name, kind, reason))
        elif type(module) in LAYERS or type(module) in ATTENTION:
            candidates.append((name, module))
        elif any(True for p in module.parameters(recurse=False) if p.dim() > 1):
            not_quantized.append(NotQuantized(name, kind, "layer type that cannot be quantized"))
    if not candidates:
        raise QwtError(
            f"The scope {settings.scope!r} of this model holds no Linear or Conv2d layer; "
            "choose another scope."
        )
    names = [name for name, _ in candidates]
    for entry in settings.overrides:
        if not fnmatch.filter(names, entry.pattern):
            raise QwtError(
                f"The override pattern {entry.pattern!r} matches no layer in scope "
                f"{settings.scope!r}; layer names look like {', '.join(names[:3])}."
            )
    for name, module in candidates:
        override = _matching_override(name, settings.overrides)
        if override is not None and override.skip:
            not_quantized.append(
                NotQuantized(name, type(module).__name__, "excluded by an override")
            )
            continue
        weight_bits = settings.weight_bits
        activation_bits = settings.activation_bits
        if override is not None:
            weight_bits = override.weight_bits or weight_bits
            activation_bits = override.activation_bits or activation_bits
        if type(module) in LAYERS:
            module.__class__ = LAYERS[type(module)]
            module._attach(name, weight_bits, activation_bits)
        else:
            module.__class__ = ATTENTION[type(module)]
            module._attach(name, activation_bits)
    model.quantization_settings = settings
    model.not_quantized = not_quantized
    return model


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear | QuantizedConv2d]:
    """The quantized Linear and Conv2d layers by name."""
    kinds = (QuantizedLinear, QuantizedConv2d)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """All activation quantizers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ActivationQuantizer)}


@contextlib.contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Let all activation quantizers observe; inside, the model computes in full precision."""
    quantizers = activation_quantizers(model)
    for name, quantizer in quantizers.items():
        quantizer.observer = RangeObserver(name.rpartition(".")[0], quantizer.channel_axis)
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None


@contextlib.contextmanager
def measuring_means(
    model: nn.Module, layers: list[QuantizedLinear | QuantizedConv2d]
) -> Iterator[None]:
    """Let layers measure their input means; inside, the model computes in full precision."""
    attention = [m for m in model.modules() if isinstance(m, QuantizedAttention)]
    operands = [quantizer for module in attention for quantizer in module.quantizers()]
    for layer in layers:
        layer.input_means = InputMeans()
    for quantizer in operands:
        quantizer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.input_means = None
        for quantizer in operands:
            quantizer.enabled = True


def forward_scope(model: nn.Module, inputs: dict[str, Any], scope: str) -> Any:
    """Run the part of the detector that ``scope`` names on one collated batch.

    Args:
        inputs: what the loader yields: {"inputs": [images], "data_samples": […]}.
    """
    data = model.data_preprocessor(inputs, False)
    if scope == "backbone":
        return model.backbone(data["inputs"])
    if scope == "backbone+neck":
        return model.extract_feat(data["inputs"])
    return model.predict(data["inputs"], data["data_samples"])


@torch.no_grad()
def calibrate(model: nn.Module, loader: Iterable[dict[str, Any]]) -> nn.Module:
    """Find all ranges on calibration images, in full precision, then quantize the weights.

    Args:
        model: from :func:`quantize_model`.
        loader: batches as mmdet's test step takes them. It is gone through once for the ranges and,
            with ``bias_correction``, once more for the shifts that these ranges cause.

    Returns:
        ``model``, ready to run quantized.

    Raises:
        QwtError: no image came, or an activation is not finite.
    """
    settings: QuantizationSettings = model.quantization_settings
    with observing(model):
        _set_input_bits(model, _observe(model, loader))
        quantizers = activation_quantizers(model).values()
        for quantizer in progress(quantizers, "Choosing ranges", unit="quantizer"):
            if not quantizer.observer.is_empty:
                limits = quantizer.observer.estimate(
                    settings.activation_range, quantizer.bits, settings.percentile
                )
                quantizer.set_range(*limits)
    layers = [layer for layer in quantized_layers(model).values() if layer.is_calibrated]
    with measuring_means(model, layers if settings.bias_correction else []):
        if settings.bias_correction:
            for batch in progress(loader, "Measuring mean shifts", unit="batch"):
                forward_scope(model, batch, settings.scope)
        for layer in progress(layers, "Quantizing weights", unit="layer"):
            layer.quantize_weight(settings.weight_range, settings.percentile)
    for name, module in model.named_modules():
        if isinstance(module, UNITS) and not module.is_calibrated:
            reason = "never ran on a calibration image"
            logger.warning("%s %s and is not quantized; it raises if it runs later.", name, reason)
            model.not_quantized.append(NotQuantized(name, type(module).__name__, reason))
    return model


def _observe(model: nn.Module, loader: Iterable[dict[str, Any]]) -> str | None:
    """Run the calibration images and return the name of the layer that ran first."""
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in quantized_layers(model).items()
    ]
    batches = 0
    try:
        for batch in progress(loader, "Calibrating", unit="batch"):
            forward_scope(model, batch, model.quantization_settings.scope)
            batches += 1
            while handles:
                handles.pop().remove()
    finally:
        for handle in handles:
            handle.remove()
    if batches == 0:
        raise QwtError("There are no calibration images; choose at least one.")
    return order[0] if order else None


def _set_input_bits(model: nn.Module, first: str | None) -> None:
    """Give the layer that sees the image ``input_bits``, unless an override says otherwise."""
    settings: QuantizationSettings = model.quantization_settings
    override = first and _matching_override(first, settings.overrides)
    if first and (not override or override.activation_bits is None):
        model.get_submodule(first).input_quantizer.bits = settings.input_bits
