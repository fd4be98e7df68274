"""Turn a detector into a quantized one, and calibrate it on images."""

import contextlib
import dataclasses
import fnmatch
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mmcv.cnn.bricks import wrappers
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.flop_counter import FlopCounterMode

from ..errors import QwtError
from ..progress import progress
from ..settings import Override, QuantizationSettings
from .attention import ATTENTION, QuantizedAttention, split_projections
from .folding import apply_fold, factors, find_folds
from .layers import ActivationQuantizer, QuantizedConv2d, QuantizedLinear, Watch
from .moments import InputMoments, SignalNoise
from .ranges import RangeObserver
from .subclasses import quantized_form, reason_against

logger = logging.getLogger(__name__)

# Exact classes only; subclasses with a forward of their own keep it (see subclasses.py).
LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv2d: QuantizedConv2d,
    NonDynamicallyQuantizableLinear: QuantizedLinear,  # of nn.MultiheadAttention
    wrappers.Linear: QuantizedLinear,
    wrappers.Conv2d: QuantizedConv2d,
}

UNSUPPORTED = "layer type that cannot be quantized"

UNITS = (QuantizedLinear, QuantizedConv2d, QuantizedAttention)
"""What is quantized: layers, and the matrix products of attention."""

NOISE_IMAGES = 8
"""Calibration images that the signal-to-noise ratios of the report are measured on."""


@dataclass(frozen=True)
class NotQuantized:
    """A module with weights or matrix products that stays in full precision, and why.

    Args:
        multiply_adds_percent: its share in the convolutions and matrix products of all that is in
            scope; None where torch's counter knows none in it (mmcv's own operators).
    """

    name: str
    type: str
    reason: str
    multiply_adds_percent: float | None = None


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
    return isinstance(module, nn.MultiheadAttention) and type(module) not in ATTENTION


def _reason_against(layer: nn.Linear | nn.Conv2d) -> str | None:
    """Why a layer stays in full precision, or None where it has a quantized form."""
    if "weight" not in layer._parameters:  # torch.nn.utils.weight_norm and its kin
        return "its weight is computed from other tensors"
    return None if type(layer) in LAYERS else reason_against(layer)


