"""Calibration: the passes that turn a model with quantizers into one that computes quantized."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..archives import overfitted_ranges
from ..data.batches import single_images
from ..detectors.forward import check_precision
from ..errors import QwtError
from ..progress import progress
from ..record import NotQuantized, quantization_of
from ..replay.cache import ActivationCache
from . import sequential  # noqa: F401  registers its fit
from .convert import (
    activation_quantizers,
    full_precision,
    matching_override,
    quantized_layers,
    quantized_units,
    running_order,
)
from .folding import apply_fold, factors, folded_range
from .layers import layer_by_name
from .quantizer import Watch
from .sqnr import count_multiply_adds, measure_sqnr
from .validation import FoldedObserver
from .weight_fit import Calibration

logger = logging.getLogger(__name__)

NOISE_IMAGES = 8
"""Calibration images on which the SQNR of layers and of ranges is measured."""


def observe(run: Calibration) -> None:
    """Run all images in full precision; collect a histogram of each activation."""
    run.observers = {
        quantizer: FoldedObserver(
            name.rpartition(".")[0], quantizer.channel_axis, symmetric=quantizer.symmetric
        )
        for name, quantizer in activation_quantizers(run.model).items()
    }

    def see(observer: FoldedObserver, x: Tensor, output: Tensor) -> None:
        observer.update(run.images_seen, x)

    watch: dict[nn.Module, Watch] = {q: partial(see, seen) for q, seen in run.observers.items()}
    watch |= run.weights.watches()
    skipped = [entry.name for entry in run.about.not_quantized]
    order: list[str] = []
    with full_precision(run.model, watch):
        for image in run.images("Calibrating"):
            with contextlib.ExitStack() as stack:
                if run.images_seen == 0:
                    order = stack.enter_context(running_order(run.model))
                if run.images_seen == 0 and skipped:  # counting slows a pass
                    run.shares = stack.enter_context(count_multiply_adds(run.model, skipped))
                run.forward(image)
            run.weights.add_image(image)
            run.images_seen += 1
    if run.images_seen == 0:
        raise QwtError("There are no calibration images; choose at least one.")
    run.first = order[0] if order else None


def set_input_bits(run: Calibration) -> None:
    """Give the first layer ``input_bits``, unless an override sets its activation bits or they are not rounded."""
    settings = run.about.settings
    override = run.first and matching_override(run.first, settings.overrides)
    if run.first and (not override or override.activation_bits is None):
        quantizer = layer_by_name(run.model, run.first).input_quantizer
        if quantizer.rounds:
            quantizer.bits = settings.input_bits


def choose_ranges(run: Calibration) -> None:
    """Choose activation grids from the histograms; scale migration also considers the weights' grids."""
    settings, layers = run.about.settings, quantized_layers(run.model).values()
    readers = {layer.input_quantizer: layer for layer in layers}
    for quantizer, seen in progress(run.observers.items(), "Choosing ranges", unit="quantizer"):
        run.validation.choose_grid(quantizer, seen, readers.get(quantizer), settings)
    run.observers = {}


def fold_norms(run: Calibration) -> None:
    """Turn ranges per channel after LayerNorms into ranges per tensor."""
    for fold in run.about.folds:
        quantizers = [layer_by_name(run.model, name).input_quantizer for name in fold.layers]
        if not all(quantizer.is_calibrated for quantizer in quantizers):
            continue
        finest = max(quantizers, key=lambda quantizer: quantizer.bits)
        scale, zero_point, factor, shift = factors(*finest.grid)
        for quantizer in quantizers:  # they have all seen the same values
            if quantizer.bits == finest.bits:
                quantizer.set_parameters(scale, zero_point)
            else:
                quantizer.set_range(*folded_range(quantizer, factor, shift))
        apply_fold(run.model, fold, factor, shift)


def fit_weights(run: Calibration) -> None:
    """Choose grids, codes and bias corrections of all weights; ``weight`` stays in full precision."""
    run.weights.fit()


