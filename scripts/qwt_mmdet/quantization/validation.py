"""Whether ranges generalize to images that they were not estimated from.

A second set of ranges is estimated from every second calibration image. With these ranges, and weights in full
precision, the SQNR of outputs is measured on images of this half and of the other one. If there are too few
calibration images, it is much lower on the other half, since values beyond a range are clipped.

To save time, no range search runs for the half. Its ranges are those of all images times the ratio of the
ranges that hold 99.99 % of the values, of the half and of all images.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QuantizationSettings
from ..detectors.forward import scope_tensors
from ..record import RangeCheck
from .convert import activation_quantizers, full_precision
from .layers import QuantizedLayer
from .migration import choose_grid
from .quantizer import ActivationQuantizer
from .ranges import RangeObserver
from .sqnr import HeadError, sqnr_db

PERCENTILE = 99.99


class FoldedObserver:
    """A :class:`.ranges.RangeObserver` for each half of the images."""

    def __init__(
        self, name: str, channel_axis: int | None = None, *, symmetric: bool = False
    ) -> None:
        self.folds = tuple(RangeObserver(name, channel_axis, symmetric=symmetric) for _ in range(2))

    def update(self, image: int, x: Tensor) -> None:
        """Add a tensor, of any shape, of an image."""
        self.folds[image % 2].update(x)

    def merged(self) -> RangeObserver:
        """The histogram of all images."""
        first = self.folds[0]
        merged = RangeObserver(first.name, first.channel_axis, symmetric=first.symmetric)
        for fold in self.folds:
            merged.merge(fold)
        return merged


def widths(observer: RangeObserver, pooled: bool) -> Tensor:
    """Width of the range that holds 0 and 99.99 % of the values, [channels] or, ``pooled``, [1]."""
    low, high = (observer.pooled() if pooled else observer).percentiles(PERCENTILE)
    return high.clamp(min=0) - low.clamp(max=0)


class RangeValidation:
    """Scales that are estimated from every second image, by quantizer."""

    def __init__(self) -> None:
        self._scales: dict[ActivationQuantizer, Tensor] = {}

    def choose_grid(
        self,
        quantizer: ActivationQuantizer,
        observer: FoldedObserver,
        layer: QuantizedLayer | None,
        settings: QuantizationSettings,
    ) -> None:
        """Choose a quantizer's grid from all images (:func:`.migration.choose_grid`); keep the scale of the half.

        A quantizer that never ran gets no grid.
        """
        first, whole = observer.folds[0], observer.merged()
        if whole.is_empty:
            return
        if not quantizer.rounds:
            quantizer.pass_values(whole.counts.device)
            return
        choose_grid(quantizer, whole, layer, settings)
        if not quantizer.logarithmic and not first.is_empty:
            scale, _ = quantizer.grid
            own, all_images = (widths(seen, scale.numel() == 1) for seen in (first, whole))
            self._scales[quantizer] = torch.where(own > 0, own / all_images, 1.0) * scale

    def check(
        self,
        model: nn.Module,
        images: Iterable[dict[str, Any]],
        count: int,
        scope: str,
        spared: Collection[str],
    ) -> RangeCheck:
        """Measure the SQNR of the scope's outputs with the scales of the half.

        Args:
            model: with full-precision weights.
            images: the first calibration images in their order, batches of one.
            count: number of all calibration images.
            spared: names of quantizers that keep their scales.
        """
        if count < 2:
            return RangeCheck(count, None, None)
        named = {n: q for n, q in activation_quantizers(model).items() if q.is_calibrated}
        own = {q: q.scale for q in named.values()}
        scales = {
            q: self._scales[q] for n, q in named.items() if n not in spared and q in self._scales
        }
        errors = HeadError(), HeadError()
        with full_precision(model, {}):
            try:
                for quantizer, scale in scales.items():
                    quantizer.scale = scale
                for number, image in enumerate(images):
                    outputs = []
                    for enabled in (False, True):
                        for quantizer in own:
                            quantizer.enabled = enabled
                        outputs.append(scope_tensors(model, image, scope))
                    errors[number % 2].update(*outputs)
            finally:
                for quantizer, kept in own.items():
                    quantizer.scale = kept
        seen, unseen = (sqnr_db(error.relative()) for error in errors)
        return RangeCheck(count, seen, unseen)
