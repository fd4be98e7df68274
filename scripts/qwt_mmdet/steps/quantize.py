"""Quantize and calibrate a detector."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..archives import WARMUP_FORMAT, add_account, copy_with_summary
from ..config import QuantizationSettings, as_plain
from ..quantization.calibrate import calibrate
from ..quantization.convert import quantize_model
from ..quantization.state import load_warmup, save_warmup
from .inputs import Inputs, Pathlike

logger = logging.getLogger(__name__)


def quantize(
    inputs: Inputs,
    *,
    settings: Mapping[str, Any],
    output: Pathlike,
    supplied: Pathlike | None = None,
    activation_cache: Mapping[str, Any] | None = None,
) -> None:
    """Quantize and calibrate a detector and write its warmup file.

    Args:
        supplied: an existing warmup file to check and copy instead of calibrating.
        activation_cache: limits {device_gb, memory_gb} of the activations that a refit caches.
    """
    resolved = QuantizationSettings.from_mapping(settings)
    model = inputs.load()
    inputs.check_evaluation(model)
    if supplied is not None:
        load_warmup(model, supplied, resolved)
        logger.info("The warmup file %s fits and is used as it is", supplied)
        copy_with_summary(supplied, output, WARMUP_FORMAT, "warmup")
        return
    loader = inputs.loader(model)
    quantize_model(model, resolved)
    calibrate(model, loader, **(activation_cache or {}))
    save_warmup(model, output, inputs.provenance(quantization=as_plain(resolved)))
    add_account(output, inputs.job.account())


def read_recipe(path: Pathlike) -> dict[str, Any]:
    """The settings in a recipe, which the step choose_recipe wrote."""
    (settings,) = yaml.safe_load(Path(path).read_text(encoding="utf-8")).values()
    return settings