def check_ranges(run: Calibration) -> None:
    """Warn of ranges that fit only the images that they were estimated from."""
    if not run.noise_images:
        return
    folded = {f"{name}.input_quantizer" for name in run.about.folded_layers}
    run.about.range_check = check = run.validation.check(
        run.model,
        islice(single_images(run.loader), run.noise_images),
        run.images_seen,
        run.about.settings.scope,
        spared=folded,  # folding has rescaled their inputs since
    )
    if sentence := overfitted_ranges(dataclasses.asdict(check)):
        logger.warning("%s", sentence)


def measure_layers(run: Calibration) -> None:
    """Measure the SQNR of every layer on the first images, for the report."""
    images = islice(single_images(run.loader), run.noise_images)
    fitted = run.weights.fitted if run.weights.refits else None
    run.about.sqnr_db = measure_sqnr(run.model, images, run.about.settings.scope, fitted)


def round_weights(run: Calibration) -> None:
    """Set the weights to their rounded values: from here on the model computes quantized."""
    for layer in run.layers.values():
        layer.restore_weight()


def list_what_is_not_quantized(run: Calibration) -> None:
    """Complete the list of what is not quantized: layers that never ran, and shares of the multiply-adds."""
    for name, unit in quantized_units(run.model).items():
        if not unit.is_calibrated:
            reason = "never ran on a calibration image"
            logger.warning("%s %s and is not quantized; it raises if it runs later.", name, reason)
            run.about.not_quantized.append(NotQuantized(name, type(unit).__name__, reason))
    run.about.not_quantized = [
        dataclasses.replace(entry, multiply_adds_percent=run.shares.get(entry.name))
        for entry in run.about.not_quantized
    ]


PASSES: tuple[Callable[[Calibration], None], ...] = (
    observe,
    set_input_bits,  # after the pass that tells which layer runs first, before any grid is chosen
    choose_ranges,
    fold_norms,  # changes weights, so it comes before all passes that read them
    fit_weights,
    check_ranges,
    measure_layers,  # needs full-precision weights beside the codes
    round_weights,
    list_what_is_not_quantized,
)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    *,
    noise_images: int = NOISE_IMAGES,
    device_gb: float = 4.0,
    memory_gb: float = 4.0,
    keep_weights: bool = False,
) -> nn.Module:
    """Find all ranges on calibration images, in full precision, then quantize the weights.

    Args:
        model: from :func:`.convert.quantize_model`.
        loader: batches as mmdet's test step takes them, of any size: each image runs alone. It is iterated
            once for the ranges, and once more where rounding or bias correction need moments of the inputs
            (``refit: sequential`` keeps the images instead).
        noise_images: number of images, the first ones, on which the SQNR of every layer is measured.
        device_gb, memory_gb: with ``refit: sequential``, limits of kept activations (see
            :class:`..replay.cache.ActivationCache`).
        keep_weights: leave the weights in full precision, as ``load_warmup(…, round_weights=False)`` does.

    Returns:
        ``model``, ready to run quantized.

    Raises:
        QwtError: no image came, an activation is not finite, or the model is not in float32.
    """
    check_precision(model)
    with ActivationCache(device_gb, memory_gb) as cache:
        refit = quantization_of(model).settings.refit
        run = Calibration(model, loader, noise_images, cache, refit)
        for run_pass in PASSES:
            if run_pass is not round_weights or not keep_weights:
                run_pass(run)
        if keep_weights and run.weights.refits:
            run.about.fitted = {name: run.weights.fitted(name) for name in run.layers}
    return model


@torch.no_grad()
def quantize_weights_alone(model: nn.Module, loader: Iterable[dict[str, Any]]) -> None:
    """Choose codes and bias corrections of a calibrated model again, each layer by itself, as ``refit: none`` does."""
    Calibration(model, loader).weights.fit()
