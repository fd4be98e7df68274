"""Scale reparameterization: per-channel quantization after a LayerNorm at the cost of per-tensor.

Channels of a LayerNorm's output differ in range, so one scale for all of them wastes codes. Let s be the
scale and z the zero point of each channel, r1 = s / mean(s) and r2 = z − round(mean(z)). The LayerNorm
returns (y + s r2) / r1 in place of y, and the next layer inverts this in its weight and bias. The new
tensor, quantized with one scale and one zero point, has the same codes as y quantized per channel
(RepQ-ViT, arXiv 2212.08254, section 3.2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.backbones.pvt import PVTEncoderLayer
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock
from mmdet.models.layers.transformer.utils import PatchMerging
from torch import Tensor, nn

from .layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear, exchange_class, layer_by_name
from .quantizer import ActivationQuantizer


@dataclass(frozen=True)
class Fold:
    """A LayerNorm and the layers that read its output. Nothing else reads it.

    Attributes:
        norm, layers: names of modules, relative to the module that they were found in.
        padder: name of a module in between that pads with zeros, whose padding the fold changes.
    """

    norm: str
    layers: tuple[str, ...]
    padder: str | None = None


def _swin_folds(block: SwinBlock) -> list[Fold]:
    return [
        Fold("norm1", ("attn.w_msa.qkv",), padder="attn"),
        Fold("norm2", ("ffn.layers.0.0",)),
    ]


def _patch_merging_folds(merging: PatchMerging) -> list[Fold]:
    return [] if merging.norm is None else [Fold("norm", ("reduction",))]


def _pvt_folds(layer: PVTEncoderLayer) -> list[Fold]:
    feed_forward = Fold("norm2", ("ffn.layers.0",))
    if layer.attn.sr_ratio == 1:
        projections = tuple(f"attn.attn.{name}_proj" for name in "qkv")
        return [Fold("norm1", projections), feed_forward]
    return [
        Fold("norm1", ("attn.attn.q_proj", "attn.sr")),
        Fold("attn.norm", ("attn.attn.k_proj", "attn.attn.v_proj")),
        feed_forward,
    ]


FOLDS: dict[type[nn.Module], Callable[[Any], list[Fold]]] = {
    SwinBlock: _swin_folds,
    PatchMerging: _patch_merging_folds,
    PVTEncoderLayer: _pvt_folds,
}
"""Functions that return the folds inside of a module, by its class."""


class FoldedShiftWindowMSA(ShiftWindowMSA):
    """mmdet's shifted windows, padded with the folded value of zero."""

    padding: Tensor

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """[batch, height · width, channels] -> the same shape."""
        height, width = hw_shape
        below, right = -height % self.window_size, -width % self.window_size
        if not below and not right:
            return super().forward(query, hw_shape)
        size = (height + below, width + right)
        padded = self.padding.to(query.dtype).expand(len(query), *size, -1).clone()
        padded[:, :height, :width] = query.unflatten(1, hw_shape)
        output = super().forward(padded.flatten(1, 2), size).unflatten(1, size)
        return output[:, :height, :width].flatten(1, 2)


def find_folds(model: nn.Module) -> list[Fold]:
    """All folds of a model's LayerNorms into quantized layers without padding, with names relative to ``model``."""
    found = []
    for name, module in model.named_modules():
        for fold in FOLDS.get(type(module), lambda _: [])(module):
            absolute = [f"{name}.{member}" for member in (fold.norm, *fold.layers)]
            norm, *layers = [model.get_submodule(member) for member in absolute]
            padder = None if fold.padder is None else f"{name}.{fold.padder}"
            if _has_factors(norm) and all(map(_takes_factors, layers)):
                found.append(Fold(absolute[0], tuple(absolute[1:]), padder))
    return found


def _has_factors(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def _takes_factors(layer: nn.Module) -> bool:
    if isinstance(layer, QuantizedLayer) and not layer.input_quantizer.rounds:
        return False
    if type(layer) is QuantizedConv2d:  # a subclass may pad the input by itself
        return layer.groups == 1 and not any(layer._reversed_padding_repeated_twice)
    return type(layer) is QuantizedLinear


def factors(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From grids per channel, [channels]: scale and zero point of the tensor, [1], and r1 and s r2, [channels]."""
    tensor_scale = scale.mean(0, keepdim=True)
    tensor_zero_point = zero_point.mean(0, keepdim=True).round()
    shift = scale * (zero_point - tensor_zero_point)
    return tensor_scale, tensor_zero_point, scale / tensor_scale, shift


def folded_range(
    quantizer: ActivationQuantizer, factor: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """The clipping range of the folded tensor, [1] each, for factors [channels] of a quantizer with other bits."""
    scale, zero_point = quantizer.grid
    ends = (-zero_point, 2**quantizer.bits - 1 - zero_point)
    low, high = (((scale * end + shift) / factor).mean(0, keepdim=True) for end in ends)
    return low, high


@torch.no_grad()
def apply_fold(model: nn.Module, fold: Fold, factor: Tensor, shift: Tensor) -> None:
    """Change the LayerNorm to return (y + shift) / factor, and its readers to invert this, in place.

    ``factor`` and ``shift``, [channels], become buffers of the first layer, so that loading a saved state can
    repeat the fold.
    """
    norm = model.get_submodule(fold.norm)
    assert isinstance(norm, nn.LayerNorm)  # as find_folds has checked
    norm.bias.copy_((norm.bias + shift) / factor)
    norm.weight.copy_(norm.weight / factor)
    for name in fold.layers:
        layer = layer_by_name(model, name)
        weight = layer.weight.double()
        columns = [1, -1] + [1] * (weight.dim() - 2)
        shifted = (weight * shift.double().view(columns)).flatten(1).sum(1)
        bias = shifted.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
        layer.bias = nn.Parameter((bias - shifted).float(), requires_grad=False)
        layer.weight.copy_((weight * factor.double().view(columns)).float())
    first = layer_by_name(model, fold.layers[0])
    first.fold_factor, first.fold_shift = factor, shift
    if fold.padder is not None:
        padder = exchange_class(model.get_submodule(fold.padder), FoldedShiftWindowMSA)
        padder.register_buffer("padding", shift / factor, persistent=False)
