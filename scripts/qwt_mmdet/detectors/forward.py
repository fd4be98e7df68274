"""Run a scope of a detector, and count its operations."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from mmdet.models import BaseDetector
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads import CascadeRoIHead, MaskScoringRoIHead, StandardRoIHead
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import QwtError


def check_precision(model: nn.Module) -> None:
    """Check that a model computes with float32, as all of this package does.

    Raises:
        QwtError: it does not, as after ``model.double()`` or ``model.half()``.
    """
    others = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if others:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        raise QwtError(
            f"The model has parameters in {names}; this package computes with float32, so call "
            "model.float() first."
        )


def forward_scope(model: BaseDetector, inputs: dict[str, Any] | None, scope: str) -> Any:
    """Run the part ``scope`` of the detector on one collated batch.

    Args:
        inputs: batch of the loader: {"inputs": [images], "data_samples": […]}. None if the model's preprocessor
            does not read it, as in a replay.
    """
    data = model.data_preprocessor(inputs, False)
    if scope == "backbone":
        return model.backbone(data["inputs"])
    if scope == "backbone+neck":
        return model.extract_feat(data["inputs"])
    return model.predict(data["inputs"], data["data_samples"])


def dense_head(model: BaseDetector) -> BaseDenseHead | None:
    """The dense head (of a one-stage detector, or of proposals); None if it needs more than features (DETR)."""
    head = getattr(model, "rpn_head", None) or getattr(model, "bbox_head", None)
    return head if isinstance(head, BaseDenseHead) else None


def computes_on_regions(roi_head: Any) -> bool:
    """Whether a second stage takes maps, and regions of them, and nothing else."""
    known = (StandardRoIHead, CascadeRoIHead, MaskScoringRoIHead)
    return getattr(type(roi_head), "forward", None) in [cls.forward for cls in known]


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested lists and tuples, in their order."""
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors_of(part)]
    return [value] if isinstance(value, Tensor) else []


def head_tensors(model: BaseDetector, batch: dict[str, Any]) -> list[Tensor]:
    """The raw outputs of a detector's dense head (RPN or one-stage), for one collated batch.

    Where the head needs more than the features (DETR and its like), the features that enter it.
    """
    features = model.extract_feat(model.data_preprocessor(batch, False)["inputs"])
    head = dense_head(model)
    return tensors_of(features if head is None else head(features))


def scope_tensors(model: BaseDetector, batch: dict[str, Any], scope: str) -> list[Tensor]:
    """The outputs of a scope: the maps of backbone or neck; for the whole detector :func:`head_tensors`."""
    if scope == "detector":
        return head_tensors(model, batch)
    return tensors_of(forward_scope(model, batch, scope))


@contextlib.contextmanager
def count_operations(model: nn.Module) -> Iterator[FlopCounterMode]:
    """Inside: count operations of convolutions and matrix products; two operations are one multiply-add.

    Gradients of weights are disabled, since torch's counter fails on views of weights with gradients.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
