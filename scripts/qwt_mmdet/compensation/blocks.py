"""Which modules of a detector are compensated."""

import fnmatch
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..detectors.forward import forward_scope
from ..errors import QwtError
from ..replay.walk import Arguments
from .modules import LAYERS, aligned_input, block_output, channel_axis, hooked

logger = logging.getLogger(__name__)

BlockFinder = Callable[[nn.Module, bool], list[str]]
"""Takes a backbone or neck, and whether to include downsampling layers outside of its blocks; returns names
relative to it."""

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


def _layers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, LAYERS)]


def _named(blocks: str, between: str = "-") -> BlockFinder:
    """A finder of the outermost modules with layers whose whole name matches a regular expression.

    Args:
        blocks: of blocks; an nn.Sequential is none, but may hold some.
        between: of layers between stages.
    """

    def find(component: nn.Module, downsampling: bool) -> list[str]:
        names: list[str] = []
        for name, module in component.named_modules():
            is_block = re.fullmatch(blocks, name) and not isinstance(module, nn.Sequential)
            is_asked = is_block or (downsampling and re.fullmatch(between, name))
            inside = any(name.startswith(f"{outer}.") for outer in names)
            if is_asked and not inside and _layers(module):
                names.append(name)
        return names

    return find


register_blocks("SwinTransformer")(
    _named(r"stages\.\d+\.blocks\.\d+", between=r"stages\.\d+\.downsample")
)
register_blocks(
    "ResNet", "ResNetV1d", "ResNeXt", "ResNeSt", "Res2Net", "RegNet", "DetectoRS_ResNet"
)(_named(r"layer\d+\.\d+"))
register_blocks("CSPDarknet", "CSPNeXt", "YOLOXCSPDarknet", "MobileNetV2")(
    _named(r"(stem|stage\d+|layer\d+)\.\d+")
)
register_blocks("PyramidVisionTransformer", "PyramidVisionTransformerV2")(
    _named(r"layers\.\d+\.1\.\d+", between=r"layers\.[1-9]\d*\.0\.projection")
)
register_blocks("ConvNeXt")(_named(r"stages\.\d+\.\d+", between=r"downsample_layers\.[1-9]\d*"))
register_blocks("FPN", "PAFPN", registry=NECKS)(
    _named(r"(lateral_convs|fpn_convs|downsample_convs|pafpn_convs)\.\d+")
)
register_blocks("YOLOXPAFPN", "CSPNeXtPAFPN", registry=NECKS)(
    _named(r"(reduce_layers|top_down_blocks|downsamples|bottom_up_blocks|out_convs)\.\d+")
)
register_blocks("ChannelMapper", registry=NECKS)(_named(r"(convs|extra_convs)\.\d+"))


register_blocks(
    "TimmBackbone", "FeatureListNet", "FeatureDictNet", "FeatureHookNet", "FeatureGetterNet",
    "EfficientNetFeatures", "MobileNetV3Features",
)(  # `blocks.2.1`, `stages_0.blocks.1`, `layer3.0`, `s2.b1`
    _named(
        r"(|.*\.)(blocks\.\d+(\.\d+)?|layer\d+\.\d+|s\d+\.b\d+)",
        between=r"(|.*\.)(stages|layers)[._]\d+\.downsample",
    )
)  # fmt: skip


def _weights(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for module in modules for m in _layers(module) for p in m.parameters())


def _stacked(units: dict[str, nn.Module], component: nn.Module) -> list[str]:
    """The innermost modules whose class is repeated in a list of modules."""
    classes = {
        class_name
        for name, parent in component.named_modules()
        if isinstance(parent, nn.ModuleList | nn.Sequential)
        for class_name, times in Counter(
            type(child)
            for key, child in parent.named_children()
            if f"{name}.{key}".lstrip(".") in units
        ).items()
        if times > 1
    }
    names = [name for name, module in units.items() if type(module) in classes]
    return [n for n in names if not any(other.startswith(f"{n}.") for other in names)]


def _repeated(units: dict[str, nn.Module], component: nn.Module) -> list[str]:
    """The outermost modules whose class is repeated anywhere."""
    times = Counter(type(module) for module in units.values())
    names = [name for name, module in units.items() if times[type(module)] > 1]
    return [n for n in names if not any(n.startswith(f"{other}.") for other in names)]


def likely_blocks(component: nn.Module, fitting: set[str]) -> list[str]:
    """Blocks of a backbone or neck whose class is not registered.

    Three sets of modules are tried: those with several layers whose class is repeated in a list of modules
    (residual blocks, transformer layers); modules whose class is repeated anywhere; single layers. The first
    set that holds at least a quarter of the weights is taken, else the one that holds most.

    Args:
        fitting: names of modules that can be compensated, relative to ``component``.
    """
    modules = {name: module for name, module in component.named_modules() if name in fitting}
    units = {
        name: module
        for name, module in modules.items()
        if len(_layers(module)) > 1 and type(module) not in (nn.Sequential, nn.ModuleList)
    }
    single = [name for name, module in modules.items() if isinstance(module, LAYERS)]
    choices = [_stacked(units, component), _repeated(units, component), single]
    total = _weights([component])
    held = [_weights(modules[name] for name in names) for names in choices]
    enough = [names for names, share in zip(choices, held, strict=True) if 4 * share >= total]
    return enough[0] if enough else choices[held.index(max(held))]


