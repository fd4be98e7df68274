"""How codes, scales and biases of weights are found: the setting ``refit``, by name.

``none`` is below, ``sequential`` in :mod:`.sequential`. docs/extending/weight_fit.md shows how to add another.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import InitVar, dataclass, field
from operator import length_hint
from typing import Any

from torch import Tensor, nn

from ..data.batches import count_images, single_images
from ..detectors.forward import forward_scope
from ..errors import Registry
from ..progress import progress
from ..record import Quantization, quantization_of
from ..replay.cache import ActivationCache
from .convert import calibrated_layers, full_precision
from .layers import QuantizedLayer
from .moments import InputMoments
from .quantizer import ActivationQuantizer, Watch
from .rounding import ROUNDINGS
from .validation import FoldedObserver, RangeValidation
from .vectors import POSITIONS
from .weights import quantize_weight

UNKNOWN_IMAGES = 128
"""Number of images that is assumed for a loader that does not know its length."""

Affine = tuple[Tensor, Tensor | None]
"""Weights and bias of a layer."""


@dataclass
class Calibration:
    """What the passes of a calibration share.

    Args:
        cache: for activations and images that a fit needs later.
        refit: name of the fit of weights.

    Attributes:
        first: name of the layer that runs first.
        observers: histograms of the input of each activation quantizer.
        shares: percentage of the multiply-adds of each module that is not quantized, by name.
        images_seen: number of calibration images that have run.
        weights: finds the codes and biases.
    """

    model: nn.Module
    loader: Iterable[dict[str, Any]]
    noise_images: int = 0
    cache: ActivationCache = field(default_factory=ActivationCache)
    refit: InitVar[str] = "none"
    first: str | None = None
    observers: dict[ActivationQuantizer, FoldedObserver] = field(default_factory=dict)
    validation: RangeValidation = field(default_factory=RangeValidation)
    images_seen: int = 0
    shares: dict[str, float] = field(default_factory=dict)
    weights: "WeightFit" = field(init=False)

    def __post_init__(self, refit: str) -> None:
        self.weights = WEIGHT_FITS.find(refit)(self)

    @property
    def about(self) -> Quantization:
        """The record of the quantized model, which the passes complete."""
        return quantization_of(self.model)

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        """The layers whose inputs have a range, by name."""
        return calibrated_layers(self.model)

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


class WeightFit:
    """A way to find codes, scales and biases of weights. Its methods are called in the order in which they stand.

    Attributes:
        refits: whether layers get other weights than the model's, which :meth:`fitted` returns. They are fitted on
            what the quantized layers before hand over, so they also correct errors of these.
    """

    refits = False

    def __init__(self, run: Calibration) -> None:
        self.run = run

    def watches(self) -> dict[nn.Module, Watch]:
        """What is called with input and output of a layer, in the pass in full precision that observes ranges."""
        return {}

    def add_image(self, image: dict[str, Any]) -> None:
        """Called after each image of that pass."""

    def fit(self) -> None:
        """Set grid, codes and bias correction of all layers; ``weight`` stays in full precision."""
        raise NotImplementedError

    def fitted(self, name: str) -> Affine:
        """Weights and bias of a layer before they were rounded, where the fit ``refits``."""
        raise NotImplementedError


WEIGHT_FITS: Registry[type[WeightFit]] = Registry("refit")
register_weight_fit = WEIGHT_FITS.register
"""Decorator: the class is the fit of weights of a name."""


@register_weight_fit("none")
class Separate(WeightFit):
    """Each layer by itself, with moments of its inputs where rounding or bias correction need them."""

    def fit(self) -> None:
        """Measure moments, then quantize the weights."""
        moments = self._moments()
        for layer in progress(self.run.layers.values(), "Quantizing weights", unit="layer"):
            quantize_weight(layer, self.run.about.settings, moments.pop(layer, None))

    def _moments(self) -> dict[QuantizedLayer, InputMoments]:
        """Moments of the quantized inputs of each layer that ran."""
        run, settings = self.run, self.run.about.settings
        second = ROUNDINGS.find(settings.rounding).needs_moments
        if not settings.bias_correction and not second:
            return {}
        limit = math.ceil(POSITIONS / max(1, run.expected_images)) if second else 0
        moments = {layer: InputMoments(layer, limit) for layer in run.layers.values()}
        with full_precision(run.model, {layer: seen.update for layer, seen in moments.items()}):
            for image in run.images("Measuring quantized inputs"):
                run.forward(image)
        return {layer: seen for layer, seen in moments.items() if seen.positions}
