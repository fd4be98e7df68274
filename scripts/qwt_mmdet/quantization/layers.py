"""Quantized layers: the model's own modules, given quantizers in place.

A layer keeps its identity (name, parents, sharing between parents): its class is exchanged for a
subclass that quantizes its input and holds quantized weights. All that calibration finds is held
in buffers, so state_dict is the file format.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .primitives import dequantize, fake_quantize, quantization_parameters, quantize
from .ranges import RangeObserver, weight_range


class ActivationQuantizer(nn.Module):
    """Quantizer of one activation tensor.

    It observes while ``observer`` is set (calibration) and quantizes once it has its parameters.

    Args:
        name: of the layer and input, for messages.
        bits: 2 to 8.
        channel_axis: axis with a scale per channel, or None for one scale per tensor.
    """

    def __init__(self, name: str, bits: int, channel_axis: int | None = None) -> None:
        super().__init__()
        self.name = name
        self.bits = bits
        self.channel_axis = channel_axis
        self.enabled = True
        self.observer: RangeObserver | None = None
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    @property
    def is_calibrated(self) -> bool:
        return self.scale is not None

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set scale and zero point from a clipping range of shape [channels] or [1]."""
        self.scale, self.zero_point = quantization_parameters(low, high, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on its grid (during calibration and when disabled: ``x`` itself)."""
        if self.observer is not None:
            self.observer.update(x)
            return x
        if not self.enabled:
            return x
        if self.scale is None:
            raise RuntimeError(
                f"{self.name} runs now but did not run on any calibration image, so it has no "
                "range; use more calibration images or exclude it with an override (skip: true)."
            )
        scale, zero_point = self.scale, self.zero_point
        if self.channel_axis is not None:
            shape = [1] * x.dim()
            shape[self.channel_axis] = -1
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        return fake_quantize(x, scale, zero_point, self.bits)


class _QuantizedWeight:
    """What quantized Linear and Conv2d share: an input quantizer and weights with integer codes."""

    weight: nn.Parameter
    input_quantizer: ActivationQuantizer
    weight_codes: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    weight_bits: int

    def _attach(self, name: str, weight_bits: int, activation_bits: int) -> None:
        self.weight_bits = weight_bits
        axis = self._input_channel_axis()
        self.input_quantizer = ActivationQuantizer(f"Layer {name}", activation_bits, axis)
        for buffer in ("weight_codes", "weight_scale", "weight_zero_point"):
            self.register_buffer(buffer, None)

    def _input_channel_axis(self) -> int | None:
        return None

    @property
    def is_calibrated(self) -> bool:
        return self.input_quantizer.is_calibrated

    @torch.no_grad()
    def quantize_weight(self, method: str, percentile: float) -> None:
        """Round the weights once, per output channel; ``weight`` holds the rounded values."""
        low, high = weight_range(self.weight, method, self.weight_bits, percentile)
        scale, zero_point = quantization_parameters(low, high, self.weight_bits)
        shape = [-1] + [1] * (self.weight.dim() - 1)
        codes = quantize(self.weight, scale.view(shape), zero_point.view(shape), self.weight_bits)
        self.weight_codes, self.weight_scale, self.weight_zero_point = codes, scale, zero_point
        self.restore_weight()

    @torch.no_grad()
    def restore_weight(self) -> None:
        """Set ``weight`` from the integer codes, scales and zero points."""
        shape = [-1] + [1] * (self.weight_codes.dim() - 1)
        self.weight.copy_(
            dequantize(
                self.weight_codes, self.weight_scale.view(shape), self.weight_zero_point.view(shape)
            )
        )


class QuantizedLinear(_QuantizedWeight, nn.Linear):
    """nn.Linear with quantized input (per tensor) and weight (per output channel)."""

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] -> […, out]."""
        return F.linear(self.input_quantizer(x), self.weight, self.bias)


class QuantizedConv2d(_QuantizedWeight, nn.Conv2d):
    """nn.Conv2d with quantized input and weight (per output channel).

    The input of a depthwise convolution has a scale per channel: each output channel sees one input
    channel, so the factor folds into the weight and the integer arithmetic stays the same.
    """

    def _input_channel_axis(self) -> int | None:
        return 1 if self.groups > 1 and self.groups == self.in_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, height, width] -> [batch, out, height', width']."""
        return self._conv_forward(self.input_quantizer(x), self.weight, self.bias)
