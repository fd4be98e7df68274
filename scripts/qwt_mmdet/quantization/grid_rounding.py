"""Rounding of a tensor to a grid, in place or compiled, with the same result.

Fake quantization is bound by memory: rounding in place passes over a tensor five times, the function that
torch.compile has fused once. Compiling takes seconds to minutes, once per process. So it starts after
rounding in place has taken longer than that. The environment variable ``QWT_COMPILE`` can be ``always`` or
``never`` (default: ``auto``).
"""

import functools
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import QwtError

logger = logging.getLogger(__name__)

COMPILE_VARIABLE = "QWT_COMPILE"
WORTH_COMPILING = 3e10
"""Elements rounded in place after which compiling pays: about half a minute on one core."""

CHUNK = 2**17
"""Elements of a large tensor that a CPU rounds at a time, so that they stay in its cache."""

_rounded_in_place = 0


def round_to_grid(
    x: Tensor,
    inverse_scale: Tensor,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    *,
    overwrite: bool = False,
) -> Tensor:
    """Return ``clamp(round(x · inverse_scale), low, high) · scale``.

    Args:
        x: any shape; the others broadcast against it.
        overwrite: the result may be written into ``x``; otherwise it is a new tensor.

    Raises:
        QwtError: ``QWT_COMPILE`` has another value, or is ``always`` where nothing can be compiled.
    """
    global _rounded_in_place
    mode = os.environ.get(COMPILE_VARIABLE, "auto")
    if mode not in ("auto", "always", "never"):
        raise QwtError(f"{COMPILE_VARIABLE} is {mode!r}; set it to auto, always or never.")
    # The compiled function takes one dimension and one scale, which is nearly all of the work.
    plain = scale.numel() == 1 and x.is_contiguous() and not x.requires_grad
    if plain and mode != "never":
        if mode == "always" or _rounded_in_place > WORTH_COMPILING:
            compiled = _compiled(x.device.type, required=mode == "always")
            if compiled is not None:
                flat = [t.reshape(-1) for t in (x, inverse_scale, low, high, scale)]
                return compiled(*flat).view_as(x)
        _rounded_in_place += x.numel()
    in_chunks = plain and x.numel() > 2 * CHUNK and x.device.type == "cpu"
    if in_chunks and x.dtype == scale.dtype == torch.float32:
        y = x if overwrite else torch.empty_like(x)
        _round_in_chunks(x, y, *map(float, (inverse_scale, low, high, scale)))
        return y
    y = torch.mul(x, inverse_scale, out=x if overwrite else None)
    # One limit at a time: torch does not vectorize a clamp between two tensors that broadcast.
    return y.round_().clamp_(min=low).clamp_(max=high).mul_(scale)


def _round_in_chunks(
    x: Tensor, y: Tensor, inverse_scale: float, low: float, high: float, scale: float
) -> None:
    """:func:`round_to_grid` of ``x`` into ``y``, which may be ``x``."""
    for part, place in zip(*(t.view(-1).split(CHUNK) for t in (x, y)), strict=True):
        torch.mul(part, inverse_scale, out=place).round_().clamp_(low, high).mul_(scale)


def _fused(x: Tensor, inverse_scale: Tensor, low: Tensor, high: Tensor, scale: Tensor) -> Tensor:
    return torch.clamp(torch.round(x * inverse_scale), low, high) * scale


@functools.cache
def _compiled(device: str, *, required: bool) -> Callable[..., Tensor] | None:
    """The compiled function, tried once; None where it does not work and is not required."""
    function = torch.compile(_fused, dynamic=True, fullgraph=True)
    try:
        function(torch.zeros(64, device=device), *torch.ones(4, 1, device=device))
    except Exception as error:
        message = f"torch.compile does not work here ({type(error).__name__})"
        if required:
            raise QwtError(
                f"{message}, but {COMPILE_VARIABLE} is always; install a C++ compiler or unset it."
            ) from error
        logger.info("%s; tensors are rounded in place", message)
        return None
    return function
