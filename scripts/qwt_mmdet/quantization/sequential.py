"""Sequential calibration: each layer is fitted on the outputs of the quantized layers before it.

First, outputs y of each layer of the full-precision network are sampled, and the ranges of its inputs are chosen. Then
the layers are calibrated in running order. The inputs x of a layer come from the quantized layers before it. Its
weights and bias are fitted to y,

    W̃, b̃ = argmin Σ p ‖y − W̃ x̂ − b̃‖² + λ ‖W̃ − W‖²,

where x̂ is x on its grid and p weights the positions. Then W̃ is rounded, with the second moments of x̂. Positions
where the original weights leave large errors have less weight (Huber, 1964), so that few of them do not decide the fit.
So each layer corrects errors of the layers before it, as QwT does (arXiv 2411.13918), without additional
parameters. With error feedback this is close to GPTAQ (arXiv 2504.02692).
"""

import logging
import math
import operator
from collections import Counter
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QuantizationSettings
from ..detectors.forward import dense_head
from ..errors import QwtError
from ..progress import progress
from ..replay.cache import release_free_memory
from ..replay.walk import ReachedError, Walk
from .convert import activation_quantizers, full_precision, quantized_layers
from .layers import QuantizedLayer
from .moments import MAX_COLUMNS
from .quantizer import ActivationQuantizer, Watch
from .regression import RegressionSums, choose_ridge, ridge_towards
from .rounding import ROUNDINGS
from .scores import level_scores, score_map, scores_at
from .vectors import (
    POSITIONS,
    input_vectors,
    output_size,
    output_vectors,
    quantized_vectors,
    sampled_positions,
)
from .weight_fit import Affine, Calibration, WeightFit, register_weight_fit
from .weights import choose_codes

logger = logging.getLogger(__name__)

MAX_REFIT_COLUMNS = 4608
"""Layers with more inputs per output are only rounded: a regression would take minutes."""
FOLDS, FEW_FOLDS, MANY_COLUMNS = 4, 2, 2048
"""Parts of the images, by which a layer's ridge is cross-validated; few where sums over many columns take memory."""
HUBER_LIMIT, HEAD_HUBER_LIMIT = 3.0, 1.0
"""Distances from the mean, in medians, up to which an error has its full weight in the fit of a layer; the second in
the dense head."""

See = Callable[[int, int, Tensor], None]
"""Takes the number of an image, the number of the layer's call on it, and the layer's input."""


