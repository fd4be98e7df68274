"""Checkpoints: fetch, verify, and read them without running what they might contain."""

import contextlib
import datetime
import io
import json
import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..data.download import LARGEST_BYTES, download, printable
from ..errors import QwtError
from ..files import is_url, sha256_file, write_atomically
from .unpickling import (
    LEGACY_MAGIC,
    ZIP_MAGIC,
    Damaged,
    Dictionary,
    Refused,
    StoredTensor,
    TorchFile,
    kind,
    quoted,
)

logger = logging.getLogger(__name__)

LISTED_KEYS = 10
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


def fetch_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    sha256: str | None = None,
    most_bytes: int = LARGEST_BYTES,
) -> None:
    """Get a checkpoint from a path or an address, verify it, and write its weights alone.

    ``output`` becomes ``{"state_dict": {name: tensor}, "meta": {"source", "sha256", "classes"}}``
    of plain types, which ``torch.load(weights_only=True)`` reads; its bytes depend on the source
    alone. ``sha256`` in it is that of the source file, ``classes`` the class names that an
    OpenMMLab checkpoint or the metadata of a safetensors file carries, or None.

    Args:
        source: path or http(s) address of a file written by ``torch.save`` or by safetensors.
        sha256: the hash that the source must have. Without one, the last eight digits of an
            OpenMMLab file name (``name-1a2b3c4d.pth``) must be the first eight of the hash.
        most_bytes: largest size of a download.

    Raises:
        QwtError: the source cannot be had, has another hash, is damaged, refers to anything that
            reading weights does not need, or holds no weights or such that are not finite.
            ``output`` is then not written.
    """
    source = str(source)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise QwtError(
            f"The sha256 {sha256!r} of the checkpoint {source} is not 64 hexadecimal digits; "
            "copy it again, or leave it out."
        )
    name = printable(source)
    with _local_file(source, Path(output), sha256, most_bytes) as path:
        digest = sha256_file(path)
        _verify(name, path.name, digest, sha256)
        weights, classes = _read(path, name)
    meta = {"source": name, "sha256": digest, "classes": classes}
    # Saved through a stream: torch would write the name of a file into the archive.
    content = io.BytesIO()
    torch.save({"state_dict": weights, "meta": meta}, content)
    with write_atomically(output) as partial:
        partial.write_bytes(content.getbuffer())
    logger.info("%s: %d tensors from %s", output, len(weights), name)


def load_checkpoint(path: str | Path) -> OrderedDict[str, Tensor]:
    """Read the weights of a checkpoint file; see :func:`read_checkpoint`."""
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | Path) -> tuple[OrderedDict[str, Tensor], list[str] | None]:
    """Read the weights and the class names of a checkpoint file; nothing that is in the file is run.

    Understands what :func:`fetch_checkpoint` writes, safetensors, OpenMMLab files (``state_dict``),
    files with the weights under another of the names in ``WEIGHTS`` or ``AVERAGES``, and bare state
    dicts, in torch's present and its pre-1.6 format. Where a file has weights and their average
    (EMA), the average is taken, and the log says so. ``state_dict`` of an OpenMMLab file is the
    average already, as MMEngine's hook swaps it in before saving.

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
    return _read(path, str(path))


def load_weights(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load a state dict into a model, strictly, once its modules have converted their older keys.

    Where the keys fit only without a prefix, such as Lightning's ``model.``, it is removed and
    tensors without it are left out; the log says so.

    Args:
        model: is changed, even where an error is raised.
        state: what :func:`load_checkpoint` returns.
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
            _load(model, _below(state, prefix), what)
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
    _load(model, _below(state, prefix), what)
    others = [key for key in state if not key.startswith(prefix)]
    logger.log(
        logging.WARNING if len(fitting) > 1 else logging.INFO,
        "The prefix %s of the checkpoint's names is removed%s%s.",
        quoted(prefix),
        f"; left out are {_some(others)}" if others else "",
        f"; {_some(fitting)} would fit as well, for another one save {_without(fitting[-1])}"
        if len(fitting) > 1
        else "",
    )


def _without(prefix: str) -> str:
    """The line of Python that removes a prefix."""
    text = repr(quoted(prefix))
    return f"{{k.removeprefix({text}): v for k, v in state.items() if k.startswith({text})}}"


def _prefixes(needed: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Prefixes of at most four parts that at least half of a model's names follow, best first."""
    found: Counter[str] = Counter()
    for key in state:
        parts = key.split(".", 4)
        for count in range(1, len(parts)):
            prefix = ".".join(parts[:count]) + "."
            if key[len(prefix) :] in needed:
                found[prefix] += 1
    return [prefix for prefix, count in found.most_common(4) if count >= len(needed) / 2]


