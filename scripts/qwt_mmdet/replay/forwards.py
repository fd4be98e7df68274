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


def unknown(outlines: Any) -> Any:
    """New tensors for the outlines of :func:`outlined`: filled with NaN, or with 0 if the dtype has no NaN."""

    def tensor(value: Any) -> Any:
        if not isinstance(value, _Outline):
            return value
        # Not an expanded scalar: code between modules may work in place (DetectoRS' neck does).
        has_nan = value.dtype.is_floating_point or value.dtype.is_complex
        filling = math.nan if has_nan else 0
        return torch.full(value.shape, filling, dtype=value.dtype, device=value.device)

    return tree_map(tensor, outlines)
