"""Checkpoint files: their weights and class names, read without running what they might contain."""

import json
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import QwtError, quoted
from .unpickling import ZIP_MAGIC, Damaged, Refused, memory_of, own_tensors, read_as_data
from .weights import below, some

logger = logging.getLogger(__name__)

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before torch 1.6
WEIGHTS = ("state_dict", "model", "model_state_dict", "params", "net", "module")
"""Where a checkpoint may keep its weights; a bare state dict is understood as well."""
AVERAGES = ("ema", "ema_state_dict", "model_ema", "state_dict_ema", "params_ema", "ema_model")
"""Where a checkpoint may keep their average over the training (EMA)."""
WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes of parallel training, of averaged and of compiled models."""
COUNTERS = {"n_averaged", "steps"}
"""How often torch's and MMEngine's averaged models were updated."""
MAX_CLASSES = 100_000
MAX_CLASS_NAME = 200


def load_checkpoint(path: str | Path) -> OrderedDict[str, Tensor]:
    """Read the weights of a checkpoint file; see :func:`read_checkpoint`."""
    return read_checkpoint(path)[0]


def read_checkpoint(
    path: str | os.PathLike[str], name: str | None = None
) -> tuple[OrderedDict[str, Tensor], list[str] | None]:
    """Read the weights and the class names of a checkpoint file; nothing that is in the file is run.

    Understands what :func:`.steps.fetch.fetch_checkpoint` writes, safetensors, OpenMMLab files (``state_dict``),
    files with the weights under another of the names in ``WEIGHTS`` or ``AVERAGES``, and bare state
    dicts, in torch's present and its pre-1.6 format. Where a file has weights and their average
    (EMA), the average is taken, and the log says so. ``state_dict`` of an OpenMMLab file is the
    average already, as MMEngine's hook swaps it in before saving.

    Args:
        name: what messages call the file; its path, if not given.

    Returns:
        Tensors on the CPU by parameter name, without the prefixes in ``WRAPPERS``. ``_metadata``,
        where modules look up of which version their keys are, is kept if the file has it. And the
        class names that the file carries, in the order of the labels; None without any.

    Raises:
        QwtError: the file is missing, damaged, refused, or holds no weights or such that are not
            finite.
    """
    path = Path(path)
    if not path.is_file():
        raise QwtError(f"The checkpoint {path} does not exist; check the path.")
    name = name or str(path)
    weights: Any  # with torch's attribute _metadata
    try:
        with open(path, "rb") as stream:
            head = stream.read(512)
        is_zip = head.startswith(ZIP_MAGIC)
        if not is_zip and (path.suffix == ".safetensors" or head[8:9] == b"{"):
            weights, classes = _read_safetensors(path, name)
        else:
            content = read_as_data(path)
            stored, metadata = _chosen(content, name)
            _require_weight_types(stored, name)
            weights = own_tensors(stored, path.stat().st_size)
            classes = _classes(content, name)
            if metadata is not None:
                weights._metadata = metadata
    except Refused as error:
        raise QwtError(
            f"The checkpoint {name} was refused: {error}; nothing of it was run. If you trust its "
            "origin, load it there and save model.state_dict() alone."
        ) from None
    except (Damaged, SafetensorError) as error:
        size = path.stat().st_size
        if size == 0:
            problem = "is empty"
        elif head[257:262] == b"ustar":
            problem = "is not a PyTorch checkpoint; it is a tar file"
        elif is_zip or head.startswith(LEGACY_MAGIC) or isinstance(error, SafetensorError):
            problem = "is truncated or damaged"
        else:
            problem = f"is not a PyTorch checkpoint; it begins with {head[:32]!r}"
        raise QwtError(
            f"The checkpoint {name} ({size} bytes) {problem} ({quoted(error)}). Get the whole file "
            "again and compare its size with the original's."
        ) from error
    except OSError as error:
        raise QwtError(f"The checkpoint {name} cannot be read: {error}.") from error
    _require_usable(weights, name)
    return weights, classes


def _read_safetensors(path: Path, name: str) -> tuple[OrderedDict[str, Tensor], list[str] | None]:
    with safe_open(path, framework="pt") as file:
        stored, _ = _chosen(dict(file.get_tensors()), name)
        _require_weight_types(stored, name)
        meta = file.metadata() or {}
    decoded = {}
    for key in {"classes", "CLASSES", "dataset_meta", "meta"} & meta.keys():
        try:
            decoded[key] = json.loads(meta[key])
        except (ValueError, RecursionError):
            logger.warning("%s: the metadata %s is not JSON and is left out.", name, key)
    inner = decoded.get("meta")
    return (
        OrderedDict((key, tensor.contiguous()) for key, tensor in stored.items()),
        _classes({"meta": decoded | (inner if isinstance(inner, dict) else {})}, name),
    )


def _state_dicts(content: dict[Any, Any], seen: set[int], place: tuple[str, ...] = ()) -> list[Any]:
    """All ``(keys that lead to it, state dict)`` in a checkpoint."""
    seen.add(id(content))
    found = []
    for key in (*WEIGHTS, *AVERAGES):
        inner = content.get(key)
        if isinstance(inner, dict) and id(inner) not in seen and len(place) < 3:
            found += _state_dicts(inner, seen, (*place, key))
    if not found and any(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        found = [(place, content)]
    return found


def _described(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "nothing (None)"
    names: dict[type, str] = {dict: "a dictionary", list: "a list", tuple: "a tuple", str: "a text"}
    names |= {bool: "a truth value", int: "a whole number", float: "a number", Tensor: "a tensor"}
    return next((n for kind, n in names.items() if isinstance(value, kind)), "another object")


def _foreign_key(state: dict[Any, Any]) -> str | None:
    """What the first key is that is no text; None where there is none."""
    return next((_described(key) for key in state if not isinstance(key, str)), None)


def _chosen(content: Any, name: str) -> tuple[dict[str, Tensor], OrderedDict[str, Any] | None]:
    """The tensors of a checkpoint's state dict, by name, and the versions of its modules."""
    state_dicts = _state_dicts(content, set()) if isinstance(content, dict) else []
    if not state_dicts:
        found = _described(content)
        if isinstance(content, dict):
            texts = [key for key in content if isinstance(key, str)]
            found += f" of {some(texts)}" if texts else ""
            foreign = _foreign_key(content)
            found += f" with {foreign} as a key" if foreign else ""
        raise QwtError(
            f"The checkpoint {name} holds no weights but {found}; it needs a state dict, bare or "
            f"under one of the keys {', '.join((*WEIGHTS, *AVERAGES))}."
        )
    states = {path: _unwrapped(state, name) for path, state in state_dicts}
    paths = list(states)
    first, reason = paths[0], "it comes first"
    averages = [path for path in paths if set(AVERAGES) & set(path)]
    if averages and averages[0] != first:
        # MMEngine's hook has swapped the two before saving.
        if "steps" in dict(state_dicts).get(("ema_state_dict",), ()):
            reason = "MMEngine has put the average over the training (EMA) there"
        elif states[averages[0]][0].keys() >= states[first][0].keys():
            first, reason = averages[0], "it is the average over the training (EMA)"
        else:
            reason = f"{_place(averages[0])} is not complete"
    foreign_key = _foreign_key(dict(state_dicts)[first])
    if foreign_key is not None:
        raise QwtError(
            f"The checkpoint {name} was refused: a name in {_place(first) or 'its state dict'} is "
            f"{foreign_key} where only a text can be the name of a weight."
        )
    memory = {path: {k: memory_of(v) for k, v in states[path][0].items()} for path in paths}
    others = [path for path in paths if memory[path] != memory[first]]
    if others:
        logger.warning(
            "%s: the weights are taken from %s, since %s. For those of %s, save "
            "{'state_dict': checkpoint%s} as a file of its own.",
            name,
            _place(first),
            reason,
            " or ".join(map(_place, others)),
            "".join(f"[{key!r}]" for key in others[0]),
        )
    return states[first]