def _below(state: Mapping[str, Tensor], prefix: str) -> OrderedDict[str, Tensor]:
    """The tensors and the metadata whose names follow a prefix, without it."""
    part = OrderedDict(
        (key.removeprefix(prefix), value) for key, value in state.items() if key.startswith(prefix)
    )
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        part._metadata = OrderedDict(
            (f"{key}.".removeprefix(prefix)[:-1], value)
            for key, value in metadata.items()
            if f"{key}.".startswith(prefix)
        )
    return part


def _load(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    # Each module converts its older keys in what it is given. mmcv's deformable convolutions look
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
        f"  {name} ({len(keys)}): {_some(keys)}"
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


def _some(names: Iterable[str]) -> str:
    names = [quoted(name) for name in names]
    more = f", and {len(names) - LISTED_KEYS} more" if len(names) > LISTED_KEYS else ""
    return ", ".join(names[:LISTED_KEYS]) + more


# --- Where the file comes from ---------------------------------------------------------------


@contextlib.contextmanager
def _local_file(source: str, output: Path, sha256: str | None, most_bytes: int) -> Iterator[Path]:
    """Yield a path with the content of ``source``; what had to be downloaded goes away after it."""
    if not is_url(source):
        path = Path(source).expanduser()
        if not path.is_file():
            raise QwtError(f"The checkpoint {source} does not exist; check the path.")
        yield path
        return
    name = Path(unquote(urlsplit(source).path)).name
    if not name:
        raise QwtError(
            f"The checkpoint address {printable(source)} names no file; check the address."
        )
    folder = output.parent / f"{output.name}.download"
    download(source, folder / name, sha256=sha256, most_bytes=most_bytes)
    try:
        yield folder / name
    finally:
        (folder / name).unlink()
        with contextlib.suppress(OSError):  # parts of another file may be in it
            folder.rmdir()


def _verify(source: str, name: str, digest: str, sha256: str | None) -> None:
    if sha256 is not None and digest != sha256.lower():
        raise QwtError(
            f"The checkpoint {source} has the sha256 {digest}, but the config says "
            f"{sha256.lower()}; get the right file, or correct the config."
        )
    digits = _digits_in_name(name)
    if digits is None or digest.startswith(digits):
        return
    if sha256 is not None:
        logger.warning(
            "%s has the sha256 of the config, but not the one in its own name (%s).", source, digits
        )
        return
    raise QwtError(
        f"The checkpoint {source} has the sha256 {digest}, but its name says {digits}…; the file "
        "is incomplete or another one. Get it again, or put the sha256 into the config if it is "
        "the file that you mean."
    )


def _digits_in_name(name: str) -> str | None:
    """First eight digits of the sha256 as OpenMMLab writes them into file names."""
    found = re.search(r"-([0-9a-f]{8})\.(?:pth|safetensors)$", name)
    if not found:
        return None
    try:  # model-20240131.pth carries a date, not a hash
        datetime.datetime.strptime(found[1], "%Y%m%d")
    except ValueError:
        return found[1]
    return None


# --- What is in it ---------------------------------------------------------------------------


def _read(path: Path, name: str) -> tuple[OrderedDict[str, Tensor], list[str] | None]:
    """Weights and class names of a checkpoint file; ``name`` is what messages call it."""
    try:
        with open(path, "rb") as stream:
            head = stream.read(512)
        is_zip = head.startswith(ZIP_MAGIC)
        if not is_zip and (path.suffix == ".safetensors" or head[8:9] == b"{"):
            weights, classes = _read_safetensors(path, name)
        else:
            with TorchFile(path) as file:
                stored, metadata = _chosen(file.content, name)
                weights = OrderedDict(file.tensors(stored))
                classes = _classes(file.content, name)
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
    _require_finite(weights, name)
    return weights, classes


def _read_safetensors(path: Path, name: str) -> tuple[OrderedDict[str, Tensor], list[str] | None]:
    with safe_open(path, framework="pt") as file:
        stored, _ = _chosen(Dictionary(file.get_tensors()), name)
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


def _candidates(content: Dictionary, seen: set[int], place: tuple[str, ...] = ()) -> list[Any]:
    """All ``(keys that lead to it, state dict)`` in a checkpoint."""
    seen.add(id(content))
    found = []
    for key in (*WEIGHTS, *AVERAGES):
        inner = content.get(key)
        if type(inner) is Dictionary and id(inner) not in seen and len(place) < 3:
            found += _candidates(inner, seen, (*place, key))
    if not found and any(isinstance(value, StoredTensor | Tensor) for value in content.values()):
        found = [(place, content)]
    return found


def _chosen(content: Any, name: str) -> tuple[dict[str, Any], OrderedDict[str, Any] | None]:
    """The tensors of a checkpoint's state dict, by name, and the versions of its modules."""
    candidates = _candidates(content, set()) if type(content) is Dictionary else []
    if not candidates:
        found = kind(content)
        if type(content) is Dictionary:
            found += f" of {_some(content)}" if content else ""
            found += f" with {content.foreign_key} as a key" if content.foreign_key else ""
        raise QwtError(
            f"The checkpoint {name} holds no weights but {found}; it needs a state dict, bare or "
            f"under one of the keys {', '.join((*WEIGHTS, *AVERAGES))}."
        )
    states = {place: _unwrapped(state, name) for place, state in candidates}
    places = list(states)
    first, reason = places[0], "it comes first"
    averages = [place for place in places if set(AVERAGES) & set(place)]
    if averages and averages[0] != first:
        # MMEngine's hook has swapped the two before saving.
        if "steps" in dict(candidates).get(("ema_state_dict",), ()):
            reason = "MMEngine has put the average over the training (EMA) there"
        elif states[averages[0]][0].keys() >= states[first][0].keys():
            first, reason = averages[0], "it is the average over the training (EMA)"
        else:
            reason = f"{_place(averages[0])} is not complete"
    foreign_key = dict(candidates)[first].foreign_key
    if foreign_key is not None:
        raise QwtError(
            f"The checkpoint {name} was refused: a name in {_place(first) or 'its state dict'} is "
            f"{foreign_key} where only a text can be the name of a weight."
        )
    others = [p for p in places if p != first and states[p][0] != states[first][0]]
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


def _unwrapped(state: Dictionary, name: str) -> tuple[dict[str, Any], OrderedDict[str, Any] | None]:
    """The tensors of a state dict without prefixes of wrappers, and the versions of its modules."""
    tensors = {k: v for k, v in state.items() if isinstance(v, StoredTensor | Tensor)}
    if len(tensors) < len(state):
        left_out = _some(key for key in state if key not in tensors)
        logger.info("%s: left out what is no tensor: %s", name, left_out)
    weights: Mapping[str, Any] = OrderedDict(tensors)
    versions = state.metadata
    if versions is not None:
        weights._metadata = OrderedDict(
            (key, {"version": value["version"]})
            for key, value in versions.items()
            if type(value) is Dictionary and type(value.get("version")) is int
        )
    while True:
        names = weights.keys() - COUNTERS
        prefix = next((p for p in WRAPPERS if names and all(k.startswith(p) for k in names)), None)
        if prefix is None:
            break
        weights = _below(weights, prefix)
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


def _require_finite(weights: Mapping[str, Tensor], name: str) -> None:
    wrong = []
    for key, tensor in weights.items():
        if tensor.is_floating_point() or tensor.is_complex():
            # torch cannot ask its 8-bit types
            values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
            count = values.numel() - int(values.isfinite().sum())
            if count:
                wrong.append(f"{quoted(key)} ({count} of {values.numel()})")
    if wrong:
        raise QwtError(
            f"The checkpoint {name} has {len(wrong)} tensors with NaN or infinite numbers: "
            f"{_some(wrong)}. Its training diverged, or the file was converted wrongly; take an "
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
