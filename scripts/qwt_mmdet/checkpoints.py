"""Checkpoints: fetch, verify, and read them without running what they might contain."""

import contextlib
import datetime
import io
import logging
import pickle
import re
import tarfile
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from torch import Tensor

from .download import download, is_url, printable
from .errors import QwtError
from .files import sha256_file, write_atomically

logger = logging.getLogger(__name__)

LISTED_KEYS = 10
ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before torch 1.6


def fetch_checkpoint(source: str | Path, output: str | Path, *, sha256: str | None = None) -> None:
    """Get a checkpoint from a path or an address, verify it, and write its weights alone.

    ``output`` becomes ``{"state_dict": {name: tensor}, "meta": {"source", "sha256", "classes"}}``
    of plain types, which ``torch.load(weights_only=True)`` reads; its bytes depend on the source
    alone. ``sha256`` in it is that of the source file, ``classes`` the class names that an
    OpenMMLab checkpoint carries, or None.

    Args:
        source: path or http(s) address of a file written by ``torch.save``.
        sha256: the hash that the source must have. Without one, the last eight digits of an
            OpenMMLab file name (``name-1a2b3c4d.pth``) must be the first eight of the hash.

    Raises:
        QwtError: the source cannot be had, has another hash, is damaged, refers to anything that
            reading weights does not need, or holds no weights. ``output`` is then not written.
    """
    source = str(source)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise QwtError(
            f"The sha256 {sha256!r} of the checkpoint {source} is not 64 hexadecimal digits; "
            "copy it again, or leave it out."
        )
    name = printable(source)
    with _local_file(source, Path(output), sha256) as path:
        digest = sha256_file(path)
        _verify(name, path.name, digest, sha256)
        checkpoint = _read(path, name)
        weights = _weights(checkpoint, name)
    meta = {"source": name, "sha256": digest, "classes": _classes(checkpoint)}
    # Saved through a stream: torch would write the name of a file into the archive.
    content = io.BytesIO()
    torch.save({"state_dict": weights, "meta": meta}, content)
    with write_atomically(output) as partial:
        partial.write_bytes(content.getbuffer())
    logger.info("%s: %d tensors from %s", output, len(weights), name)


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint file; nothing that is in the file is run.

    Understands what :func:`fetch_checkpoint` writes, OpenMMLab files (``state_dict``), files with
    the weights under ``model``, and bare state dicts, in torch's present and its pre-1.6 format.
    Where a checkpoint was trained with an average of the weights (EMA), ``state_dict`` holds the
    average already, as OpenMMLab's hook swaps it in before saving; the raw copies are dropped.

    Returns:
        Tensors on the CPU by parameter name, without a ``module.`` prefix of parallel training.

    Raises:
        QwtError: the file is missing, damaged, refused, or holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise QwtError(f"The checkpoint {path} does not exist; check the path.")
    return _weights(_read(path, str(path)), str(path))


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
        if key in needed & there and checkpoint_state[key].shape != value.shape
    ]
    groups = [
        f"  {name} ({len(keys)}): {_some(keys)}"
        for name, keys in (
            ("missing in the checkpoint", missing),
            ("unexpected in the checkpoint", unexpected),
            ("of another shape", misshapen),
        )
        if keys
    ]
    if not groups:
        return
    if missing or unexpected:
        remedy = (
            "The checkpoint is of another architecture than the config; take the config that "
            "it was trained with."
        )
    else:
        remedy = (
            "The architecture is the same but not its size; adapt the config (for a head, "
            "num_classes) to the checkpoint."
        )
    raise QwtError("\n".join([f"{what}:", *groups, remedy]))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - LISTED_KEYS} more" if len(names) > LISTED_KEYS else ""
    return ", ".join(names[:LISTED_KEYS]) + more


# --- Where the file comes from ---------------------------------------------------------------


