"""Files of torch.save that were made to hurt: each costs little and is refused in a short sentence."""

import contextlib
import io
import pickle
import resource
import struct
import sys
import time
import warnings
import zipfile

import pytest
import torch
from qwt_mmdet.detectors import unpickling
from qwt_mmdet.detectors.checkpoint import load_checkpoint
from qwt_mmdet.detectors.unpickling import MAX_OPCODES, Damaged, Refused, StoredTensor, TorchFile
from qwt_mmdet.errors import QwtError

FLOATS = struct.pack("<4f", 1, 2, 3, 4)
COUNTED = struct.pack("<q", 4) + FLOATS


# --- Pickles by hand -----------------------------------------------------------------------------


def text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def whole(value: int) -> bytes:
    content = pickle.encode_long(value)
    return b"\x8b" + struct.pack("<I", len(content)) + content


def many(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def dictionary(*items: bytes) -> bytes:
    return b"}(" + b"".join(items) + b"u"


def storage(count: int = 4, kind: str = "FloatStorage", key: str = "0") -> bytes:
    module = "torch.storage" if kind == "UntypedStorage" else "torch"
    place = many(
        text("storage"), f"c{module}\n{kind}\n".encode(), text(key), text("cpu"), whole(count)
    )
    return place + b"Q"


def tensor(size=(4,), stride=(1,), offset=0, of: bytes | None = None) -> bytes:
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n"
        + many(
            of or storage(),
            whole(offset),
            many(*map(whole, size)),
            many(*map(whole, stride)),
            b"\x89",
            b"ccollections\nOrderedDict\n)R",
        )
        + b"R"
    )


def zipped(path, program: bytes, records=None, compression=zipfile.ZIP_STORED, extra=()):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two records of one name
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("a/data.pkl", b"\x80\x02" + program + b".")
            for key, content in {"0": FLOATS, **(records or {})}.items():
                archive.writestr(f"a/data/{key}", content)
            for name, content in extra:
                archive.writestr(name, content)
    return path


def legacy(path, program: bytes, content: bytes = COUNTED):
    # Here a storage is described by six values.
    program = program.replace(b"tQ", b"NtQ")
    before = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    path.write_bytes(
        b"".join(pickle.dumps(value, 2) for value in before)
        + b"\x80\x02"
        + program
        + b"."
        + pickle.dumps(["0"] if b"Q" in program else [], 2)
        + content
    )
    return path


WRITERS = {"zip": zipped, "legacy": legacy}


def nested(depth: int) -> bytes:
    return b")" + b"\x85" * depth


def doubled(times: int) -> bytes:
    """A tuple of 2^times leaves in 4 bytes per doubling: each holds the one before it twice."""
    return b")" + b"2\x86" * times