def _place(keys: tuple[str, ...]) -> str:
    return ".".join(keys)


def _unwrapped(
    state: dict[Any, Any], name: str
) -> tuple[dict[str, Tensor], OrderedDict[str, Any] | None]:
    """The tensors of a state dict without prefixes of wrappers, and the versions of its modules."""
    texts = {key: value for key, value in state.items() if isinstance(key, str)}
    tensors = {key: value for key, value in texts.items() if isinstance(value, Tensor)}
    if len(tensors) < len(texts):
        left_out = some(key for key in texts if key not in tensors)
        logger.info("%s: left out what is no tensor: %s", name, left_out)
    weights: Any = OrderedDict(tensors)  # with torch's attribute _metadata
    versions = getattr(state, "_metadata", None)
    if isinstance(versions, dict):
        weights._metadata = OrderedDict(
            (key, {"version": value["version"]})
            for key, value in versions.items()
            if isinstance(value, dict) and type(value.get("version")) is int
        )
    while True:
        names = weights.keys() - COUNTERS
        prefix = next((p for p in WRAPPERS if names and all(k.startswith(p) for k in names)), None)
        if prefix is None:
            break
        weights = below(weights, prefix)
        logger.info("%s: removed the prefix %s of all names", name, prefix)
    common = next(iter(weights)).partition(".")[0] + "."
    if all(key.startswith(common) for key in weights):
        logger.info(
            "%s: all names begin with %s; a model that has none such is loaded without it",
            name,
            quoted(common),
        )
    # MMDetection 2 registered the raw weights beside their average under such names.
    raw = {"ema_" + key.replace(".", "_") for key in weights}
    return (
        {key: value for key, value in weights.items() if key not in raw},
        getattr(weights, "_metadata", None),
    )