@contextlib.contextmanager
def _local_file(source: str, output: Path, sha256: str | None) -> Iterator[Path]:
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
    download(source, folder / name, sha256=sha256)
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
    found = re.search(r"-([0-9a-f]{8})\.pth$", name)
    if not found:
        return None
    try:  # model-20240131.pth carries a date, not a hash
        datetime.datetime.strptime(found[1], "%Y%m%d")
    except ValueError:
        return found[1]
    return None


# --- Reading without running -----------------------------------------------------------------


class _RefusedGlobal(pickle.UnpicklingError):
    """A pickle refers to something that is not on our list."""


class _Discarded:
    """Stands in for an object that is of no use here: takes what it is given and keeps nothing."""

    __slots__ = ()

    def __new__(cls, *arguments: Any, **keywords: Any) -> "_Discarded":
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


class _Rebuild:
    """A function that a pickle may call but, unlike a bare function, cannot alter."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name} cannot be set")

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def _discarded_attribute(owner: Any, name: str) -> type[_Discarded]:
    """MMEngine's HistoryBuffer refers to its own methods by ``getattr``; nobody else may."""
    if owner is not _Discarded:
        raise _RefusedGlobal("builtins.getattr")
    return _Discarded


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    # Hooks and requires_grad, which follow, are of no use for weights.
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


