"""Which modules of a detector are compensated."""

import fnmatch
from collections.abc import Callable

from torch import nn

from ..errors import QwtError

BlockFinder = Callable[[nn.Module], list[str]]

BACKBONES: dict[str, BlockFinder] = {}
"""Block finder by class name of the backbone; a finder returns names relative to the backbone."""


def register_blocks(*class_names: str) -> Callable[[BlockFinder], BlockFinder]:
    """Decorator: the function lists the blocks of the backbones of these classes."""

    def decorate(finder: BlockFinder) -> BlockFinder:
        for name in class_names:
            BACKBONES[name] = finder
        return finder

    return decorate


@register_blocks("SwinTransformer")
def swin_blocks(backbone: nn.Module) -> list[str]:
    """Each attention + MLP block of each stage."""
    return [
        f"stages.{i}.blocks.{j}"
        for i, stage in enumerate(backbone.stages)
        for j in range(len(stage.blocks))
    ]


@register_blocks("ResNet", "ResNeXt", "ResNetV1d")
def resnet_blocks(backbone: nn.Module) -> list[str]:
    """Each residual block of each stage."""
    return [f"{s}.{j}" for s in backbone.res_layers for j in range(len(getattr(backbone, s)))]


@register_blocks("CSPDarknet", "CSPNeXt")
def csp_blocks(backbone: nn.Module) -> list[str]:
    """The parts of each stage: downsampling convolution, pyramid pooling, CSP layer."""
    return [
        f"{layer}.{j}"
        for layer in backbone.layers
        if isinstance(getattr(backbone, layer), nn.Sequential)
        for j in range(len(getattr(backbone, layer)))
    ]


def find_blocks(model: nn.Module, patterns: tuple[str, ...] = ()) -> list[str]:
    """Names of the blocks of a detector, relative to the detector.

    Args:
        patterns: module name patterns (fnmatch); empty takes what is registered for the backbone.

    Raises:
        QwtError: no finder is registered, or a pattern matches nothing or nested modules.
    """
    if not patterns:
        kind = type(model.backbone).__name__
        if kind not in BACKBONES:
            raise QwtError(
                f"No blocks are registered for the backbone class {kind} (known: "
                f"{', '.join(sorted(BACKBONES))}); name them with 'blocks', a list of module name "
                "patterns such as backbone.layer*.*."
            )
        return [f"backbone.{name}" for name in BACKBONES[kind](model.backbone)]
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
