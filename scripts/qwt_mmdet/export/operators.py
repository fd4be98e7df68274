"""Operators of mmcv that ONNX lacks, from operators that it has. They take their place while a graph is traced."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from mmcv.ops import (
    CornerPool,
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    MultiScaleDeformableAttention,
)
from mmcv.ops.deform_conv import deform_conv2d
from mmcv.ops.merge_cells import ConcatCell, GlobalPoolingCell, SumCell
from mmcv.ops.modulated_deform_conv import modulated_deform_conv2d
from mmdet.models.detectors.base_detr import DetectionTransformer
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

KNOWN = (
    ConcatCell,
    CornerPool,
    DeformConv2d,
    DeformConv2dPack,
    GlobalPoolingCell,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    MultiScaleDeformableAttention,
    SumCell,
)
"""Classes of mmcv.ops that have a graph."""

Pair = int | tuple[int, int]


def _sampled(maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Values between pixels, bilinear, 0 outside.

    Args:
        maps: [n, channels, height, width]. x, y: in pixels, [n, rows, columns].

    Returns:
        [n, channels, rows, columns].
    """
    height, width = maps.shape[2:]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
    return F.grid_sample(maps, grid, align_corners=False)


def deformable_convolution(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    deform_groups: int,
) -> Tensor:
    """Deformable convolution (Dai et al., arXiv 1703.06211; with ``mask`` Zhu et al., arXiv 1811.11168).

    Args:
        x: [n, in, height, width].
        offset: in pixels, [n, deform_groups · 2 · kernel positions, height', width'], y before x.
        mask: factor of each sampled value, [n, deform_groups · kernel positions, height', width'].
        weight: [out, in / groups, kernel height, kernel width].

    Returns:
        [n, out, height', width'].
    """
    (sy, sx), (py, px), (dy, dx) = _pair(stride), _pair(padding), _pair(dilation)
    number, channels = x.shape[:2]
    kernel = weight.shape[2:]
    taps = kernel[0] * kernel[1]
    height = (x.shape[2] + 2 * py - dy * (kernel[0] - 1) - 1) // sy + 1
    width = (x.shape[3] + 2 * px - dx * (kernel[1] - 1) - 1) // sx + 1
    size = height, width

    def of_this_size(values: Tensor, channels: int) -> Tensor:
        """A larger map is read from its start on, as mmcv's kernels do (DyHead relies on it)."""
        if values.shape[2:] == size:
            return values
        return values.flatten(1)[:, : channels * height * width].view(number, -1, *size)

    offset = of_this_size(offset, 2 * taps * deform_groups)
    offset = offset.reshape(number * deform_groups, taps, 2, *size)

    rows, columns = (torch.arange(side, device=x.device) for side in size)
    tap_rows = torch.arange(kernel[0], device=x.device).repeat_interleave(kernel[1])
    tap_columns = torch.arange(kernel[1], device=x.device).repeat(kernel[0])
    at_y = offset[:, :, 0] + (rows * sy)[:, None] + (tap_rows * dy - py)[:, None, None]
    at_x = offset[:, :, 1] + columns * sx + (tap_columns * dx - px)[:, None, None]
    parts = x.reshape(number * deform_groups, -1, *x.shape[2:])
    values = _sampled(parts, at_x.flatten(1, 2), at_y.flatten(1, 2))
    values = values.reshape(number * deform_groups, -1, taps, *size)
    if mask is not None:
        mask = of_this_size(mask, taps * deform_groups)
        values = values * mask.reshape(number * deform_groups, 1, taps, *size)
    values = values.reshape(number, channels * taps, *size)
    return F.conv2d(values, weight.flatten(1)[:, :, None, None], bias, groups=groups)


def _deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
    *_: Any,
) -> Tensor:
    return deformable_convolution(
        x, offset, None, weight, None, stride, padding, dilation, groups, deform_groups
    )


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "deform_conv2d": (deform_conv2d, _deform_conv2d),
    "modulated_deform_conv2d": (modulated_deform_conv2d, deformable_convolution),
}
"""Functions of mmcv's and what takes their place, by name."""