# All that a checkpoint needs to become tensors in dictionaries ...
_REBUILT = {
    ("builtins", "getattr"): _Rebuild(_discarded_attribute),
    ("collections", "OrderedDict"): _Rebuild(OrderedDict),
    ("torch._utils", "_rebuild_tensor"): _Rebuild(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Rebuild(lambda data, *_: data),
    ("torch._utils", "_rebuild_parameter_with_state"): _Rebuild(lambda data, *_: data),
    ("torch._tensor", "_rebuild_from_type_v2"): _Rebuild(
        lambda function, kind, arguments, state: function(*arguments)
    ),
}
# ... and what training leaves beside them: nothing of it is imported, made or called.
_ARRAYS = {"_reconstruct", "scalar", "_frombuffer"}
_PATHS = {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"}
_DISCARDED = {
    "_codecs": {"encode"},
    "addict.addict": {"Dict"},
    "argparse": {"Namespace"},
    "builtins": {"bytearray", "complex", "frozenset", "list", "range", "set", "slice"},
    "collections": {"Counter", "defaultdict", "deque"},
    "datetime": {"date", "datetime", "timedelta", "timezone"},
    "mmcv.utils.config": {"Config", "ConfigDict"},
    "mmengine.config.config": {"Config", "ConfigDict"},
    "mmengine.logging.history_buffer": {"HistoryBuffer"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": _ARRAYS,
    "numpy._core.numeric": _ARRAYS,
    "numpy.core.multiarray": _ARRAYS,
    "numpy.core.numeric": _ARRAYS,
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
    "torch": {"Size", "Tensor", "device"},
    "torch._tensor": {"Tensor"},
    "torch.nn.parameter": {"Parameter"},
    "torch.serialization": {"_get_layout"},
}
_PYTHON2_MODULES = {"__builtin__": "builtins"}  # as pickles up to protocol 2 have it


class _Unpickler(pickle.Unpickler):
    """Finds what is on our list and refuses all else, before anything of it is imported."""

    def find_class(self, module: str, name: str) -> Any:
        module = _PYTHON2_MODULES.get(module, module)
        if (module, name) in _REBUILT:
            return _REBUILT[module, name]
        if (
            name.partition(".")[0] in _DISCARDED.get(module, ())
            or (module == "numpy.dtypes" and "." not in name)
            or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        ):
            return _Discarded
        raise _RefusedGlobal(f"{module}.{name}")


# What torch.load takes as pickle_module. Its own allow-list (weights_only=True) would not do: it
# makes and calls what is added to it, knows only today's names of numpy's functions, and reads
# one protocol.
_PICKLE_MODULE = types.SimpleNamespace(
    __name__=__name__,
    Unpickler=_Unpickler,
    load=lambda file, **options: _Unpickler(file, **options).load(),
)


def _check_archive(path: Path) -> None:
    # The very reader that torch.load uses: a zip file can look different to another one.
    if "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise _RefusedGlobal("TorchScript code")
    with zipfile.ZipFile(path) as archive:  # torch itself does not compare checksums
        record = archive.testzip()
    if record is not None:
        raise pickle.UnpicklingError(f"the checksum of {record} is wrong")


def _read(path: Path, name: str) -> Any:
    """Read a file written by torch.save; ``name`` is what messages call it."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(32)
        stream.seek(0)
        is_zip = head.startswith(ZIP_MAGIC)
        try:
            if is_zip:
                _check_archive(path)
            # torch still unpacks the tar files of its first versions; a file can be both.
            if not is_zip and tarfile.is_tarfile(path):
                raise pickle.UnpicklingError("it is a tar file")
            return torch.load(
                stream, map_location="cpu", pickle_module=_PICKLE_MODULE, weights_only=False
            )
        except _RefusedGlobal as error:
            raise QwtError(
                f"The checkpoint {name} was refused: it refers to {error}, which weights do not "
                "need and which could run code; nothing of it was run. If you trust its origin, "
                "load it there and save model.state_dict() alone."
            ) from None
        except Exception as error:  # a damaged pickle can raise anything
            if is_zip or head.startswith(LEGACY_MAGIC):
                problem = "is truncated or damaged"
            elif size == 0:
                problem = "is empty"
            else:
                problem = f"is not a PyTorch checkpoint; it begins with {head!r}"
            reason = str(error).split("\n")[0] or type(error).__name__
            raise QwtError(
                f"The checkpoint {name} ({size} bytes) {problem} ({reason}). Get the whole file "
                "again and compare its size with the original's."
            ) from error


# --- What is in it ---------------------------------------------------------------------------


def _weights(checkpoint: Any, name: str) -> dict[str, Tensor]:
    state = checkpoint
    if isinstance(checkpoint, Mapping):
        for key in ("state_dict", "model"):
            if isinstance(checkpoint.get(key), Mapping):
                state = checkpoint[key]
                break
    tensors = (
        {
            key: value
            for key, value in state.items()
            if isinstance(key, str) and isinstance(value, Tensor)
        }
        if isinstance(state, Mapping)
        else {}
    )
    if not tensors:
        found = (
            f"a dictionary of {_some(map(str, state))}"
            if isinstance(state, Mapping)
            else f"a {type(state).__name__}"
        )
        raise QwtError(
            f"The checkpoint {name} holds no weights but {found}; it needs a state dict, bare or "
            "under the key state_dict or model."
        )
    if len(tensors) < len(state):
        logger.info(
            "%s: left out what is no tensor: %s",
            name,
            _some(str(key) for key in state if key not in tensors),
        )
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    # MMDetection 2 registered the raw weights beside their average under such names.
    raw = {"ema_" + key.replace(".", "_") for key in tensors}
    return {
        # A copy of its own, so that saving it saves no storage that it only looks into.
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
        if key not in raw
    }


def _classes(checkpoint: Any) -> list[str] | None:
    """Class names of an OpenMMLab checkpoint (MMEngine: meta.dataset_meta; before: meta)."""
    meta = checkpoint.get("meta") if isinstance(checkpoint, Mapping) else None
    if not isinstance(meta, Mapping):
        return None
    for place in (meta.get("dataset_meta"), meta):
        for key in ("classes", "CLASSES"):
            names = place.get(key) if isinstance(place, Mapping) else None
            if isinstance(names, str):
                return [names]
            if (
                isinstance(names, list | tuple)
                and names
                and all(isinstance(name, str) for name in names)
            ):
                return list(names)
    return None
