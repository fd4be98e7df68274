"""Bytes of weights: the one count that reports, searches and budgets share.

A quantized weight takes its bits. Each of its output channels, and each scale that the layer's input may have, adds a
scale and a zero point. All other parameters are float32, as are biases that quantization adds. The count depends on
bits and settings alone, not on calibration images, so that the size of a recipe is known before its calibration.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..record import quantization_of
from .convert import calibrated_layers, quantized_layers

FLOAT = 4
"""Bytes of a number in single precision."""
GRID = FLOAT + 1
"""Bytes of a scale and of a zero point, which is one byte."""


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors in a file: floating point in single precision."""
    return sum(t.numel() * (FLOAT if t.is_floating_point() else t.element_size()) for t in tensors)


def code_bytes(weights: int, bits: float) -> float:
    """Bytes of the codes of so many weights, of so many bits each."""
    return weights * bits / 8


def full_precision_bytes(model: nn.Module) -> int:
    """Bytes of a detector's parameters in full precision, also of a quantized detector's."""
    layers = quantized_layers(model).values()
    added = [layer.bias for layer in layers if not layer.had_bias and layer.bias is not None]
    return tensor_bytes(model.parameters()) - tensor_bytes(added)


def size_range(model: nn.Module, bits: Mapping[str, tuple[int, int]]) -> tuple[float, float]:
    """About the smallest and the largest bytes of a detector that is not calibrated yet.

    Args:
        model: from :func:`.convert.quantize_model`.
        bits: fewest and most bits of weights by the layer's name, where they are not the layer's own.
    """
    corrected = quantization_of(model).settings.bias_correction
    total = [float(full_precision_bytes(model))] * 2
    for name, layer in quantized_layers(model).items():
        own = bits.get(name, (layer.weight_bits, layer.weight_bits))
        added = GRID * (len(layer.weight) + layer.most_input_scales) - tensor_bytes([layer.weight])
        added += FLOAT * len(layer.weight) * (corrected and layer.bias is None)
        total = [
            t + added + code_bytes(layer.weight.numel(), b) for t, b in zip(total, own, strict=True)
        ]
    return total[0], total[1]


def weight_bytes(module: nn.Module, bits: Mapping[str, int] | None = None) -> float:
    """Bytes of a module's parameters: quantized weights at their bits, all others as float32.

    Args:
        bits: of weights by the layer's name, where they are to differ from the layer's own.
    """
    total: float = tensor_bytes(module.parameters())
    for name, layer in calibrated_layers(module).items():
        own = (bits or {}).get(name, layer.weight_bits)
        total += code_bytes(layer.weight.numel(), own) - tensor_bytes([layer.weight])
    return total


def detector_bytes(model: nn.Module, bits: Mapping[str, int] | None = None) -> float:
    """Bytes of a quantized detector: those of :func:`weight_bytes`, and all that quantization adds to the parameters."""
    total = weight_bytes(model, bits)
    for layer in calibrated_layers(model).values():
        total += GRID * (len(layer.weight) + layer.most_input_scales)
        if layer.bias is None and layer.bias_correction is not None:
            total += FLOAT * len(layer.weight)
    return total