def _deformable_attention(
    module: MultiScaleDeformableAttention,
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    identity: Tensor | None = None,
    query_pos: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    reference_points: Tensor | None = None,
    spatial_shapes: Any = None,
    **_: Any,
) -> Tensor:
    """Multi-scale deformable attention (Zhu et al., arXiv 2010.04159); arguments as of mmcv's module."""
    assert reference_points is not None
    value = query if value is None else value
    identity = query if identity is None else identity
    query = query if query_pos is None else query + query_pos
    if not module.batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    number, queries, _width = query.shape
    heads, levels, points = module.num_heads, module.num_levels, module.num_points
    value = module.value_proj(value)
    if key_padding_mask is not None:
        value = value.masked_fill(key_padding_mask[..., None], 0.0)
    offsets = module.sampling_offsets(query).view(number, queries, heads, levels, points, 2)
    weights = module.attention_weights(query).view(number, queries, heads, levels * points)
    weights = weights.softmax(-1)
    reference = reference_points[:, :, None, :, None]
    if reference.shape[-1] == 4:
        places = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
    else:
        sides = torch.tensor([[w, h] for h, w in spatial_shapes], dtype=offsets.dtype)
        places = reference + offsets / sides[:, None].to(offsets.device)
    found = []
    for level, (part, (height, width)) in enumerate(
        zip(value.split([h * w for h, w in spatial_shapes], 1), spatial_shapes, strict=True)
    ):
        maps = part.transpose(1, 2).reshape(number * heads, -1, height, width)
        place = places[:, :, :, level].transpose(1, 2).flatten(0, 1)
        found.append(
            _sampled(maps, place[..., 0] * width - 0.5, place[..., 1] * height - 0.5)
        )  # [number · heads, channels, queries, points]
    weights = weights.transpose(1, 2).reshape(number * heads, 1, queries, levels * points)
    output = (torch.cat(found, -1) * weights).sum(-1).view(number, -1, queries).transpose(1, 2)
    output = module.output_proj(output)
    if not module.batch_first:
        output = output.transpose(0, 1)
    return module.dropout(output) + identity


def _corner_pool(module: CornerPool, x: Tensor) -> Tensor:
    """The largest value so far in one direction (Law & Deng, arXiv 1808.01244); [n, channels, height, width]."""
    axis, flip = module.cummax_dim_flip[module.mode]
    x = x.flip(axis) if flip else x
    step, length = 1, x.shape[axis]
    while step < length:
        before = F.pad(x, (step, 0) if axis == 3 else (0, 0, step, 0), value=-torch.inf)
        x = torch.maximum(x, before.narrow(axis, 0, length))
        step *= 2
    return x.flip(axis) if flip else x


MODULES: dict[type[nn.Module], Callable[..., Tensor]] = {
    MultiScaleDeformableAttention: _deformable_attention,
    CornerPool: _corner_pool,
}
"""Methods that take the place of a module's ``forward``, by its class."""


def _with_known_sizes(module: DetectionTransformer) -> Callable[..., Any]:
    """The module's ``pre_transformer``, which gives heights and widths of levels as numbers in the place of a tensor."""
    original = module.pre_transformer

    def prepared(maps: Sequence[Tensor], *arguments: Any) -> tuple[dict[str, Any], ...]:
        sizes = tuple(tuple(level.shape[2:]) for level in maps)
        with mock.patch.object(torch, "_shape_as_tensor", lambda x: torch.tensor(x.shape)):
            found = original(maps, *arguments)  # torch cannot trace its own
        return tuple(
            {key: sizes if key == "spatial_shapes" else value for key, value in inputs.items()}
            for inputs in found
        )

    return prepared


@contextlib.contextmanager
def onnx_operators(model: nn.Module) -> Iterator[None]:
    """Inside: modules of a detector compute with operators that ONNX has."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, DetectionTransformer):
                module.pre_transformer = _with_known_sizes(module)
                stack.callback(vars(module).pop, "pre_transformer")
            for module_class, forward in MODULES.items():
                if isinstance(module, module_class):
                    module.forward = forward.__get__(module)
                    stack.callback(vars(module).pop, "forward")
        for name, (original, ours) in FUNCTIONS.items():
            holders = [
                m for m in sys.modules.values() if getattr(m, "__dict__", {}).get(name) is original
            ]
            for holder in holders:
                if holder is not sys.modules[__name__]:
                    stack.enter_context(mock.patch.object(holder, name, ours))
        yield


def lacking(module_class: type[nn.Module]) -> bool:
    """Whether a class of mmcv uses an operator that ONNX lacks and that has no replacement here."""
    return module_class.__module__.startswith("mmcv.ops") and module_class not in KNOWN
