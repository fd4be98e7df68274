"""Checkpoints: what is read, what is refused, and that nothing of a refused file ever runs."""

import datetime
import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import struct
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from flaky_server import Drop, FlakyServer, Status
from qwt_mmdet.detectors.checkpoint import load_checkpoint
from qwt_mmdet.detectors.weights import check_keys, load_weights
from qwt_mmdet.errors import QwtError
from qwt_mmdet.steps.fetch import fetch_checkpoint
from safetensors.torch import save_file
from torch import nn

pytestmark = pytest.mark.usefixtures("local_server")

CLASSES = ("person", "bicycle", "traffic light")


def small_state() -> OrderedDict:
    generator = torch.Generator().manual_seed(0)
    return OrderedDict(
        {
            "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
            "bn.running_var": torch.rand(4, generator=generator),
            "bn.num_batches_tracked": torch.tensor(7),
            "table": torch.randn(100, 100, generator=generator),
            "half": torch.randn(5, generator=generator).half(),
            "mask": torch.tensor([True, False]),
        }
    )


def prefixed(prefix: str, state: dict | None = None) -> dict:
    return {prefix + key: value for key, value in (state or small_state()).items()}


def openmmlab_checkpoint() -> dict:
    """What MMEngine's CheckpointHook writes after an epoch, in small."""
    from mmengine.logging import HistoryBuffer

    state = small_state()
    losses = HistoryBuffer()
    for value in (0.5, 0.25):
        losses.update(value)
    parameter = nn.Parameter(state["conv.weight"].clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    meta = {
        "epoch": 12, "seed": np.int64(3), "cfg": "model = dict(type='RetinaNet')",
        "time": datetime.datetime(2023, 1, 1), "work_dir": pathlib.PosixPath("work_dirs"),
        "dataset_meta": {"classes": CLASSES, "palette": [(1, 2, 3)]},
    }  # fmt: skip
    runtime = {
        "iter": 5, "lr": np.float64(0.1), "dtype": np.dtype("float32"), "type": torch.float16,
        "shape": torch.Size([1, 2]), "device": torch.device("cpu"), "bytes": b"\xff\x00",
        "table": np.arange(6.0).reshape(2, 3), "names": np.array(["a", "b"]), "set": {1, 2},
        "objects": np.array([None, "x"], dtype=object), "last": deque([1, 2], 5),
        "counts": defaultdict(list, {"a": [1]}),
    }  # fmt: skip
    return {
        "meta": meta,
        "state_dict": state,
        "message_hub": {
            "log_scalars": OrderedDict({"train/loss": losses}),
            "runtime_info": OrderedDict(runtime),
            "resumed_keys": {"train/loss": True},
        },
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [{"last_step": 3, "_last_lr": [np.float32(0.1)]}],
    }


def rewrite(path: pathlib.Path, old: bytes, new: bytes) -> None:
    """Replace bytes in the pickle of a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if name.endswith("data.pkl"):
                assert old in content
                content = content.replace(old, new)
            archive.writestr(name, content)


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert type(found[key]) is torch.Tensor
        assert found[key].dtype == value.dtype
        assert not found[key].requires_grad
        torch.testing.assert_close(found[key], value.detach(), rtol=0, atol=0)


@pytest.fixture
def loaded(tmp_path):
    """What is loaded of a content that was saved."""

    def save_and_load(content, **options):
        torch.save(content, tmp_path / "a.pth", **options)
        return load_checkpoint(tmp_path / "a.pth")

    return save_and_load


@pytest.mark.parametrize("numpy_version", [1, 2])
def test_openmmlab_file_with_history_and_numpy_objects(tmp_path, numpy_version):
    path = tmp_path / "epoch_12.pth"
    torch.save(openmmlab_checkpoint(), path)
    if numpy_version == 1:
        rewrite(path, b"cnumpy._core.", b"cnumpy.core.")
    with pytest.raises(pickle.UnpicklingError):  # torch's own allow-list refuses such files
        torch.load(path, weights_only=True)
    assert_same(load_checkpoint(path), small_state())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_only_the_pickle_protocol_of_torch_is_read_in_both_formats(loaded, protocol, zipped):
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    if protocol == 2:
        assert_same(loaded(openmmlab_checkpoint(), **options), small_state())
        return
    with (
        pytest.warns(UserWarning, match=f"pickle protocol {protocol}"),
        pytest.raises(QwtError, match="another pickle protocol than 2"),
    ):
        loaded(openmmlab_checkpoint(), **options)


def test_parameters_become_plain_tensors(loaded):
    special = nn.Parameter(torch.ones(3))
    special.note = "attribute"  # makes torch save it by another function
    state = {"parameter": nn.Parameter(torch.ones(2, 2)), "special": special}
    assert_same(loaded(state), state)


def test_raw_copies_beside_averaged_weights_go(loaded):
    """A parameter that only looks like one stays."""
    state = small_state() | {"ema_decay": torch.tensor(0.5)}
    copies = {"ema_" + key.replace(".", "_"): value + 1 for key, value in small_state().items()}
    assert_same(loaded({"state_dict": state | copies}), state)


@pytest.mark.parametrize(
    "state",
    [
        prefixed("module."),
        {"n_averaged": torch.tensor(9)} | prefixed("module."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod."),
    ],
    ids=["parallel", "averaged", "compiled and parallel", "compiled"],
)
def test_wrappers_go(loaded, state, caplog):
    caplog.set_level("INFO")
    assert_same(loaded(state), small_state())
    assert "removed the prefix" in caplog.text


def test_averaged_models_of_torch_and_mmengine(tmp_path):
    from mmengine.model import ExponentialMovingAverage

    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    for averaged in (torch.optim.swa_utils.AveragedModel(model), ExponentialMovingAverage(model)):
        torch.save({"state_dict": averaged.state_dict()}, tmp_path / "a.pth")
        loaded = load_checkpoint(tmp_path / "a.pth")
        assert_same(loaded, model.state_dict())
        assert loaded._metadata["1"] == {"version": 2}  # of the batch normalization's keys
        fetch_checkpoint(tmp_path / "a.pth", tmp_path / "b.pth")
        again = torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]
        assert again._metadata == loaded._metadata


GOOD = small_state()
RAW = OrderedDict((k, v + 1 if v.is_floating_point() else v) for k, v in GOOD.items())
NUMBERED = {0: torch.ones(1), "a": torch.ones(1)}
OF_MMENGINE = {"steps": torch.tensor(4)} | prefixed("module.", RAW)


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        (GOOD, None),
        ({"model": GOOD, "epoch": 3}, None),
        ({"model": RAW, "ema": {"module": GOOD, "updates": 7}}, r"ema\.module"),
        ({"state_dict": RAW, "state_dict_ema": GOOD}, "state_dict_ema"),
        ({"model": RAW, "model_ema": GOOD}, "model_ema"),
        ({"params": RAW, "params_ema": GOOD}, "params_ema"),
        ({"state_dict": RAW, "ema_state_dict": GOOD}, "ema_state_dict"),
        ({"ema": {"state_dict": GOOD}}, None),
        ({"module": GOOD, "ds_version": "1"}, None),
        ({"state_dict": GOOD, "ema_state_dict": 5, "ema": {}}, None),
        ({"state_dict": GOOD, "net": NUMBERED}, "state_dict"),
        ({"model": {"state_dict": GOOD}, "step": torch.tensor(3)}, None),
        ({"state_dict": GOOD, "ema": small_state()}, "ema"),
        # as MMEngine's hook leaves it: the average lies in state_dict
        ({"state_dict": GOOD, "ema_state_dict": OF_MMENGINE}, "state_dict, since MMEngine"),
        (
            {"model": GOOD, "ema": {"conv.weight": torch.ones(1)}},
            "model, since ema is not complete",
        ),
    ],
)
def test_of_two_sets_of_weights_the_log_says_which_is_taken(loaded, content, taken, caplog):
    assert_same(loaded(content), GOOD)
    if taken is None:
        assert "taken from" not in caplog.text
    else:
        said = f"weights are taken from {taken}.*save {{'state_dict': checkpoint"
        assert re.search(said, caplog.text)


def test_safetensors_file(tmp_path):
    path = tmp_path / "a.safetensors"
    state = small_state() | {"b": torch.ones(2).bfloat16()}
    meta = {"classes": json.dumps(CLASSES), "format": "pt"}
    save_file(prefixed("module.", state), path, metadata=meta)
    assert_same(dict(sorted(load_checkpoint(path).items())), dict(sorted(state.items())))
    fetch_checkpoint(path, tmp_path / "out.pth", sha256=digest(path))
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert written["meta"]["classes"] == list(CLASSES)
    assert written["meta"]["sha256"] == digest(path)
    wrong = path.rename(tmp_path / "a-deadbeef.safetensors")
    with pytest.raises(QwtError, match="its name says deadbeef"):
        fetch_checkpoint(wrong, tmp_path / "wrong.pth")


def safetensors(header: str | bytes, data: bytes = bytes(16), size: int | None = None) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if size is None else size) + header + data


LARGE = '{"w": {"dtype": "F32", "shape": [700000000], "data_offsets": [0, 16]}}'
BROKEN = {
    "empty": b"",
    "one byte": b"{",
    "header of 8 exabytes": safetensors("{}", size=2**63),
    "header that ends early": safetensors('{"w": '),
    "deep header": safetensors("[" * 100_000),
    "header that is no UTF-8": safetensors(b"\xff\xfe{}"),
    "number for a tensor": safetensors('{"w": 1}'),
    "shape larger than its range": safetensors(LARGE),
    "too little data": safetensors(LARGE.replace("700000000", "4"), bytes(15)),
    "metadata alone": safetensors('{"__metadata__": {"format": "pt"}}', b""),
    "web page": b"<!DOCTYPE html><html>",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_safetensors_file(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    message = r"a\.safetensors.* (holds no weights|is empty|damaged)"
    with pytest.raises(QwtError, match=message) as caught:
        load_checkpoint(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ("nan", torch.float32),
        ("inf", torch.float16),
        ("-inf", torch.bfloat16),
        ("nan", torch.float8_e4m3fn),
    ],
)
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    bad = torch.full((12, 3), float(value))
    bad[0, 1:] = 0
    state = {f"bad{n}": row for n, row in enumerate(bad.to(dtype))}
    torch.save(small_state() | state, tmp_path / "a.pth")
    message = r"a\.pth has 12 tensors with NaN .*: bad0 \(1 of 3\), bad1 \(3 of 3\), .*, and 2 more"
    with pytest.raises(QwtError, match=message):
        fetch_checkpoint(tmp_path / "a.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.uint16, torch.uint64, torch.float4_e2m1fn_x2]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_types_that_no_weights_have_are_named(tmp_path, dtype, suffix):
    odd = torch.zeros(4, dtype=torch.uint8 if dtype.itemsize == 1 else dtype).view(dtype)
    save = torch.save if suffix == ".pth" else save_file
    save(small_state() | {"odd": odd}, tmp_path / f"a{suffix}")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(QwtError, match=rf"1 tensors of types .*: odd \({name}\)"):
        load_checkpoint(tmp_path / f"a{suffix}")


def test_a_negative_variance_is_named(loaded):
    state = {"bn1.running_var": torch.ones(3), "bn2.running_var": torch.tensor([1.0, -0.5, 2.0])}
    with pytest.raises(QwtError, match=r"below 0: bn2\.running_var \(-0\.5\)\. "):
        loaded(small_state() | state)


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.made_by = function, arguments

    def __reduce__(self):
        return self.made_by


NAMED = r"evil\.pth was refused: it refers to (posix|nt)\.system"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("zip", NAMED),
        ("legacy", NAMED),
        (0, "is not a PyTorch checkpoint"),
        (2, NAMED),
        (4, "another pickle protocol than 2"),
    ],
)
def test_system_call_is_refused_and_not_run(tmp_path, how, said):
    trace, path, output = tmp_path / "trace", tmp_path / "evil.pth", tmp_path / "out.pth"
    call = Calls(os.system, f"touch {trace}")
    if how in ("zip", "legacy"):
        content = {"state_dict": small_state(), "optimizer": call}
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    else:
        path.write_bytes(pickle.dumps({"state_dict": {}, "optimizer": call}, protocol=how))
    for read in (load_checkpoint, lambda path: fetch_checkpoint(path, output)):
        with pytest.raises(QwtError, match=said):
            read(path)
        assert not trace.exists()
    assert not output.exists()


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (eval, ("1",), "builtins.eval"),
        (getattr, (nn.Linear, "forward"), "torch.nn.modules.linear.Linear"),
        (open, ("trace", "w"), "io.open"),
        (np.load, ("x.npy",), "numpy.load"),
        (torch.load, ("x.pth",), "torch.serialization.load"),
        (torch.hub.load, ("x", "y"), "torch.hub.load"),
        (type, ("X", (), {}), "builtins.type"),
    ],
)
def test_name_of_the_refused_global(tmp_path, monkeypatch, function, arguments, name):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": small_state(), "x": Calls(function, *arguments)}, "evil.pth")
    with pytest.raises(QwtError, match=f"refers to {name}, "):
        load_checkpoint("evil.pth")
    assert os.listdir(tmp_path) == ["evil.pth"]


def test_module_that_runs_on_import_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "runs_on_import.py").write_text("open('trace', 'w')\ndef f(): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("runs_on_import\nf", "numpy.dtypes\nruns_on_import.f"):
        pathlib.Path("evil.pth").write_bytes(b"\x80\x02c" + name.encode() + b"\n)R.")
        with pytest.raises(QwtError, match="refused"):
            load_checkpoint("evil.pth")
    assert not pathlib.Path("trace").exists()
    assert "runs_on_import" not in sys.modules


def test_what_stands_for_getattr_gets_nothing(loaded):
    content = {"state_dict": small_state(), "x": Calls(getattr, "", "join")}
    assert_same(loaded(content), small_state())


@pytest.mark.parametrize(
    ("name", "known"),
    [
        (b"mmcv.utils.config\nConfigDict", True),
        (b"addict.addict\nDict", True),
        (b"collections\ndefaultdict", True),
        (b"no_such_package\nDict", False),
    ],
)
def test_dictionaries_of_classes_that_may_not_be_installed(tmp_path, name, known):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": small_state(), "x": "HERE"}, path)
    # An object without arguments, an item of it, then its attributes.
    rewrite(path, b"X\x04\x00\x00\x00HERE", b"c" + name + b"\n)\x81U\x01aK\x01s}U\x01bK\x01sb")
    if known:
        assert_same(load_checkpoint(path), small_state())
    else:
        with pytest.raises(QwtError, match=r"refers to no_such_package\.Dict"):
            load_checkpoint(path)


def test_a_whole_model_is_refused_by_the_name_of_its_class(loaded):
    with pytest.raises(QwtError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        loaded({"model": nn.Linear(2, 2)})


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants torch.export to be used instead
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "a.pth"))
    with pytest.raises(QwtError, match="refused: it refers to TorchScript code"):
        load_checkpoint(tmp_path / "a.pth")


def test_functions_on_the_list_cannot_be_altered(tmp_path, loaded):
    # BUILD with a state on the global itself, as object.__reduce__ would never write it.
    targets = "torch._utils\n_rebuild_tensor_v2", "collections\nOrderedDict", "argparse\nNamespace"
    for target in targets:
        program = b"c" + target.encode() + b"\nN}U\x05extraK\x01s\x86b"
        (tmp_path / "b.pth").write_bytes(b"\x80\x02" + program + b".")
        with pytest.raises(QwtError, match=r"b\.pth"):
            load_checkpoint(tmp_path / "b.pth")
    assert not hasattr(torch._utils._rebuild_tensor_v2, "extra")
    assert_same(loaded(small_state()), small_state())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.999, 0.9, 0.5, 0.05])
def test_truncated_file(tmp_path, zipped, kept):
    path = tmp_path / "cut.pth"
    torch.save(openmmlab_checkpoint(), path, _use_new_zipfile_serialization=zipped)
    size = int(path.stat().st_size * kept)
    os.truncate(path, size)
    message = rf"cut\.pth \({size} bytes\) is truncated or damaged.*Get the whole file again"
    with pytest.raises(QwtError, match=message):
        load_checkpoint(path)


def test_flipped_bit_in_a_weight(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(small_state(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(QwtError, match=r"is truncated or damaged \(Bad CRC-32 .*data/"):
        load_checkpoint(path)


def tar_file() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "is not a PyTorch checkpoint; it begins with b'<!DOCTYPE html"),
        (bytes(1000), "is not a PyTorch checkpoint"),
        (tar_file(), "it is a tar file"),
    ],
    ids=["empty", "page", "zeros", "tar"],
)
def test_file_that_is_no_checkpoint(tmp_path, content, problem):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(QwtError, match=problem):
        load_checkpoint(tmp_path / "a.pth")


def test_missing_file(tmp_path):
    for call in (load_checkpoint, lambda path: fetch_checkpoint(path, tmp_path / "out.pth")):
        with pytest.raises(QwtError, match=r"absent\.pth does not exist; check the path"):
            call(tmp_path / "absent.pth")


NO_TEXT = "a name in state_dict is {}.* where only a text"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.ones(1), 7: torch.ones(1)}}, NO_TEXT.format("a whole number")),
        ({"state_dict": {"a": torch.ones(1), ("a",): torch.ones(1)}}, NO_TEXT.format("a tuple")),
        ({"state_dict": {"a": torch.ones(1), None: torch.ones(1)}}, NO_TEXT.format("nothing")),
        ({"epoch": 3, "network": {}}, r"a\.pth holds no weights"),
        ([1, 2], r"a\.pth holds no weights"),
        ({"state_dict": {}}, r"a\.pth holds no weights"),
    ],
)
def test_file_without_weights(loaded, content, message):
    with pytest.raises(QwtError, match=message):
        loaded(content)


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def checkpoint(tmp_path) -> pathlib.Path:
    path = tmp_path / "source" / "retinanet.pth"
    path.parent.mkdir()
    torch.save(openmmlab_checkpoint(), path)
    return path


def test_fetched_file_holds_the_weights_and_where_they_are_from(tmp_path, checkpoint):
    """It has the same bytes every time."""
    output = tmp_path / "out" / "checkpoint.pth"
    sha256 = digest(checkpoint)
    fetch_checkpoint(checkpoint, output, sha256=sha256.upper())
    written = torch.load(output, weights_only=True)
    assert written.keys() == {"state_dict", "meta"}
    meta = {"source": str(checkpoint), "sha256": sha256, "classes": list(CLASSES)}
    assert written["meta"] == meta
    assert_same(written["state_dict"], small_state())
    assert_same(load_checkpoint(output), small_state())
    assert os.listdir(output.parent) == ["checkpoint.pth"]
    fetch_checkpoint(checkpoint, tmp_path / "again.pth")
    assert digest(tmp_path / "again.pth") == digest(output)


@pytest.mark.parametrize(
    ("suffix", "meta", "classes"),
    [
        ("pth", {"dataset_meta": {"CLASSES": ("a", "b")}}, ["a", "b"]),
        ("pth", {"CLASSES": ["a"]}, ["a"]),
        ("pth", {"dataset_meta": {"classes": "person"}}, ["person"]),
        ("pth", {"dataset_meta": {"classes": None}}, None),
        ("pth", {}, None),
        ("safetensors", {"dataset_meta": '{"classes": ["a", "b"]}'}, ["a", "b"]),
        ("safetensors", {"meta": '{"CLASSES": ["a"]}'}, ["a"]),
        ("safetensors", {"classes": "[" * 100_000}, None),
        ("safetensors", {"classes": "1" * 100_000}, None),
        ("safetensors", {"classes": "a, b"}, None),
        ("safetensors", {"classes": '["a", 1]'}, None),
        ("safetensors", {}, None),
    ],
)
def test_class_names(tmp_path, suffix, meta, classes):
    path, state = tmp_path / f"a.{suffix}", {"w": torch.ones(1)}
    if suffix == "pth":
        torch.save({"meta": meta, "state_dict": state}, path)
    else:
        save_file(state, path, metadata=meta)
    fetch_checkpoint(path, tmp_path / "out.pth")
    assert torch.load(tmp_path / "out.pth", weights_only=True)["meta"]["classes"] == classes


def test_wrong_sha256_of_a_path(tmp_path, checkpoint):
    with pytest.raises(QwtError, match=rf"sha256 {digest(checkpoint)}.*{'1' * 64}"):
        fetch_checkpoint(checkpoint, tmp_path / "out.pth", sha256="1" * 64)
    with pytest.raises(QwtError, match=r"'abc' .* is not 64 hexadecimal digits"):
        fetch_checkpoint(checkpoint, tmp_path / "out.pth", sha256="abc")
    assert not (tmp_path / "out.pth").exists()
    assert checkpoint.exists()


def test_digits_in_an_openmmlab_name(tmp_path, checkpoint, caplog):
    good = checkpoint.rename(checkpoint.with_name(f"a-{digest(checkpoint)[:8]}.pth"))
    fetch_checkpoint(good, tmp_path / "out.pth")
    bad = good.rename(good.with_name("retinanet_coco_20200130-deadbeef.pth"))
    with pytest.raises(QwtError, match=rf"{digest(bad)}, but its name says deadbeef"):
        fetch_checkpoint(bad, tmp_path / "bad.pth")
    assert not (tmp_path / "bad.pth").exists()
    fetch_checkpoint(bad, tmp_path / "bad.pth", sha256=digest(bad))  # the config decides
    assert "not the one in its own name (deadbeef)" in caplog.text
    fetch_checkpoint(bad.rename(bad.with_name("my-20240131.pth")), tmp_path / "date.pth")


def test_fetch_over_a_bad_connection(tmp_path, checkpoint):
    source = checkpoint.rename(checkpoint.with_name(f"a-{digest(checkpoint)[:8]}.pth"))
    output = tmp_path / "out" / "checkpoint.pth"
    with FlakyServer(folder=source.parent) as server:
        server.plan[source.name] += [Status(503), Drop(20_000), Status(500)]
        address = server.base.replace("://", "://user:secret@") + f"/{source.name}?token=secret"
        fetch_checkpoint(address, output, sha256=digest(source))
        assert len(server.requests) == 4
        found = re.fullmatch(r"bytes=(\d+)-", server.requests[-1][1])
        assert 0 < int(found[1]) <= 20_000  # it goes on where the connection broke
    meta = torch.load(output, weights_only=True)["meta"]
    assert meta["source"] == server.url(source.name)
    assert os.listdir(output.parent) == ["checkpoint.pth"]


def test_wrong_sha256_of_an_address(tmp_path, checkpoint):
    output = tmp_path / "out" / "checkpoint.pth"
    with FlakyServer(folder=checkpoint.parent) as server:
        with pytest.raises(QwtError, match=rf"{digest(checkpoint)}.*{'1' * 64}"):
            fetch_checkpoint(server.url(checkpoint.name), output, sha256="1" * 64)
        checkpoint.rename(checkpoint.with_name("a-deadbeef.pth"))
        with pytest.raises(QwtError, match="its name says deadbeef"):
            fetch_checkpoint(server.url("a-deadbeef.pth"), output)
    assert [path for path in output.parent.rglob("*") if path.is_file()] == []


def test_address_of_no_file(tmp_path):
    with pytest.raises(QwtError, match="names no file"):
        fetch_checkpoint("https://host/", tmp_path / "out.pth")


def state(**shapes) -> dict:
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


def test_fitting_keys_pass_whatever_the_batch_counters():
    model = state(conv__weight=(2, 3), bn__num_batches_tracked=(), bn__weight=(2,))
    check_keys(model, state(bn__weight=(2,), conv__weight=(2, 3)), "a")
    check_keys(state(a=(1,)), state(a=(1,), bn__num_batches_tracked=()), "a")


def test_keys_that_do_not_fit_are_listed_by_kind():
    model = state(backbone__a=(2,), backbone__b=(2,), head__weight=(80, 4))
    checkpoint = state(backbone__a=(2,), extra__c=(1,), head__weight=(3, 4))
    with pytest.raises(QwtError) as caught:
        check_keys(model, checkpoint, "w.pth does not fit swin.py")
    *lines, remedy = str(caught.value).split("\n")
    assert lines == [
        "w.pth does not fit swin.py:",
        "  missing in the checkpoint (1): backbone.b",
        "  unexpected in the checkpoint (1): extra.c",
        "  of another shape (1): head.weight (checkpoint (3, 4), model (80, 4))",
    ]
    assert "another architecture" in remedy


OLD_MODEL = "tools/model_converters/upgrade_model_version.py"


@pytest.mark.parametrize(
    ("model", "checkpoint", "remedy"),
    [
        ({"cls": 80}, {"cls": 3}, "num_classes"),
        ({"a": 1}, {"backbone.extra.0.weight": 1}, "tools/model_converters/upgrade_ssd_version.py"),
        ({"a": 1}, {"bbox_head.fc_cls.weight": 1}, OLD_MODEL),
        ({"a": 1}, {"bbox_head.cls_convs.0.weight": 1}, OLD_MODEL),
        (dict.fromkeys(map(str, range(25)), 1), {}, r"missing .* \(25\): 0, .*, 9, and 15 more\n"),
    ],
)
def test_the_message_shows_the_remedy_and_ten_names(model, checkpoint, remedy):
    with pytest.raises(QwtError, match=remedy):
        check_keys(*({k: torch.ones(n) for k, n in s.items()} for s in (model, checkpoint)), "a")


def small_model() -> nn.Module:
    return nn.Sequential(OrderedDict(backbone=nn.Linear(2, 3), head=nn.BatchNorm1d(3)))


def equal(first: dict, second: dict) -> bool:
    return all(torch.equal(first[key], second[key]) for key in second)


@pytest.mark.parametrize("prefix", ["model.", "net.", "model.detector.", "pl_module.net.model."])
def test_prefix_that_the_model_does_not_have_goes(prefix, caplog):
    caplog.set_level("INFO")
    weights = small_model().state_dict()
    # of a loss that Lightning keeps beside the model
    state = prefixed(prefix, weights) | {"criterion.weight": torch.ones(3)}
    model = small_model()
    load_weights(model, state, "a.pth does not fit b.py")
    assert equal(model.state_dict(), weights)
    assert f"prefix {prefix} of the checkpoint's names is removed" in caplog.text
    assert "left out are criterion.weight" in caplog.text


def test_of_two_prefixes_the_average_is_taken_and_the_log_says_so(caplog):
    raw, average = small_model().state_dict(), small_model().state_dict()
    model = small_model()
    load_weights(model, prefixed("model.", raw) | prefixed("ema_model.", average), "a")
    assert equal(model.state_dict(), average)
    assert "prefix ema_model. of" in caplog.text
    assert "model., ema_model. would fit as well" in caplog.text


def test_line_that_removes_a_prefix_does_so():
    weights = small_model().state_dict()
    state = prefixed("net.", weights | {"more": torch.ones(1)})
    with pytest.raises(QwtError, match=r"follow the prefix 'net\.'") as caught:
        load_weights(small_model(), state, "a")
    line = re.search(r"state = (\{.*\}), and", str(caught.value))[1]
    assert eval(line, {"state": state}).keys() == weights.keys() | {"more"}


def test_a_model_with_such_a_prefix_keeps_it():
    weights, model = (nn.ModuleDict({"model": small_model()}) for _ in range(2))
    load_weights(model, weights.state_dict(), "a")
    assert equal(model.state_dict(), weights.state_dict())


def test_versions_of_the_modules_decide_which_keys_are_old(tmp_path):
    class Renamed(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state, prefix, metadata, *rest):
            if metadata.get("version", 1) < 2:
                state[prefix + "weight"] = state.pop(prefix + "old")
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    new = nn.Sequential(Renamed(2, 3))
    torch.save({"state_dict": new.state_dict()}, tmp_path / "new.pth")
    weights = dict(new.state_dict())
    old = {"0.old": weights.pop("0.weight")} | weights
    torch.save({"state_dict": old}, tmp_path / "old.pth")
    for name in ("new.pth", "old.pth"):
        fetch_checkpoint(tmp_path / name, tmp_path / "fetched.pth")
        for path in (tmp_path / name, tmp_path / "fetched.pth"):
            model = nn.Sequential(Renamed(2, 3))
            load_weights(model, load_checkpoint(path), "a")
            assert equal(model.state_dict(), new.state_dict())


def test_keys_of_a_module_that_does_not_look_are_compared_all_the_same():
    class Silent(nn.Sequential):  # as mmdet's VFNetHead
        def _load_from_state_dict(self, *_):
            pass

    model = Silent(nn.Linear(2, 3))
    with pytest.raises(QwtError, match=r"unexpected in the checkpoint \(1\): more"):
        load_weights(model, model.state_dict() | {"more": torch.ones(1)}, "a")
    with pytest.raises(QwtError, match=r"missing in the checkpoint \(1\): 0\.bias"):
        load_weights(model, {"0.weight": torch.ones(3, 2)}, "a")


def test_integer_weights_do_not_pass_for_others():
    model = small_model()
    state = model.state_dict() | {"backbone.weight": torch.ones(3, 2, dtype=torch.int8)}
    with pytest.raises(QwtError, match=r"floating point \(1\): backbone\.weight \(int8\)"):
        load_weights(model, state, "a")


def test_number_of_torch_0_3_is_read():
    model = nn.ParameterDict({"scale": torch.tensor(1.0)})
    load_weights(model, {"scale": torch.tensor([2.0])}, "a")
    assert model["scale"].item() == 2
