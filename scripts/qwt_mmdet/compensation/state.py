"""Apply a fitted compensation to a detector, save it and load it."""

import os
from typing import Any

from torch import nn

from ..archives import COMPENSATION_FORMAT, REMEDY, load_archive, save_with_summary
from ..config import CompensationSettings, as_plain
from ..errors import QwtError
from ..fingerprint import weights_fingerprint
from ..quantization.state import check_grids, quantizer_state
from ..record import record_of
from .modules import attach_compensation
from .result import BlockFit, Compensation

COMPENSATION_KEYS = ("fingerprint", "settings", "blocks", "backbone_multiply_adds", "heads")
"""Keys of a file that :func:`load_compensation` reads."""


def quantized_fingerprint(model: nn.Module) -> dict[str, str]:
    """Hashes of a quantized detector: its config, its full-precision weights, its quantizers."""
    return {
        **record_of(model).fingerprint,
        "quantization": weights_fingerprint(quantizer_state(model)),
    }


def _fault(compensation: Compensation) -> str | None:
    """The first invalid value of a compensation; None without any."""
    for block in compensation.blocks:
        if block.kind is None:
            continue
        for key, tensor in block.kind.tensors().items():
            is_grid = key in block.kind.grids
            sound = tensor.isfinite() & (tensor > 0) if is_grid else tensor.isfinite()
            if not sound.all():
                expected = "a positive number" if is_grid else "a finite number"
                value = tensor[~sound][0].item()
                return f"{key} of block {block.name} holds {value:g}, which is not {expected}"
    return None


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

    The file holds the tensors, the decision, the errors and the cost of each block; it loads with
    ``torch.load(weights_only=True)``. The compensation may be applied already.

    Raises:
        QwtError: the model is quantized but not calibrated, or the compensation holds invalid values.
    """
    if record_of(model).quantization is not None:
        check_grids(model)
    if fault := _fault(compensation):
        raise QwtError(f"The compensation cannot be saved: {fault}; fit it with a larger ridge.")
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
        QwtError: the file is unreadable, was fitted for another model or quantization, or holds invalid values.
    """
    content = load_archive(path, COMPENSATION_FORMAT, "compensation", COMPENSATION_KEYS)
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
    if fault := _fault(compensation):
        raise QwtError(f"The compensation file {path} cannot be used: {fault}; {REMEDY}.")
    apply_compensation(model, compensation)
    return compensation