@register_weight_fit("sequential")
class Sequential(WeightFit):
    """Layers are fitted in running order, to sampled outputs of the full-precision network.

    Attributes:
        images: number of images so far.
        order: the layers by name, in the order of their first calls.
        calls: number of runs of a layer, by number of the image and name.
        image_positions: number of positions that are sampled of each image.
        head_layers: modules of the dense head, whose positions are weighted by the scores of their own level.
    """

    refits = True

    def __init__(self, run: Calibration) -> None:
        super().__init__(run)
        self.cache = run.cache  # of images, outputs, maps of scores, and fitted weights
        self.images = 0
        self.order: dict[str, QuantizedLayer] = {}
        self.calls: Counter[tuple[int, str]] = Counter()
        self.image_positions = math.ceil(POSITIONS / max(1, run.expected_images))
        self.head_layers: set[nn.Module] = set()

    def watches(self) -> dict[nn.Module, Watch]:
        """Sample each layer's outputs of the next image."""
        layers = quantized_layers(self.run.model).items()
        return {layer: partial(self._sample, name, layer) for name, layer in layers}

    def add_image(self, image: dict[str, Any]) -> None:
        """Keep the image that has just run."""
        self.cache["image", self.images] = image
        self.images += 1

    def _sample(self, name: str, layer: QuantizedLayer, x: Tensor, output: Tensor) -> None:
        self.order.setdefault(name, layer)
        image, call = self.images, self.calls[self.images, name]
        self.calls[image, name] += 1
        size = output_size(layer, x)
        calls = self.calls[0, name] if image else 1  # calls share the positions of their image
        limit = math.ceil(self.image_positions / max(1, calls))
        chosen = self.positions(image, call, size, limit, x.device)
        vectors = output_vectors(layer, output, chosen)
        if not torch.isfinite(vectors).all():
            raise QwtError(
                f"The full-precision output of layer {name} holds NaN or infinite values during "
                "calibration; check that the checkpoint is sound and that the model evaluates."
            )
        self.cache["output", image, name, call] = size, vectors

    def positions(
        self, image: int, call: int, size: tuple[int, ...], limit: int, device: torch.device
    ) -> Tensor:
        """Sampled positions of a call; the same for the same arguments."""
        return sampled_positions(math.prod(size), limit, 1009 * image + call, device)

    def outputs(self, image: int, name: str, call: int, size: tuple[int, ...]) -> Tensor | None:
        """Remove and return the outputs [positions, out] of a call; None if it had another size."""
        key = ("output", image, name, call)
        found, vectors = self.cache.pop(key) if key in self.cache else (None, None)
        return vectors if found == size else None

    def fit(self) -> None:
        """Choose codes and biases of all layers in running order."""
        model, settings = self.run.model, self.run.about.settings
        if settings.refit_weighting:
            self._weigh_positions()
        walk = Walk(
            model, self.order, self.cache, settings.scope,
            ignored=ActivationQuantizer, spent=range(self.images),
        )  # fmt: skip
        weights = {layer: layer.weight.data for layer in quantized_layers(model).values()}
        inputs = {layer.input_quantizer for layer in weights}
        with full_precision(model, {}), walk.active():
            walk.record("backbone+neck" if settings.scope == "detector" else settings.scope)
            for quantizer in activation_quantizers(model).values():  # those of attention
                quantizer.enabled = quantizer not in inputs and quantizer.is_calibrated
            try:
                for name, layer in progress(self.order.items(), "Calibrating layers", unit="layer"):
                    quantizer = layer.input_quantizer
                    if not quantizer.is_calibrated:  # all its inputs were empty
                        continue
                    fit = LayerFit(name, layer, self, settings.refit_weighting)
                    self._visit(walk, name, fit.see)
                    self.cache["fitted", name] = fit.finish(settings)
                    layer.weight.data = layer.rounded_weight().to(layer.weight.dtype)
                    layer.enabled = quantizer.enabled = True
                    walk.pending.discard(name)
            finally:
                for layer, weight in weights.items():
                    layer.weight.data = weight

    def _weigh_positions(self) -> None:
        """Keep maps of the full-precision detector's scores for each image: of all levels together, and of each."""
        head = dense_head(self.run.model)
        self.head_layers = set(head.modules()) if head is not None else set()
        with full_precision(self.run.model, {}):
            for image in range(self.images):
                levels = level_scores(self.run.model, self.cache["image", image])
                if levels is None:
                    logger.info(
                        "This detector has no map of scores; all positions have the same weight."
                    )
                    return
                self.cache["scores", image] = [score_map(levels), *levels]

    def _visit(self, walk: Walk, name: str, see: See) -> None:
        """Pass all inputs of a layer in the quantized network on to ``see``."""
        quantizer = self.order[name].input_quantizer
        release_free_memory()
        for image in range(self.images):
            expected = self.calls[image, name]
            calls = 0

            def watch(x: Tensor, _: Tensor, image: int = image, expected: int = expected) -> None:
                nonlocal calls
                see(image, calls, x)
                calls += 1
                if calls == expected:
                    raise ReachedError

            quantizer.watch = watch
            if expected:
                walk.run(image, name)
        quantizer.watch = None

    def fitted(self, name: str) -> Affine:
        """Weights and bias of a layer after its regression, before they were rounded."""
        return self.cache["fitted", name]


def corresponds(full: Tensor, own: Tensor) -> bool:
    """Tell whether outputs of a layer in two networks, [positions, out], belong to the same positions.

    They do not where the networks selected different proposals, detections or queries. Then the correlation of
    their deviations from the means is below one half.
    """
    full, own = full - full.mean(0), own - own.mean(0)
    return bool((full * own).sum() >= full.norm() * own.norm() / 2)


def huber_weights(errors: Tensor, medians: float) -> Tensor:
    """Weights of errors [groups, n, out] by their distances from the mean: 1 up to a limit, then limit / distance.

    The limit is ``medians`` times the median distance.

    Returns:
        [n], in (0, 1] (Huber, Robust estimation of a location parameter, 1964).
    """
    distances = (errors - errors.mean(1, keepdim=True)).square().sum((0, 2)).sqrt()
    limit = medians * distances.median()
    if limit == 0:
        return torch.ones_like(distances)
    return limit / distances.clamp(min=limit)


