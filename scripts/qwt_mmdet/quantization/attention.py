"""Attention classes whose two matrix products are quantized.

``softmax(q kᵀ) v`` has two products of activations, which belong to no Linear layer. Each attention class has
a registered quantized class, which computes the same as the original when its quantizers are disabled.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from mmdet.models.backbones.swin import WindowMSA
from torch import Tensor, nn

from .quantizer import ActivationQuantizer

ATTENTION: dict[type[nn.Module], type["QuantizedAttention"]] = {}
"""Quantized class by original class; extend it with :func:`register_attention`."""

Quantized = TypeVar("Quantized", bound="type[QuantizedAttention]")


def register_attention(original: type[nn.Module]) -> Callable[[Quantized], Quantized]:
    """Class decorator: the decorated subclass of ``original`` is its quantized class.

    The subclass names its operands in ``operands``; each becomes an ActivationQuantizer submodule
    ``{operand}_quantizer``.
    """

    def decorate(quantized: Quantized) -> Quantized:
        ATTENTION[original] = quantized
        return quantized

    return decorate


class QuantizedAttention(nn.Module):
    """Base of the quantized attention classes: query, key, probability and value quantizers."""

    operands = ("query", "key", "probability", "value")
    weight_bits = None  # its projections are layers of their own

    query_quantizer: ActivationQuantizer
    key_quantizer: ActivationQuantizer
    probability_quantizer: ActivationQuantizer
    value_quantizer: ActivationQuantizer

    def _attach(
        self, name: str, activation_bits: int, *, logarithmic_probability: bool = False
    ) -> None:
        for operand in self.operands:
            quantizer = ActivationQuantizer(
                f"Attention {name} ({operand})",
                activation_bits,
                logarithmic=logarithmic_probability and operand == "probability",
            )
            self.add_module(f"{operand}_quantizer", quantizer)

    @property
    def activation_bits(self) -> int:
        return self.quantizers()[0].bits

    @property
    def is_calibrated(self) -> bool:
        return all(quantizer.is_calibrated for quantizer in self.quantizers())

    def quantizers(self) -> list[ActivationQuantizer]:
        return [getattr(self, f"{operand}_quantizer") for operand in self.operands]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        add_bias: Callable[[Tensor], Tensor],
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        """Return softmax(query keyᵀ + bias) value, and the probabilities.

        The operands may be overwritten.

        Args:
            query: […, queries, channels], scaled. key, value: […, keys, channels].
            add_bias: adds position bias and masks to scores […, queries, keys].
            dropout: of the probabilities, in training.
        """
        # Made contiguous first, or the products would copy the rounded operands.
        query, key, value = (
            quantizer(operand.contiguous(), overwrite=True)
            for quantizer, operand in (
                (self.query_quantizer, query),
                (self.key_quantizer, key),
                (self.value_quantizer, value),
            )
        )
        probability = F.softmax(add_bias(query @ key.transpose(-2, -1)), dim=-1)
        probability = self.probability_quantizer(probability, overwrite=True)
        if dropout and self.training:
            probability = F.dropout(probability, dropout)
        return probability @ value, probability


@register_attention(WindowMSA)
class QuantizedWindowMSA(QuantizedAttention, WindowMSA):
    """mmdet's window attention (Swin) with both matrix products quantized."""

    num_heads: int
    scale: float
    qkv: nn.Module
    proj: nn.Module
    attn_drop: nn.Dropout
    proj_drop: nn.Module
    relative_position_bias_table: Tensor
    relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[windows · batch, tokens, channels] -> the same shape.

        Args:
            mask: [windows, tokens, tokens], 0 or a large negative number.
        """
        batch, tokens, channels = x.shape
        heads = self.num_heads
        qkv = self.qkv(x).reshape(batch, tokens, 3, heads, channels // heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        table = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = table.view(tokens, tokens, heads).permute(2, 0, 1)
        attended, _ = self.attend(
            query * self.scale,
            key,
            value,
            lambda scores: add_window_mask(scores + bias, mask),
            self.attn_drop.p,
        )
        return self.proj_drop(self.proj(attended.transpose(1, 2).reshape(batch, tokens, channels)))


def add_window_mask(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Add a mask per window, [windows, tokens, tokens], to [batch · windows, heads, tokens, tokens]."""
    if mask is None:
        return scores
    masked = scores.view(-1, len(mask), *scores.shape[1:]) + mask[:, None]
    return masked.view_as(scores)


@register_attention(nn.MultiheadAttention)
class QuantizedMultiheadAttention(QuantizedAttention, nn.MultiheadAttention):
    """torch's attention, alone or inside mmcv's wrapper (PVT, the DETR family).

    :func:`split_projections` has given its packed input projection the form of three layers.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results of nn.MultiheadAttention; ``is_causal`` needs ``attn_mask`` there too."""
        inputs = [query, key, value]
        is_batched = query.dim() == 3
        if not is_batched:
            inputs = [x[None] for x in inputs]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        queries, keys, values = (layer(x) for layer, x in zip(projections, inputs, strict=True))
        batch = len(queries)
        if self.bias_k is not None and self.bias_v is not None:
            keys = torch.cat([keys, self.bias_k.expand(batch, -1, -1)], 1)
            values = torch.cat([values, self.bias_v.expand(batch, -1, -1)], 1)
        if self.add_zero_attn:
            keys, values = F.pad(keys, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1))
        mask = _merged_mask(attn_mask, key_padding_mask, self.num_heads, keys.shape[1], keys.dtype)
        queries, keys, values = (
            x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (queries, keys, values)
        )
        attended, probability = self.attend(
            queries * self.head_dim**-0.5,
            keys,
            values,
            lambda scores: scores if mask is None else scores + mask,
            self.dropout,
        )
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        weights = None
        if need_weights:
            weights = probability.mean(1) if average_attn_weights else probability
        if not is_batched:
            return output[0], None if weights is None else weights[0]
        return (output if self.batch_first else output.transpose(0, 1)), weights


def _merged_mask(
    attention: Tensor | None, padding: Tensor | None, heads: int, keys: int, dtype: torch.dtype
) -> Tensor | None:
    """One mask to add to scores [batch, heads, queries, keys], from those of nn.MultiheadAttention.

    Args:
        attention: [queries, sources] or [batch · heads, queries, sources].
        padding: [batch, sources]. True or −∞ excludes a key in both.
        keys: number of sources, and of the keys that biases and zero attention add, which no mask excludes.
    """
    merged = None
    for mask, is_padding in ((attention, False), (padding, True)):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
        mask = F.pad(mask, (0, keys - mask.shape[-1]))
        if is_padding:
            mask = mask[:, None, None]
        elif mask.dim() == 3:
            mask = mask.unflatten(0, (-1, heads))
        merged = mask if merged is None else merged + mask
    return merged


def split_projections(attention: nn.MultiheadAttention) -> None:
    """Turn the packed input projection into the layers q_proj, k_proj and v_proj, in place.

    Afterwards the module computes only in its quantized class.
    """
    packed = attention.in_proj_weight
    weights = (
        packed.chunk(3)
        if packed is not None
        else (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    )
    packed_bias = attention.in_proj_bias
    biases = (None, None, None) if packed_bias is None else packed_bias.chunk(3)
    for name, weight, bias in zip("qkv", weights, biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device)
        layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        attention.add_module(f"{name}_proj", layer)
    for name in (
        "in_proj_weight",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "in_proj_bias",
    ):
        setattr(attention, name, None)
    # torch's transformer layers would otherwise use the packed weight directly.
    attention._qkv_same_embed_dim = False
    attention.train(attention.training)
