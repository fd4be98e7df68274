"""Relative errors and signal-to-quantization-noise ratios (SQNR), and shares of multiply-adds."""

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


class RelativeError:
    """Streaming power of a tensor and of its quantization error."""

    signal = noise = 0.0

    def update(self, full: Tensor, quantized: Tensor) -> None:
        """Add a tensor in full precision and quantized, of any (equal) shape."""
        self.signal += float(full.square().sum(dtype=torch.float64))
        self.noise += float((full - quantized).square_().sum(dtype=torch.float64))

    def sqnr_db(self) -> float | None:
        """10 log10(signal / noise), or None where one of them is 0."""
        return sqnr_db(self.noise / self.signal) if self.signal else None


def sqnr_db(relative_error: float | None) -> float | None:
    """Signal-to-quantization-noise ratio in dB for a relative error; None without any error."""
    return -10 * math.log10(relative_error) if relative_error else None


class HeadError:
    """Streaming relative error of all tensors that a detector's heads return."""

    def __init__(self) -> None:
        self._tensors: list[RelativeError] = []

    def update(self, full: Sequence[Tensor], quantized: Sequence[Tensor]) -> None:
        """Add the tensors of one image in full precision and quantized."""
        self._tensors = self._tensors or [RelativeError() for _ in full]
        for total, *pair in zip(self._tensors, full, quantized, strict=True):
            total.update(*pair)

    def relative(self) -> float:
        """Error power by signal power, averaged over the tensors whose signal is not 0."""
        shares = [total.noise / total.signal for total in self._tensors if total.signal > 0]
        return sum(shares) / len(shares) if shares else 0.0


def measure_sqnr(
    model: nn.Module,
    images: Iterable[dict[str, Any]],
    scope: str,
    fitted: Callable[[str], tuple[Tensor, Tensor | None]] | None = None,
) -> dict[str, float | None]:
    """Signal-to-quantization-noise ratio in dB of every layer's output and attention's operands.

    Each ratio counts the rounding of that layer's weights and input alone.

    Args:
        model: calibrated; its weights are not rounded.
        fitted: returns a layer's weights and bias after a sequential refit, before they were rounded. Then all
            layers compute quantized, and each is compared with its fitted weights on the same input.
            None: each layer is quantized alone, on the activations of the full-precision model.
    """
    errors: dict[str, RelativeError] = {}
    watch: dict[nn.Module, Watch] = {}

    def see_layer(name: str, layer: QuantizedLayer, x: Tensor, output: Tensor) -> None:
        exact = output if fitted is None else layer._compute(x, *fitted(name))
        errors[name].update(exact, layer.quantized_output(x))

    def see_operand(name: str, quantizer: ActivationQuantizer, x: Tensor, _: Tensor) -> None:
        errors[name].update(x, quantizer.quantized(x))

    for name, layer in quantized_layers(model).items():
        if layer.is_calibrated:
            errors[name], watch[layer] = RelativeError(), partial(see_layer, name, layer)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedAttention) and module.is_calibrated:
            for operand, quantizer in zip(module.operands, module.quantizers(), strict=True):
                key = f"{name} ({operand})"
                errors[key] = RelativeError()
                watch[quantizer] = partial(see_operand, key, quantizer)
    with (full_precision if fitted is None else rounded_weights)(model, watch):
        for image in images:
            forward_scope(model, image, scope)
    return {name: total.sqnr_db() for name, total in errors.items()}


@contextlib.contextmanager
def count_multiply_adds(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, float]]:
    """Count the multiply-adds of convolutions and matrix products inside.

    Afterwards the dictionary holds the percentage of each module in ``names``. A module without operations that
    torch's counter knows is left out.
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
