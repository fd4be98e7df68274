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
    y = torch.mul(x, inverse_scale, out=x if overwrite else None)
    # One limit at a time: torch does not vectorize a clamp between two tensors that broadcast.
    return y.round_().clamp_(min=low).clamp_(max=high).mul_(scale)


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
