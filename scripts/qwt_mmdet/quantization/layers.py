"""Quantized layers: the model's own modules, given quantizers in place.

A layer keeps its identity (name, parents, sharing between parents): its class is exchanged for a
subclass that quantizes its input and holds quantized weights. All that calibration finds is held
in buffers, so state_dict is the file format.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..settings import QuantizationSettings
from .moments import MAX_COLUMNS, InputMoments, chosen_rows
from .primitives import (
    dequantize,
    fake_quantize,
    fake_quantize_log_sqrt2,
    quantization_parameters,
    quantize,
)
from .ranges import RangeObserver, weight_range
from .rounding import gptq_codes

Watch = Callable[[nn.Module, Tensor, Tensor], None]
"""Called with a layer or quantizer, its input and its output whenever it has run with ``enabled`` off."""


class ActivationQuantizer(nn.Module):
    """Quantizer of one activation tensor.

    It observes while ``observer`` is set (calibration) and quantizes once it has its parameters.

    Args:
        name: of the layer and input, for messages.
        bits: 2 to 8.
        channel_axis: axis with a scale per channel, or None for one scale per tensor.
        logarithmic: powers of √2 in place of a uniform grid, for values from 0 such as attention
            probabilities.
    """

    def __init__(
        self,
        name: str,
        bits: int,
        channel_axis: int | None = None,
        *,
        logarithmic: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.bits = bits
        self.channel_axis = channel_axis
        self.logarithmic = logarithmic
        self.enabled = True
        self.observer: RangeObserver | None = None
        self.watch: Watch | None = None
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    @property
    def is_calibrated(self) -> bool:
        return self.scale is not None

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set scale and zero point from a clipping range of shape [channels] or [1]."""
        self.set_parameters(*quantization_parameters(low, high, self.bits))

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point, [channels] or, for one grid of the whole tensor, [1]."""
        self.scale, self.zero_point = scale, zero_point
        if scale.numel() == 1:
            self.channel_axis = None

    def choose_range(self, method: str, percentile: float) -> None:
        """Set scale and zero point from what the observer has seen."""
        if self.logarithmic:
            self.scale = self.observer.estimate_log_scale(self.bits)
            self.zero_point = torch.zeros_like(self.scale)
        else:
            self.set_range(*self.observer.estimate(method, self.bits, percentile))

    def forward(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        """Return ``x`` on its grid (while it observes and when disabled: ``x`` itself).

        Args:
            overwrite: nobody else needs ``x``; the result may take its place.
        """
        if self.observer is not None:
            self.observer.update(x)
            return x
        if not self.enabled:
            if self.watch is not None:
                self.watch(self, x, x)
            return x
        if self.scale is None:
            raise RuntimeError(
                f"{self.name} runs now but did not run on any calibration image, so it has no "
                "range; use more calibration images or exclude it with an override (skip: true)."
            )
        return self.quantized(x, overwrite=overwrite)

    def quantized(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        """Return ``x`` on its grid, also when disabled."""
        if self.logarithmic:
            return fake_quantize_log_sqrt2(x, self.scale, self.bits, overwrite=overwrite)
        scale, zero_point = self.scale, self.zero_point
        if self.channel_axis is not None:
            shape = [1] * x.dim()
            shape[self.channel_axis] = -1
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        return fake_quantize(x, scale, zero_point, self.bits, overwrite=overwrite)


LAYER_BUFFERS = (
    "weight_codes",
    "weight_scale",
    "weight_zero_point",
    "bias_correction",
    "fold_factor",
    "fold_shift",
)
"""Buffers of a quantized layer beside those of its input quantizer."""


class _QuantizedWeight:
    """What quantized Linear and Conv2d share: an input quantizer and weights with integer codes.

    ``weight`` holds the full-precision weights until :meth:`restore_weight` rounds them. With
    ``enabled`` off the layer computes with what ``weight`` holds and nothing else. ``migrates``: its input's
    scales are chosen by ``migrate_scales``.
    """

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
    def is_calibrated(self) -> bool:
        return self.input_quantizer.is_calibrated

    def forward(self, x: Tensor) -> Tensor:
        """Linear: […, in] -> […, out]. Conv2d: [batch, in, h, w] -> [batch, out, h', w']."""
        if not self.enabled:
            output = self._compute(x, self.weight, self.bias)
            if self.watch is not None:
                self.watch(self, x, output)
            return output
        return self._compute(self.input_quantizer(x), self.weight, self.effective_bias())

    @torch.no_grad()
    def quantized_output(self, x: Tensor) -> Tensor:
        """What the layer returns once ``weight`` holds the rounded values."""
        return self._compute(
            self.input_quantizer.quantized(x), self.rounded_weight(), self.effective_bias()
        )

    @torch.no_grad()
    def quantize_weight(self, settings: QuantizationSettings, moments: InputMoments | None) -> None:
        """Choose grids and codes of the weights, per output channel.

        With ``bias_correction`` the shift of the output's mean is taken back:
        W E[x] − Wq E[xq] (after Nagel et al., arXiv 1906.04721, section 4.2). GPTQ is then left with
        the deviations from the mean, and minimises the error of those.

        Args:
            moments: of the inputs; None, or empty, for nearest rounding without a correction.
        """
        bits, factor = self.weight_bits, self.input_factor()
        weight = self.weight * factor
        limits = weight_range(weight, settings.weight_range, bits, settings.percentile)
        scale, zero_point = quantization_parameters(*limits, bits)
        if moments is not None and settings.rounding == "gptq":
            grouped, factors = (
                w.flatten(1).unflatten(0, (self.weight_groups, -1))
                for w in (weight, factor.expand_as(weight))
            )
            grids = [parameter.view(grouped.shape[:2]) for parameter in (scale, zero_point)]
            parts = zip(
                grouped.split(MAX_COLUMNS, dim=2),
                factors[:, 0].double().split(MAX_COLUMNS, dim=1),
                moments.second(centred=settings.bias_correction),
                strict=True,
            )
            codes = torch.cat(
                [
                    gptq_codes(w, m / (f[:, :, None] * f[:, None]), *grids, bits)
                    for w, f, m in parts
                ],
                dim=2,
            ).view_as(weight)
        else:
            shape = [-1] + [1] * (weight.dim() - 1)
            codes = quantize(weight, scale.view(shape), zero_point.view(shape), bits)
        self.weight_codes, self.weight_scale, self.weight_zero_point = codes, scale, zero_point
        if moments is not None and settings.bias_correction:
            full, quantized = moments.means()
            expected = self._mean_output(self.weight.double(), full)
            found = self._mean_output(self.rounded_weight().double(), quantized)
            self.bias_correction = (expected - found).float()

    def effective_bias(self) -> Tensor | None:
        """The bias with its correction, shape [out], or None where there is neither."""
        if self.bias_correction is None:
            return self.bias
        return self.bias_correction if self.bias is None else self.bias + self.bias_correction

    def rounded_weight(self) -> Tensor:
        """The weights on their grids, from the integer codes."""
        shape = [-1] + [1] * (self.weight_codes.dim() - 1)
        rounded = dequantize(
            self.weight_codes, self.weight_scale.view(shape), self.weight_zero_point.view(shape)
        )
        return rounded / self.input_factor()

    def input_factor(self) -> Tensor:
        """What the weights are multiplied with before they are rounded; broadcasts against them.

        Integer arithmetic has one scale per output channel. Where input channels have scales of their
        own, the weights take up how these differ.
        """
        scale = self.input_quantizer.scale
        if self.input_quantizer.channel_axis is None:
            return torch.ones(1, device=scale.device)
        factor = (scale / scale.mean()).view(self.weight_groups, 1, -1)
        outputs = len(self.weight) // self.weight_groups
        shape = [len(self.weight), -1] + [1] * (self.weight.dim() - 2)
        return factor.expand(-1, outputs, -1).reshape(shape)

    @torch.no_grad()
    def restore_weight(self) -> None:
        """Set ``weight`` from the integer codes, scales and zero points."""
        self.weight.copy_(self.rounded_weight())


LARGE_INPUT = 2**23
"""Elements beyond which a new tensor costs more than what is done with it: C libraries take fresh
pages from the system for each (glibc: from 32 MiB)."""

PART = 2**19
"""Elements that are rounded at a time where the input is large: they stay in the cache."""


class QuantizedLinear(_QuantizedWeight, nn.Linear):
    """nn.Linear with quantized input (per tensor) and weight (per output channel)."""

    weight_groups = 1

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] -> […, out]. A large input on the CPU is rounded and multiplied in parts."""
        in_parts = self.enabled and x.numel() > LARGE_INPUT and x.device.type == "cpu"
        if not in_parts or torch.is_grad_enabled():
            return super().forward(x)
        rows = x.flatten(0, -2)
        output = rows.new_empty(len(rows), self.out_features)
        parts = (t.split(max(1, PART // self.in_features)) for t in (rows, output))
        for part, place in zip(*parts, strict=True):
            place.copy_(super().forward(part))
        return output.unflatten(0, x.shape[:-1])

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def measure(self, x: Tensor, output: Tensor, moments: InputMoments, *, second: bool) -> None:
        """Add one call's input to ``moments``; ``second``: also to the second moments."""
        rows = x.reshape(-1, x.shape[-1])
        quantized = self.input_quantizer.quantized(x).reshape(rows.shape)
        sums = [t.sum(0, dtype=torch.float64) for t in (rows, quantized)]
        moments.update_means(*sums, len(rows))
        if second:
            moments.update_second(quantized[chosen_rows(len(rows), x.device)][None])

    def _mean_output(self, weight: Tensor, mean: Tensor) -> Tensor:
        return weight @ mean


MIGRATION_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""From one scale for all input channels to one for each."""


class QuantizedConv2d(_QuantizedWeight, nn.Conv2d):
    """nn.Conv2d with quantized input and weight (per output channel).

    The input of a depthwise convolution has a scale per channel: each output channel sees one input
    channel, so the factor folds into the weight and the integer arithmetic stays the same. Other
    convolutions may have such scales too (:meth:`migrate_scales`).
    """

    def _input_channel_axis(self) -> int | None:
        return 1 if self.is_depthwise else None

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel sees one input channel."""
        return self.groups > 1 and self.groups == self.in_channels

    @torch.no_grad()
    def migrate_scales(self, settings: QuantizationSettings) -> None:
        """Choose how far the input's scale goes with its channels, while its observer is there.

        Quiet channels waste the codes of a common scale. With scales of their own the weights have to
        take up how the scales differ (:meth:`input_factor`), and are harder to round (SmoothQuant, Xiao
        et al., arXiv 2211.10438, with one strength for all layers). Here ranges go from the tensor's to
        the channel's by powers, range_tensor^(1 − a) · range_channel^a, and the a of
        ``MIGRATION_STRENGTHS`` with the smallest expected error of the layer's output is taken:

            Σ_c (Σ W_c² · E[(x_c − x̂_c)²] + Σ (W_c − Ŵ_c)² · E[x_c²])

        over input channels c, as if errors were not correlated, with Ŵ rounded to the nearest and
        deviations from the mean in the place of x_c where biases are corrected.
        """
        quantizer, observer = self.input_quantizer, self.input_quantizer.observer
        channel, tensor = (
            seen.estimate(settings.range_method, quantizer.bits, settings.percentile)
            for seen in (observer, observer.pooled())
        )
        silent = (channel[0] == 0) & (channel[1] == 0)  # their scale would say nothing
        channel = [torch.where(silent, t, c) for t, c in zip(tensor, channel, strict=True)]
        power = observer.mean_square(centred=settings.bias_correction)
        energy = self._by_input_channel(self.weight.square())
        best = float("inf")
        for strength in MIGRATION_STRENGTHS:
            low, high = (
                sign * (sign * whole).clamp(min=0) ** (1 - strength)
                * (sign * own).clamp(min=0) ** strength
                for sign, whole, own in zip((-1, 1), tensor, channel, strict=True)
            )  # fmt: skip
            quantizer.scale, quantizer.zero_point = quantization_parameters(
                low, high, quantizer.bits
            )
            error = energy @ observer.mean_error(low, high, quantizer.bits)
            factor = self.input_factor()
            weight = self.weight * factor
            limits = weight_range(
                weight, settings.weight_range, self.weight_bits, settings.percentile
            )
            grid = [
                parameter[:, None, None, None]
                for parameter in quantization_parameters(*limits, self.weight_bits)
            ]
            lost = (fake_quantize(weight, *grid, self.weight_bits) - weight) / factor
            error += self._by_input_channel(lost.square()) @ power
            if error < best:
                best, found = error, (quantizer.scale, quantizer.zero_point, strength)
        scale, zero_point, strength = found
        if strength == 0:
            scale, zero_point = scale[:1], zero_point[:1]
        quantizer.set_parameters(scale, zero_point)

    def _by_input_channel(self, weight: Tensor) -> Tensor:
        """Sum a tensor of the weight's shape over all but the input channels: [in], float64."""
        grouped = weight.double().unflatten(0, (self.groups, -1))
        return grouped.sum((1, 3, 4)).flatten()

    @property
    def weight_groups(self) -> int:
        return self.groups

    def _compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.Conv2d._conv_forward(self, x, weight, bias)  # a subclass may have its own

    def measure(self, x: Tensor, output: Tensor, moments: InputMoments, *, second: bool) -> None:
        """Add one call's input to ``moments``; ``second``: also to the second moments."""
        quantized = self.input_quantizer.quantized(x)
        padded, padded_quantized = self._pad(x), self._pad(quantized)
        sums = [self._tap_sums(t, output.shape[2:]) for t in (padded, padded_quantized)]
        moments.update_means(*sums, len(x) * output[0, 0].numel())
        if second:
            moments.update_second(self._rows(padded_quantized, output.shape[2:]))

    def _pad(self, x: Tensor) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, self._reversed_padding_repeated_twice, mode=mode)

    def _taps(self, padded: Tensor, size: torch.Size) -> Tensor:
        """View of the padded input under each kernel tap: [batch, in, h', w', kernel h, kernel w]."""
        batch, channel, row, column = padded.stride()
        (down, right), (spread_y, spread_x) = self.stride, self.dilation
        return padded.as_strided(
            (*padded.shape[:2], *size, *self.kernel_size),
            (batch, channel, row * down, column * right, row * spread_y, column * spread_x),
            padded.storage_offset(),
        )

    def _tap_sums(self, padded: Tensor, size: torch.Size) -> Tensor:
        """Sum of the padded input under each kernel tap: [in, kernel height, kernel width]."""
        total = padded.sum(0, keepdim=True)
        return self._taps(total, size).sum((0, 2, 3), dtype=torch.float64)

    def _rows(self, padded: Tensor, size: torch.Size) -> Tensor:
        """What the kernel is multiplied with at some output positions: [groups, positions, columns]."""
        positions = len(padded) * size.numel()
        chosen = chosen_rows(positions, padded.device)
        image, place = chosen // size.numel(), chosen % size.numel()
        taps = self._taps(padded, size).permute(0, 2, 3, 1, 4, 5)
        rows = taps[image, place // size[1], place % size[1]]
        return rows.reshape(len(chosen), self.groups, -1).transpose(0, 1)

    def _mean_output(self, weight: Tensor, mean: Tensor) -> Tensor:
        grouped = mean.view(self.groups, -1, *mean.shape[1:])
        weight = weight.view(self.groups, -1, *weight.shape[1:])
        return torch.einsum("goihw,gihw->go", weight, grouped).flatten()
