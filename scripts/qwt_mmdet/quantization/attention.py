"""Attention classes whose two matrix products are quantized.

``softmax(q kᵀ) v`` has two products of activations, which no Linear layer covers. A quantized form
is registered per attention class; it must compute what the original computes when its quantizers
are switched off.
"""

from collections.abc import Callable

import torch.nn.functional as F
from mmdet.models.backbones.swin import WindowMSA
from torch import Tensor, nn

from .layers import ActivationQuantizer

ATTENTION: dict[type[nn.Module], type[nn.Module]] = {}
"""Quantized class by original class; extend it with :func:`register_attention`."""


def register_attention(original: type[nn.Module]) -> Callable[[type], type]:
    """Class decorator: the decorated subclass of ``original`` is its quantized form.

    The subclass names its operands in ``operands``; each becomes an ActivationQuantizer submodule
    ``{operand}_quantizer``.
    """

    def decorate(quantized: type[nn.Module]) -> type[nn.Module]:
        ATTENTION[original] = quantized
        return quantized

    return decorate


class QuantizedAttention(nn.Module):
    """Base of the quantized attention classes: query, key, probability and value quantizers."""

    operands = ("query", "key", "probability", "value")

    def _attach(self, name: str, activation_bits: int) -> None:
        for operand in self.operands:
            quantizer = ActivationQuantizer(f"Attention {name} ({operand})", activation_bits)
            self.add_module(f"{operand}_quantizer", quantizer)

    @property
    def is_calibrated(self) -> bool:
        return all(quantizer.is_calibrated for quantizer in self.quantizers())

    def quantizers(self) -> list[ActivationQuantizer]:
        return [getattr(self, f"{operand}_quantizer") for operand in self.operands]


@register_attention(WindowMSA)
class QuantizedWindowMSA(QuantizedAttention, WindowMSA):
    """mmdet's window attention (Swin) with both matrix products quantized."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[windows · batch, tokens, channels] -> the same shape.

        Args:
            mask: [windows, tokens, tokens], 0 or a large negative number.
        """
        batch, tokens, channels = x.shape
        heads = self.num_heads
        qkv = self.qkv(x).reshape(batch, tokens, 3, heads, channels // heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query = self.query_quantizer(query * self.scale)
        scores = query @ self.key_quantizer(key).transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        scores = scores + bias.view(tokens, tokens, heads).permute(2, 0, 1)
        if mask is not None:
            windows = len(mask)
            scores = scores.view(batch // windows, windows, heads, tokens, tokens)
            scores = (scores + mask[:, None]).view(batch, heads, tokens, tokens)
        probability = self.probability_quantizer(F.softmax(scores, dim=-1))
        attended = self.attn_drop(probability) @ self.value_quantizer(value)
        return self.proj_drop(self.proj(attended.transpose(1, 2).reshape(batch, tokens, channels)))
