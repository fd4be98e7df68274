"""Read files of ``torch.save`` as data: no object is made, nothing is imported, nothing is called.

A pickle is a program for a small stack machine. Here a machine of our own goes through its opcodes
and keeps what weights need: text, numbers, lists, tuples, dictionaries with text as keys, and
descriptions of tensors. All else becomes ``DISCARDED``. Work and memory are bounded by the file's
size, whatever the file claims.
"""

import io
import math
import mmap
import pickletools
import types
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import quoted

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before torch 1.6
LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
MAX_OPCODES = 2_000_000
"""Opcodes that are read of one file: a thousand tensors with an optimizer take some 200,000."""
EXPANSION = 4
"""How many times the size of their file all tensors together may take (views may overlap)."""
MAX_DIMENSIONS = 64  # as many as torch allows


class Refused(Exception):
    """A file holds what weights do not need; the message completes "it was refused: …"."""


class Damaged(Exception):
    """A file is not whole or no checkpoint; the message is the reason."""


class Dictionary(dict[str, Any]):
    """A dictionary of a pickle. Items whose key is no text are left out.

    Attributes:
        foreign_key: what the first such key was, such as "a tuple"; None where there is none.
        metadata: ``_metadata`` of a state dict, where modules keep the versions of their keys.
    """

    __slots__ = ("foreign_key", "metadata")

    def __init__(self, items: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__(items)
        self.foreign_key: str | None = None
        self.metadata: Dictionary | None = None


class Discarded:
    """Stands for every object that is of no use here."""

    __slots__ = ()


DISCARDED = Discarded()


class Storage(NamedTuple):
    """Numbers in a file: ``elements`` numbers of ``dtype`` from element ``start`` of record ``key``."""

    key: str
    dtype: torch.dtype
    elements: int
    start: int = 0


class StoredTensor(NamedTuple):
    """A tensor that was not read yet; offset and strides count elements of ``dtype``."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


class _StorageType(NamedTuple):
    dtype: torch.dtype


def described(value: Any) -> str:
    """What a value is, in words."""
    names = {
        Dictionary: "a dictionary",
        list: "a list",
        tuple: "a tuple",
        str: "a text",
        int: "a whole number",
        float: "a number",
        bool: "a truth value",
        StoredTensor: "a tensor",
        type(None): "nothing (None)",
    }
    return names.get(type(value), "an object of another type")


# --- What a pickle may refer to --------------------------------------------------------------


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Refused(reason)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None
) -> StoredTensor:
    _require(type(storage) is Storage, "a tensor has no storage")
    _require(
        all(
            type(numbers) is tuple
            and len(numbers) <= MAX_DIMENSIONS
            and all(map(_is_count, numbers))
            for numbers in (size, stride)
        )
        and len(size) == len(stride)
        and math.prod(max(n, 1) for n in size) < 2**63,
        "a tensor has an impossible size or stride",
    )
    _require(_is_count(offset), "a tensor begins before its storage")
    dtype = dtype or storage.dtype
    elements = math.prod(size)
    available = storage.elements * storage.dtype.itemsize // dtype.itemsize
    _require(
        elements <= available,
        f"a tensor claims {elements} elements, but its storage has {available}",
    )
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    _require(elements == 0 or last < available, "a tensor reaches beyond its storage")
    return StoredTensor(storage, dtype, offset, size, stride)


def _without_views(metadata: Any) -> None:
    # torch notes here that a complex tensor is to be read conjugated or negated.
    _require(not metadata, "a tensor is a conjugated or negated view")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any) -> StoredTensor:
    return _tensor(storage, offset, size, stride)


def _rebuild_tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, *rest: Any
) -> StoredTensor:
    # Of the rest, requires_grad and hooks are of no use for weights.
    _without_views(rest[2] if len(rest) > 2 else None)
    return _tensor(storage, offset, size, stride)


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> StoredTensor:
    _require(isinstance(dtype, torch.dtype), "a tensor has no type")
    _without_views(rest[0] if rest else None)
    return _tensor(storage, offset, size, stride, dtype)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(function: Any, type_: Any, arguments: Any, state: Any) -> Any:
    _require(
        function in (_rebuild_tensor, _rebuild_tensor_v2, _rebuild_tensor_v3, _rebuild_parameter)
        and type(arguments) is tuple,
        "a tensor is rebuilt in an unknown way",
    )
    return function(*arguments)


def _ordered_dict(pairs: Any = ()) -> list[Any]:
    """Keys and values in turn, as Python 2 and old protocols hand them over."""
    _require(
        type(pairs) in (list, tuple)
        and all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs),
        "an ordered dictionary is made of something else than pairs",
    )
    return [item for pair in pairs for item in pair]


def _attribute(owner: Any, name: Any) -> Discarded:
    """MMEngine's HistoryBuffer refers to its own methods by ``getattr``; nobody else may."""
    _require(owner is DISCARDED, _reference("builtins.getattr"))
    return DISCARDED


def _reference(name: str) -> str:
    return f"it refers to {quoted(name)}, which weights do not need and which could run code"


# All that a checkpoint needs to become tensors in dictionaries ...
_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "getattr"): _attribute,
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}
# ... what training leaves beside them, none of which is made ...
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
# ... and tensors of other layouts, which are refused by their name.
_LAYOUTS = {
    "_rebuild_meta_tensor_no_storage": "a tensor without numbers (device meta)",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a tensor that is quantized already",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
}
_PYTHON2_MODULES = {"__builtin__": "builtins"}  # as pickles up to protocol 2 have it


