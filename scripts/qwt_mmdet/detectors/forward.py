"""Run a part of a detector."""

from typing import Any

from torch import nn


def forward_scope(model: nn.Module, inputs: dict[str, Any], scope: str) -> Any:
    """Run the part of the detector that ``scope`` names on one collated batch.

    Args:
        inputs: what the loader yields: {"inputs": [images], "data_samples": […]}.
    """
    data = model.data_preprocessor(inputs, False)
    if scope == "backbone":
        return model.backbone(data["inputs"])
    if scope == "backbone+neck":
        return model.extract_feat(data["inputs"])
    return model.predict(data["inputs"], data["data_samples"])
