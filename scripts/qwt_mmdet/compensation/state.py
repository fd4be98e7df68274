"""Put a fitted compensation onto a detector, save it and load it."""

import os
from typing import Any

from torch import nn

from ..archives import COMPENSATION_FORMAT, load_archive, save_with_summary
from ..config import CompensationSettings, as_plain
from ..errors import QwtError
from ..fingerprint import weights_fingerprint
from ..quantization.state import quantizer_state
from ..record import record_of
from .modules import attach_compensation
from .result import BlockFit, Compensation


def quantized_fingerprint(model: nn.Module) -> dict[str, str]:
    """Hashes of a quantized detector: its config, its full-precision weights, its quantizers."""
    return {
        **record_of(model).fingerprint,
        "quantization": weights_fingerprint(quantizer_state(model)),
    }


def apply_compensation(model: nn.Module, compensation: Compensation) -> nn.Module:
    """Attach the kept blocks' compensation to a quantized detector, in place; returns the model."""
    for block in compensation.blocks:
        if block.kept and block.kind:
            attach_compensation(model.get_submodule(block.name), block.kind)
    return model


def save_compensation(
    model: nn.Module,
    compensation: Compensation,
    path: str | os.PathLike[str],
    provenance: dict[str, Any] | None = None,
) -> None:
    """Save a compensation with the fingerprint of the quantized model that it belongs to.

    The file holds per block its tensors, the decision, the errors and the cost; it loads with
    ``torch.load(weights_only=True)``. Call it before the compensation is applied or after.
    """
    content = {
        "format": COMPENSATION_FORMAT,
        "fingerprint": quantized_fingerprint(model),
        "settings": as_plain(compensation.settings),
        "blocks": [block.plain() for block in compensation.blocks],
        "backbone_multiply_adds": compensation.backbone_multiply_adds,
        "heads": compensation.heads,
        "summary": compensation.summary(),
        "provenance": provenance or {},
    }
    save_with_summary(content, path)


def load_compensation(model: nn.Module, path: str | os.PathLike[str]) -> Compensation:
    """Read a compensation file and apply it to the quantized detector that it was fitted for.

    Raises:
        QwtError: the file is unreadable, or was fitted for another model or quantization.
    """
    content = load_archive(path, COMPENSATION_FORMAT, "compensation")
    ours = quantized_fingerprint(model)
    differing = [key for key, value in ours.items() if content["fingerprint"].get(key) != value]
    if differing:
        raise QwtError(
            f"The compensation file {path} was fitted for something else: {', '.join(differing)} "
            "differ; fit it again for this quantized model."
        )
    compensation = Compensation(
        CompensationSettings.from_mapping(content["settings"]),
        tuple(BlockFit.from_plain(block) for block in content["blocks"]),
        content["backbone_multiply_adds"],
        content["heads"],
    )
    apply_compensation(model, compensation)
    return compensation
