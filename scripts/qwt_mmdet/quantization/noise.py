"""How much noise quantization puts on each layer, and what stays in full precision."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..detectors.forward import count_operations, forward_scope
from .attention import QuantizedAttention
from .convert import full_precision, quantized_layers, rounded_weights
from .layers import QuantizedLayer
from .quantizer import ActivationQuantizer, Watch


class SignalNoise:
    """Streaming signal-to-quantization-noise ratio of a tensor."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0

    def update(self, full: Tensor, quantized: Tensor) -> None:
        """Add a tensor as it should be and as it is, of any (equal) shape."""
        self.signal += float(full.square().sum(dtype=torch.float64))
        self.noise += float((full - quantized).square_().sum(dtype=torch.float64))

    def decibels(self) -> float | None:
        """10 log10(signal / noise), or None where one of them is 0."""
        return decibels(self.noise / self.signal) if self.signal else None


def decibels(relative_noise: float | None) -> float | None:
    """Signal-to-noise ratio in dB for noise by signal power; None without any noise."""
    return -10 * math.log10(relative_noise) if relative_noise else None


class HeadNoise:
    """Streaming noise of all tensors that a detector's heads return."""

    def __init__(self) -> None:
        self._tensors: list[SignalNoise] = []

    def update(self, full: Sequence[Tensor], quantized: Sequence[Tensor]) -> None:
        """Add the tensors of one image as they should be and as they are."""
        self._tensors = self._tensors or [SignalNoise() for _ in full]
        for total, *pair in zip(self._tensors, full, quantized, strict=True):
            total.update(*pair)

    def relative(self) -> float:
        """Noise by signal power, averaged over the tensors that have a signal."""
        shares = [total.noise / total.signal for total in self._tensors if total.signal > 0]
        return sum(shares) / len(shares) if shares else 0.0


def measure_noise(
    model: nn.Module,
    images: Iterable[dict[str, Any]],
    scope: str,
    fitted: Callable[[str], tuple[Tensor, Tensor | None]] | None = None,
) -> dict[str, float | None]:
    """Signal-to-quantization-noise ratio in dB of every layer's output and attention's operands.

    The noise is what rounding this layer's weights and this input changes, and nothing else.

    Args:
        model: calibrated; its weights are not rounded.
        fitted: of a sequential refit, by name a layer's weights and bias before they were rounded. Then all
            layers compute quantized, and each is compared with its fitted weights on the input that it gets.
            None: each is quantized alone, on what the full-precision model computes.
    """
    noise: dict[str, SignalNoise] = {}
    watch: dict[nn.Module, Watch] = {}

    def see_layer(name: str, layer: QuantizedLayer, x: Tensor, output: Tensor) -> None:
        exact = output if fitted is None else layer._compute(x, *fitted(name))
        noise[name].update(exact, layer.quantized_output(x))

    def see_operand(name: str, quantizer: ActivationQuantizer, x: Tensor, _: Tensor) -> None:
        noise[name].update(x, quantizer.quantized(x))

    for name, layer in quantized_layers(model).items():
        if layer.is_calibrated:
            noise[name], watch[layer] = SignalNoise(), partial(see_layer, name, layer)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedAttention) and module.is_calibrated:
            for operand, quantizer in zip(module.operands, module.quantizers(), strict=True):
                key = f"{name} ({operand})"
                noise[key], watch[quantizer] = SignalNoise(), partial(see_operand, key, quantizer)
    with (full_precision if fitted is None else rounded_weights)(model, watch):
        for image in images:
            forward_scope(model, image, scope)
    return {name: total.decibels() for name, total in noise.items()}


@contextlib.contextmanager
def count_multiply_adds(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, float]]:
    """Count convolutions and matrix products inside.

    Afterwards the dictionary holds the share of each module in ``names`` in percent of all, as far as
    torch's counter knows any in it.
    """
    start: dict[str, int] = {}
    spent: Counter[str] = Counter()
    shares: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        counter = stack.enter_context(count_operations(model))
        for name in names:

            def enter(*_: Any, name: str = name) -> None:
                start[name] = counter.get_total_flops()

            def leave(*_: Any, name: str = name) -> None:
                spent[name] += counter.get_total_flops() - start[name]

            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield shares
    shares.update({n: 100 * v / counter.get_total_flops() for n, v in spent.items() if v})