def quantize_model(model: nn.Module, settings: QuantizationSettings) -> nn.Module:
    """Exchange the layers in scope for quantized ones, in place; they need :func:`calibrate` next.

    Args:
        model: an mmdet detector in full precision.

    Returns:
        ``model`` itself, with ``quantization_settings``, ``folds`` and ``not_quantized`` set on it.

    Raises:
        QwtError: an override matches no layer, or the scope holds no layer to quantize.
    """
    if hasattr(model, "quantization_settings"):
        raise QwtError("This model is quantized already; load it again in full precision first.")
    if any(type(module).__module__.startswith("timm.") for module in model.modules()):
        from . import timm_models  # noqa: F401  registers what it knows
    candidates: list[tuple[str, nn.Module]] = []
    not_quantized: list[NotQuantized] = []
    opaque: list[str] = []
    for module in [m for n, m in model.named_modules() if in_scope(n, settings.scope)]:
        if type(module) is nn.MultiheadAttention:
            split_projections(module)
    for name, module in model.named_modules():
        if not in_scope(name, settings.scope) or any(name.startswith(f"{o}.") for o in opaque):
            continue
        kind = type(module).__name__
        if _is_opaque(module):
            opaque.append(name)
            reason = "attention class without a registered quantized form"
            not_quantized.append(NotQuantized(name, kind, reason))
        elif type(module) in ATTENTION:
            candidates.append((name, module))
        elif isinstance(module, nn.Linear | nn.Conv2d):
            reason = _reason_against(module)
            if reason is None:
                candidates.append((name, module))
            else:
                not_quantized.append(NotQuantized(name, kind, f"{UNSUPPORTED}: {reason}"))
        elif any(True for p in module.parameters(recurse=False) if p.dim() > 1):
            not_quantized.append(NotQuantized(name, kind, UNSUPPORTED))
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
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.__class__ = LAYERS.get(type(module)) or quantized_form(type(module))
            module._attach(name, weight_bits, activation_bits)
        else:
            module.__class__ = ATTENTION[type(module)]
            module._attach(
                name, activation_bits, logarithmic_probability=settings.activation_range == "repq"
            )
    model.folds = find_folds(model) if settings.activation_range == "repq" else []
    for fold in model.folds:
        for name in fold.layers:
            layer = model.get_submodule(name)
            layer.input_quantizer.channel_axis = 1 if isinstance(layer, nn.Conv2d) else -1
    if settings.migrate_scales:
        for layer in quantized_layers(model).values():
            quantizer = layer.input_quantizer
            if isinstance(layer, nn.Conv2d) and quantizer.channel_axis is None:
                layer.migrates, quantizer.channel_axis = True, 1
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
def full_precision(model: nn.Module, watch: dict[nn.Module, Watch]) -> Iterator[None]:
    """Let a model whose weights are not rounded yet compute in full precision.

    Args:
        watch: what is called with a layer or activation quantizer, its input and its output whenever it
            has run.
    """
    switched = [*quantized_layers(model).values(), *activation_quantizers(model).values()]
    for module in switched:
        module.enabled = False
        module.watch = watch.get(module)
    try:
        yield
    finally:
        for module in switched:
            module.enabled = True
            module.watch = None


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
def calibrate(
    model: nn.Module, loader: Iterable[dict[str, Any]], *, noise_images: int = NOISE_IMAGES
) -> nn.Module:
    """Find all ranges on calibration images, in full precision, then quantize the weights.

    Args:
        model: from :func:`quantize_model`.
        loader: batches as mmdet's test step takes them. It is gone through once for the ranges and,
            with ``bias_correction`` or ``gptq``, once more for the moments of the quantized inputs;
            its first images once more for the ratio of signal to noise of every layer.
        noise_images: number of these, in whole batches.

    Returns:
        ``model``, ready to run quantized, with ``signal_noise`` (dB by name) set on it.

    Raises:
        QwtError: no image came, or an activation is not finite.
    """
    settings: QuantizationSettings = model.quantization_settings
    shares = find_ranges(model, loader)
    layers = {n: layer for n, layer in quantized_layers(model).items() if layer.is_calibrated}
    moments = _measure_moments(model, loader, list(layers.values()))
    for layer in progress(layers.values(), "Quantizing weights", unit="layer"):
        layer.quantize_weight(settings, moments.pop(layer, None))
    model.signal_noise = _measure_noise(model, _first_images(loader, noise_images), layers)
    for layer in layers.values():
        layer.restore_weight()
    for name, module in model.named_modules():
        if isinstance(module, UNITS) and not module.is_calibrated:
            reason = "never ran on a calibration image"
            logger.warning("%s %s and is not quantized; it raises if it runs later.", name, reason)
            model.not_quantized.append(NotQuantized(name, type(module).__name__, reason))
    model.not_quantized = [
        dataclasses.replace(entry, multiply_adds_percent=shares.get(entry.name))
        for entry in model.not_quantized
    ]
    return model


@torch.no_grad()
def find_ranges(model: nn.Module, loader: Iterable[dict[str, Any]]) -> dict[str, float]:
    """The first part of :func:`calibrate`: run all images in full precision and choose the ranges.

    Returns:
        By name of a module that is not quantized its share of the multiply-adds, in percent.
    """
    settings: QuantizationSettings = model.quantization_settings
    with observing(model):
        first, shares = _observe(model, loader)
        _set_input_bits(model, first)
        quantizers = activation_quantizers(model).values()
        migrating = {m.input_quantizer: m for m in quantized_layers(model).values() if m.migrates}
        for quantizer in progress(quantizers, "Choosing ranges", unit="quantizer"):
            if quantizer.observer.is_empty:
                continue
            if quantizer in migrating:
                migrating[quantizer].migrate_scales(settings)
            else:
                quantizer.choose_range(settings.range_method, settings.percentile)
    _fold(model)
    return shares


def _first_images(loader: Iterable[dict[str, Any]], images: int) -> Iterator[dict[str, Any]]:
    """Batches until they hold so many images."""
    for batch in loader:
        if images <= 0:
            return
        yield batch
        images -= len(batch["inputs"])