_WEIGHT_TYPES = re.compile(r"torch\.(bfloat16|float(16|32|64|8_\w+)|u?int8|int(16|32|64)|bool)")


def _kind(tensor: Tensor) -> str:
    """The type of a tensor's numbers; where they do not lie one after the other, what it is instead."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return str(tensor.layout)
    return "without numbers" if tensor.is_meta else str(tensor.dtype)


def _require_weight_types(stored: Mapping[str, Tensor], name: str) -> None:
    """Refuse tensors that hold no weights, before they are copied: torch cannot copy them all."""
    kinds = {key: _kind(tensor) for key, tensor in stored.items()}
    wrong = [
        f"{quoted(key)} ({kind.removeprefix('torch.')})"
        for key, kind in kinds.items()
        if not _WEIGHT_TYPES.fullmatch(kind)
    ]
    if wrong:
        raise QwtError(
            f"The checkpoint {name} has {len(wrong)} tensors of types that no detector computes with: "
            f"{some(wrong)}. Take the weights in floating point of 16 or 32 bits."
        )


def _require_usable(weights: Mapping[str, Tensor], name: str) -> None:
    """Refuse numbers that cannot be weights, or statistics of a normalization layer."""
    wrong = []
    negative = [
        f"{quoted(key)} ({tensor.min().item():.3g})"
        for key, tensor in weights.items()
        if key.endswith("running_var") and tensor.numel() and bool((tensor < 0).any())
    ]
    if negative:
        raise QwtError(
            f"The checkpoint {name} has {len(negative)} variances of normalization layers below 0: "
            f"{some(negative)}. The file is damaged or was converted wrongly; get it again."
        )
    for key, tensor in weights.items():
        if tensor.is_floating_point():
            # torch cannot ask its 8-bit types
            values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
            count = values.numel() - int(values.isfinite().sum())
            if count:
                wrong.append(f"{quoted(key)} ({count} of {values.numel()})")
    if wrong:
        raise QwtError(
            f"The checkpoint {name} has {len(wrong)} tensors with NaN or infinite numbers: "
            f"{some(wrong)}. Its training diverged, or the file was converted wrongly; take an "
            "earlier checkpoint."
        )


def _classes(checkpoint: Any, name: str) -> list[str] | None:
    """Class names of an OpenMMLab checkpoint (MMEngine: meta.dataset_meta; before: meta)."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, Mapping) else None
    if not isinstance(meta, Mapping):
        return None
    for place in (meta.get("dataset_meta"), meta):
        for key in ("classes", "CLASSES"):
            names = place.get(key) if isinstance(place, Mapping) else None
            if isinstance(names, str):
                names = [names]
            if isinstance(names, list | tuple) and names:
                if len(names) <= MAX_CLASSES and all(
                    isinstance(n, str) and len(n) <= MAX_CLASS_NAME for n in names
                ):
                    return list(names)
                logger.warning("%s: its %s are no list of names and are left out.", name, key)
    return None
