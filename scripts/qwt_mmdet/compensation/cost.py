"""The cost of compensation, and the choice of blocks within a budget."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models import BaseDetector

from ..config import MaxCost
from ..detectors.forward import count_operations, forward_scope
from .result import BlockFit, Option


@torch.no_grad()
def backbone_multiply_adds(model: BaseDetector, batch: dict[str, Any]) -> int:
    """Multiply-adds of the backbone's convolutions and matrix products for one image.

    Args:
        model: in full precision; the counter does not know quantized operations.
    """
    with count_operations(model) as counter:
        forward_scope(model, batch, "backbone")
    return counter.get_total_flops() // 2


def within_budget(blocks: Sequence[BlockFit], limits: MaxCost) -> dict[str, int]:
    """Choose a form of compensation for each kept block within a budget; blocks without one are left out.

    Errors are relative to the power of a block's output, so that blocks are comparable. Each step takes the
    block and form that remove the most error for their share of the budget, until none fits (marginal analysis;
    a greedy solution of the knapsack problem).

    Returns:
        The index of the chosen form, by block.
    """
    asked = {"bytes_percent": limits.bytes, "multiply_adds_percent": limits.multiply_adds}
    budgets = {field: limit for field, limit in asked.items() if limit is not None}
    nothing = Option(0.0, 0.0, 0.0)
    options = {
        block.name: [
            option._replace(error=(option.error - block.error_before) / block.target_power)
            for option in block.options
        ]
        for block in blocks
        if block.kept and block.target_power > 0
    }
    chosen: dict[str, int] = {}
    while True:
        now = {name: options[name][chosen[name]] if name in chosen else nothing for name in options}
        spent = {field: sum(getattr(o, field) for o in now.values()) for field in budgets}
        best, step = 0.0, None
        for name, forms in options.items():
            for index, form in enumerate(forms):
                added = {f: getattr(form, f) - getattr(now[name], f) for f in spent}
                if any(spent[field] + added[field] > limit for field, limit in budgets.items()):
                    continue
                share = sum(added[field] / limit for field, limit in budgets.items() if limit)
                # Steps without additional cost come first.
                worth = (now[name].error - form.error) / max(share, 1e-12)
                if worth > best:
                    best, step = worth, (name, index)
        if step is None:
            return chosen
        chosen[step[0]] = step[1]
