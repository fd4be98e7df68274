"""Calibration: the passes that turn a model with quantizers into one that computes quantized."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn

from ..archives import overfitted_ranges
from ..data.batches import count_images, single_images
from ..detectors.forward import check_precision, forward_scope
from ..errors import QwtError
from ..progress import progress
from ..record import NotQuantized, Quantization, quantization_of
from ..replay.cache import ActivationCache
from .convert import (
    activation_quantizers,
    full_precision,
    matching_override,
    quantized_layers,
    quantized_units,
    running_order,
)
from .folding import apply_fold, factors, folded_range
from .layers import QuantizedConv2d, QuantizedLayer, layer_by_name
from .moments import InputMoments, measure_inputs
from .quantizer import ActivationQuantizer, Watch
from .rounding import rounding_by_name
from .sequential import POSITIONS, FullPrecision, calibrate_sequentially, weigh_positions
from .sqnr import count_multiply_adds, measure_sqnr
from .validation import FoldedObserver, RangeValidation
from .weights import quantize_weight

logger = logging.getLogger(__name__)

NOISE_IMAGES = 8
"""Calibration images on which the SQNR of layers and of ranges is measured."""
UNKNOWN_IMAGES = 128
"""Number of images that is assumed for a loader that does not know its length."""


@dataclass
class Calibration:
    """The state that the passes share.

    Attributes:
        first: name of the layer that runs first.
        observers: histograms of the input of each activation quantizer.
        validation: of the ranges, on half of the images.
        shares: percentage of the multiply-adds of each module that is not quantized, by name.
        images_seen: number of calibration images that have run.
        moments: of the inputs of each layer, where rounding or bias correction need them.
        full: outputs of the layers in full precision, with ``refit: sequential``.
    """

    model: nn.Module
    loader: Iterable[dict[str, Any]]
    noise_images: int
    first: str | None = None
    observers: dict[ActivationQuantizer, FoldedObserver] = field(default_factory=dict)
    validation: RangeValidation = field(default_factory=RangeValidation)
    images_seen: int = 0
    shares: dict[str, float] = field(default_factory=dict)
    moments: dict[QuantizedLayer, InputMoments] = field(default_factory=dict)
    full: FullPrecision | None = None

    @property
    def about(self) -> Quantization:
        """The record of the quantized model, which the passes complete."""
        return quantization_of(self.model)

    @property
    def expected_images(self) -> int:
        """Number of images; ``UNKNOWN_IMAGES`` where the loader has no length."""
        return count_images(self.loader) or length_hint(self.loader, UNKNOWN_IMAGES)

    def images(self, description: str) -> Iterator[dict[str, Any]]:
        """All images, in batches of one."""
        total = count_images(self.loader)
        return progress(single_images(self.loader), description, total=total)

    def forward(self, image: dict[str, Any]) -> None:
        """Run the modules in scope."""
        forward_scope(self.model, image, self.about.settings.scope)


def observe(run: Calibration) -> None:
    """Run all images in full precision; collect a histogram of each activation.

    A sequential refit chooses most ranges later; then only those of folded LayerNorms and attention are observed.
    """
    quantizers = activation_quantizers(run.model)
    if run.full is not None:
        kept = {
            f"{name}.input_quantizer"
            for name in quantized_layers(run.model).keys() - run.about.folded_layers
        }
        quantizers = {name: quantizers[name] for name in quantizers.keys() - kept}
    run.observers = {
        quantizer: FoldedObserver(name.rpartition(".")[0], quantizer.channel_axis)
        for name, quantizer in quantizers.items()
    }

    def see(observer: FoldedObserver, x: Tensor, output: Tensor) -> None:
        observer.update(run.images_seen, x)

    watch: dict[nn.Module, Watch] = {q: partial(see, seen) for q, seen in run.observers.items()}
    if run.full is not None:
        watch |= run.full.watches(run.model)
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
            if run.full is not None:
                run.full.add_image(image)
            run.images_seen += 1
    if run.images_seen == 0:
        raise QwtError("There are no calibration images; choose at least one.")
    run.first = order[0] if order else None


def set_input_bits(run: Calibration) -> None:
    """Give the first layer ``input_bits``, unless an override sets its activation bits."""
    settings = run.about.settings
    override = run.first and matching_override(run.first, settings.overrides)
    if run.first and (not override or override.activation_bits is None):
        layer_by_name(run.model, run.first).input_quantizer.bits = settings.input_bits


def choose_ranges(run: Calibration) -> None:
    """Choose activation grids from the histograms; scale migration also considers the weights' grids."""
    settings = run.about.settings
    migrating = {
        layer.input_quantizer: layer
        for layer in quantized_layers(run.model).values()
        if isinstance(layer, QuantizedConv2d) and layer.migrates
    }
    for quantizer in progress(run.observers, "Choosing ranges", unit="quantizer"):
        run.validation.choose_grid(
            quantizer, run.observers[quantizer], migrating.get(quantizer), settings
        )
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


