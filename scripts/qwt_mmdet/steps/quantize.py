"""Quantize and calibrate a detector."""

import logging
from collections.abc import Mapping
from typing import Any

from ..archives import WARMUP_FORMAT, copy_with_summary
from ..config import QuantizationSettings, as_plain
from ..data.loaders import make_loader
from ..detectors.build import load_detector
from ..quantization.calibrate import calibrate
from ..quantization.convert import quantize_model
from ..quantization.state import load_warmup, save_warmup
from .provenance import Pathlike, provenance

logger = logging.getLogger(__name__)


def quantize(
    *,
    config: str,
    checkpoint: Pathlike,
    config_options: Mapping[str, Any] | None,
    annotations: Pathlike,
    settings: Mapping[str, Any],
    output: Pathlike,
    device: str,
    batch_size: int,
    workers: int,
    seed: int,
    supplied: Pathlike | None = None,
) -> None:
    """Quantize and calibrate a detector and write its warmup state.

    Args:
        supplied: an existing warmup file to check and take instead of calibrating.
    """
    resolved = QuantizationSettings.from_mapping(settings)
    model = load_detector(config, checkpoint, device=device, config_options=config_options)
    if supplied is not None:
        load_warmup(model, supplied, resolved)
        logger.info("The warmup file %s fits and is used as it is", supplied)
        copy_with_summary(supplied, output, WARMUP_FORMAT, "warmup")
        return
    loader = make_loader(model.cfg, annotations, batch_size=batch_size, workers=workers)
    quantize_model(model, resolved)
    calibrate(model, loader)
    source = provenance(
        checkpoint=checkpoint,
        annotations=annotations,
        device=device,
        seed=seed,
        config=config,
        config_options=dict(config_options or {}),
        quantization=as_plain(resolved),
    )
    save_warmup(model, output, source)
