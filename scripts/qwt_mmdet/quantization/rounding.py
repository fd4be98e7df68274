"""Rounding of weights to their grids, by name.

``gptq`` is rounding with error feedback (GPTQ, Frantar et al., ICLR 2023, arXiv 2210.17323). Columns of a
weight are rounded one after the other. The columns that are not rounded yet compensate each column's error
such that the layer's output changes least, ‖(W − Wq) X‖². This needs only the inputs' second moments X Xᵀ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Registry
from .grid_rounding import round_to_grid
from .primitives import quantize
from .regression import damped_factor

Round = Callable[[Tensor, Tensor, Tensor, int, Sequence[Tensor] | None], Tensor]
"""Takes weights [groups, out, in], scales and zero points [groups, out], bits, and the inputs' second
moments in chunks of columns, each [groups, columns, columns], or None. Returns codes, uint8, of the
weights' shape."""


@dataclass(frozen=True)
class Rounding:
    """A rounding, and whether it uses the second moments of the layer's inputs."""

    function: Round
    needs_moments: bool


ROUNDINGS: Registry[Rounding] = Registry("rounding")


def register_rounding(name: str, *, needs_moments: bool = False) -> Callable[[Round], Round]:
    """Decorator: the function is the rounding ``name``."""

    def decorate(function: Round) -> Round:
        ROUNDINGS[name] = Rounding(function, needs_moments)
        return function

    return decorate


@register_rounding("nearest")
def nearest(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, moments: Sequence[Tensor] | None
) -> Tensor:
    """Round every weight to the nearest code."""
    return quantize(weight, scale[..., None], zero_point[..., None], bits)


@register_rounding("gptq", needs_moments=True)
def gptq(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, moments: Sequence[Tensor] | None
) -> Tensor:
    """Round each chunk of columns with error feedback; without moments, round to the nearest."""
    if moments is None:
        return nearest(weight, scale, zero_point, bits, None)
    chunks = weight.split([moment.shape[-1] for moment in moments], dim=2)
    return torch.cat(
        [gptq_codes(w, m, scale, zero_point, bits) for w, m in zip(chunks, moments, strict=True)],
        dim=2,
    )


DAMPING = 0.01
"""Added to the second moments' diagonal, relative to its mean (arXiv 2210.17323, section 3.3)."""
BLOCK = 128
"""Columns whose errors are passed on together."""


def gptq_codes(
    weight: Tensor, moments: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> Tensor:
    """Round weights to their grids with error feedback, columns with large inputs first.

    Args:
        weight: [groups, out, in].
        moments: [groups, in, in] second moments of the inputs; symmetric, at least semi-definite.
        scale, zero_point: [groups, out] of the grids.
        bits: 2 to 8.

    Returns:
        Integer codes, uint8, [groups, out, in].

    Raises:
        torch.linalg.LinAlgError: the moments hold NaN or are not semi-definite.
    """
    order = moments.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True)
    left = weight.double().gather(2, order[:, None].expand_as(weight))
    moments = moments.double().gather(1, order[:, :, None].expand_as(moments))
    moments = moments.gather(2, order[:, None].expand_as(moments))
    upper = _inverse_factor(moments)
    scale, zero_point = scale[..., None], zero_point[..., None]
    inverse, lowest, highest = scale.reciprocal(), -zero_point, 2**bits - 1 - zero_point
    rounded = []
    for start in range(0, weight.shape[2], BLOCK):
        stop = start + BLOCK
        block, triangle = left[..., start:stop], upper[:, start:stop, start:stop]
        pivots = triangle.diagonal(dim1=1, dim2=2)[:, None]
        columns = zip(block.split(1, 2), triangle.split(1, 1), pivots.split(1, 2), strict=True)
        errors = []
        for column, row, pivot in columns:
            rounded.append(round_to_grid(column.float(), inverse, lowest, highest, scale))
            errors.append((column - rounded[-1]) / pivot)
            # ``row`` is 0 at columns that are rounded already.
            block.addcmul_(errors[-1], row, value=-1)
        left[..., stop:] -= torch.cat(errors, 2) @ upper[:, start:stop, stop:]
    codes = quantize(torch.cat(rounded, 2), scale, zero_point, bits)
    return torch.empty_like(codes).scatter_(2, order[:, None].expand_as(codes), codes)


def _inverse_factor(moments: Tensor) -> Tensor:
    """Upper triangular U with Uᵀ U = (moments + damping)⁻¹, [groups, in, in], float64."""
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    # Where all inputs are 0, any damping makes the matrix invertible.
    factor = damped_factor(moments, torch.where(mean > 0, DAMPING * mean, 1.0))
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
