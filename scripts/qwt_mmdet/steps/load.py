"""A detector as far as it is finished: quantized, compensated, or neither."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..compensation.state import load_compensation
from ..detectors.build import load_detector
from ..quantization.state import load_warmup
from .provenance import Pathlike


def load_quantized(
    config: str,
    checkpoint: Pathlike,
    *,
    warmup: Pathlike | None = None,
    compensation: Pathlike | None = None,
    device: str = "cpu",
    config_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a detector, quantize it with a warmup file and compensate it, as far as files are given.

    Raises:
        QwtError: a file cannot be read, or does not belong to the others.
    """
    model = load_detector(config, checkpoint, device=device, config_options=config_options)
    if warmup is not None:
        load_warmup(model, warmup)
    if compensation is not None:
        load_compensation(model, compensation)
    return model
