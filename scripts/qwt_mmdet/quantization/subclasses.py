"""Quantized classes of subclasses of nn.Linear or nn.Conv2d.

A subclass may change its input before the product (mmcv's Conv2dAdaptivePadding pads it), or the product
afterwards. Its own forward keeps running; only its call of ``F.linear`` or ``F.conv2d`` with the layer's
weight and bias is replaced by the quantized product. A class that uses its weight otherwise, for example
standardises it first, cannot be quantized: it would not multiply with the rounded weight.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear

PRODUCTS = {
    F.linear: ("input", "weight", "bias"),
    F.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
}
"""Names of the arguments of each product, in order."""

OPTIONS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
"""Options of a convolution that are attributes of the layer, and their defaults."""


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value if value == "same" else tuple(value)


class Products(TorchFunctionMode):
    """Inside: replaces each product of an input with the layer's weight by ``product``.

    Args:
        product: takes the input; None keeps torch's product.

    Attributes:
        seen: number of products so far.
        other_uses: names of other functions that computed a tensor from the weight.
    """

    def __init__(
        self,
        layer: nn.Linear | nn.Conv2d | QuantizedLayer,
        product: Callable[[Tensor], Tensor] | None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.product = product
        self.seen = 0
        self.other_uses: list[str] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS and self._is_the_layers(func, args, kwargs):
            self.seen += 1
            if self.product is None:
                return func(*args, **kwargs)
            return self.product(args[0] if args else kwargs["input"])
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and any(
            value is self.layer.weight for value in (*args, *kwargs.values())
        ):
            self.other_uses.append(getattr(func, "__name__", str(func)))
        return result

    def _is_the_layers(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = {**dict(zip(PRODUCTS[func], args, strict=False)), **kwargs}
        layer = self.layer
        options = OPTIONS if func is F.conv2d else {}
        return (
            given["weight"] is layer.weight
            and given.get("bias") is layer.bias
            and all(
                _pair(given.get(key, default)) == _pair(getattr(layer, key))
                for key, default in options.items()
            )
        )


class _OwnForward(QuantizedLayer):
    """First base of quantized subclasses: runs the forward of the original class."""

    original: type[nn.Module]
    base: type[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        with Products(self, functools.partial(self.base.forward, self)):
            return self.original.forward(self, x)


@functools.cache
def quantized_class(original: type[nn.Module]) -> type[QuantizedLayer]:
    """The quantized class of the subclass ``original``."""
    base = QuantizedConv2d if issubclass(original, nn.Conv2d) else QuantizedLinear
    attributes = {"original": original, "base": base, "__module__": __name__}
    return type(f"Quantized{original.__name__}", (_OwnForward, base, original), attributes)


@torch.no_grad()
def reason_against(layer: nn.Linear | nn.Conv2d) -> str | None:
    """Why a layer of a subclass cannot be quantized, or None where it can.

    The layer runs once on an input of ones.
    """
    if "weight" not in layer._parameters:  # torch.nn.utils.weight_norm and its kin
        return "its weight is computed from other tensors"
    if len(inspect.signature(layer.forward).parameters) != 1:
        return "its forward takes more than the input"
    if isinstance(layer, nn.Linear):
        sizes = []
    else:
        sizes = [
            spread * (taps - 1) + 1 + step
            for taps, spread, step in zip(
                layer.kernel_size, layer.dilation, layer.stride, strict=True
            )
        ]
    channels = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    x = layer.weight.new_ones(1, channels, *sizes)
    calls = Products(layer, None)
    try:
        with calls:
            layer.forward(x)
    except Exception as error:
        return f"its forward fails on a tensor of shape {tuple(x.shape)} ({type(error).__name__})"
    if calls.other_uses:
        return f"its forward uses its weight in another way ({', '.join(calls.other_uses)})"
    if calls.seen != 1:
        return f"its forward multiplies its input {calls.seen} times with its weight"
    return None
