"""Compensation as part of a block: ``output + x W + b``, added by a forward hook.

W and b are buffers of the block itself, so all module names stay as they are, and copying, moving
and state_dict work as usual.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import QwtError

BUFFERS = ("compensation_weight", "compensation_bias")


def aligned_input(x: Tensor, output: Tensor) -> Tensor:
    """Take from a block's input the positions of its output.

    Args:
        x: [batch, tokens, in] or [batch, in, height, width].
        output: the block's output of the same layout; a convolutional block may have a stride s,
            then height' = ⌈height / s⌉.

    Returns:
        [batch, tokens, in], or [batch, in, height', width'] (every s-th row and column: what a 1×1
        convolution with that stride reads).

    Raises:
        QwtError: input and output have no such correspondence.
    """
    if x.dim() == output.dim() == 3 and x.shape[:2] == output.shape[:2]:
        return x
    if x.dim() == output.dim() == 4 and len(x) == len(output):
        stride = [
            max(1, round(full / small))
            for full, small in zip(x.shape[2:], output.shape[2:], strict=True)
        ]
        x = x[:, :, :: stride[0], :: stride[1]]
        if x.shape[2:] == output.shape[2:]:
            return x
    raise QwtError(
        f"A block turns a tensor of shape {tuple(x.shape)} into {tuple(output.shape)}; a linear "
        "compensation needs tokens [batch, tokens, channels] or maps [batch, channels, height, "
        "width] that keep their positions up to a stride. Choose other 'blocks'."
    )


def as_rows(x: Tensor) -> Tensor:
    """[batch, tokens, c] or [batch, c, height, width] -> [positions, c]."""
    return (x if x.dim() == 3 else x.permute(0, 2, 3, 1)).reshape(
        -1, x.shape[-1 if x.dim() == 3 else 1]
    )


def add_compensation(output: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``output + x W + b`` for W [in, out] and b [out]; maps use a strided 1×1 convolution."""
    x = aligned_input(x, output)
    weight, bias = weight.to(output.dtype), bias.to(output.dtype)
    x = x.to(output.dtype)
    if x.dim() == 3:
        return output + F.linear(x, weight.T, bias)
    return output + F.conv2d(x, weight.T[:, :, None, None], bias)


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a block works on: its first argument."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise QwtError("A block was called without a tensor; choose other 'blocks'.")


def _compensate(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    return add_compensation(
        output, block_input(args, kwargs), block.compensation_weight, block.compensation_bias
    )


def attach_compensation(block: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Give a block its compensation: W [in, out], b [out].

    Raises:
        QwtError: it has one already.
    """
    if hasattr(block, BUFFERS[0]):
        raise QwtError("This model is compensated already; load it again first.")
    device = next(block.parameters()).device
    for name, value in zip(BUFFERS, (weight, bias), strict=True):
        block.register_buffer(name, value.to(device=device, dtype=torch.float32))
    block.register_forward_hook(_compensate, with_kwargs=True)
