"""What compensation costs, and which blocks are worth it."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models import BaseDetector

from ..config import MaxCost
from ..detectors.forward import count_operations, forward_scope
from ..quantization.convert import quantized_layers
from .result import BYTES_PER_PARAMETER, BlockFit


@torch.no_grad()
def backbone_multiply_adds(model: BaseDetector, batch: dict[str, Any]) -> int:
    """Multiply-adds of the backbone's convolutions and matrix products for one image.

    Args:
        model: in full precision, for which the counter knows all operations.
    """
    with count_operations(model) as counter:
        forward_scope(model, batch, "backbone")
    return counter.get_total_flops() // 2


def backbone_bytes(model: BaseDetector) -> float:
    """Bytes of a quantized detector's backbone: quantized weights at their bits, others as float32."""
    count = sum(parameter.numel() for parameter in model.backbone.parameters())
    total: float = count * BYTES_PER_PARAMETER
    for layer in quantized_layers(model.backbone).values():
        total -= layer.weight.numel() * (BYTES_PER_PARAMETER - layer.weight_bits / 8)
    return total


def _error_reduction(block: BlockFit) -> float:
    """The error that a compensation removes, in units of the power of the block's output.

    Held-out where there are held-out images. The unit makes blocks comparable.
    """
    before, after = block.holdout_error_before, block.holdout_error_after
    if before is None or after is None:
        before, after = block.fit_error_before, block.fit_error_after
    if before is None or after is None or block.target_power == 0:
        return 0.0
    return (before - after) / block.target_power


def too_expensive(blocks: Sequence[BlockFit], limits: MaxCost) -> set[str]:
    """Names of the kept blocks that exceed a budget, those with the least error reduction per cost.

    Blocks are taken greedily by error reduction per share of the budget, as long as they fit.
    """
    budgets = [
        (limit, key)
        for limit, key in (
            (limits.multiply_adds, "multiply_adds_percent"),
            (limits.bytes, "bytes_percent"),
        )
        if limit is not None
    ]

    def worth(block: BlockFit) -> float:
        cost = max(getattr(block, key) / limit if limit else float("inf") for limit, key in budgets)
        return _error_reduction(block) / cost if cost else float("inf")

    dropped: set[str] = set()
    spent = dict.fromkeys((key for _, key in budgets), 0.0)
    for block in sorted((b for b in blocks if b.kept), key=worth, reverse=True):
        if all(spent[key] + getattr(block, key) <= limit for limit, key in budgets):
            for key in spent:
                spent[key] += getattr(block, key)
        else:
            dropped.add(block.name)
    return dropped
