"""Read files of ``torch.save`` by ``torch.load(weights_only=True)``, which runs no code of a file.

Checkpoints also hold objects of numpy, MMEngine and MMCV from training. :class:`_Nothing` replaces each of them.
"""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import quoted

ZIP_MAGIC = b"PK\x03\x04"
EXPANSION = 4
"""How many times the size of their file all tensors together may take (views may overlap)."""


class Refused(Exception):
    """A file holds what weights do not need; the message completes "it was refused: …"."""


class Damaged(Exception):
    """A file is not whole or no checkpoint; the message is the reason."""


class _Nothing:
    """Stands for an object that is of no use here, whatever it would be made of."""

    def __new__(cls, *_: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None: ...


class _Dictionary(_Nothing):
    """A dictionary's place must be one, since items are set in it."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


_ARRAYS = "_reconstruct scalar"
_PATHS = "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"
_STUBS = {
    "addict.addict": "Dict",
    "argparse": "Namespace",
    "builtins": "frozenset getattr list range slice",  # HistoryBuffer names its methods by getattr
    "collections": "defaultdict deque",
    "datetime": "date datetime timedelta timezone",
    "mmcv.utils.config": "Config ConfigDict",
    "mmengine.config.config": "Config ConfigDict",
    "mmengine.logging.history_buffer": "HistoryBuffer",
    "numpy": "dtype ndarray",
    "numpy._core.multiarray": _ARRAYS,
    "numpy.core.multiarray": _ARRAYS,
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}
_KINDS: dict[str, Any] = dict.fromkeys(("Dict", "ConfigDict", "defaultdict"), _Dictionary)
_KINDS["deque"] = lambda *_: []
_SAFE_GLOBALS: list[Any] = [
    (_KINDS.get(name, _Nothing), f"{module}.{name}")
    for module, names in _STUBS.items()
    for name in names.split()
]


def read_as_data(path: Path) -> Any:
    """Read a file of ``torch.save``, in its present (zip) or its first format.

    Returns:
        What was saved, of plain types and tensors on the CPU. Those of a zip file lie in the file.

    Raises:
        Refused: it holds something that weights do not need.
        Damaged: it is not whole, or no such file.
        OSError: it cannot be read.
    """
    with open(path, "rb") as stream:
        head = stream.read(len(ZIP_MAGIC))
    is_zip = head == ZIP_MAGIC
    try:
        if is_zip:
            _check_archive(path)
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+) ", str(error))
        if found:
            name = found[1] if "." in found[1] else f"builtins.{found[1]}"
            raise Refused(_reference(name)) from None
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0]
        if "Unsupported operand" in reason and (is_zip or head.startswith(b"\x80")):
            raise Refused("it is of another pickle protocol than 2, torch.save's own") from None
        raise Damaged(quoted(reason)) from error
    except (Refused, Damaged, MemoryError, OSError):
        raise
    except Exception as error:  # of torch or zipfile; a damaged file makes them raise many
        raise Damaged(quoted(str(error).split("\n")[0] or type(error).__name__)) from error


def _reference(name: str) -> str:
    return f"it refers to {quoted(name)}, which weights do not need and which could run code"


def _check_archive(path: Path) -> None:
    """Compare the checksums of all records, which torch does not do."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.filename.endswith("/constants.pkl") for record in records):
            raise Refused(_reference("TorchScript code"))
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise Refused("its records are compressed, which torch's own are not")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise Refused("its records overlap")
        damaged = archive.testzip()
    if damaged:
        raise Damaged(f"Bad CRC-32 for the record {quoted(damaged)}")


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """Storage, offset and shape of a tensor; tensors with equal ones share their numbers."""
    if tensor.layout != torch.strided:
        return (id(tensor),)
    first = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *first, tensor.dtype, tuple(tensor.shape), tensor.stride()


def own_tensors(tensors: Mapping[str, Tensor], file_size: int) -> OrderedDict[str, Tensor]:
    """Copy tensors out of their file, contiguous; those that are the same in it share their memory.

    Raises:
        Refused: together they are larger than a file of that size allows.
    """
    memory = {name: memory_of(tensor) for name, tensor in tensors.items()}
    distinct = {memory[name]: tensor for name, tensor in tensors.items()}
    total = sum(tensor.nbytes for tensor in distinct.values())
    if total > EXPANSION * file_size:
        raise Refused(f"its tensors take {total} bytes, but the file has {file_size}")
    layout = torch.contiguous_format
    copies = {at: v.detach().clone(memory_format=layout) for at, v in distinct.items()}
    return OrderedDict((name, copies[at]) for name, at in memory.items())
