"""What a search measures errors at: the dense head's outputs, and the second stage's at fixed proposals."""

from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models import BaseDetector
from torch import Tensor

from ..detectors.forward import computes_on_regions, dense_head, head_tensors, tensors_of
from ..quantization.sqnr import HeadError

PROPOSALS = 100
"""Of an image, those with the highest scores."""


@dataclass(frozen=True)
class Reference:
    """An image and the outputs of the full-precision detector for it.

    Args:
        batch: of one image. proposals: ``InstanceData`` of each image; None for one stage.
        stages: outputs of the dense head, and those of the second stage.
    """

    batch: dict[str, Any]
    proposals: list[Any] | None
    stages: list[list[Tensor]]

    @classmethod
    @torch.no_grad()
    def of(cls, model: BaseDetector, batch: dict[str, Any]) -> "Reference":
        """The reference of one batch, computed by a detector in full precision."""
        proposals = None
        if dense_head(model) is not None and computes_on_regions(getattr(model, "roi_head", None)):
            data = model.data_preprocessor(batch, False)
            features = model.extract_feat(data["inputs"])
            found = model.rpn_head.predict(features, data["data_samples"], rescale=False)
            proposals = [boxes[:PROPOSALS] for boxes in found]
        return cls(batch, proposals, outputs(model, batch, proposals))


@torch.no_grad()
def outputs(
    model: BaseDetector, batch: dict[str, Any], proposals: list[Any] | None
) -> list[list[Tensor]]:
    """The outputs of each stage of a detector for one batch; see :class:`Reference`."""
    head = dense_head(model)
    if proposals is None or head is None:
        return [head_tensors(model, batch)]
    data = model.data_preprocessor(batch, False)
    features = model.extract_feat(data["inputs"])
    second = model.roi_head(features, proposals, data["data_samples"])
    return [tensors_of(head(features)), tensors_of(second)]


class OutputError:
    """Streaming relative error of a detector's outputs, averaged over its stages."""

    def __init__(self) -> None:
        self._stages: list[HeadError] = []

    def update(self, reference: Reference, model: BaseDetector) -> None:
        """Run a detector on the image of a reference, and add its error."""
        found = outputs(model, reference.batch, reference.proposals)
        self._stages = self._stages or [HeadError() for _ in found]
        for stage, *pair in zip(self._stages, reference.stages, found, strict=True):
            stage.update(*pair)

    def relative(self) -> float:
        """Error power by signal power."""
        return sum(stage.relative() for stage in self._stages) / max(len(self._stages), 1)
