"""Which modules of a detector are compensated."""

import fnmatch
import logging
import re
from collections.abc import Callable

from torch import nn

from ..errors import QwtError

logger = logging.getLogger(__name__)

BlockFinder = Callable[[nn.Module, bool], list[str]]
"""Takes a backbone or neck and whether downsampling layers are wanted that are no blocks
themselves; returns names relative to it."""

BACKBONES: dict[str, BlockFinder] = {}
"""Block finder by class name of the backbone."""

NECKS: dict[str, BlockFinder] = {}
"""Block finder by class name of the neck."""


def register_blocks(
    *class_names: str, registry: dict[str, BlockFinder] = BACKBONES
) -> Callable[[BlockFinder], BlockFinder]:
    """Decorator: the function lists the blocks of the backbones (or necks) of these classes."""

    def decorate(finder: BlockFinder) -> BlockFinder:
        for name in class_names:
            registry[name] = finder
        return finder

    return decorate


def _children(module: nn.Module, name: str) -> list[str]:
    """Names of the direct children of the submodule ``name``; none if there is no such module."""
    part = getattr(module, name, None)
    return [] if part is None else [f"{name}.{child}" for child, _ in part.named_children()]


@register_blocks("SwinTransformer")
def swin_blocks(backbone: nn.Module, downsampling: bool) -> list[str]:
    """Each attention + MLP block of each stage; on request patch merging."""
    names = []
    for i, stage in enumerate(backbone.stages):
        names += [f"stages.{i}.blocks.{j}" for j in range(len(stage.blocks))]
        if downsampling and stage.downsample is not None:
            names.append(f"stages.{i}.downsample")
    return names


@register_blocks(
    "ResNet", "ResNetV1d", "ResNeXt", "ResNeSt", "Res2Net", "RegNet", "DetectoRS_ResNet"
)
def resnet_blocks(backbone: nn.Module, downsampling: bool) -> list[str]:
    """Each residual block of each stage; these hold the downsampling."""
    return [name for stage in backbone.res_layers for name in _children(backbone, stage)]


@register_blocks("CSPDarknet", "CSPNeXt", "YOLOXCSPDarknet", "MobileNetV2")
def staged_blocks(backbone: nn.Module, downsampling: bool) -> list[str]:
    """The parts of each stage: downsampling convolution, pyramid pooling, CSP layer, residuals."""
    return [
        name
        for layer in backbone.layers
        if isinstance(getattr(backbone, layer), nn.Sequential)
        for name in _children(backbone, layer)
    ]


@register_blocks("PyramidVisionTransformer", "PyramidVisionTransformerV2")
def pvt_blocks(backbone: nn.Module, downsampling: bool) -> list[str]:
    """Each encoder layer of each stage; on request the patch embeddings between stages."""
    names = []
    for i, (_, layers, _) in enumerate(backbone.layers):
        if downsampling and i:
            names.append(f"layers.{i}.0.projection")
        # A position embedding may come before them.
        names += [f"layers.{i}.1.{j}" for j, layer in enumerate(layers) if hasattr(layer, "attn")]
    return names


@register_blocks("ConvNeXt")
def convnext_blocks(backbone: nn.Module, downsampling: bool) -> list[str]:
    """Each block of each stage; on request the downsampling layers between stages."""
    names = []
    for i, stage in enumerate(backbone.stages):
        if downsampling and i:
            names.append(f"downsample_layers.{i}")
        names += [f"stages.{i}.{j}" for j in range(len(stage))]
    return names


# Stages of timm's models, and what they hold: `blocks.2.1`, `stages_0.blocks.1`, `layer3.0`,
# `s2.b1`; layers between stages are called downsample.
_TIMM_BLOCK = re.compile(
    r"(|.*\.)(blocks\.\d+|((stages|layers)[._]\d+\.)blocks\.\d+|layer\d+\.\d+|s\d+\.b\d+)"
)
_TIMM_DOWNSAMPLE = re.compile(r"(|.*\.)(stages|layers)[._]\d+\.downsample")


