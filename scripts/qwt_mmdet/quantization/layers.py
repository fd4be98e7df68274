"""Quantized layers: the model's own modules, given quantizers in place.

A layer keeps its identity (name, parents, sharing between parents). Its class is exchanged for a
subclass that quantizes its input and holds quantized weights. Buffers hold the results of calibration
(:mod:`.calibrate`), so state_dict is the file format.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .primitives import dequantize
from .quantizer import ActivationQuantizer, Watch

LAYER_BUFFERS = (
    "weight_codes",
    "weight_scale",
    "weight_zero_point",
    "bias_correction",
    "fold_factor",
    "fold_shift",
)
"""Buffers of a quantized layer beside those of its input quantizer."""


Subclass = TypeVar("Subclass", bound=nn.Module)


def exchange_class(module: nn.Module, subclass: type[Subclass]) -> Subclass:
    """Exchange the class of a module, in place, for a subclass of it; returns the module."""
    module.__class__ = subclass
    assert isinstance(module, subclass)
    return module


class QuantizedLayer(nn.Module):
    """Base of quantized Linear and Conv2d: an input quantizer and weights with integer codes.

    ``weight`` holds the full-precision weights until :meth:`restore_weight` rounds them. If ``enabled`` is
    False, the layer computes with ``weight`` and the original bias. ``migrates``: scale migration chooses the
    scales of its input.
    """

    weight: Tensor
    bias: Tensor | None
    weight_codes: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    bias_correction: Tensor | None
    fold_factor: Tensor | None
    fold_shift: Tensor | None

    def _attach(self, name: str, weight_bits: int, activation_bits: int) -> None:
        self.weight_bits = weight_bits
        self.enabled = True
        self.watch: Watch | None = None
        self.migrates = False
        self.had_bias = self.bias is not None
        axis = self._input_channel_axis()
        self.input_quantizer = ActivationQuantizer(f"Layer {name}", activation_bits, axis)
        for buffer in LAYER_BUFFERS:
            self.register_buffer(buffer, None)

    def _input_channel_axis(self) -> int | None:
        return None

    @property
    def weight_groups(self) -> int:
        """Number of groups of channels, as of a grouped convolution."""
        return 1

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    @property
    def activation_bits(self) -> int:
        return self.input_quantizer.bits

    @property
    def is_calibrated(self) -> bool:
        return self.input_quantizer.is_calibrated

    @property
    def most_input_scales(self) -> int:
        """Number of scales that calibration may give the input: none, one, or one for each channel."""
        if not self.input_quantizer.rounds:
            return 0
        per_channel = self.migrates or self._input_channel_axis() is not None
        return self.weight.shape[1] * self.weight_groups if per_channel else 1

    def forward(self, x: Tensor) -> Tensor:
        """Linear: […, in] -> […, out]. Conv2d: [batch, in, h, w] -> [batch, out, h', w']."""
        bias = self.effective_bias() if self.enabled else self.bias
        output = self._compute(self.input_quantizer(x), self.weight, bias)
        if self.watch is not None:
            self.watch(x, output)
        return output

    @torch.no_grad()
    def quantized_output(self, x: Tensor) -> Tensor:
        """The layer's output with quantized input and weights, whatever ``weight`` and ``enabled`` are."""
        return self._compute(
            self.input_quantizer.quantized(x), self.rounded_weight(), self.effective_bias()
        )

    def effective_bias(self) -> Tensor | None:
        """The bias with its correction, shape [out], or None where there is neither."""
        if self.bias_correction is None:
            return self.bias
        return self.bias_correction if self.bias is None else self.bias + self.bias_correction

    def rounded_weight(self) -> Tensor:
        """The weights on their grids, from the integer codes."""
        codes, scale, zero_point = self.weight_codes, self.weight_scale, self.weight_zero_point
        if codes is None or scale is None or zero_point is None:
            raise AssertionError(f"{self.input_quantizer.name} has no codes before calibration")
        shape = [-1] + [1] * (codes.dim() - 1)
        return dequantize(codes, scale.view(shape), zero_point.view(shape)) / self.input_factor()

    def input_factor(self, scale: Tensor | None = None) -> Tensor:
        """Factor of the weights before they are rounded; broadcasts against them.

        If each input channel has a scale, the weights are multiplied with its ratio to the mean scale.

        Args:
            scale: of the input; None for that of its quantizer.
        """
        if scale is None:
            scale, _ = self.input_quantizer.grid
        if scale.numel() == 1:
            return torch.ones_like(scale)
        factor = (scale / scale.mean()).view(self.weight_groups, 1, -1)
        outputs = len(self.weight) // self.weight_groups
        shape = [len(self.weight), -1] + [1] * (self.weight.dim() - 2)
        return factor.expand(-1, outputs, -1).reshape(shape)

    @torch.no_grad()
    def restore_weight(self) -> None:
        """Set ``weight`` from the integer codes, scales and zero points."""
        self.weight.copy_(self.rounded_weight())


def layer_by_name(model: nn.Module, name: str) -> QuantizedLayer:
    """The module ``name``, which is a quantized layer."""
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantizedLayer), f"{name} is not quantized"
    return layer


LARGE_INPUT = 2**23
"""Elements beyond which allocating a tensor costs more than computing with it: C libraries take fresh
pages from the system for each (glibc: from 32 MiB)."""

CHUNK = 2**19
"""Elements of a large input that are rounded at a time, so that they stay in the cache."""


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """nn.Linear with quantized input (per tensor) and weight (per output channel)."""

    bias: Tensor | None  # type: ignore[assignment]  # torch forgets Linear(…, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] -> […, out]. A large input on the CPU is rounded and multiplied in chunks."""
        in_chunks = self.enabled and x.numel() > LARGE_INPUT and x.device.type == "cpu"
        if not in_chunks or torch.is_grad_enabled():
            return super().forward(x)
        vectors = x.flatten(0, -2)
        output = vectors.new_empty(len(vectors), self.out_features)
        chunks = (t.split(max(1, CHUNK // self.in_features)) for t in (vectors, output))
        for chunk, place in zip(*chunks, strict=True):
            place.copy_(super().forward(chunk))
        return output.unflatten(0, x.shape[:-1])

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d with quantized input and weight (per output channel).

    The input of a depthwise convolution has a scale per channel. Each output channel sees one input
    channel, so the scale folds into the weight's and the integer arithmetic stays the same. Inputs of other
    convolutions have scales per channel only by migration (:mod:`.migration`).
    """

    def _input_channel_axis(self) -> int | None:
        return 1 if self.is_depthwise else None

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel sees one input channel."""
        return self.groups > 1 and self.groups == self.in_channels

    @property
    def weight_groups(self) -> int:
        return self.groups

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.Conv2d._conv_forward(self, x, weight, bias)  # a subclass may have its own
