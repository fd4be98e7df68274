"""Exchange the layers of a detector for quantized ones, in place."""

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping

from mmcv.cnn.bricks import wrappers
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..config import Override, QuantizationSettings
from ..detectors.forward import check_precision
from ..errors import QwtError
from ..record import NotQuantized, Quantization, record_of
from .attention import ATTENTION, QuantizedAttention, split_projections
from .folding import find_folds
from .layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear, exchange_class, layer_by_name
from .quantizer import ActivationQuantizer, Watch
from .scheme import folds_norms, integer_grids, logarithmic_attention, symmetric_activations
from .subclasses import quantized_class, reason_against

# Exact classes only; subclasses.py handles subclasses.
LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv2d: QuantizedConv2d,
    NonDynamicallyQuantizableLinear: QuantizedLinear,  # of nn.MultiheadAttention
    wrappers.Linear: QuantizedLinear,
    wrappers.Conv2d: QuantizedConv2d,
}

UNSUPPORTED = "layer type that cannot be quantized"

Unit = QuantizedLayer | QuantizedAttention
"""A unit of quantization: a layer, or the matrix products of attention."""


def in_scope(name: str, scope: str) -> bool:
    """Tell whether the module called ``name`` belongs to ``scope`` (see QuantizationSettings)."""
    if scope == "detector":
        return not name.startswith("data_preprocessor")
    return name.split(".")[0] in scope.split("+")


def matching_override(name: str, overrides: tuple[Override, ...]) -> Override | None:
    matches = [entry for entry in overrides if fnmatch.fnmatchcase(name, entry.pattern)]
    return matches[-1] if matches else None


def own_bits(name: str, settings: QuantizationSettings) -> tuple[int, int]:
    """Bits of the weights and of the input of a layer: those of its override, else those of the settings."""
    override = matching_override(name, settings.overrides)
    weight_bits = override and override.weight_bits
    activation_bits = override and override.activation_bits
    return weight_bits or settings.weight_bits, activation_bits or settings.activation_bits


def quantize_model(model: nn.Module, settings: QuantizationSettings) -> nn.Module:
    """Exchange the layers in scope for quantized ones, in place; they need :func:`.calibrate.calibrate` next.

    Args:
        model: an mmdet detector in full precision.

    Returns:
        ``model`` itself.

    Raises:
        QwtError: an override matches no layer, the scope holds no layer to quantize, or the model is not
            in float32.
    """
    if record_of(model).quantization is not None:
        raise QwtError("This model is quantized already; load it again in full precision first.")
    check_precision(model)
    if any(type(module).__module__.startswith("timm.") for module in model.modules()):
        from . import timm_models  # noqa: F401  registers its classes
    found, not_quantized = _choose(model, settings.scope)
    names = [name for name, _ in found]
    for entry in settings.overrides:
        if not fnmatch.filter(names, entry.pattern):
            raise QwtError(
                f"The override pattern {entry.pattern!r} matches no layer in scope "
                f"{settings.scope!r}; layer names look like {', '.join(names[:3])}."
            )
    for name, module in found:
        override = matching_override(name, settings.overrides)
        if override is not None and override.skip:
            reason = "excluded by an override"
            not_quantized.append(NotQuantized(name, type(module).__name__, reason))
        else:
            _exchange(name, module, settings)
    folds = find_folds(model) if folds_norms(settings) else []
    for fold in folds:
        for name in fold.layers:
            layer = layer_by_name(model, name)
            layer.input_quantizer.channel_axis = 1 if isinstance(layer, nn.Conv2d) else -1
    for layer in quantized_layers(model).values():
        if not isinstance(layer, QuantizedConv2d):
            continue
        if layer.is_depthwise:
            layer.migrates = integer_grids(settings)  # which need one zero point for all channels
        elif settings.migrate_scales and layer.input_quantizer.channel_axis is None:
            layer.migrates, layer.input_quantizer.channel_axis = True, 1
    for quantizer in activation_quantizers(model).values():
        quantizer.symmetric = symmetric_activations(settings)
    record_of(model).quantization = Quantization(settings, folds, not_quantized)
    return model


