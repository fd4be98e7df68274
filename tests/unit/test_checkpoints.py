"""Checkpoints: what is read, what is refused, and that nothing of a refused file ever runs."""

import datetime
import hashlib
import io
import os
import pathlib
import pickle
import sys
import tarfile
import warnings
import zipfile
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from flaky_server import Drop, FlakyServer, Status
from qwt_mmdet import download as download_module
from qwt_mmdet.checkpoints import check_keys, fetch_checkpoint, load_checkpoint
from qwt_mmdet.errors import QwtError
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
def test_every_pickle_protocol_in_both_formats(tmp_path, protocol, zipped):
    path = tmp_path / "a.pth"
    torch.save(
        openmmlab_checkpoint(),
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    assert zipfile.is_zipfile(path) == zipped
    assert_same(load_checkpoint(path), small_state())


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


@pytest.mark.parametrize("how", ["zip", "legacy", "0", "2", "4"])
def test_system_call_is_refused_and_not_run(tmp_path, how):
    trace = tmp_path / "trace"
    content = {
        "state_dict": small_state() if how in ("zip", "legacy") else {},
        "optimizer": Calls(os.system, f"touch {trace}"),
    }
    path = tmp_path / "evil.pth"
    save(content, path, how)
    with pytest.raises(QwtError, match=r"evil\.pth was refused: it refers to (posix|nt)\.system"):
        load_checkpoint(path)
    assert not trace.exists()
    with pytest.raises(QwtError, match="was refused"):
        fetch_checkpoint(path, tmp_path / "out" / "checkpoint.pth")
    assert not trace.exists()
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (eval, ("1",), "builtins.eval"),
        (getattr, ("", "join"), "builtins.getattr"),
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
    with pytest.raises(QwtError, match=r"is truncated or damaged \(the checksum of .*data/"):
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
    assert type(written["state_dict"]) is dict
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
        assert server.requests[-1][1] == "bytes=16384-"
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