def refused(path) -> str:
    """The message of the error, after a check that it came cheaply and reads well."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(QwtError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    assert message.isprintable()
    assert len(message.replace(str(path), "")) < 600
    return message


# --- What they hold is read right ------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_pickle_by_hand_is_read(tmp_path, writer):
    path = writer(
        tmp_path / "a.pth", dictionary(text("w"), tensor((2, 2), (1, 2)), text("v"), tensor())
    )
    weights = load_checkpoint(path)
    assert weights["w"].tolist() == [[1, 3], [2, 4]]
    assert weights["v"].tolist() == [1, 2, 3, 4]
    with TorchFile(path) as file:
        assert file.content.keys() == {"w", "v"}
        assert isinstance(file.content["w"], StoredTensor)
        assert file.content["w"].nbytes == 16


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.uint8, torch.bool, torch.int64]
)
def test_every_type_and_view_is_as_torch_reads_it(tmp_path, zipped, dtype):
    base = torch.arange(24).to(dtype)
    state = {
        "view": base[2:8],
        "strided": base.view(4, 6)[::2, 1::2],
        "transposed": base.view(4, 6).T,
        "scalar": base[3],
        "empty": base[:0].view(0, 5),
    }
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    weights = load_checkpoint(tmp_path / "a.pth")
    for key, value in torch.load(tmp_path / "a.pth").items():
        assert weights[key].dtype == dtype
        assert torch.equal(weights[key], value)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_types_that_torch_saves_untyped(tmp_path, dtype):
    state = {"w": torch.arange(6).to(dtype).view(2, 3)}
    torch.save(state, tmp_path / "a.pth")
    found = load_checkpoint(tmp_path / "a.pth")["w"]
    assert found.dtype == dtype
    assert found.tolist() == state["w"].tolist()


@pytest.mark.parametrize("zipped", [True, False])
def test_tied_weights_share_their_memory_and_views_do_not(tmp_path, zipped):
    weight = torch.rand(100)
    state = {f"branch{number}": weight for number in range(50)} | {"part": weight[:10]}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = load_checkpoint(tmp_path / "a.pth")
    assert len({tensor.data_ptr() for tensor in found.values()}) == 2
    assert torch.equal(found["branch7"], weight)
    assert found["part"].untyped_storage().nbytes() == 40


def test_numbers_of_a_big_endian_machine(tmp_path):
    path = zipped(
        tmp_path / "a.pth",
        dictionary(text("w"), tensor()),
        {"0": struct.pack(">4f", 1, 2, 3, 4)},
        extra=[("a/byteorder", b"big")],
    )
    assert load_checkpoint(path)["w"].tolist() == [1, 2, 3, 4]


def test_ordered_dictionary_of_python_2(tmp_path):
    pairs = b"](]" + b"(" + text("w") + tensor() + b"ee"
    path = zipped(tmp_path / "a.pth", b"ccollections\nOrderedDict\n" + pairs + b"\x85R")
    assert load_checkpoint(path)["w"].tolist() == [1, 2, 3, 4]


# --- What they claim is not believed ---------------------------------------------------------------


UNBELIEVED = {
    "stride 0": dictionary(text("w"), tensor((700_000_000,), (0,))),
    "stride 0 in a matrix": dictionary(text("w"), tensor((30_000, 30_000), (0, 0))),
    "huge stride": dictionary(text("w"), tensor((2,), (10**12,))),
    "stride beyond 64 bits": dictionary(text("w"), tensor((1,), (2**70,))),
    "negative stride": dictionary(text("w"), tensor((4,), (-1,), 3)),
    "negative offset": dictionary(text("w"), tensor((1,), (1,), -1)),
    "negative size": dictionary(text("w"), tensor((-4,), (1,))),
    "offset beyond the storage": dictionary(text("w"), tensor((4,), (1,), 1)),
    "size that overflows": dictionary(text("w"), tensor((2**40, 2**40), (1, 1))),
    "empty, but of a size that overflows": dictionary(
        text("w"), tensor((0, 2**40, 2**40), (1, 1, 1))
    ),
    "more strides than sizes": dictionary(text("w"), tensor((2,), (1, 1))),
    "a thousand dimensions": dictionary(text("w"), tensor((1,) * 1000, (1,) * 1000)),
    "size of text": dictionary(
        text("w"),
        b"ctorch._utils\n_rebuild_tensor\n"
        + many(storage(), whole(0), many(text("4")), many(text("1")))
        + b"R",
    ),
    "storage larger than the file": dictionary(text("w"), tensor(of=storage(10**12))),
    "storage larger than its record": dictionary(text("w"), tensor((9,), of=storage(9))),
    "storage with a negative size": dictionary(text("w"), tensor(of=storage(-4))),
    "storage described twice": dictionary(
        text("v"), tensor(), text("w"), tensor((8,), of=storage(8, "HalfStorage"))
    ),
    "storage that is not there": dictionary(text("w"), tensor(of=storage(key="17"))),
    "storage of another folder": dictionary(text("w"), tensor(of=storage(key="../data.pkl"))),
    "storage of text": dictionary(text("w"), tensor(of=text("storage"))),
    "persistent id that is text": dictionary(text("w"), text("storage") + b"Q"),
    "persistent id as a line": dictionary(text("w"), b"Pstorage\n"),
    "persistent id that is deep": dictionary(text("w"), nested(20_000) + b"Q"),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("program", UNBELIEVED.values(), ids=UNBELIEVED)
def test_a_tensor_that_the_file_does_not_hold(tmp_path, program, writer):
    refused(writer(tmp_path / "a.pth", program))


AMPLIFIED = {
    "tuple nested through the memo as a key": dictionary(doubled(60), tensor()),
    "tuple nested through the memo as a value": dictionary(text("w"), doubled(60)),
    "tuple nested through the memo alone": doubled(60),
    "tuple 20,000 deep as a key": dictionary(nested(20_000), tensor()),
    "tuple 50,000 deep as a key": dictionary(nested(50_000), tensor()),
    "tuple 20,000 deep": nested(20_000),
    "list 50,000 deep": b"]" * 50_000 + b"a" * 49_999,
    "dictionary 20,000 deep": (b"}" + text("model")) * 20_000 + b"}" + b"s" * 20_000,
    "list in itself": b"]q\x00h\x00a",
    "dictionary in itself": b"}q\x00" + text("model") + b"h\x00s",
    "20 kB whole number as a key": dictionary(whole(1 << 160_000), tensor()),
    "20 kB whole number alone": whole(1 << 160_000),
    "20 kB whole number in digits": b"L" + b"9" * 20_000 + b"L\n",
    "whole number as a key": dictionary(whole(7), tensor()),
    "nothing as a key": dictionary(b"N", tensor()),
    "bytes as a key": dictionary(b"C\x01a", tensor()),
    "BUILD on an ordered dictionary": b"ccollections\nOrderedDict\n)R"
    + dictionary(text("keys"), b"N")
    + b"b",
    "BUILD with a number": b"ccollections\nOrderedDict\n)RK\x01b",
    "BUILD on a list": b"]" + dictionary(text("a"), b"N") + b"b",
    "BUILD on text": text("a") + dictionary(text("a"), b"N") + b"b",
    "ordered dictionary of numbers": b"ccollections\nOrderedDict\nK\x05\x85R",
    "ordered dictionary of itself": b"ccollections\nOrderedDict\n](h\x00e\x85R",
    "ordered dictionaries of one long list": b"]("
    + b"]K\x01K\x01\x86" * 5_000
    + b"eq\x000"
    + b"("
    + b"ccollections\nOrderedDict\nh\x00\x85R" * 2_000
    + b"l",
    "memo at the end of its range": b"Nr\xff\xff\xff\x7f.",
    "text of 8 exabytes": b"\x8d" + b"\xff" * 7 + b"\x7f" + b"a",
    "bytes of 8 exabytes": b"\x8e" + b"\xff" * 7 + b"\x7f" + b"a",
    "array of 8 exabytes": b"\x96" + b"\xff" * 7 + b"\x7f" + b"a",
    "frame of 8 exabytes": b"\x95" + b"\xff" * 7 + b"\x7f" + b"N",
    "number of 2 GB": b"\x8b\xff\xff\xff\x7f" + b"a",
    "stack that runs empty": b"0",
    "mark that is not there": b"t",
    "memo that is not there": b"h\x07",
    "rebuilt by itself": b"]q\x00(ctorch._tensor\n_rebuild_from_type_v2\nNh\x00Ne0"
    b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n_rebuild_from_type_v2\nNh\x00NtR",
    "storage as a function": b"ctorch\nFloatStorage\n)R",
    "text as a function": text("os.system") + b")R",
    "key of a megabyte": dictionary(text("k" * 1_000_000), b"N"),
    "key that controls the terminal": dictionary(text("\x1b[2J\r\n\u202e\ud800\0"), b"N"),
    "global with a name of a megabyte": b"c" + b"a" * 1_000_000 + b"\nb\n",
    "global that controls the terminal": b"\x8c\x04\x1b[2J\x8c\x02\r\x07\x93",
    "extension": b"\x82\x01",
    "sparse tensor": b"ctorch._utils\n_rebuild_sparse_tensor\n)R",
    "quantized tensor": b"ctorch._utils\n_rebuild_qtensor\n)R",
    "tensor without numbers": b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R",
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("program", AMPLIFIED.values(), ids=AMPLIFIED)
def test_a_pickle_that_would_cost_everything(tmp_path, program, writer):
    refused(writer(tmp_path / "a.pth", program))


def test_number_of_opcodes(tmp_path, monkeypatch):
    assert MAX_OPCODES > 20 * 40 * 1000  # a tensor takes some 40, a large optimizer 3 per weight
    monkeypatch.setattr(unpickling, "MAX_OPCODES", 1000)
    assert "more than 1000 opcodes" in refused(zipped(tmp_path / "a.pth", b"N0" * 500 + b"N"))


def test_a_hostile_value_beside_good_weights_costs_nothing(tmp_path):
    # An optimizer's state has whole numbers as keys; what is not needed is not looked at.
    for beside in (dictionary(whole(0), dictionary(text("step"), b"K\x01")), doubled(60)):
        program = dictionary(
            text("state_dict"), dictionary(text("w"), tensor()), text("optimizer"), beside
        )
        assert load_checkpoint(zipped(tmp_path / "a.pth", program)).keys() == {"w"}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_many_views_of_one_storage(tmp_path, writer):
    # 200 views take 200 times what the file's storage does.
    count = 50_000
    content = bytes(4 * count)
    of = storage(count)
    views = (text(f"w{n}") + tensor((count - n,), (1,), n, of) for n in range(200))
    program = dictionary(*views)
    if writer is zipped:
        path = zipped(tmp_path / "a.pth", program, {"0": content})
    else:
        path = legacy(tmp_path / "a.pth", program, struct.pack("<q", count) + content)
    assert "bytes, but the file has" in refused(path)


def test_compressed_records(tmp_path):
    path = zipped(
        tmp_path / "a.pth",
        dictionary(text("w"), tensor((10_000_000,), of=storage(10_000_000, "ByteStorage"))),
        {"0": bytes(10_000_000)},
        zipfile.ZIP_DEFLATED,
    )
    assert "compressed" in refused(path)


def test_records_that_overlap(tmp_path):
    count = 100_000
    path = zipped(
        tmp_path / "a.pth",
        dictionary(
            *(
                text(f"w{n}") + tensor((1,), (1,), 0, storage(count, "ByteStorage", str(n)))
                for n in range(20)
            )
        ),
        {"0": bytes(count)} | {str(n): b"" for n in range(1, 20)},
    )
    content = bytearray(path.read_bytes())
    first = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)
    entry = content[first : first + 46]
    place = first
    while (place := content.find(b"PK\x01\x02", place + 1)) >= 0:
        content[place + 16 : place + 28] = entry[16:28]  # checksum and sizes
        content[place + 42 : place + 46] = entry[42:46]  # where it lies
    path.write_bytes(content)
    assert "overlap" in refused(path).lower()


@pytest.mark.parametrize(
    "extra",
    [
        [("a/data.pkl", b"N.")],
        [("b/data.pkl", b"N.")],
        [("a/data/0", b"")],
        [("a/constants.pkl", b"")],
        [("a/byteorder", b"b" * 1000)],
    ],
)
def test_records_that_contradict_each_other(tmp_path, extra):
    path = zipped(tmp_path / "a.pth", dictionary(text("w"), tensor()), extra=extra)
    if extra[0][0].endswith("byteorder"):
        assert load_checkpoint(path)["w"].tolist() == [1, 2, 3, 4]
    else:
        refused(path)


def test_many_records_are_no_matter(tmp_path):
    extra = [(f"a/{n}", b"") for n in range(5_000)]
    path = zipped(tmp_path / "a.pth", dictionary(text("w"), tensor()), extra=extra)
    assert load_checkpoint(path)["w"].tolist() == [1, 2, 3, 4]


def test_zip64(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (
            ("a/data.pkl", b"\x80\x02" + dictionary(text("w"), tensor()) + b"."),
            ("a/data/0", FLOATS),
        ):
            with archive.open(name, "w", force_zip64=True) as record:
                record.write(content)
    assert load_checkpoint(path)["w"].tolist() == [1, 2, 3, 4]


def test_no_byte_of_a_file_makes_it_raise_anything_else(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {"a": torch.rand(3), "b": torch.rand(2, 2)}
    for is_zip in (True, False):
        stream = io.BytesIO()
        torch.save(state, stream, _use_new_zipfile_serialization=is_zip)
        for _ in range(150):
            content = bytearray(stream.getvalue())
            place = int(torch.randint(len(content), (), generator=generator))
            content[place] = int(torch.randint(256, (), generator=generator))
            (tmp_path / "a.pth").write_bytes(content)
            with (
                contextlib.suppress(Refused, Damaged),
                TorchFile(tmp_path / "a.pth") as file,
            ):
                content = file.content if isinstance(file.content, dict) else {}
                file.tensors({k: v for k, v in content.items() if isinstance(v, StoredTensor)})


def test_the_machine_makes_nothing(tmp_path, monkeypatch):
    # All of the library's names for objects stand for nothing: numpy itself is not touched.
    import numpy as np

    state = {"w": torch.ones(2), "extra": np.arange(3), "when": sys.version_info.major}
    torch.save(state, tmp_path / "a.pth")
    monkeypatch.setattr(pickle, "Unpickler", None)
    monkeypatch.setattr(pickle, "_Unpickler", None)
    assert load_checkpoint(tmp_path / "a.pth").keys() == {"w"}
