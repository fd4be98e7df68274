"""Attention classes and folds of timm's models. Imported for models that hold a module of timm."""

import torch

from ..imports import importable_torchvision

with importable_torchvision():
    from timm.layers.attention import Attention
    from timm.models.convnext import ConvNeXtBlock
    from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
    from timm.models.vision_transformer import Block
from torch import Tensor

from .attention import QuantizedAttention, add_window_mask, register_attention
from .folding import FOLDS, Fold


@register_attention(Attention)
class QuantizedTimmAttention(QuantizedAttention, Attention):
    """timm's attention (ViT and its kin) with both matrix products quantized."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[batch, tokens, channels] -> the same shape."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv

        def add_masks(scores: Tensor) -> Tensor:
            masks = [attn_mask]
            if is_causal:
                masks.append(torch.ones_like(scores[0, 0], dtype=torch.bool).tril())
            for mask in masks:
                if mask is None:
                    continue
                if mask.dtype == torch.bool:  # here True keeps a key
                    scores = scores.masked_fill(~mask, float("-inf"))
                else:
                    scores = scores + mask
            return scores

        attended, _ = self.attend(
            self.q_norm(query) * self.scale, self.k_norm(key), value, add_masks, self.attn_drop.p
        )
        attended = self.norm(attended.transpose(1, 2).flatten(2))
        if self.gate is not None:
            attended = attended * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(attended))


@register_attention(WindowAttention)
class QuantizedTimmWindowAttention(QuantizedAttention, WindowAttention):
    """timm's window attention (Swin) with both matrix products quantized."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[windows · batch, tokens, channels] -> the same shape; ``mask``: [windows, tokens, tokens]."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv
        attended, _ = self.attend(
            query * self.scale,
            key,
            value,
            lambda scores: add_window_mask(scores + self._get_rel_pos_bias(), mask),
            self.attn_drop.p,
        )
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))


def _block_folds(block: Block) -> list[Fold]:
    attention = getattr(block.attn, "gate", None) is None
    return [Fold("norm1", ("attn.qkv",))] * attention + [Fold("norm2", ("mlp.fc1",))]


FOLDS[Block] = _block_folds
# The output of norm1 is padded with zeros inside of the block, and so cannot be shifted.
FOLDS[SwinTransformerBlock] = lambda _: [Fold("norm2", ("mlp.fc1",))]
FOLDS[PatchMerging] = lambda _: [Fold("norm", ("reduction",))]
FOLDS[ConvNeXtBlock] = lambda _: [Fold("norm", ("mlp.fc1",))]
