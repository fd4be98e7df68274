"""The arithmetic of quantization, as pure functions of tensors.

Uniform affine: ``x ≈ (q − zero_point) · scale`` with
``q = clamp(round(x / scale) + zero_point, 0, 2^bits − 1)`` (Nagel et al., arXiv 2106.08295,
equations 4 to 7). Rounding is half to even, and division is a multiplication with the reciprocal of
the scale, as in torch's own fake_quantize functions.

Logarithmic, for attention probabilities: ``x ≈ scale · 2^(−q/2)`` (RepQ-ViT, arXiv 2212.08254,
section 3.3).

Where autograd records, rounding has a straight-through gradient (Bengio et al., arXiv 1308.3432): 1
where ``x`` lies in the range, 0 where it is clipped, as in torch's own fake_quantize functions.
"""

from typing import Any

import torch
from torch import Tensor

from . import grid_rounding


def quantization_parameters(
    low: Tensor, high: Tensor, bits: int, *, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """Turn clipping ranges into scales and zero points.

    The range is widened to contain zero, so that zero (padding, ReLU) has no error.

    Args:
        low, high: range limits, any (equal) shape, low ≤ high.
        bits: 2 to 8.
        symmetric: widen the range to (−a, a), with zero at the code 2^(bits − 1) and a at the largest
            code. Signed codes, the codes minus this, then have the zero point 0.

    Returns:
        scale (float32, > 0) and zero_point (float32 holding whole numbers from 0 to 2^bits − 1),
        both of the shape of ``low``. A range of zero width gets scale 1.
    """
    levels = 2**bits - 1
    low = low.double().clamp(max=0.0)
    high = high.double().clamp(min=0.0)
    if symmetric:
        width, levels = torch.maximum(-low, high), 2 ** (bits - 1) - 1
    else:
        width = high - low
    scale = (width / levels).float()
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    zero_point = (-low / scale.double()).round().clamp(0, levels).float()
    return scale, zero_point


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the integer codes of ``x`` as uint8, of the shape of ``x``.

    ``scale`` and ``zero_point`` broadcast against ``x``.
    """
    codes = (x * scale.reciprocal()).round_().add_(zero_point).clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the float32 values of integer codes; the inverse of :func:`quantize` on its grid."""
    return (codes.float() - zero_point) * scale


class _StraightThrough(torch.autograd.Function):
    """Rounded values with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


def _is_differentiated(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, *, overwrite: bool = False
) -> Tensor:
    """Round ``x`` to its quantization grid and keep it in floating point.

    Equal to ``dequantize(quantize(x))`` and to torch.fake_quantize_per_tensor_affine; in place or compiled
    (see :mod:`.grid_rounding`).

    Args:
        x: any shape; ``scale`` and ``zero_point`` broadcast against it.
        overwrite: the result may be written into ``x``, unless autograd records.

    Returns:
        A tensor of the shape and dtype of ``x``, a new one unless ``overwrite`` is set.
    """
    inverse, low = scale.reciprocal(), -zero_point
    high = low + (2**bits - 1)
    if _is_differentiated(x):
        values = x.detach()
        codes = (values * inverse).round_()
        rounded = grid_rounding.round_to_grid(values, inverse, low, high, scale)
        return _StraightThrough.apply(x, rounded.to(x.dtype), (codes >= low) & (codes <= high))
    rounded = grid_rounding.round_to_grid(x, inverse, low, high, scale, overwrite=overwrite)
    return rounded.to(x.dtype)


_EXPONENT_BITS = 0x7F800000  # of a float32


def fake_quantize_log_sqrt2(
    x: Tensor, scale: Tensor, bits: int, *, overwrite: bool = False
) -> Tensor:
    """Round ``x`` ≥ 0 to powers of √2 and keep it in floating point.

    ``scale · 2^(−q/2)`` with ``q = max(0, round(−2 log2(x / scale)))``. The last of the 2^bits codes
    represents zero, for values below the smallest power (arXiv 2212.08254, equations 12 and 13, where zero
    is an additional code).

    ``−q = floor(log2(√2 (x / scale)²))`` is read from the exponent bits of a float, without a logarithm.

    Args:
        x: any shape, no value below 0; ``scale`` broadcasts against it.
        overwrite: the result may be written into ``x``, unless autograd records.

    Returns:
        A tensor of the shape and dtype of ``x``, a new one unless ``overwrite`` is set.
    """
    if _is_differentiated(x):
        values = x.detach()
        rounded = fake_quantize_log_sqrt2(values, scale, bits)
        return _StraightThrough.apply(x, rounded, values <= 2**0.25 * scale)
    y = x.float()
    y = torch.mul(y, 2**0.25 / scale, out=y if overwrite else None)
    y.square_().clamp_(max=1.0)
    y.view(torch.int32).bitwise_and_(_EXPONENT_BITS)  # now a power of two
    smallest = max(2.0 ** -(2**bits - 2), torch.finfo(torch.float32).tiny)
    torch.threshold_(y, smallest / 2, 0.0)
    return y.sqrt_().mul_(scale).to(x.dtype)
