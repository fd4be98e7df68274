"""timm's models as backbones of mmdet detectors: ``backbone=dict(type="TimmBackbone", …)``."""

from typing import Any

from mmdet.registry import MODELS
from torch import Tensor, nn

from ..imports import importable_torchvision

with importable_torchvision():
    import timm


@MODELS.register_module()
class TimmBackbone(nn.Module):
    """A timm model that returns its feature maps.

    Args:
        model_name: of timm, such as ``resnet18`` or ``convnext_atto``.
        out_indices: stages whose maps are returned, from 0.
        pretrained: download timm's weights; a detector's checkpoint replaces them.
        options: further arguments of ``timm.create_model``.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: tuple[int, ...] = (0, 1, 2, 3),
        pretrained: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model = timm.create_model(
            model_name,
            features_only=True,
            out_indices=out_indices,
            pretrained=pretrained,
            **options,
        )
        self.channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[batch, 3, height, width] -> one [batch, channels, height', width'] for each stage."""
        features = self.model(x)
        if self.channels_last:
            features = [feature.permute(0, 3, 1, 2).contiguous() for feature in features]
        return tuple(features)