class LayerFit:
    """The regression of one layer; ``weighting``: weight of the scores of positions, 0 to 1."""

    def __init__(
        self, name: str, layer: QuantizedLayer, full: Sequential, weighting: float
    ) -> None:
        self.name, self.layer, self.full, self.weighting = name, layer, full, weighting
        self.weight = layer.weight.flatten(1).unflatten(0, (layer.weight_groups, -1))
        self.samples = 0

    def see(self, image: int, call: int, x: Tensor) -> None:
        """Keep samples of one call of the layer in the quantized network.

        Where the full-precision network has no output at the same positions, the target is the output of the
        full-precision layer for ``x``.
        """
        layer, size = self.layer, output_size(self.layer, x)
        if not math.prod(size):
            return
        expected = self.full.outputs(image, self.name, call, size)
        limit = self.full.image_positions if expected is None else len(expected)
        chosen = self.full.positions(image, call, size, limit, x.device)
        vectors = input_vectors(layer, x, size, chosen)
        own = (vectors @ self.weight.transpose(1, 2)).transpose(0, 1).flatten(1)
        if layer.bias is not None:
            own += layer.bias
        y = own if expected is None or not corresponds(expected, own) else expected
        groups = len(self.weight)
        y = y.unflatten(1, (groups, -1)).transpose(0, 1).contiguous()
        weights = self._weights(image, size, chosen)
        self.full.cache["sample", self.samples] = image, vectors, y, weights
        self.samples += 1

    def _weights(self, image: int, size: tuple[int, ...], chosen: Tensor) -> Tensor | None:
        if ("scores", image) not in self.full.cache:
            return None
        whole, *levels = self.full.cache["scores", image]
        in_head = self.layer in self.full.head_layers
        own = [level for level in levels if in_head and (1, *level.shape) == size]
        scores = own[0].flatten() if own else scores_at(whole, size)
        if scores is None:
            return None
        return 1 - self.weighting + self.weighting * scores[chosen] / scores.mean().clamp(min=1e-12)

    def _sums(self) -> list[RegressionSums]:
        """Sums of the samples of each part of the images, with inputs on their grid."""
        columns = self.weight.shape[2]
        width = columns if columns <= MAX_REFIT_COLUMNS else MAX_COLUMNS
        folds = FOLDS if columns <= MANY_COLUMNS else FEW_FOLDS
        limit = HEAD_HUBER_LIMIT if self.layer in self.full.head_layers else HUBER_LIMIT
        origin = None
        parts: dict[int, RegressionSums] = {}
        for number in range(self.samples):
            image, vectors, y, weights = self.full.cache.pop(("sample", number))
            x = quantized_vectors(self.layer, vectors).contiguous()
            robust = huber_weights(y - x @ self.weight.transpose(1, 2), limit)
            weights = robust if weights is None else weights * robust
            origin = origin or (x.mean(1, keepdim=True), y.mean(1, keepdim=True))
            fold = image % folds
            if fold not in parts:
                parts[fold] = RegressionSums(columns, width, width, origin)
            parts[fold].update(x, y, weights)
        return list(parts.values())

    def finish(self, settings: QuantizationSettings) -> Affine:
        """Set the layer's codes and bias; return the fitted weights and bias, before they are rounded."""
        layer, centred = self.layer, settings.bias_correction
        parts = self._sums()
        if not parts:
            choose_codes(layer, layer.weight, settings, None)
            return layer.weight.data, layer.bias
        sums = reduce(operator.add, parts)
        mean_x, mean_y = sums.means()
        bias = torch.zeros_like(mean_y)
        if layer.bias is not None:
            bias = layer.bias.double().view_as(mean_y)
        squares, cross = sums.moments(sums.about(centred=centred, bias=bias))
        weight = self.weight.double()
        if cross is not None:
            ridge = choose_ridge(weight, parts, centred=centred, bias=bias)
            weight = ridge_towards(weight, squares[0], cross, ridge)
        fitted = weight.float().view_as(layer.weight)
        needs_moments = ROUNDINGS.find(settings.rounding).needs_moments
        choose_codes(layer, fitted, settings, squares if needs_moments else None)
        if not centred:
            return fitted, layer.bias
        rounded = layer.rounded_weight().double().view_as(weight)
        shift = mean_y - torch.einsum("goi,gi->go", rounded, mean_x) - bias
        layer.bias_correction = shift.flatten().float()
        exact = mean_y - torch.einsum("goi,gi->go", weight, mean_x)
        return fitted, exact.flatten().float()
