"""Put a fitted compensation onto a detector, save it and load it."""

import dataclasses
import os
from typing import Any

from torch import nn

from ..errors import QwtError
from ..fingerprint import weights_fingerprint
from ..quantization.state import (
    load_archive,
    quantizer_state,
    save_archive,
    settings_to_plain,
)
from ..settings import CompensationSettings
from .fit import BlockFit, Compensation
from .modules import attach_compensation

COMPENSATION_FORMAT = "qwt-mmdet compensation 1"


def quantized_fingerprint(model: nn.Module) -> dict[str, str]:
    """Hashes of a quantized detector: its config, its full-precision weights, its quantizers."""
    return {**model.fingerprint, "quantization": weights_fingerprint(quantizer_state(model))}


def apply_compensation(model: nn.Module, compensation: Compensation) -> nn.Module:
    """Attach the kept blocks' compensation to a quantized detector, in place; returns the model."""
    for block in compensation.blocks:
        if block.kept:
            attach_compensation(model.get_submodule(block.name), block.weight, block.bias)
    return model


def summarize_compensation(compensation: Compensation) -> dict[str, Any]:
    """Counts and costs of the kept blocks, for reports."""
    kept = [block for block in compensation.blocks if block.kept]
    return {
        "blocks": len(compensation.blocks),
        "kept": len(kept),
        "parameters": sum(block.parameters for block in kept),
        "bytes": sum(block.parameters for block in kept) * 2,  # stored as float16
        "multiply_adds": sum(block.multiply_adds for block in kept),
    }


def block_rows(compensation: Compensation) -> list[dict[str, Any]]:
    """One dictionary of plain values per block, without W and b: the rows of blocks.csv."""
    return [
        {
            field.name: getattr(block, field.name)
            for field in dataclasses.fields(BlockFit)
            if field.name not in ("weight", "bias")
        }
        for block in compensation.blocks
    ]


def save_compensation(
    model: nn.Module,
    compensation: Compensation,
    path: str | os.PathLike[str],
    provenance: dict[str, Any] | None = None,
) -> None:
    """Save a compensation with the fingerprint of the quantized model that it belongs to.

    The file holds per block W, b, the gate's decision and the errors; it loads with
    ``torch.load(weights_only=True)``. Call it before the compensation is applied or after.
    """
    fields = [field.name for field in dataclasses.fields(BlockFit)]
    content = {
        "format": COMPENSATION_FORMAT,
        "fingerprint": quantized_fingerprint(model),
        "settings": settings_to_plain(compensation.settings),
        "blocks": [{f: getattr(block, f) for f in fields} for block in compensation.blocks],
        "summary": summarize_compensation(compensation),
        "provenance": provenance or {},
    }
    save_archive(content, path)


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
        tuple(BlockFit(**block) for block in content["blocks"]),
    )
    apply_compensation(model, compensation)
    return compensation