def _misfit(module: nn.Module, arguments: Arguments, output: Any) -> str | None:
    """Why the output of a module cannot be compensated; None where it can."""
    tensors = [value for value in tree_leaves(arguments) if isinstance(value, Tensor)]
    first = next(iter((*arguments[0], *arguments[1].values())), None)
    if not tensors or (len(tensors) > 1 and not isinstance(first, Tensor)):
        return f"it takes {len(tensors)} tensors at once"
    if sum(isinstance(value, Tensor) for value in tree_leaves(output)) != 1:
        return "it does not return one tensor"
    try:
        tensor = block_output(type(module).__name__, output)
        aligned_input(arguments, tensor, channel_axis(module, tensor))
    except QwtError as error:
        return str(error)
    return None


def replay_scope(blocks: Iterable[str]) -> str:
    """The smallest scope whose forward pass runs all these blocks."""
    components = {name.split(".")[0] for name in blocks}
    if components == {"backbone"}:
        return "backbone"
    return "backbone+neck" if components <= {"backbone", "neck"} else "detector"


@torch.no_grad()
def block_positions(
    model: nn.Module, blocks: Iterable[str], forward: Callable[[], object]
) -> dict[str, int]:
    """Number of positions of each block's output, in running order.

    Args:
        forward: runs the model on one image.

    Raises:
        QwtError: a block does not run, runs twice, or returns something that cannot be compensated.
    """
    found: dict[str, int] = {}

    def look(name: str, module: nn.Module, arguments: Arguments, output: Any) -> None:
        if name in found:
            raise QwtError(
                f"The block {name} runs twice in one forward pass and cannot be compensated; "
                "leave it out of 'blocks'."
            )
        tensor = block_output(name, output)
        axis = channel_axis(module, tensor)
        aligned_input(arguments, tensor, axis)
        found[name] = tensor.numel() // tensor.shape[axis]

    with hooked(model, blocks, look):
        forward()
    missing = [name for name in blocks if name not in found]
    if missing:
        raise QwtError(
            f"The blocks {', '.join(missing)} do not run in the forward pass; leave them out of "
            "'blocks'."
        )
    return found


@torch.no_grad()
def _misfits(
    model: nn.Module, batch: dict[str, Any], components: Iterable[str]
) -> dict[str, str | None]:
    """Why each module with layers in ``components`` cannot be a block, by name; None where it can."""
    found: dict[str, str | None] = {
        name: "it does not run in the forward pass"
        for component in components
        for name, module in model.get_submodule(component).named_modules(prefix=component)
        if _layers(module)
    }
    runs: Counter[str] = Counter()

    def look(name: str, module: nn.Module, arguments: Arguments, output: Any) -> None:
        runs[name] += 1
        again = runs[name] > 1
        found[name] = (
            "it runs twice in one forward pass" if again else _misfit(module, arguments, output)
        )

    with hooked(model, list(found), look):
        forward_scope(model, batch, replay_scope(components))
    return found


def _blocks_of(
    component: str, module: nn.Module, misfits: dict[str, str | None], downsampling: bool
) -> list[str]:
    """Blocks of the backbone or neck called ``component``: registered ones, or else likely ones."""
    class_name = type(module).__name__
    finder = (BACKBONES if component == "backbone" else NECKS).get(class_name)
    registered = [
        f"{component}.{name}" for name in (finder(module, downsampling) if finder else ())
    ]
    blocks = [name for name in registered if misfits[name] is None]
    for name in registered:
        if misfits[name]:
            logger.warning("The block %s stays without compensation: %s.", name, misfits[name])
    if blocks:
        return blocks
    fitting = {n.removeprefix(f"{component}.") for n, reason in misfits.items() if reason is None}
    blocks = [f"{component}.{name}" for name in likely_blocks(module, fitting)]
    if blocks:
        logger.info(
            "No blocks are registered for the class %s of the %s; these modules are compensated: %s. To choose "
            "others, set 'blocks' to a list of module name patterns such as %s.",
            class_name, component, ", ".join(blocks), re.sub(r"\.\d+", ".*", blocks[0]),
        )  # fmt: skip
    return blocks


def find_blocks(
    model: nn.Module,
    batch: dict[str, Any],
    patterns: tuple[str, ...] = (),
    *,
    scope: str = "backbone",
    downsampling: bool = False,
) -> list[str]:
    """Names of the blocks of a detector, relative to the detector.

    Args:
        batch: one image as the loader gives it.
        patterns: module name patterns (fnmatch). Empty: the registered blocks of the backbone and, if ``scope``
            includes it, of the neck; or else :func:`likely_blocks`. Blocks that cannot be compensated are left
            out, and the log names them.
        scope: the quantized part of the detector.
        downsampling: whether registered blocks include the layers between stages.

    Raises:
        QwtError: the backbone has no blocks, or a pattern matches nothing or nested modules.
    """
    if not patterns:
        neck = scope != "backbone" and getattr(model, "neck", None) is not None
        components = ["backbone", *["neck"] * neck]
        misfits = _misfits(model, batch, components)
        found: list[str] = []
        for component in components:
            module = model.get_submodule(component)
            blocks = _blocks_of(component, module, misfits, downsampling)
            found += blocks
            lacks = (
                "no module that runs once, takes one tensor and returns one with the same positions"
            )
            if not found:
                raise QwtError(
                    f"The backbone, of class {type(module).__name__}, has {lacks}; set 'blocks' to a list of module "
                    "name patterns such as backbone.layer*.*."
                )
            if not blocks:
                logger.warning(
                    "The %s, of class %s, stays without compensation: it has %s.",
                    component, type(module).__name__, lacks,
                )  # fmt: skip
        return found
    names = [name for name, _ in model.named_modules() if name]
    chosen: list[str] = []
    for pattern in patterns:
        # fnmatch's star also matches dots; a block pattern matches modules of one depth.
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
