"""Loading of state dicts into models, with checks of names and shapes."""

import contextlib
import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QwtError, quoted

logger = logging.getLogger(__name__)

LISTED_KEYS = 10


def load_weights(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict into a model, strictly, once its modules have converted their older keys.

    Where the keys fit only without a prefix, such as Lightning's ``model.``, it is removed and
    tensors without it are left out; the log says so.

    Args:
        model: is changed, even where an error is raised.
        state: what :func:`.checkpoint.load_checkpoint` returns.
        what: how the message begins, such as "The checkpoint a.pth does not fit b.py".

    Raises:
        QwtError: lists missing, unexpected and wrong-shaped names.
    """
    prefixes = _prefixes(model.state_dict(), state)
    try:
        _load(model, state, what)
        return
    except QwtError as error:
        misfit = error
    fitting = []
    for prefix in prefixes:
        with contextlib.suppress(QwtError):
            _load(model, below(state, prefix), what)
            fitting.append(prefix)
    if not fitting:
        raise (
            misfit
            if not prefixes
            else QwtError(
                f"{misfit}\nMost names of the model follow the prefix {quoted(prefixes[0])!r}; remove it "
                f"with state = {_without(prefixes[0])}, and compare the rest."
            )
        )
    averages = [prefix for prefix in fitting if "ema" in prefix or "average" in prefix]
    prefix = (averages or fitting)[0]
    _load(model, below(state, prefix), what)
    others = [key for key in state if not key.startswith(prefix)]
    logger.log(
        logging.WARNING if len(fitting) > 1 else logging.INFO,
        "The prefix %s of the checkpoint's names is removed%s%s.",
        quoted(prefix),
        f"; left out are {some(others)}" if others else "",
        f"; {some(fitting)} would fit as well, for another one save {_without(fitting[-1])}"
        if len(fitting) > 1
        else "",
    )


def _without(prefix: str) -> str:
    """The line of Python that removes a prefix."""
    text = repr(quoted(prefix))
    return f"{{k.removeprefix({text}): v for k, v in state.items() if k.startswith({text})}}"


def _prefixes(needed: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Prefixes of at most four names that at least half of a model's names follow, best first."""
    found: Counter[str] = Counter()
    for key in state:
        names = key.split(".", 4)
        for count in range(1, len(names)):
            prefix = ".".join(names[:count]) + "."
            if key[len(prefix) :] in needed:
                found[prefix] += 1
    return [prefix for prefix, count in found.most_common(4) if count >= len(needed) / 2]


def below(state: Mapping[str, Tensor], prefix: str) -> OrderedDict[str, Tensor]:
    """The tensors and the metadata whose names follow a prefix, without it."""
    chosen: Any = OrderedDict(  # with torch's attribute _metadata
        (key.removeprefix(prefix), value) for key, value in state.items() if key.startswith(prefix)
    )
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        chosen._metadata = OrderedDict(
            (f"{key}.".removeprefix(prefix)[:-1], value)
            for key, value in metadata.items()
            if f"{key}.".startswith(prefix)
        )
    return chosen


def _load(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    # Each module converts its older keys in the given state dict. mmcv's deformable convolutions look
    # beside their own prefix for them, so all are given everything, as torch did until 1.12.
    converted = OrderedDict(state)
    metadata = getattr(state, "_metadata", {})
    missing: list[str] = []
    problems: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        version = dict(metadata.get(prefix[:-1], {}))
        module._load_from_state_dict(converted, prefix, version, True, missing, [], problems)
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{prefix}{name}.")

    with torch.no_grad():
        visit(model, "")
    lost = set(missing)
    needed = model.state_dict()
    # A module may make up for what is missing, as mmcv's ConvAWS2d does.
    check_keys(
        {key: value for key, value in needed.items() if key in converted or key in lost},
        converted,
        what,
    )
    if problems:
        raise QwtError(f"{what}: {quoted(problems[0])}.")


def check_keys(
    model_state: Mapping[str, Tensor], checkpoint_state: Mapping[str, Tensor], what: str
) -> None:
    """Make sure that a checkpoint has exactly the tensors that a model needs.

    Batch counters of normalization layers (``num_batches_tracked``) do not matter at inference and
    may be missing or left over.

    Args:
        model_state: what the model needs, by name.
        checkpoint_state: what the checkpoint has, by name.
        what: how the message begins, such as "The checkpoint a.pth does not fit b.py".

    Raises:
        QwtError: lists missing, unexpected and wrong-shaped names.
    """
    needed = {key for key in model_state if not key.endswith("num_batches_tracked")}
    there = {key for key in checkpoint_state if not key.endswith("num_batches_tracked")}
    missing = [key for key in model_state if key in needed - there]
    unexpected = [key for key in checkpoint_state if key in there - needed]
    misshapen = [
        f"{key} (checkpoint {tuple(checkpoint_state[key].shape)}, model {tuple(value.shape)})"
        for key, value in model_state.items()
        if key in needed & there and not _same_shape(checkpoint_state[key], value)
    ]
    mistyped = [
        f"{key} ({checkpoint_state[key].dtype})".replace("torch.", "")
        for key, value in model_state.items()
        if key in needed & there
        and value.is_floating_point()
        and not checkpoint_state[key].is_floating_point()
    ]
    groups = [
        f"  {name} ({len(keys)}): {some(keys)}"
        for name, keys in (
            ("missing in the checkpoint", missing),
            ("unexpected in the checkpoint", unexpected),
            ("of another shape", misshapen),
            ("whole numbers where the model has floating point", mistyped),
        )
        if keys
    ]
    if not groups:
        return
    if any(_OLD_SSD.match(key) for key in unexpected):
        remedy = (
            "These are names of MMDetection before 2.14; its "
            "tools/model_converters/upgrade_ssd_version.py renames them."
        )
    elif any(_OLD_HEAD.match(key) for key in unexpected):
        remedy = (
            "These may be names of MMDetection 1; its tools/model_converters/"
            "upgrade_model_version.py renames them and puts the background class last."
        )
    elif missing or unexpected:
        remedy = (
            "The checkpoint is of another architecture than the config; take the config that "
            "it was trained with."
        )
    elif mistyped:
        remedy = "The weights are quantized or damaged; take those of the full-precision model."
    else:
        remedy = (
            "The architecture is the same but not its size; adapt the config (for a head, "
            "num_classes) to the checkpoint."
        )
    raise QwtError("\n".join([f"{what}:", *groups, remedy]))


_OLD_SSD = re.compile(r"backbone\.(extra|l2_norm)\.")
_OLD_HEAD = re.compile(r"(bbox_head(\.\d)?\.fc_(cls|reg)|.*\.(cls|reg)_convs\.\d+)\.(weight|bias)$")


def _same_shape(found: Tensor, needed: Tensor) -> bool:
    # torch 0.3 had no tensors without dimensions; torch still reads its single numbers.
    return found.shape == needed.shape or (found.shape == (1,) and needed.dim() == 0)


def some(names: Iterable[str]) -> str:
    names = [quoted(name) for name in names]
    more = f", and {len(names) - LISTED_KEYS} more" if len(names) > LISTED_KEYS else ""
    return ", ".join(names[:LISTED_KEYS]) + more
