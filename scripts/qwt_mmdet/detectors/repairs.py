"""Repairs of faults in mmdet 3.3 that inference meets."""

import math

from mmdet.models.dense_heads import SSDHead
from mmdet.models.roi_heads.mask_heads import fcn_mask_head
from torch import Tensor, nn

_paste = fcn_mask_head._do_paste_mask


def paste_masks(
    masks: Tensor, boxes: Tensor, height: int, width: int, skip_empty: bool = True
) -> tuple[Tensor, tuple[slice, ...]]:
    """mmdet's pasting of masks, which fails on boxes beside the image or that are not finite.

    Args:
        masks: [n, 1, mask height, mask width].
        boxes: [n, 4], x1, y1, x2, y2 in pixels of the image.
        height, width: of the image.
        skip_empty: paste only into the region of the image that the boxes cover.

    Returns:
        The pasted masks [n, h, w], and the region of the image that they are.
    """
    if skip_empty:  # in numbers, since this is called for each box on a CPU
        x1, y1, x2, y2 = zip(*boxes.tolist(), strict=True)
        is_finite = all(map(math.isfinite, (*x1, *y1, *x2, *y2)))
        beside = min(x1) >= width or min(y1) >= height or min(max(x2), max(y2)) <= 0
        skip_empty = is_finite and not beside
    return _paste(masks, boxes, height, width, skip_empty=skip_empty)


def repair(model: nn.Module) -> None:
    """Mend what a model needs for inference."""
    fcn_mask_head._do_paste_mask = paste_masks
    for module in model.modules():
        # mmdet's prediction asks SSD's head for a loss that its __init__ leaves out
        if isinstance(module, SSDHead) and not hasattr(module, "loss_cls"):
            module.loss_cls = None