@register_blocks(
    "TimmBackbone", "FeatureListNet", "FeatureDictNet", "FeatureHookNet", "FeatureGetterNet",
    "EfficientNetFeatures", "MobileNetV3Features",
)  # fmt: skip
def timm_blocks(backbone: nn.Module, downsampling: bool) -> list[str]:
    """The blocks of timm's feature extractors, by the names that timm gives to them."""
    names = []
    for name, module in backbone.named_modules():
        if any(name.startswith(f"{outer}.") for outer in names):
            continue
        if _TIMM_DOWNSAMPLE.fullmatch(name):
            if downsampling and not isinstance(module, nn.Identity):
                names.append(name)
        elif _TIMM_BLOCK.fullmatch(name):
            if isinstance(module, nn.Sequential):  # EfficientNets number stages, and in them blocks
                names += [f"{name}.{child}" for child, _ in module.named_children()]
            else:
                names.append(name)
    return names


@register_blocks("FPN", "PAFPN", registry=NECKS)
def fpn_blocks(neck: nn.Module, downsampling: bool) -> list[str]:
    """Lateral, top-down and bottom-up convolutions."""
    parts = ("lateral_convs", "fpn_convs", "downsample_convs", "pafpn_convs")
    return [name for part in parts for name in _children(neck, part)]


@register_blocks("YOLOXPAFPN", "CSPNeXtPAFPN", registry=NECKS)
def csp_pafpn_blocks(neck: nn.Module, downsampling: bool) -> list[str]:
    """Reducing convolutions, CSP layers on both ways, downsampling and output convolutions."""
    parts = ("reduce_layers", "top_down_blocks", "downsamples", "bottom_up_blocks", "out_convs")
    return [name for part in parts for name in _children(neck, part)]


@register_blocks("ChannelMapper", registry=NECKS)
def channel_mapper_blocks(neck: nn.Module, downsampling: bool) -> list[str]:
    """The convolution of each level."""
    return [name for part in ("convs", "extra_convs") for name in _children(neck, part)]


def _registered(
    module: nn.Module, registry: dict[str, BlockFinder], downsampling: bool
) -> list[str]:
    kind = type(module).__name__
    if kind not in registry:
        raise QwtError(
            f"No blocks are registered for the class {kind} (known: {', '.join(sorted(registry))}); "
            "name them with 'blocks', a list of module name patterns such as backbone.layer*.*."
        )
    return registry[kind](module, downsampling)


def find_blocks(
    model: nn.Module,
    patterns: tuple[str, ...] = (),
    *,
    scope: str = "backbone",
    downsampling: bool = False,
) -> list[str]:
    """Names of the blocks of a detector, relative to the detector.

    Args:
        patterns: module name patterns (fnmatch); empty takes what is registered for the backbone
            and, where ``scope`` goes beyond it, for the neck; an unknown neck is left out, with a
            warning.
        scope: which part of the detector is quantized.
        downsampling: registered blocks include the layers between stages.

    Raises:
        QwtError: no finder is registered, or a pattern matches nothing or nested modules.
    """
    if not patterns:
        found = [f"backbone.{n}" for n in _registered(model.backbone, BACKBONES, downsampling)]
        neck = getattr(model, "neck", None) if scope != "backbone" else None
        if type(neck).__name__ in NECKS:
            found += [f"neck.{n}" for n in _registered(neck, NECKS, downsampling)]
        elif neck is not None:
            logger.warning(
                "The neck stays without compensation, since no blocks are registered for its class "
                "%s (known: %s); 'blocks' can name them.",
                type(neck).__name__, ", ".join(sorted(NECKS)),
            )  # fmt: skip
        return found
    names = [name for name, _ in model.named_modules() if name]
    chosen: list[str] = []
    for pattern in patterns:
        # fnmatch's star crosses dots; a block pattern names modules of one depth.
        depth = pattern.count(".")
        matches = [n for n in fnmatch.filter(names, pattern) if n.count(".") == depth]
        if not matches:
            raise QwtError(f"The block pattern {pattern!r} matches no module of the model.")
        chosen += [name for name in matches if name not in chosen]
    for name in chosen:
        inside = [other for other in chosen if other.startswith(f"{name}.")]
        if inside:
            raise QwtError(
                f"The block {inside[0]} lies inside the block {name}; blocks must not be nested, so "
                "narrow the patterns in 'blocks'."
            )
    return chosen