def _global(module: str, name: str) -> Any:
    module = _PYTHON2_MODULES.get(module, module)
    if (module, name) in _FUNCTIONS:
        return _FUNCTIONS[module, name]
    if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
        return _StorageType(_STORAGES[name])
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    if name.partition(".")[0] in _DISCARDED.get(module, ()) or (
        module == "numpy.dtypes" and "." not in name
    ):
        return DISCARDED
    if module == "torch._utils" and name in _LAYOUTS:
        raise Refused(f"it holds {_LAYOUTS[name]}; save dense tensors of numbers")
    raise Refused(_reference(f"{module}.{name}"))


# --- The machine -----------------------------------------------------------------------------


class _Machine:
    """Goes through the pickles of one file, in which it counts opcodes and notes storages."""

    def __init__(self, file_size: int) -> None:
        self.file_size = file_size
        self.opcodes = 0
        self.storages: dict[str, Storage] = {}

    def load(self, stream: Any) -> Any:
        """Read the pickle at the stream's position and leave the stream behind its end."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0
        for opcode, argument, _ in pickletools.genops(stream):
            self.opcodes += 1
            _require(self.opcodes <= MAX_OPCODES, f"it has more than {MAX_OPCODES} opcodes")
            if opcode.name == "STOP":
                return self.stack.pop()
            action = _ACTIONS.get(opcode.name)
            if action is None:
                raise Refused(f"it uses the opcode {opcode.name}")
            action(self, argument)

    def marked(self) -> list[Any]:
        """Take everything above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def number(self, value: Any) -> None:
        # Weights need no larger one, and Python takes long to write it out.
        self.push(DISCARDED if type(value) is int and value.bit_length() > 128 else value)

    def pop(self, _: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def pop_mark(self, _: Any) -> None:
        self.marked()

    def frozenset(self, _: Any) -> None:
        self.marked()
        self.push(DISCARDED)

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Damaged("it refers to what it does not hold")
        self.push(self.memo[index])

    def memorize(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def top(self, count: int) -> tuple[Any, ...]:
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def append(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if target is not DISCARDED:
            _require(type(target) is list, f"it appends to {described(target)}")
            target.extend(items)

    def set_items(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if target is not DISCARDED:
            _require(type(target) is Dictionary, f"it sets items of {described(target)}")
            for key, value in zip(items[::2], items[1::2], strict=True):
                if type(key) is str:
                    target[key] = value
                elif target.foreign_key is None:
                    target.foreign_key = described(key)

    def dictionary(self, items: list[Any]) -> None:
        self.push(Dictionary())
        self.set_items(items)

    def call(self, function: Any, arguments: Any) -> None:
        if function is DISCARDED:
            self.push(DISCARDED)
            return
        _require(
            isinstance(function, types.FunctionType) and type(arguments) is tuple,
            f"it calls {described(function)}",
        )
        result = function(*arguments)
        if function is _ordered_dict:
            self.copied += len(result)
            _require(self.copied <= MAX_OPCODES, "it copies its items again and again")
            self.dictionary(result)
        else:
            self.push(result)

    def reduce(self, _: Any) -> None:
        self.call(*self.top(2))

    def new_with_keywords(self, _: Any) -> None:
        function, arguments, keywords = self.top(3)
        _require(function is DISCARDED or not keywords, "it calls a function with keywords")
        self.call(function, arguments)

    def instance(self, reference: str) -> None:
        self.call(_global(*reference.split(" ", 1)), tuple(self.marked()))

    def object(self, _: Any) -> None:
        function, *arguments = self.marked()
        self.call(function, tuple(arguments))

    def build(self, _: Any) -> None:
        target, state = self.top(2)
        # Everything but a state dict's metadata would only alter what is made of the target.
        if type(target) is Dictionary and type(state) is Dictionary:
            _require(state.keys() <= {"_metadata"}, "it sets attributes of a dictionary")
            if type(state.get("_metadata")) is Dictionary:
                target.metadata = state["_metadata"]
        else:
            _require(
                target is DISCARDED or type(target) is StoredTensor,
                f"it sets attributes of {described(target)}",
            )
        self.push(target)

    def stack_global(self, _: Any) -> None:
        module, name = self.top(2)
        _require(type(module) is str and type(name) is str, "it refers to something without a name")
        self.push(_global(module, name))

    def persistent(self, _: Any) -> None:
        saved = self.stack.pop()
        _require(type(saved) is tuple and len(saved) in (5, 6), "a storage is described wrongly")
        what, storage_type, key, _, count, *view = saved
        _require(
            what == "storage"
            and type(storage_type) is _StorageType
            and type(key) is str
            and _is_count(count),
            "a storage is described wrongly",
        )
        dtype = storage_type.dtype
        if count * dtype.itemsize > self.file_size:
            raise Damaged(f"a storage claims {count} elements, more than the file has")
        whole = Storage(key, dtype, count)
        _require(
            self.storages.setdefault(key, whole) == whole, "a storage is described in two ways"
        )
        start = 0
        if view and view[0] is not None:  # a part of a storage, as torch before 0.4 saved it
            _require(
                type(view[0]) is tuple and len(view[0]) == 3 and all(map(_is_count, view[0][1:])),
                "a part of a storage is described wrongly",
            )
            _, start, length = view[0]
            _require(start + length <= count, "a part of a storage reaches beyond it")
            count = length
        self.push(Storage(key, dtype, count, start))


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        _Machine.number,
    ),
    **dict.fromkeys(
        (
            *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
            *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        ),
        _Machine.push,
    ),
    **dict.fromkeys(
        ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "EMPTY_SET"),
        lambda machine, _: machine.push(DISCARDED),
    ),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.memorize),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(machine.top(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.top(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.top(3)),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.marked())),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "LIST": lambda machine, _: machine.push(machine.marked()),
    "APPEND": lambda machine, _: machine.append(machine.top(1)),
    "APPENDS": lambda machine, _: machine.append(machine.marked()),
    "ADDITEMS": lambda machine, _: machine.append(machine.marked()),
    "FROZENSET": _Machine.frozenset,
    "EMPTY_DICT": lambda machine, _: machine.push(Dictionary()),
    "DICT": lambda machine, _: machine.dictionary(machine.marked()),
    "SETITEM": lambda machine, _: machine.set_items(machine.top(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.marked()),
    "GLOBAL": lambda machine, reference: machine.push(_global(*reference.split(" ", 1))),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_with_keywords,
    "INST": _Machine.instance,
    "OBJ": _Machine.object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


# --- Files -----------------------------------------------------------------------------------


class TorchFile:
    """A file of ``torch.save``, in its present (zip) or its first format.

    Attributes:
        content: what was saved, of plain types, with a :class:`StoredTensor` for each tensor.

    Raises:
        Refused: it holds something that weights do not need.
        Damaged: it is not whole, or no such file.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._size = path.stat().st_size
        with open(path, "rb") as stream:
            is_zip = stream.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        self._reader = _damaged(_Archive if is_zip else _Sequence, path, self._size)
        self.content = self._reader.content

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._reader.close()

    def tensors(self, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """Read tensors, contiguous; those that are the same in the file share their memory.

        Raises:
            Refused: together they are larger than the file allows.
            Damaged: a record is missing, too short, or has another checksum.
        """
        views = set(stored.values())
        total = sum(view.nbytes for view in views)
        _require(
            total <= EXPANSION * self._size,
            f"its tensors take {total} bytes, but the file has {self._size}",
        )
        by_storage: dict[str, list[StoredTensor]] = {}
        for view in views:
            by_storage.setdefault(view.storage.key, []).append(view)
        total = sum(_damaged(self._reader.size, key) for key in by_storage)
        _require(total <= self._size, "its records overlap")
        read = {
            view: tensor
            for key, views in by_storage.items()
            for view, tensor in _damaged(self._read, key, views)
        }
        return {name: read[view] for name, view in stored.items()}

    def _read(self, key: str, views: list[StoredTensor]) -> list[tuple[StoredTensor, Tensor]]:
        stored = self._reader.storages[key]
        data = bytearray(self._reader.record(key))
        needed = stored.elements * stored.dtype.itemsize
        if len(data) < needed:
            raise Damaged(f"a storage has {len(data)} of {needed} bytes")
        whole = (
            torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        )
        if self._reader.big_endian:
            whole.untyped_storage().byteswap(stored.dtype)
        return [(view, _contiguous(whole, view)) for view in views]


def _contiguous(data: Tensor, view: StoredTensor) -> Tensor:
    """The numbers of ``view`` in the bytes of its storage, in memory of their own."""
    if view.nbytes == 0:
        return torch.empty(view.size, dtype=view.dtype)
    first = view.storage.start * view.storage.dtype.itemsize
    last = first + view.storage.elements * view.storage.dtype.itemsize
    typed = data[first : last - (last - first) % view.dtype.itemsize].view(view.dtype)
    tensor = typed.as_strided(view.size, view.stride, typed.storage_offset() + view.offset)
    if tensor.is_contiguous() and view.nbytes == len(data):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


class _Archive:
    """The format since torch 1.6: a zip file with a pickle and one record per storage."""

    def __init__(self, path: Path, size: int) -> None:
        self._archive = zipfile.ZipFile(path)
        self._file_size = size
        names = self._archive.namelist()
        _require(len(set(names)) == len(names), "two of its records have the same name")
        roots = [name.rpartition("/")[0] for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Damaged(f"it has {len(roots)} records data.pkl")
        self._root = roots[0]
        _require(f"{self._root}/constants.pkl" not in names, _reference("TorchScript code"))
        order = f"{self._root}/byteorder"
        self.big_endian = order in names and self._bytes(order) == b"big"
        machine = _Machine(size)
        self.content = machine.load(io.BytesIO(self._bytes(f"{self._root}/data.pkl")))
        self.storages = machine.storages

    def _info(self, name: str) -> zipfile.ZipInfo:
        info = self._archive.getinfo(name)
        _require(
            info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1,
            f"its record {quoted(name)} is compressed or encrypted, which torch's own are not",
        )
        if not info.file_size == info.compress_size <= self._file_size:
            raise Damaged(f"the record {quoted(name)} claims {info.file_size} bytes")
        return info

    def _bytes(self, name: str) -> bytes:
        return self._archive.read(self._info(name))  # compares the checksum

    def size(self, key: str) -> int:
        return self._info(f"{self._root}/data/{key}").file_size

    def record(self, key: str) -> bytes:
        return self._bytes(f"{self._root}/data/{key}")

    def close(self) -> None:
        self._archive.close()


class _Sequence:
    """The format before torch 1.6: five pickles, then each storage after its number of elements."""

    big_endian = False

    def __init__(self, path: Path, size: int) -> None:
        with open(path, "rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        machine = _Machine(size)
        for number in (LEGACY_MAGIC_NUMBER, LEGACY_PROTOCOL):
            if machine.load(self._map) != number:
                raise Damaged("it does not begin as torch's files do")
        machine.load(self._map)  # about the machine that wrote it
        self.content = machine.load(self._map)
        self.storages = machine.storages
        self._places: dict[str, tuple[int, int]] = {}
        for key in machine.load(self._map):
            storage = self.storages.get(key) if type(key) is str else None
            if storage is None:
                raise Damaged("a storage is not described")
            count = int.from_bytes(self._map.read(8), "little")
            begin = self._map.tell()
            end = begin + storage.elements * storage.dtype.itemsize
            if count != storage.elements or end > size:
                raise Damaged("a storage has another size than its description")
            self._places[key] = begin, end
            self._map.seek(end)

    def size(self, key: str) -> int:
        begin, end = self._places[key]
        return end - begin

    def record(self, key: str) -> bytes:
        begin, end = self._places[key]
        return self._map[begin:end]

    def close(self) -> None:
        self._map.close()


def _damaged(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; whatever a damaged file makes it raise becomes ``Damaged``."""
    try:
        return function(*arguments)
    except (Refused, Damaged, MemoryError):
        raise
    except Exception as error:
        raise Damaged(quoted(str(error).split("\n")[0] or type(error).__name__)) from error