def _fold(model: nn.Module) -> None:
    """Turn ranges per channel after LayerNorms into ranges per tensor."""
    for fold in model.folds:
        quantizers = [model.get_submodule(name).input_quantizer for name in fold.layers]
        first = quantizers[0]
        if not all(quantizer.is_calibrated for quantizer in quantizers):
            continue
        scale, zero_point, factor, shift = factors(first.scale, first.zero_point)
        for quantizer in quantizers:  # they have all seen the same values
            quantizer.set_parameters(scale, zero_point)
        apply_fold(model, fold, factor, shift)


def _measure_moments(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    layers: list[QuantizedLinear | QuantizedConv2d],
) -> dict[nn.Module, InputMoments]:
    """Moments of the quantized inputs in a full-precision pass, as far as the settings need them."""
    settings: QuantizationSettings = model.quantization_settings
    second = settings.rounding == "gptq"
    if not settings.bias_correction and not second:
        return {}
    moments = {layer: InputMoments() for layer in layers}

    def measure(layer: nn.Module, x: Tensor, output: Tensor) -> None:
        layer.measure(x, output, moments[layer], second=second)

    with full_precision(model, dict.fromkeys(layers, measure)):
        for batch in progress(loader, "Measuring quantized inputs", unit="batch"):
            forward_scope(model, batch, settings.scope)
    return moments


def _measure_noise(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    layers: dict[str, QuantizedLinear | QuantizedConv2d],
) -> dict[str, float | None]:
    """Signal-to-quantization-noise ratio in dB of every layer's output and attention's operands.

    Each is quantized alone: its input is what the full-precision model computes.
    """
    names = {layer: name for name, layer in layers.items()}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedAttention) and module.is_calibrated:
            for operand, quantizer in zip(module.operands, module.quantizers(), strict=True):
                names[quantizer] = f"{name} ({operand})"
    noise = {module: SignalNoise() for module in names}

    def measure(module: nn.Module, x: Tensor, output: Tensor) -> None:
        operand = isinstance(module, ActivationQuantizer)
        quantized = module.quantized(x) if operand else module.quantized_output(x)
        noise[module].update(output, quantized)

    with full_precision(model, dict.fromkeys(names, measure)):
        for batch in batches:
            forward_scope(model, batch, model.quantization_settings.scope)
    return {name: noise[module].decibels() for module, name in names.items()}


@contextlib.contextmanager
def _multiply_adds(model: nn.Module) -> Iterator[dict[str, float]]:
    """Count inside; afterwards the dictionary holds what is not quantized, in percent of all."""
    start: dict[str, int] = {}
    spent: Counter[str] = Counter()
    shares: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        counter = stack.enter_context(FlopCounterMode(display=False))
        for name in [entry.name for entry in model.not_quantized]:

            def enter(*_: Any, name: str = name) -> None:
                start[name] = counter.get_total_flops()

            def leave(*_: Any, name: str = name) -> None:
                spent[name] += counter.get_total_flops() - start[name]

            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield shares
    shares.update({n: 100 * v / counter.get_total_flops() for n, v in spent.items() if v})


def _observe(
    model: nn.Module, loader: Iterable[dict[str, Any]]
) -> tuple[str | None, dict[str, float]]:
    """Run the calibration images.

    Returns:
        The name of the layer that ran first, and the multiply-adds (of the first batch, in percent)
        of what is not quantized.
    """
    shares: dict[str, float] = {}
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, module in quantized_layers(model).items()
    ]
    batches = 0
    try:
        for batch in progress(loader, "Calibrating", unit="batch"):
            with contextlib.ExitStack() as stack:
                if batches == 0 and model.not_quantized:  # counting slows a pass
                    shares = stack.enter_context(_multiply_adds(model))
                forward_scope(model, batch, model.quantization_settings.scope)
            batches += 1
            while handles:
                handles.pop().remove()
    finally:
        for handle in handles:
            handle.remove()
    if batches == 0:
        raise QwtError("There are no calibration images; choose at least one.")
    return order[0] if order else None, shares


def _set_input_bits(model: nn.Module, first: str | None) -> None:
    """Give the layer that sees the image ``input_bits``, unless an override says otherwise."""
    settings: QuantizationSettings = model.quantization_settings
    override = first and _matching_override(first, settings.overrides)
    if first and (not override or override.activation_bits is None):
        model.get_submodule(first).input_quantizer.bits = settings.input_bits