def measure_moments(run: Calibration) -> None:
    """Measure moments of the quantized inputs of all layers, where rounding or bias correction need them."""
    settings = run.about.settings
    second = rounding_by_name(settings.rounding).needs_moments
    if not settings.bias_correction and not second:
        return
    limit = math.ceil(POSITIONS / max(1, run.expected_images)) if second else 0
    layers = [layer for layer in quantized_layers(run.model).values() if layer.is_calibrated]
    run.moments = {layer: InputMoments() for layer in layers}

    def measure(layer: QuantizedLayer, x: Tensor, output: Tensor) -> None:
        measure_inputs(layer, x, run.moments[layer], limit)

    with full_precision(run.model, {layer: partial(measure, layer) for layer in layers}):
        for image in run.images("Measuring quantized inputs"):
            run.forward(image)
    run.moments = {layer: seen for layer, seen in run.moments.items() if seen.positions}


def quantize_weights(run: Calibration) -> None:
    """Choose grids, codes and bias corrections of all weights; ``weight`` stays in full precision."""
    layers = [layer for layer in quantized_layers(run.model).values() if layer.is_calibrated]
    for layer in progress(layers, "Quantizing weights", unit="layer"):
        quantize_weight(layer, run.about.settings, run.moments.pop(layer, None))


def weigh(run: Calibration) -> None:
    """Map the full-precision detector's scores, if the refit weights positions by them."""
    if run.full is not None and run.about.settings.refit_weighting:
        weigh_positions(run.model, run.full)


def refit(run: Calibration) -> None:
    """Fit the layers in running order: range, weights and bias, on inputs from the quantized layers before."""
    if run.full is not None:
        calibrate_sequentially(run.model, run.full, run.about.settings, run.validation)


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
    fitted = run.full.fitted if run.full is not None else None
    run.about.sqnr_db = measure_sqnr(run.model, images, run.about.settings.scope, fitted)


def round_weights(run: Calibration) -> None:
    """Set the weights to their rounded values: from here on the model computes quantized."""
    for layer in quantized_layers(run.model).values():
        if layer.is_calibrated:
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


RANGE_PASSES: tuple[Callable[[Calibration], None], ...] = (
    observe,
    set_input_bits,  # after the pass that tells which layer runs first, before any grid is chosen
    choose_ranges,
    fold_norms,  # changes weights, so it comes before all passes that read them
)
WEIGHT_PASSES: dict[str, tuple[Callable[[Calibration], None], ...]] = {
    "none": (measure_moments, quantize_weights),
    "sequential": (weigh, refit),
}
"""Passes that choose codes and biases, by the setting ``refit``."""
LAST_PASSES: tuple[Callable[[Calibration], None], ...] = (
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
            once for the ranges. Where rounding or bias correction need moments of the inputs, it is iterated
            once more (``refit: sequential`` keeps the images instead).
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
    run = Calibration(model, loader, noise_images)
    refit_method = run.about.settings.refit
    with ActivationCache(device_gb, memory_gb) as cache:
        if refit_method == "sequential":
            run.full = FullPrecision(cache, run.expected_images)
        for run_pass in (*RANGE_PASSES, *WEIGHT_PASSES[refit_method], *LAST_PASSES):
            if run_pass is not round_weights or not keep_weights:
                run_pass(run)
        if run.full is not None and keep_weights:
            layers = quantized_layers(model).items()
            names = [name for name, layer in layers if layer.is_calibrated]
            run.about.fitted = {name: run.full.fitted(name) for name in names}
    return model


@torch.no_grad()
def quantize_weights_alone(model: nn.Module, loader: Iterable[dict[str, Any]]) -> None:
    """Choose codes and bias corrections again, each layer by itself, as ``refit: none`` does.

    Args:
        model: calibrated; its weights are not rounded.
        loader: as for :func:`calibrate`.
    """
    run = Calibration(model, loader, 0)
    for run_pass in WEIGHT_PASSES["none"]:
        run_pass(run)


@torch.no_grad()
def find_ranges(model: nn.Module, loader: Iterable[dict[str, Any]]) -> None:
    """Run all images in full precision and choose the ranges: the first passes of :func:`calibrate`."""
    run = Calibration(model, loader, 0)
    for run_pass in RANGE_PASSES:
        run_pass(run)