def _choose(model: nn.Module, scope: str) -> tuple[list[tuple[str, nn.Module]], list[NotQuantized]]:
    """The layers and attention modules of a scope to quantize, by name, and modules that stay as they are.

    Raises:
        QwtError: the scope holds no layer to quantize.
    """
    found: list[tuple[str, nn.Module]] = []
    not_quantized: list[NotQuantized] = []
    opaque: list[str] = []

    def leave(name: str, module: nn.Module, reason: str) -> None:
        not_quantized.append(NotQuantized(name, type(module).__name__, reason))

    for module in [m for n, m in model.named_modules() if in_scope(n, scope)]:
        if type(module) is nn.MultiheadAttention:
            split_projections(module)
    for name, module in model.named_modules():
        if not in_scope(name, scope) or any(name.startswith(f"{o}.") for o in opaque):
            continue
        if type(module) in ATTENTION:
            found.append((name, module))
        elif isinstance(module, nn.MultiheadAttention):
            opaque.append(name)  # it uses its children's weights without calling the children
            leave(name, module, "attention class without a registered quantized class")
        elif isinstance(module, nn.Linear | nn.Conv2d):
            is_plain = type(module) in LAYERS and "weight" in module._parameters
            if reason := None if is_plain else reason_against(module):
                leave(name, module, f"{UNSUPPORTED}: {reason}")
            else:
                found.append((name, module))
        elif any(True for p in module.parameters(recurse=False) if p.dim() > 1):
            leave(name, module, UNSUPPORTED)
    if not found:
        raise QwtError(
            f"The scope {scope!r} of this model holds no Linear or Conv2d layer; choose another scope."
        )
    return found, not_quantized


def _exchange(name: str, module: nn.Module, settings: QuantizationSettings) -> None:
    """Give a module its quantized class, and its bits."""
    original = type(module)
    weight_bits, activation_bits = own_bits(name, settings)
    if isinstance(module, nn.Linear | nn.Conv2d):
        # mypy takes no class for hashable.
        quantized = LAYERS.get(original) or quantized_class(original)  # type: ignore[arg-type]
        exchange_class(module, quantized)._attach(name, weight_bits, activation_bits)
    else:
        exchange_class(module, ATTENTION[original])._attach(
            name, activation_bits, logarithmic_probability=logarithmic_attention(settings)
        )


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized Linear and Conv2d layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def calibrated_layers(module: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers whose inputs have a range, by name."""
    return {name: layer for name, layer in quantized_layers(module).items() if layer.is_calibrated}


def quantized_units(model: nn.Module) -> dict[str, Unit]:
    """The quantized layers and attention modules by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Unit)}


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """All activation quantizers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ActivationQuantizer)}


@contextlib.contextmanager
def running_order(model: nn.Module) -> Iterator[list[str]]:
    """Inside: append the name of each quantized layer whenever it runs."""
    order: list[str] = []
    with contextlib.ExitStack() as stack:
        for name, layer in quantized_layers(model).items():
            handle = layer.register_forward_pre_hook(lambda *_, name=name: order.append(name))
            stack.callback(handle.remove)
        yield order


@contextlib.contextmanager
def rounded_weights(model: nn.Module, watch: Mapping[nn.Module, Watch]) -> Iterator[None]:
    """:func:`full_precision`, but what is calibrated computes quantized."""
    layers = [*quantized_layers(model).values()]
    weights = [layer.weight.data for layer in layers]
    with full_precision(model, watch):
        for layer in layers:
            layer.enabled = layer.is_calibrated
            if layer.is_calibrated:
                layer.weight.data = layer.rounded_weight().to(layer.weight.dtype)
        for quantizer in activation_quantizers(model).values():
            quantizer.enabled = quantizer.is_calibrated
        try:
            yield
        finally:
            for layer, weight in zip(layers, weights, strict=True):
                layer.weight.data = weight


@contextlib.contextmanager
def full_precision(model: nn.Module, watch: Mapping[nn.Module, Watch]) -> Iterator[None]:
    """Let a model whose weights are not rounded yet compute in full precision.

    Args:
        watch: callbacks by layer or activation quantizer, called with its input and its output after each run.
    """
    switched: list[QuantizedLayer | ActivationQuantizer]
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
