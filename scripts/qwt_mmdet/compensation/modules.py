"""Compensation as part of a block, by a forward hook.

Its tensors are buffers of the block. So all module names stay the same, and copying, moving and state_dict
work as usual.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import QwtError
from ..replay.walk import Arguments
from .kinds import KINDS, Kind

PREFIX = "compensation_"

Hook = Callable[[str, nn.Module, Arguments, Any], Any]
"""Takes a module's name, the module, its arguments and its output; returns None or another output."""

LAYERS = nn.Linear | nn.Conv2d

_IS_LINEAR: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def channel_axis(block: nn.Module, output: Tensor) -> int:
    """1 for maps [batch, channels, height, width], −1 for tokens and for maps with channels last.

    A block of linear layers without any convolution works on the last axis.
    """
    if block not in _IS_LINEAR:  # cached, since it is needed in every forward pass
        kinds = {isinstance(m, nn.Linear) for m in block.modules() if isinstance(m, LAYERS)}
        _IS_LINEAR[block] = kinds == {True}
    return -1 if output.dim() == 3 or _IS_LINEAR[block] else 1


def block_input(arguments: Arguments) -> Tensor:
    """The first tensor among a block's arguments."""
    for value in tree_leaves(arguments):
        if isinstance(value, Tensor):
            return value
    raise QwtError("A block was called without a tensor; choose other 'blocks'.")


def block_output(name: str, output: Any) -> Tensor:
    """The tensor that a block returns, alone or as the first of several values.

    Raises:
        QwtError: there is none.
    """
    tensor = output[0] if isinstance(output, tuple | list) and output else output
    if isinstance(tensor, Tensor):
        return tensor
    raise QwtError(
        f"The block {name} returns a {type(output).__name__}, not a tensor; choose other 'blocks'."
    )


def _grid(arguments: Arguments, tokens: int) -> tuple[int, int] | None:
    """Height and width of the map of ``tokens`` tokens; None if they are not among the arguments."""
    for value in (*arguments[0], *arguments[1].values()):
        pair = isinstance(value, tuple | list) and len(value) == 2
        if pair and all(isinstance(n, int) for n in value) and math.prod(value) == tokens:
            return tuple(value)
    return None


def aligned_input(arguments: Arguments, output: Tensor, axis: int) -> Tensor:
    """The input of a block at the positions of its output.

    Args:
        arguments: of the block; its input is [batch, tokens, in] or a map of the output's layout.
        output: the block's output tensor. On maps a block may have a stride s; then
            height' = ⌈height / s⌉. Tokens form a map where the arguments hold its size.
        axis: the channels of a map.

    Returns:
        The input at these positions. With a stride s these are every s-th line and column, as of a 1×1
        convolution with that stride.

    Raises:
        QwtError: input and output have no such correspondence.
    """
    x = block_input(arguments)
    if x.dim() == output.dim() == 3 and len(x) == len(output):
        if x.shape[1] == output.shape[1]:
            return x
        grid = _grid(arguments, x.shape[1])
        stride = round(math.sqrt(x.shape[1] / output.shape[1])) if output.shape[1] else 0
        if grid and stride > 1:
            strided = x.unflatten(1, grid)[:, ::stride, ::stride].flatten(1, 2)
            if strided.shape[1] == output.shape[1]:
                return strided
    if x.dim() == output.dim() == 4 and len(x) == len(output):
        sides = (2, 3) if axis == 1 else (1, 2)
        slices = [slice(None)] * 4
        for dim in sides:
            slices[dim] = slice(None, None, max(1, round(x.shape[dim] / output.shape[dim])))
        strided = x[tuple(slices)]
        if all(strided.shape[dim] == output.shape[dim] for dim in sides):
            return strided
    raise QwtError(
        f"A block turns a tensor of shape {tuple(x.shape)} into {tuple(output.shape)}; a "
        "compensation needs tokens [batch, tokens, channels] or maps [batch, channels, height, "
        "width] that keep their positions up to a stride. Choose other 'blocks'."
    )


def by_position(x: Tensor, axis: int) -> Tensor:
    """A map or tokens with channels along ``axis`` -> [positions, channels]."""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def compensated(block: nn.Module, kind: Kind, arguments: Arguments, output: Any) -> Any:
    """A block's output, with its tensor compensated."""
    tensor = block_output(type(block).__name__, output)
    axis = channel_axis(block, tensor)
    x = aligned_input(arguments, tensor, axis).to(tensor.dtype)
    changed = kind.to(tensor.device, tensor.dtype).apply(x, tensor, axis)
    return changed if isinstance(output, Tensor) else type(output)((changed, *output[1:]))


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], hook: Hook) -> Iterator[None]:
    """Inside: ``hook`` is called after every call of these modules."""
    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(
                lambda module, args, kwargs, output, name=name: hook(
                    name, module, (args, kwargs), output
                ),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        yield


def compensating(model: nn.Module, kinds: Mapping[str, Kind]) -> AbstractContextManager[None]:
    """Inside: blocks of these names run with a compensation; their buffers do not change."""
    return hooked(
        model,
        kinds,
        lambda name, block, arguments, output: compensated(block, kinds[name], arguments, output),
    )


def _compensate(kind: str, block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """The forward hook of a compensated block; its tensors are buffers of the block."""
    found = KINDS[kind](**_compensation_buffers(block))
    return compensated(block, found, (args, kwargs), output)


def _compensation_buffers(block: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix(PREFIX): value
        for name, value in block.named_buffers(recurse=False)
        if name.startswith(PREFIX)
    }


def attach_compensation(block: nn.Module, kind: Kind) -> None:
    """Give a block its compensation; a QwtError is raised if it has one already."""
    if _compensation_buffers(block):
        raise QwtError("This model is compensated already; load it again first.")
    device = next(block.parameters()).device
    for name, value in kind.to(device, torch.float32).tensors().items():
        block.register_buffer(PREFIX + name, value)
    block.register_forward_hook(partial(_compensate, kind.name), with_kwargs=True)
