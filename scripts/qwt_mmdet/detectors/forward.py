"""Run a scope of a detector, and count its operations."""

import contextlib
from collections.abc import Iterator
from typing import Any

from mmdet.models import BaseDetector
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def forward_scope(model: BaseDetector, inputs: dict[str, Any] | None, scope: str) -> Any:
    """Run what ``scope`` names of the detector on one collated batch.

    Args:
        inputs: what the loader yields: {"inputs": [images], "data_samples": […]}. None where the model's
            preprocessor does not look at it, as in a replay.
    """
    data = model.data_preprocessor(inputs, False)
    if scope == "backbone":
        return model.backbone(data["inputs"])
    if scope == "backbone+neck":
        return model.extract_feat(data["inputs"])
    return model.predict(data["inputs"], data["data_samples"])


@contextlib.contextmanager
def count_operations(model: nn.Module) -> Iterator[FlopCounterMode]:
    """Count what convolutions and matrix products inside compute; two operations are one multiply-add.

    No weight needs a gradient inside, since torch's counter fails on views of those that do.
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
