"""Whether ranges hold on images that did not make them.

Every second calibration image makes ranges of its own. The network computes with these, its weights in full
precision, on some images that made them and on some that did not. Too few images show in outputs that are much
noisier on the latter, since values beyond a range are clipped.

The ranges of these images are those of all images times the ratio of what all but 0.01 % of the values reach in
these images and in all: the search for a range costs more than the check may.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QuantizationSettings
from ..detectors.forward import scope_tensors
from ..record import RangeCheck
from .convert import activation_quantizers, full_precision
from .layers import QuantizedConv2d
from .migration import choose_grid
from .quantizer import ActivationQuantizer
from .ranges import RangeObserver
from .sqnr import HeadError, sqnr_db

PERCENTILE = 99.99


class FoldedObserver:
    """What a quantizer sees, in two folds of the images.

    Args:
        name, channel_axis: as of :class:`.ranges.RangeObserver`.
    """

    def __init__(self, name: str, channel_axis: int | None = None) -> None:
        self.folds = tuple(RangeObserver(name, channel_axis) for _ in range(2))

    def update(self, image: int, x: Tensor) -> None:
        """Add a tensor of any shape of the image of this number."""
        self.folds[image % 2].update(x)

    def merged(self) -> RangeObserver:
        """What an observer of all images has seen."""
        merged = RangeObserver(self.folds[0].name, self.folds[0].channel_axis)
        for fold in self.folds:
            merged.merge(fold)
        return merged


def widths(observer: RangeObserver, pooled: bool) -> Tensor:
    """How wide a range around 0 is that all but 0.01 % of the values lie in, [channels] or, ``pooled``, [1]."""
    low, high = (observer.pooled() if pooled else observer).percentiles(PERCENTILE)
    return high.clamp(min=0) - low.clamp(max=0)


class RangeValidation:
    """The scales that every second image gives, by quantizer."""

    def __init__(self) -> None:
        self._scales: dict[ActivationQuantizer, Tensor] = {}

    def choose_grid(
        self,
        quantizer: ActivationQuantizer,
        observer: FoldedObserver,
        migrating: QuantizedConv2d | None,
        settings: QuantizationSettings,
    ) -> None:
        """Choose a quantizer's grid from all images (:func:`.migration.choose_grid`); note that of every second one.

        A quantizer that has seen nothing stays without a grid.
        """
        first, whole = observer.folds[0], observer.merged()
        if whole.is_empty:
            return
        choose_grid(quantizer, whole, migrating, settings)
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
        """Measure the outputs of what is in scope with the first fold's grids.

        Args:
            model: with full-precision weights.
            images: the first calibration images in their order, batches of one.
            count: the number of all.
            spared: names of quantizers that keep their scales.
        """
        if count < 2:
            return RangeCheck(count, None, None)
        named = {n: q for n, q in activation_quantizers(model).items() if q.is_calibrated}
        own = {q: q.scale for q in named.values()}
        scales = {
            q: self._scales[q] for n, q in named.items() if n not in spared and q in self._scales
        }
        noise = HeadError(), HeadError()
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
                    noise[number % 2].update(*outputs)
            finally:
                for quantizer, kept in own.items():
                    quantizer.scale = kept
        seen, unseen = (sqnr_db(of.relative()) for of in noise)
        return RangeCheck(count, seen, unseen)
