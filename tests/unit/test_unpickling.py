"""Files of torch.save that claim what they do not hold, or would run something: refused in a short sentence.

What would cost without end is left to torch: a tuple nested 60 times through the memo as a key, for one.
"""

import io
import pickle
import resource
import struct
import time
import zipfile

import pytest
import torch
from qwt_mmdet.detectors.checkpoint import load_checkpoint
from qwt_mmdet.errors import QwtError

FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content


def whole(value: int) -> bytes:
    content = pickle.encode_long(value)
    return b"\x8a" + bytes([len(content)]) + content


def many(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def dictionary(*items: bytes) -> bytes:
    return b"}(" + b"".join(items) + b"u"


def storage(count: int = 4, kind: str = "FloatStorage", key: str = "0") -> bytes:
    of = f"ctorch\n{kind}\n".encode()
    return many(text("storage"), of, text(key), text("cpu"), whole(count)) + b"Q"


def tensor(size=(4,), stride=(1,), offset=0, of: bytes | None = None) -> bytes:
    shape = many(*map(whole, size)), many(*map(whole, stride))
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = many(of or storage(), whole(offset), *shape, b"\x89", hooks)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def zipped(path, program: bytes, content=FLOATS, compression=zipfile.ZIP_STORED, extra=()):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/version", b"3\n")
        archive.writestr("a/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("a/data/0", content)
        for name, content in extra:
            archive.writestr(name, content)
    return path


def legacy(path, program: bytes, content=FLOATS):
    program = program.replace(b"tQ", b"NtQ")  # here a storage is described by six values
    before = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    keys = pickle.dumps(["0"] if b"Q" in program else [], 2)
    head = b"".join(pickle.dumps(value, 2) for value in before) + b"\x80\x02" + program + b"."
    path.write_bytes(head + keys + struct.pack("<q", len(content) // 4) + content)
    return path


WRITERS = {"zip": zipped, "legacy": legacy}


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


either_writer = pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
either_format = pytest.mark.parametrize("zipped", [True, False])


@either_writer
def test_a_pickle_by_hand_is_read(tmp_path, writer):
    program = dictionary(text("w"), tensor((2, 2), (1, 2)), text("v"), tensor())
    weights = load_checkpoint(writer(tmp_path / "a.pth", program))
    assert weights["w"].tolist() == [[1, 3], [2, 4]]
    assert weights["v"].tolist() == [1, 2, 3, 4]


TYPES = ("bfloat16", "float64", "uint8", "bool", "int64")
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")  # torch's first format has none such


@pytest.mark.parametrize(
    ("name", "zipped"), [(name, z) for z in (True, False) for name in TYPES + EIGHT_BITS * z]
)
def test_every_type_and_view_is_as_torch_reads_it(tmp_path, zipped, name):
    base = torch.arange(24).to(getattr(torch, name))
    table = base.view(4, 6)
    state = {"view": base[2:8], "strided": table[::2, 1::2], "transposed": table.T}
    state |= {"scalar": base[3], "empty": base[:0].view(0, 5)}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    weights = load_checkpoint(tmp_path / "a.pth")
    for key, value in state.items():
        assert weights[key].dtype == base.dtype
        assert weights[key].tolist() == value.tolist()
        assert weights[key].is_contiguous()


@either_format
def test_tied_weights_share_their_memory_and_views_do_not(tmp_path, zipped):
    weight = torch.rand(100)
    state = {f"branch{number}": weight for number in range(50)} | {"part": weight[:10]}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    found = load_checkpoint(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(b"")  # nothing lies in the file any more
    assert len({tensor.data_ptr() for tensor in found.values()}) == 2
    assert torch.equal(found["branch7"], weight)
    assert found["part"].untyped_storage().nbytes() == 40


def test_numbers_of_a_big_endian_machine(tmp_path):
    program = dictionary(text("w"), tensor())
    numbers = struct.pack(">4f", 1, 2, 3, 4)
    path = zipped(tmp_path / "a.pth", program, numbers, extra=[("a/byteorder", b"big")])
    assert load_checkpoint(path)["w"].tolist() == [1, 2, 3, 4]


BAD = "truncated or damaged"
PROTOCOL = "another pickle protocol than 2"
OF_ONE_TENSOR = {
    "stride 0": (tensor((700_000_000,), (0,)), "bytes, but the file has"),
    "huge stride": (tensor((2,), (10**12,)), BAD),
    "stride beyond 64 bits": (tensor((1,), (2**70,)), BAD),
    "negative stride": (tensor((4,), (-1,), 3), BAD),
    "negative offset": (tensor((1,), (1,), -1), BAD),
    "negative size": (tensor((-4,), (1,)), BAD),
    "offset beyond the storage": (tensor((4,), (1,), 1), BAD),
    "size that overflows": (tensor((2**40, 2**40), (1, 1)), BAD),
    "more strides than sizes": (tensor((2,), (1, 1)), BAD),
    "storage with a negative size": (tensor(of=storage(-4)), BAD),
    "storage that is not there": (tensor(of=storage(key="17")), BAD),
    "storage of text": (tensor(of=text("storage")), BAD),
    "persistent id that is text": (text("storage") + b"Q", BAD),
}
PROGRAMS = {
    name: (dictionary(text("w"), of), said) for name, (of, said) in OF_ONE_TENSOR.items()
} | {
    "tuple 20,000 deep": (b")" + b"\x85" * 20_000, "no weights but a tuple"),
    "list 50,000 deep": (b"]" * 50_000 + b"a" * 49_999, "no weights but a list"),
    "list in itself": (b"]q\x00h\x00a", "no weights but a list"),
    "dictionary in itself": (b"}q\x00" + text("model") + b"h\x00s", "no weights but a dictionary"),
    "whole number as a key": (dictionary(whole(7), tensor()), "with a whole number as a key"),
    "nothing as a key": (dictionary(b"N", tensor()), r"with nothing (None) as a key"),
    "20 kB whole number": (b"L" + b"9" * 20_000 + b"L\n", PROTOCOL),
    "text of 8 exabytes": (b"\x8d" + b"\xff" * 7 + b"\x7f" + b"a", PROTOCOL),
    "number of 2 GB": (b"\x8b\xff\xff\xff\x7f" + b"a", PROTOCOL),
    "extension": (b"\x82\x01", PROTOCOL),
    "BUILD on a list": (b"]" + dictionary(text("a"), b"N") + b"b", BAD),
    "ordered dictionary of numbers": (b"ccollections\nOrderedDict\nK\x05\x85R", BAD),
    "mark that is not there": (b"t", BAD),
    "memo that is not there": (b"h\x07", BAD),
    "text as a function": (text("os.system") + b")R", BAD),
    "stub as a function that is altered": (b"cargparse\nNamespace\n}U\x01aK\x01sb", BAD),
    "key of a megabyte": (dictionary(text("k" * 1_000_000), b"N"), "(1000000 characters)"),
    "key that controls the terminal": (dictionary(text("\x1b[2J\r\u202e"), b"N"), r"\x1b[2J\r\u2"),
    "global that controls the terminal": (b"c\x1b[2J\nx\n", r"refers to \x1b[2J.x,"),
    "sparse tensor": (b"ctorch._utils\n_rebuild_sparse_tensor\n)R", BAD),
}


@either_writer
@pytest.mark.parametrize(("program", "said"), PROGRAMS.values(), ids=PROGRAMS)
def test_what_a_file_claims_is_not_believed(tmp_path, program, said, writer):
    assert said in refused(writer(tmp_path / "a.pth", program))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.eye(2).to_sparse(), "odd (sparse_coo)"),
        (lambda: torch.ones(2, device="meta"), "odd (without numbers)"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "odd (complex64)"),
    ],
)
def test_tensors_that_are_not_dense_numbers_are_named(tmp_path, make, said):
    torch.save({"w": torch.ones(1), "odd": make()}, tmp_path / "a.pth")
    assert said in refused(tmp_path / "a.pth")


@either_writer
def test_many_views_of_one_storage(tmp_path, writer):
    # 200 views take 200 times what the file's storage does.
    count = 50_000
    views = (text(f"w{n}") + tensor((count - n,), (1,), n, storage(count)) for n in range(200))
    path = writer(tmp_path / "a.pth", dictionary(*views), bytes(4 * count))
    assert "bytes, but the file has" in refused(path)


def test_compressed_records(tmp_path):
    program = dictionary(text("w"), tensor((10_000_000,), of=storage(10_000_000, "ByteStorage")))
    path = zipped(tmp_path / "a.pth", program, bytes(10_000_000), zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path)


def test_records_that_overlap(tmp_path):
    path = zipped(tmp_path / "a.pth", dictionary(text("w"), tensor()), bytes(100_000))
    content = bytearray(path.read_bytes())
    last = content.rindex(b"PK\x01\x02")
    middle = content.rindex(b"PK\x01\x02", 0, last)
    content[middle + 16 : middle + 28] = content[last + 16 : last + 28]  # checksum and sizes
    content[middle + 42 : middle + 46] = content[last + 42 : last + 46]  # where it lies
    path.write_bytes(content)
    assert "overlap" in refused(path)


def test_zip64(tmp_path):
    path = tmp_path / "a.pth"
    program = b"\x80\x02" + dictionary(text("w"), tensor()) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("version", b"3\n"), ("data.pkl", program), ("data/0", FLOATS)):
            with archive.open(f"a/{name}", "w", force_zip64=True) as record:
                record.write(content)
    assert load_checkpoint(path)["w"].tolist() == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_byte_of_a_file_that_changes_is_noticed_or_harmless(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noticed = {}
    for is_zip in (True, False):
        stream = io.BytesIO()
        state = {"a": torch.ones(3), "b": torch.ones(2, 2)}
        torch.save(state, stream, _use_new_zipfile_serialization=is_zip)
        noticed[is_zip] = 0
        for _ in range(150):
            content = bytearray(stream.getvalue())
            place = int(torch.randint(len(content), (), generator=generator))
            content[place] ^= 1 << int(torch.randint(8, (), generator=generator))
            (tmp_path / "a.pth").write_bytes(content)
            try:
                load_checkpoint(tmp_path / "a.pth")
            except QwtError:
                noticed[is_zip] += 1
    assert min(noticed.values()) > 30
