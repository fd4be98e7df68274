"""The quantizer of an activation: a module that holds a grid and applies it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..config.quantization import FLOAT_BITS
from ..errors import QwtError
from .primitives import fake_quantize, fake_quantize_log_sqrt2, quantization_parameters

Watch = Callable[[Tensor, Tensor], None]
"""Called with input and output of a layer or quantizer whenever it has run."""


class ActivationQuantizer(nn.Module):
    """The grid of one activation tensor, which calibration sets.

    Args:
        name: of the layer and input, for messages.
        bits: 2 to 8, or 32: values pass unchanged, and scale and zero point are 1 and 0.
        channel_axis: axis with a scale per channel, or None for one scale per tensor.
        logarithmic: powers of √2 in place of a uniform grid, for values ≥ 0 such as attention probabilities.

    Attributes:
        symmetric: whether ranges become symmetric around 0 (see :func:`.primitives.quantization_parameters`).
    """

    scale: Tensor | None
    zero_point: Tensor | None

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
        self.symmetric = False
        self.enabled = True
        self.watch: Watch | None = None
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    @property
    def rounds(self) -> bool:
        """Whether values are rounded to a grid; not with 32 bits."""
        return self.bits != FLOAT_BITS

    @property
    def is_calibrated(self) -> bool:
        return self.scale is not None

    @property
    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, [channels] or, for one grid of the whole tensor, [1].

        Raises:
            QwtError: calibration has found none.
        """
        if self.scale is None or self.zero_point is None:
            raise QwtError(
                f"{self.name} has no range, because it did not run on any calibration image; calibrate the "
                "model with more images, or exclude the layer with an override (skip: true)."
            )
        return self.scale, self.zero_point

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set scale and zero point from a clipping range of shape [channels] or [1]."""
        self.set_parameters(
            *quantization_parameters(low, high, self.bits, symmetric=self.symmetric)
        )

    def pass_values(self, device: torch.device) -> None:
        """Mark a quantizer that does not round as calibrated."""
        self.set_parameters(torch.ones(1, device=device), torch.zeros(1, device=device))

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Set scale and zero point, [channels] or, for one grid of the whole tensor, [1]."""
        self.scale, self.zero_point = scale, zero_point
        if scale.numel() == 1:
            self.channel_axis = None

    def forward(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        """Return ``x`` on its grid (when disabled: ``x`` itself).

        Args:
            overwrite: the result may be written into ``x``.
        """
        if self.enabled:
            output = self.quantized(x, overwrite=overwrite and self.watch is None)
        else:
            output = x
        if self.watch is not None:
            self.watch(x, output)
        return output

    def quantized(self, x: Tensor, *, overwrite: bool = False) -> Tensor:
        """Return ``x`` on its grid, also when disabled."""
        scale, zero_point = self.grid
        if not self.rounds:
            return x
        if self.logarithmic:
            return fake_quantize_log_sqrt2(x, scale, self.bits, overwrite=overwrite)
        if self.channel_axis is not None:
            shape = [1] * x.dim()
            shape[self.channel_axis] = -1
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        return fake_quantize(x, scale, zero_point, self.bits, overwrite=overwrite)
