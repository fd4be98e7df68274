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


LAYER_BUFFERS = ("weight_codes", "weight_scale", "weight_zero_point", "bias_correction")
"""Buffers of a quantized layer beside those of its input quantizer."""


class InputMeans:
    """Streaming means of what each weight is multiplied with, before and after quantization.

    The means, in float64, have the shape of the weight without its output axis: [in] for Linear,
    [in, kernel height, kernel width] for Conv2d.
    """

    def __init__(self) -> None:
        self.count = 0
        self.full: Tensor | float = 0.0
        self.quantized: Tensor | float = 0.0

    def update(self, full: Tensor, quantized: Tensor, count: int) -> None:
        """Add sums over ``count`` output positions."""
        self.full = self.full + full
        self.quantized = self.quantized + quantized
        self.count += count


class _QuantizedWeight:
    """What quantized Linear and Conv2d share: an input quantizer and weights with integer codes."""

    weight: nn.Parameter
    input_quantizer: ActivationQuantizer
    weight_codes: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    bias_correction: Tensor | None
    weight_bits: int
    bias: Tensor | None

    def _attach(self, name: str, weight_bits: int, activation_bits: int) -> None:
        self.weight_bits = weight_bits
        self.input_means: InputMeans | None = None
        axis = self._input_channel_axis()
        self.input_quantizer = ActivationQuantizer(f"Layer {name}", activation_bits, axis)
        for buffer in LAYER_BUFFERS:
            self.register_buffer(buffer, None)

    def _input_channel_axis(self) -> int | None:
        return None

    @property
    def is_calibrated(self) -> bool:
        return self.input_quantizer.is_calibrated

    @torch.no_grad()
    def quantize_weight(self, method: str, percentile: float) -> None:
        """Round the weights once, per output channel; ``weight`` holds the rounded values.

        Where input means were measured, the shift of the output's mean is taken back:
        ``bias_correction`` = W E[x] − Wq E[xq] (after Nagel et al., arXiv 1906.04721, section 4.2).
        """
        full = self.weight.detach().double()
        low, high = weight_range(self.weight, method, self.weight_bits, percentile)
        scale, zero_point = quantization_parameters(low, high, self.weight_bits)
        shape = [-1] + [1] * (self.weight.dim() - 1)
        codes = quantize(self.weight, scale.view(shape), zero_point.view(shape), self.weight_bits)
        self.weight_codes, self.weight_scale, self.weight_zero_point = codes, scale, zero_point
        self.restore_weight()
        means = self.input_means
        if means is not None and means.count:
            expected = self._mean_output(full, means.full / means.count)
            found = self._mean_output(self.weight.double(), means.quantized / means.count)
            self.bias_correction = (expected - found).float()

    def _mean_output(self, weight: Tensor, mean: Tensor) -> Tensor:
        return weight @ mean

    def effective_bias(self) -> Tensor | None:
        """The bias with its correction, shape [out], or None where there is neither."""
        if self.bias_correction is None:
            return self.bias
        return self.bias_correction if self.bias is None else self.bias + self.bias_correction

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
        quantized = self.input_quantizer(x)
        if self.input_means is not None:
            sums = [t.reshape(-1, t.shape[-1]).sum(0, dtype=torch.float64) for t in (x, quantized)]
            self.input_means.update(*sums, x.numel() // x.shape[-1])
            quantized = x
        return F.linear(quantized, self.weight, self.effective_bias())


class QuantizedConv2d(_QuantizedWeight, nn.Conv2d):
    """nn.Conv2d with quantized input and weight (per output channel).

    The input of a depthwise convolution has a scale per channel: each output channel sees one input
    channel, so the factor folds into the weight and the integer arithmetic stays the same.
    """

    def _input_channel_axis(self) -> int | None:
        return 1 if self.groups > 1 and self.groups == self.in_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in, height, width] -> [batch, out, height', width']."""
        quantized = self.input_quantizer(x)
        if self.input_means is None:
            return self._conv_forward(quantized, self.weight, self.effective_bias())
        output = self._conv_forward(x, self.weight, self.bias)
        sums = [self._tap_sums(t, output.shape[2:]) for t in (x, quantized)]
        self.input_means.update(*sums, len(x) * output[0, 0].numel())
        return output

    def _tap_sums(self, x: Tensor, size: torch.Size) -> Tensor:
        """Sum of the padded input under each kernel tap: [in, kernel height, kernel width]."""
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
        x = x.sum(0)
        (height, width), (down, right), (spread_y, spread_x) = size, self.stride, self.dilation
        rows = [
            [
                x[
                    :,
                    i * spread_y : i * spread_y + (height - 1) * down + 1 : down,
                    j * spread_x : j * spread_x + (width - 1) * right + 1 : right,
                ].sum((1, 2))
                for j in range(self.kernel_size[1])
            ]
            for i in range(self.kernel_size[0])
        ]
        return torch.stack([torch.stack(row, -1) for row in rows], -2).double()

    def _mean_output(self, weight: Tensor, mean: Tensor) -> Tensor:
        grouped = mean.view(self.groups, -1, *mean.shape[1:])
        weight = weight.view(self.groups, -1, *weight.shape[1:])
        return torch.einsum("goihw,gihw->go", weight, grouped).flatten()
