"""The check of a compensation at the detector's heads, on held-out images."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..detectors.forward import head_tensors
from ..quantization.sqnr import HeadError, sqnr_db
from .block_fit import Fit
from .modules import compensating
from .result import BlockFit

logger = logging.getLogger(__name__)


def check_at_heads(
    fit: Fit, model: nn.Module, reference: nn.Module, blocks: list[BlockFit]
) -> tuple[list[BlockFit], dict[str, float]]:
    """Leave out compensations, from the last block on, until the relative error at the heads is below that of none.

    The error is measured on the images of the first fold, with compensations that were fitted to the others.

    Returns:
        The blocks, and the compensation's ``heads``.
    """
    images = range(0, fit.images, fit.folds)
    for image in images:
        fit.cache["heads", image] = head_tensors(reference, fit.cache["image", image])

    def error_with(kept: Sequence[BlockFit]) -> float:
        error = HeadError()
        kinds = {block.name: block.trial for block in kept if block.trial}
        with compensating(model, kinds):
            for image in images:
                found = head_tensors(model, fit.cache["image", image])
                error.update(fit.cache["heads", image], found)
        return error.relative()

    kept = [block for block in blocks if block.kept]
    before, after = error_with([]), error_with(kept)
    while kept and not after < before:  # NaN is no improvement
        kept.pop()
        after = error_with(kept) if kept else before
    names = [block.name for block in kept]
    dropped = [block.name for block in blocks if block.kept and block.name not in names]
    logger.info(
        "At the heads, on %d held-out images: %s dB without compensation, %s dB with it; %s",
        len(images), *(f"{sqnr_db(error) or math.inf:.1f}" for error in (before, after)),
        f"left out, so that the error falls: {', '.join(dropped)}" if dropped else "all blocks stay",
    )  # fmt: skip
    blocks = [
        replace(block, kept=False, decision="heads") if block.name in dropped else block
        for block in blocks
    ]
    return blocks, {"images": len(images), "before": before, "after": after}
