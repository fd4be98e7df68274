"""Replacing the forward of modules, and tracking which tensors depend on which outputs."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

Forward = Callable[..., Any]


@contextlib.contextmanager
def replaced_forwards(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    """Inside: modules run other functions in place of their forward."""
    own = {module: vars(module)["forward"] for module in forwards if "forward" in vars(module)}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
        for module, forward in own.items():
            module.forward = forward


def detached(tree: Any) -> Any:
    """A copy of all tensors in nested containers, outside of the autograd graph."""
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, tree)


def new_leaf() -> Tensor:
    """A leaf of the autograd graph for :func:`tied`."""
    return torch.zeros((), requires_grad=True)


def tied(tree: Any, leaf: Tensor) -> Any:
    """Copies of nested tensors whose only gradient path leads to ``leaf`` (from :func:`new_leaf`).

    Tensors that cannot have gradients (integers, booleans) are returned unchanged.
    """
    return tree_map(
        lambda v: v.detach() + leaf.to(v.device, v.dtype) if _has_gradients(v) else v, tree
    )


def has_untied(tree: Any) -> bool:
    """Whether nested values hold a tensor that :func:`tied` does not tie."""
    return any(isinstance(v, Tensor) and not _has_gradients(v) for v in tree_leaves(tree))


def _has_gradients(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def made_of(tree: Any, leaves: Sequence[Tensor]) -> list[bool]:
    """For each leaf: whether one of the nested tensors has a gradient path to it."""
    values = [v for v in tree_leaves(tree) if isinstance(v, Tensor) and v.requires_grad]
    if not values or not leaves:
        return [False] * len(leaves)
    with torch.enable_grad():
        total = torch.stack([value.sum().to("cpu", torch.float32) for value in values]).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return [gradient is not None for gradient in gradients]


@dataclass(frozen=True)
class _Outline:
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def outlined(tree: Any) -> Any:
    """Replace nested tensors that are not read any more by their shape, dtype and device."""
    return tree_map(
        lambda v: _Outline(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else v, tree
    )


class Placeholders:
    """Stand-ins for outputs that nobody reads any more: NaN, or 0 where the dtype has no NaN.

    All of them share memory, since filling it costs more than a layer. Code between modules may work in place on
    a stand-in (DetectoRS' neck does); then the next ones get memory of their own.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def of(self, outlines: Any) -> Any:
        """Tensors for the outlines of :func:`outlined`."""
        return tree_map(lambda v: self._tensor(v) if isinstance(v, _Outline) else v, outlines)

    def _tensor(self, outline: _Outline) -> Tensor:
        key, size = (outline.dtype, outline.device), outline.shape.numel()
        memory = self._memory.get(key)
        # A tensor's version counts the changes of its memory, through whichever view.
        if memory is None or memory.numel() < size or memory._version:
            has_nan = outline.dtype.is_floating_point or outline.dtype.is_complex
            filling = math.nan if has_nan else 0
            memory = torch.full((size,), filling, dtype=outline.dtype, device=outline.device)
            self._memory[key] = memory
        return memory[:size].view(outline.shape)
