"""Checkpoints: what is read, what is refused, and that nothing of a refused file ever runs."""

import datetime
import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import runpy
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
from qwt_mmdet.data import download as download_module
from qwt_mmdet.detectors.checkpoint import load_checkpoint
from qwt_mmdet.detectors.weights import check_keys, load_weights
from qwt_mmdet.errors import QwtError
from qwt_mmdet.steps.fetch import fetch_checkpoint
from safetensors.torch import save_file
from torch import nn

CLASSES = ("person", "bicycle", "traffic light")


@pytest.fixture(autouse=True)
def _local_network(monkeypatch):
    monkeypatch.setattr(download_module, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # the test server is not behind one


def small_state() -> OrderedDict:
    generator = torch.Generator().manual_seed(0)
    return OrderedDict(
        [
            ("conv.weight", torch.randn(4, 3, 3, 3, generator=generator)),
            ("bn.running_var", torch.rand(4, generator=generator)),
            ("bn.num_batches_tracked", torch.tensor(7)),
            ("table", torch.randn(100, 100, generator=generator)),
            ("half", torch.randn(5, generator=generator).half()),
            ("mask", torch.tensor([True, False])),
        ]
    )


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
    return {
        "meta": {
            "epoch": 12,
            "seed": np.int64(3),
            "cfg": "model = dict(type='RetinaNet')",
            "time": datetime.datetime(2023, 1, 1),
            "work_dir": pathlib.PosixPath("work_dirs"),
            "dataset_meta": {"classes": CLASSES, "palette": [(1, 2, 3)]},
        },
        "state_dict": state,
        "message_hub": {
            "log_scalars": OrderedDict({"train/loss": losses}),
            "runtime_info": OrderedDict(
                {
                    "iter": 5,
                    "lr": np.float64(0.1),
                    "dtype": np.dtype("float32"),
                    "shape": torch.Size([1, 2]),
                    "type": torch.float16,
                    "device": torch.device("cpu"),
                    "table": np.arange(6.0).reshape(2, 3),
                    "names": np.array(["a", "b"]),
                    "objects": np.array([None, "x"], dtype=object),
                    "bytes": b"\xff\x00",
                    "set": {1, 2},
                    "counts": defaultdict(list, {"a": [1]}),
                    "last": deque([1, 2], 5),
                }
            ),
            "resumed_keys": {"train/loss": True},
        },
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [{"last_step": 3, "_last_lr": [np.float32(0.1)]}],
    }


def with_numpy1_names(path: pathlib.Path) -> None:
    """Rewrite a checkpoint as if numpy 1 had written it."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if name.endswith("data.pkl"):
                assert b"numpy._core" in content
                content = content.replace(b"cnumpy._core.", b"cnumpy.core.")
            archive.writestr(name, content)


def assert_same(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert type(found[key]) is torch.Tensor
        assert found[key].dtype == value.dtype
        assert not found[key].requires_grad
        torch.testing.assert_close(found[key], value.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("numpy_version", [1, 2])
def test_openmmlab_file_with_history_and_numpy_objects(tmp_path, numpy_version):
    path = tmp_path / "epoch_12.pth"
    torch.save(openmmlab_checkpoint(), path)
    if numpy_version == 1:
        with_numpy1_names(path)
    with pytest.raises(pickle.UnpicklingError):  # torch's own allow-list refuses such files
        torch.load(path, weights_only=True)
    assert_same(load_checkpoint(path), small_state())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_only_the_pickle_protocol_of_torch_is_read_in_both_formats(tmp_path, protocol, zipped):
    path = tmp_path / "a.pth"
    torch.save(
        openmmlab_checkpoint(),
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    assert zipfile.is_zipfile(path) == zipped
    if protocol == 2:
        assert_same(load_checkpoint(path), small_state())
        return
    with (
        pytest.warns(UserWarning, match=f"pickle protocol {protocol}"),
        pytest.raises(QwtError, match="another pickle protocol than 2"),
    ):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "wrap", [dict, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}]
)
def test_where_the_weights_may_lie(tmp_path, wrap):
    torch.save(wrap(small_state()), tmp_path / "a.pth")
    assert_same(load_checkpoint(tmp_path / "a.pth"), small_state())


def test_parameters_and_views_become_plain_tensors(tmp_path):
    table = torch.arange(1000.0)
    special = nn.Parameter(torch.ones(3))
    special.note = "attribute"  # makes torch save it by another function
    state = {
        "parameter": nn.Parameter(torch.ones(2, 2)),
        "special": special,
        "slice": table[10:20],
        "transposed": torch.arange(6.0).reshape(2, 3).T,
    }
    torch.save(state, tmp_path / "a.pth")
    weights = load_checkpoint(tmp_path / "a.pth")
    assert_same(weights, state)
    assert weights["slice"].untyped_storage().nbytes() == 40
    assert weights["transposed"].is_contiguous()


def test_prefix_of_parallel_training_goes(tmp_path):
    state = {f"module.{key}": value for key, value in small_state().items()}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    assert_same(load_checkpoint(tmp_path / "a.pth"), small_state())


def test_raw_copies_beside_averaged_weights_go(tmp_path):
    state = small_state()
    copies = {"ema_" + key.replace(".", "_"): value + 1 for key, value in state.items()}
    torch.save({"state_dict": state | copies}, tmp_path / "a.pth")
    assert_same(load_checkpoint(tmp_path / "a.pth"), state)


def test_a_parameter_that_only_looks_like_a_raw_copy_stays(tmp_path):
    state = small_state() | {"ema_decay": torch.tensor(0.5)}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    assert_same(load_checkpoint(tmp_path / "a.pth"), state)


@pytest.mark.parametrize(
    "state",
    [
        {"module." + key: value for key, value in small_state().items()},
        {"n_averaged": torch.tensor(9)} | {"module." + k: v for k, v in small_state().items()},
        {"module._orig_mod." + k: v for k, v in small_state().items()},
        {"_orig_mod." + k: v for k, v in small_state().items()},
    ],
    ids=["parallel", "averaged", "compiled and parallel", "compiled"],
)
def test_wrappers_go(tmp_path, state, caplog):
    caplog.set_level("INFO")
    torch.save(state, tmp_path / "a.pth")
    assert_same(load_checkpoint(tmp_path / "a.pth"), small_state())
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


def changed() -> OrderedDict:
    return OrderedDict(
        (key, value + 1 if value.is_floating_point() else value)
        for key, value in small_state().items()
    )


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        ({"model": changed(), "ema": {"module": small_state(), "updates": 7}}, r"ema\.module"),
        ({"state_dict": changed(), "state_dict_ema": small_state()}, "state_dict_ema"),
        ({"model": changed(), "model_ema": small_state()}, "model_ema"),
        ({"params": changed(), "params_ema": small_state()}, "params_ema"),
        ({"state_dict": changed(), "ema_state_dict": small_state()}, "ema_state_dict"),
        ({"ema": {"state_dict": small_state()}}, None),
        ({"module": small_state(), "ds_version": "1"}, None),
        ({"state_dict": small_state(), "ema_state_dict": 5, "ema": {}}, None),
        (
            {"state_dict": small_state(), "net": {0: torch.ones(1), "a": torch.ones(1)}},
            "state_dict",
        ),
        ({"model": {"state_dict": small_state()}, "step": torch.tensor(3)}, None),
        ({"state_dict": small_state(), "ema": small_state()}, "ema"),
        (
            {  # as MMEngine's hook leaves it: the average lies in state_dict
                "state_dict": small_state(),
                "ema_state_dict": {"steps": torch.tensor(4)}
                | {"module." + key: value for key, value in changed().items()},
            },
            "state_dict, since MMEngine",
        ),
        (
            {"model": small_state(), "ema": {"conv.weight": torch.ones(1)}},
            r"model, since ema is not complete",
        ),
    ],
)
def test_of_two_sets_of_weights_the_log_says_which_is_taken(tmp_path, content, taken, caplog):
    torch.save(content, tmp_path / "a.pth")
    assert_same(load_checkpoint(tmp_path / "a.pth"), small_state())
    if taken is None:
        assert "taken from" not in caplog.text
    else:
        assert re.search(
            f"weights are taken from {taken}.*save {{'state_dict': checkpoint", caplog.text
        )


# --- safetensors -------------------------------------------------------------------------------


def test_safetensors_file(tmp_path):
    path = tmp_path / "a.safetensors"
    state = {"module." + key: value.contiguous() for key, value in small_state().items()}
    meta = {"classes": json.dumps(CLASSES), "format": "pt"}
    save_file(state | {"module.b": torch.ones(2).bfloat16()}, path, metadata=meta)
    expected = dict(sorted((small_state() | {"b": torch.ones(2).bfloat16()}).items()))
    assert_same(dict(sorted(load_checkpoint(path).items())), expected)
    fetch_checkpoint(path, tmp_path / "out.pth", sha256=digest(path))
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert written["meta"]["classes"] == list(CLASSES)
    assert written["meta"]["sha256"] == digest(path)
    wrong = path.rename(tmp_path / "a-deadbeef.safetensors")
    with pytest.raises(QwtError, match="its name says deadbeef"):
        fetch_checkpoint(wrong, tmp_path / "wrong.pth")


@pytest.mark.parametrize(
    ("meta", "classes"),
    [
        ({"dataset_meta": '{"classes": ["a", "b"]}'}, ["a", "b"]),
        ({"meta": '{"CLASSES": ["a"]}'}, ["a"]),
        ({"classes": "[" * 100_000}, None),
        ({"classes": "1" * 100_000}, None),
        ({"classes": "a, b"}, None),
        ({"classes": '["a", 1]'}, None),
        ({}, None),
    ],
)
def test_class_names_in_a_safetensors_file(tmp_path, meta, classes):
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", metadata=meta)
    fetch_checkpoint(tmp_path / "a.safetensors", tmp_path / "out.pth")
    assert torch.load(tmp_path / "out.pth", weights_only=True)["meta"]["classes"] == classes


def test_safetensors_over_a_bad_connection(tmp_path):
    save_file(small_state(), tmp_path / "a.safetensors")
    with FlakyServer(folder=tmp_path) as server:
        server.plan["a.safetensors"] += [Status(503), Drop(20_000)]
        fetch_checkpoint(server.url("a.safetensors"), tmp_path / "out" / "checkpoint.pth")
    assert load_checkpoint(tmp_path / "out" / "checkpoint.pth").keys() == small_state().keys()


def safetensors(header: str | bytes, data: bytes = bytes(16), size: int | None = None) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def entry(begin: int, end: int, shape: str = "[4]", dtype: str = "F32") -> str:
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{begin}, {end}]}}'


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="one byte"),
        pytest.param(safetensors("{}", size=2**63), id="header of 8 exabytes"),
        pytest.param(safetensors("{}", size=10**9), id="header of 1 GB"),
        pytest.param(safetensors('{"w": '), id="header that ends early"),
        pytest.param(safetensors("[]"), id="list for a header"),
        pytest.param(safetensors("[" * 100_000), id="deep header"),
        pytest.param(safetensors(b"\xff\xfe{}"), id="header that is no UTF-8"),
        pytest.param(safetensors('{"w": 1}'), id="number for a tensor"),
        pytest.param(
            safetensors(f'{{"w": {entry(0, 16)}, "v": {entry(0, 16)}}}'),
            id="one range for two tensors",
        ),
        pytest.param(
            safetensors(f'{{"w": {entry(0, 16)}, "v": {entry(8, 24)}}}', bytes(24)),
            id="ranges that overlap",
        ),
        pytest.param(safetensors(f'{{"w": {entry(16, 0)}}}'), id="range from behind"),
        pytest.param(safetensors(f'{{"w": {entry(0, 10**15)}}}'), id="range beyond the file"),
        pytest.param(
            safetensors(f'{{"w": {entry(0, 16, "[700000000]")}}}'), id="shape larger than its range"
        ),
        pytest.param(
            safetensors(f'{{"w": {entry(0, 16, "[4611686018427387904, 4]")}}}'),
            id="shape that overflows",
        ),
        pytest.param(safetensors(f'{{"w": {entry(0, 16, "[-4]")}}}'), id="negative size"),
        pytest.param(safetensors(f'{{"w": {entry(0, 16, dtype="X")}}}'), id="unknown type"),
        pytest.param(safetensors(f'{{"w": {entry(0, 16)}}}', bytes(15)), id="too little data"),
        pytest.param(safetensors('{"__metadata__": {"format": "pt"}}', b""), id="metadata alone"),
        pytest.param(b"<!DOCTYPE html><html>", id="web page"),
    ],
)
def test_broken_safetensors_file(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(
        QwtError, match=r"a\.safetensors.* (holds no weights|is empty|damaged)"
    ) as e:
        load_checkpoint(tmp_path / "a.safetensors")
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 600


# --- Weights that are no numbers ---------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(tmp_path, value, dtype):
    state = small_state() | {f"bad{n}": torch.full((3,), value, dtype=dtype) for n in range(12)}
    state["bad0"][1:] = 0
    torch.save(state, tmp_path / "a.pth")
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
    path = tmp_path / f"a{suffix}"
    save = torch.save if suffix == ".pth" else save_file
    save(small_state() | {"odd": odd}, path)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(QwtError, match=rf"1 tensors of types .*: odd \({name}\)"):
        load_checkpoint(path)


def test_a_negative_variance_is_named(tmp_path):
    state = {"bn1.running_var": torch.ones(3), "bn2.running_var": torch.tensor([1.0, -0.5, 2.0])}
    torch.save(small_state() | state, tmp_path / "a.pth")
    with pytest.raises(QwtError, match=r"below 0: bn2\.running_var \(-0\.5\)\. "):
        load_checkpoint(tmp_path / "a.pth")


# --- Files that would run something ------------------------------------------------------------


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.function = function
        self.arguments = arguments

    def __reduce__(self):
        return self.function, self.arguments


def save(content, path, how):
    if how == "zip":
        torch.save(content, path)
    elif how == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(content, protocol=int(how)))


NAMED = r"evil\.pth was refused: it refers to (posix|nt)\.system"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("zip", NAMED),
        ("legacy", NAMED),
        ("0", "is not a PyTorch checkpoint"),
        ("2", NAMED),
        pytest.param(
            "4",
            "another pickle protocol than 2",
            marks=pytest.mark.filterwarnings("ignore:Detected pickle protocol 4"),
        ),
    ],
)
def test_system_call_is_refused_and_not_run(tmp_path, how, said):
    trace = tmp_path / "trace"
    content = {
        "state_dict": small_state() if how in ("zip", "legacy") else {},
        "optimizer": Calls(os.system, f"touch {trace}"),
    }
    path = tmp_path / "evil.pth"
    save(content, path, how)
    with pytest.raises(QwtError, match=said):
        load_checkpoint(path)
    assert not trace.exists()
    with pytest.raises(QwtError, match=said):
        fetch_checkpoint(path, tmp_path / "out" / "checkpoint.pth")
    assert not trace.exists()
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


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


def test_what_stands_for_getattr_gets_nothing(tmp_path):
    torch.save({"state_dict": small_state(), "x": Calls(getattr, "", "join")}, tmp_path / "a.pth")
    assert_same(load_checkpoint(tmp_path / "a.pth"), small_state())


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("mmcv.utils.config\nConfigDict", True),
        ("addict.addict\nDict", True),
        ("collections\ndefaultdict", True),
        ("no_such_package\nDict", False),
    ],
)
def test_dictionaries_of_classes_that_may_not_be_installed(tmp_path, name, known):
    # An object without arguments, an item of it, then its attributes.
    made = b"c" + name.encode() + b"\n)\x81U\x01aK\x01s}U\x01bK\x01sb"
    torch.save({"state_dict": small_state(), "x": "HERE"}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        for record, content in records.items():
            archive.writestr(record, content.replace(b"X\x04\x00\x00\x00HERE", made))
    if known:
        assert_same(load_checkpoint(tmp_path / "a.pth"), small_state())
    else:
        with pytest.raises(QwtError, match=r"refers to no_such_package\.Dict"):
            load_checkpoint(tmp_path / "a.pth")


def test_a_whole_model_is_refused_by_the_name_of_its_class(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "a.pth")
    with pytest.raises(QwtError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\)"):
        load_checkpoint(tmp_path / "a.pth")


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants torch.export to be used instead
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "a.pth"))
    with pytest.raises(QwtError, match="refused: it refers to TorchScript code"):
        load_checkpoint(tmp_path / "a.pth")


def test_tar_file_is_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / "a.pth", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(QwtError, match="it is a tar file"):
        load_checkpoint(tmp_path / "a.pth")


def test_functions_on_the_list_cannot_be_altered(tmp_path):
    # BUILD with a state on the global itself, as object.__reduce__ would never write it.
    for target in (
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ccollections\nOrderedDict\n",
        b"cargparse\nNamespace\n",
    ):
        (tmp_path / "a.pth").write_bytes(b"\x80\x02" + target + b"N}U\x05extraK\x01s\x86b.")
        with pytest.raises(QwtError, match=r"a\.pth"):
            load_checkpoint(tmp_path / "a.pth")
    assert not hasattr(torch._utils._rebuild_tensor_v2, "extra")
    torch.save(small_state(), tmp_path / "b.pth")
    assert_same(load_checkpoint(tmp_path / "b.pth"), small_state())


# --- Files that are not whole, or not checkpoints ------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.999, 0.9, 0.5, 0.05])
def test_truncated_file(tmp_path, zipped, kept):
    path = tmp_path / "cut.pth"
    torch.save(openmmlab_checkpoint(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    size = int(len(content) * kept)
    path.write_bytes(content[:size])
    with pytest.raises(QwtError, match=rf"cut\.pth \({size} bytes\) is truncated or damaged") as e:
        load_checkpoint(path)
    assert "Get the whole file again" in str(e.value)


def test_flipped_bit_in_a_weight(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(small_state(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(QwtError, match=r"is truncated or damaged \(Bad CRC-32 .*data/"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "is not a PyTorch checkpoint; it begins with b'<!DOCTYPE html"),
        (bytes(1000), "is not a PyTorch checkpoint"),
    ],
)
def test_file_that_is_no_checkpoint(tmp_path, content, problem):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(QwtError, match=problem):
        load_checkpoint(tmp_path / "a.pth")


def test_missing_file(tmp_path):
    for call in (load_checkpoint, lambda path: fetch_checkpoint(path, tmp_path / "out.pth")):
        with pytest.raises(QwtError, match=r"absent\.pth does not exist; check the path"):
            call(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    ("key", "what"), [(7, "a whole number"), (("a",), "a tuple"), (None, "nothing")]
)
def test_name_that_is_no_text(tmp_path, key, what):
    torch.save({"state_dict": small_state() | {key: torch.ones(1)}}, tmp_path / "a.pth")
    with pytest.raises(QwtError, match=f"a name in state_dict is {what}.* where only a text"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [{"epoch": 3, "network": {}}, [1, 2], {"state_dict": {}}])
def test_file_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(QwtError, match=r"a\.pth holds no weights"):
        load_checkpoint(tmp_path / "a.pth")


# --- Fetching --------------------------------------------------------------------------------


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashed_name(path: pathlib.Path) -> pathlib.Path:
    return path.rename(path.with_name(f"{path.stem}-{digest(path)[:8]}.pth"))


@pytest.fixture
def checkpoint(tmp_path) -> pathlib.Path:
    path = tmp_path / "source" / "retinanet.pth"
    path.parent.mkdir()
    torch.save(openmmlab_checkpoint(), path)
    return path


def test_fetched_file_holds_the_weights_and_where_they_are_from(tmp_path, checkpoint):
    output = tmp_path / "out" / "checkpoint.pth"
    fetch_checkpoint(checkpoint, output, sha256=digest(checkpoint).upper())
    written = torch.load(output, weights_only=True)
    assert written.keys() == {"state_dict", "meta"}
    assert written["meta"] == {
        "source": str(checkpoint),
        "sha256": digest(checkpoint),
        "classes": list(CLASSES),
    }
    assert_same(written["state_dict"], small_state())
    assert_same(load_checkpoint(output), small_state())
    assert os.listdir(output.parent) == ["checkpoint.pth"]


def test_fetched_file_has_the_same_bytes_every_time(tmp_path, checkpoint):
    for name in ("a.pth", "b.pth"):
        fetch_checkpoint(checkpoint, tmp_path / name)
    assert digest(tmp_path / "a.pth") == digest(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("meta", "classes"),
    [
        ({"dataset_meta": {"CLASSES": ("a", "b")}}, ["a", "b"]),
        ({"CLASSES": ["a"]}, ["a"]),
        ({"dataset_meta": {"classes": "person"}}, ["person"]),
        ({"dataset_meta": {"classes": None}}, None),
        ({}, None),
    ],
)
def test_class_names(tmp_path, meta, classes):
    torch.save({"meta": meta, "state_dict": small_state()}, tmp_path / "a.pth")
    fetch_checkpoint(tmp_path / "a.pth", tmp_path / "out.pth")
    assert torch.load(tmp_path / "out.pth", weights_only=True)["meta"]["classes"] == classes


def test_wrong_sha256_of_a_path(tmp_path, checkpoint):
    with pytest.raises(QwtError, match=rf"sha256 {digest(checkpoint)}.*{'1' * 64}"):
        fetch_checkpoint(checkpoint, tmp_path / "out.pth", sha256="1" * 64)
    assert not (tmp_path / "out.pth").exists()
    assert checkpoint.exists()


def test_sha256_that_cannot_be_one(tmp_path, checkpoint):
    with pytest.raises(QwtError, match=r"'abc' .* is not 64 hexadecimal digits"):
        fetch_checkpoint(checkpoint, tmp_path / "out.pth", sha256="abc")


def test_digits_in_an_openmmlab_name(tmp_path, checkpoint, caplog):
    good = hashed_name(checkpoint)
    fetch_checkpoint(good, tmp_path / "out.pth")
    bad = good.rename(good.with_name("retinanet_coco_20200130-deadbeef.pth"))
    with pytest.raises(QwtError, match=rf"{digest(bad)}, but its name says deadbeef"):
        fetch_checkpoint(bad, tmp_path / "bad.pth")
    assert not (tmp_path / "bad.pth").exists()
    fetch_checkpoint(bad, tmp_path / "bad.pth", sha256=digest(bad))  # the config decides
    assert "not the one in its own name (deadbeef)" in caplog.text


def test_date_in_a_name_is_no_hash(tmp_path, checkpoint):
    fetch_checkpoint(checkpoint.rename(checkpoint.with_name("my-20240131.pth")), tmp_path / "o.pth")
    assert (tmp_path / "o.pth").exists()


def test_fetch_over_a_bad_connection(tmp_path, checkpoint):
    source = hashed_name(checkpoint)
    output = tmp_path / "out" / "checkpoint.pth"
    with FlakyServer(folder=source.parent) as server:
        server.plan[source.name] += [Status(503), Drop(20_000), Status(500)]
        address = server.base.replace("://", "://user:secret@") + f"/{source.name}?token=secret"
        fetch_checkpoint(address, output, sha256=digest(source))
        assert server.count(source.name) == 4
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


# --- Does it fit? ------------------------------------------------------------------------------


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
    lines = str(caught.value).split("\n")
    assert lines[0] == "w.pth does not fit swin.py:"
    assert lines[1] == "  missing in the checkpoint (1): backbone.b"
    assert lines[2] == "  unexpected in the checkpoint (1): extra.c"
    assert lines[3] == "  of another shape (1): head.weight (checkpoint (3, 4), model (80, 4))"
    assert "another architecture" in lines[4]


def test_wrong_shapes_alone_point_to_the_number_of_classes():
    with pytest.raises(QwtError, match="num_classes"):
        check_keys(state(cls=(80,)), state(cls=(3,)), "w.pth")


def test_long_lists_are_cut():
    model = {f"block{number}": torch.zeros(1) for number in range(25)}
    with pytest.raises(
        QwtError, match=r"missing .* \(25\): block0, .*block9, and 15 more"
    ) as caught:
        check_keys(model, {}, "w.pth")
    assert "block10" not in str(caught.value)


# --- Loading into a model -----------------------------------------------------------------------


def small_model() -> nn.Module:
    return nn.Sequential(OrderedDict(backbone=nn.Linear(2, 3), head=nn.BatchNorm1d(3)))


def equal(first: dict, second: dict) -> bool:
    return all(torch.equal(first[key], second[key]) for key in second)


@pytest.mark.parametrize("prefix", ["model.", "net.", "model.detector.", "pl_module.net.model."])
def test_prefix_that_the_model_does_not_have_goes(prefix, caplog):
    caplog.set_level("INFO")
    weights = small_model().state_dict()
    state = {prefix + key: value for key, value in weights.items()}
    state |= {"criterion.weight": torch.ones(3)}  # of a loss that Lightning keeps beside the model
    model = small_model()
    load_weights(model, state, "a.pth does not fit b.py")
    assert equal(model.state_dict(), weights)
    assert f"prefix {prefix} of the checkpoint's names is removed" in caplog.text
    assert "left out are criterion.weight" in caplog.text


def test_of_two_prefixes_the_average_is_taken_and_the_log_says_so(caplog):
    raw, average = small_model().state_dict(), small_model().state_dict()
    state = {f"model.{k}": v for k, v in raw.items()}
    state |= {f"ema_model.{k}": v for k, v in average.items()}
    model = small_model()
    load_weights(model, state, "a")
    assert equal(model.state_dict(), average)
    assert "prefix ema_model. of" in caplog.text
    assert "model., ema_model. would fit as well" in caplog.text


def test_line_that_removes_a_prefix_does_so():
    weights = small_model().state_dict()
    state = {f"net.{key}": value for key, value in weights.items()} | {"net.more": torch.ones(1)}
    with pytest.raises(QwtError, match=r"follow the prefix 'net\.'") as caught:
        load_weights(small_model(), state, "a")
    line = re.search(r"state = (\{.*\}), and", str(caught.value))[1]
    assert eval(line, {"state": state}).keys() == weights.keys() | {"more"}


def test_a_model_with_such_a_prefix_keeps_it():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small_model()

    weights = Wrapped().state_dict()
    model = Wrapped()
    load_weights(model, weights, "a")
    assert equal(model.state_dict(), weights)


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
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(1.0))
    load_weights(model, {"scale": torch.tensor([2.0])}, "a")
    assert model.scale.item() == 2


@pytest.mark.parametrize(
    ("tool", "model", "old", "new"),
    [
        (
            "upgrade_ssd_version",
            "dict(bbox_head=dict(type='SSDHead'))",
            "backbone.extra.0.weight",
            "neck.extra_layers.0.0.conv.weight",
        ),
        (
            "upgrade_model_version",
            "dict(bbox_head=dict(type='BBoxHead'), rpn_head=dict(type='RPNHead'))",
            "bbox_head.fc_cls.weight",
            "roi_head.bbox_head.fc_cls.weight",
        ),
        (
            "upgrade_model_version",
            "dict(bbox_head=dict(type='RetinaHead'))",
            "bbox_head.cls_convs.0.weight",
            "bbox_head.cls_convs.0.conv.weight",
        ),
    ],
)
def test_the_tool_that_the_message_names_renames_old_keys(tmp_path, tool, model, old, new):
    import mmdet

    needed = {new: torch.ones(81, 2)}
    with pytest.raises(QwtError, match=f"tools/model_converters/{tool}.py"):
        check_keys(needed, {old: torch.ones(81, 2)}, "a")
    meta = {"mmdet_version": "0.5.0", "config": f"old.py\nmodel = {model}"}
    torch.save({"state_dict": {old: torch.ones(81, 2)}, "meta": meta}, tmp_path / "old.pth")
    folder = pathlib.Path(mmdet.__file__).parent / ".mim" / "tools" / "model_converters"
    convert = runpy.run_path(str(folder / f"{tool}.py"))["convert"]
    classes = {"num_classes": 81} if tool == "upgrade_model_version" else {}
    convert(str(tmp_path / "old.pth"), str(tmp_path / "new.pth"), **classes)
    check_keys(needed, load_checkpoint(tmp_path / "new.pth"), "a")
