"""The device that a step computes on, and the precision that it computes with."""

import logging
import os
import subprocess
import sys
import tempfile
import textwrap
from types import SimpleNamespace

import mmcv.ops
import pytest
import torch
from qwt_mmdet import devices
from qwt_mmdet.cli.common import check_cuda
from qwt_mmdet.errors import QwtError


@pytest.fixture
def free_cards(tmp_path, monkeypatch):
    """No job holds a card, and this process none after the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield
    while devices._HELD:
        devices._HELD.pop().release()


@pytest.fixture
def pretended_gpu(monkeypatch, free_cards):
    """Two GPUs that torch sees; tensors stay where they are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"card-{index}")
    )
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)


def operator(error: Exception):
    def nms(*_, **__):
        raise error

    return nms


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("nms_impl: implementation for device cuda:0 not found.\n"),
        RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore"),
    ],
)
def test_a_gpu_that_mmcv_was_not_compiled_for_is_not_used_and_the_log_says_why(
    pretended_gpu, monkeypatch, caplog, error
):
    monkeypatch.setattr(mmcv.ops, "nms", operator(error))
    caplog.set_level(logging.INFO)
    assert devices.choose_device(1) == "cpu"
    assert devices._HELD == [], "another job may have the card"
    cause = str(error).splitlines()[0].rstrip(".")
    assert f"Device: CPU (mmcv's operators do not run on the GPU ({cause})" in caplog.text
    assert "make clean env" in caplog.text
    with pytest.raises(QwtError, match="--device is cuda, but mmcv's operators do not run"):
        check_cuda()


def test_a_card_that_the_config_names_is_used_and_one_that_is_not_there_refused(pretended_gpu):
    check_cuda()
    assert devices.choose_device(1) == "cuda:0"
    assert devices.choose_device(1, "cuda:1") == "cuda:1"
    assert devices.choose_device(1, "cpu") == devices.choose_device(0) == "cpu"
    with pytest.raises(QwtError, match="device is cuda:2, but torch sees 2 GPUs"):
        devices.choose_device(1, "cuda:2")


def test_a_gpu_that_is_full_is_not_taken_for_one_without_operators(pretended_gpu, monkeypatch):
    monkeypatch.setattr(mmcv.ops, "nms", operator(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(torch.OutOfMemoryError):
        devices.choose_device(1)


def test_without_a_gpu_the_cpu_is_used_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    caplog.set_level(logging.INFO)
    assert devices.choose_device(1) == "cpu"
    assert "torch sees no GPU" in caplog.text
    with pytest.raises(QwtError, match="torch sees no GPU"):
        check_cuda()
    with pytest.raises(QwtError, match="device is cuda, but torch sees no GPU"):
        devices.choose_device(1, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_granted_gpu_is_used():
    assert devices.choose_device(1) == "cuda:0"


JOB = """
import os, sys, time
from qwt_mmdet import devices
devices.POLL_SECONDS = 0.01
card = devices.take_card(["a", "b"])
os.mkdir(f"busy-{card}")  # fails where another job computes on it
print(card, flush=True)
time.sleep(float(sys.argv[1]))
os.rmdir(f"busy-{card}")
"""


def start_job(folder, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", JOB, str(seconds)]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_eight_jobs_on_two_cards_are_never_two_on_one_and_those_that_wait_say_so(
    tmp_path, free_cards
):
    jobs = [start_job(tmp_path, 0.1) for _ in range(8)]
    said = [job.communicate(timeout=60) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 8, said
    assert {out.strip() for out, _ in said} == {"0", "1"}
    assert any("All 2 GPUs are held by other jobs of this machine" in err for _, err in said)


def test_a_killed_job_frees_its_card(tmp_path, free_cards):
    first, second = start_job(tmp_path, 60), start_job(tmp_path, 60)
    held = [int(job.stdout.readline()) for job in (first, second)]
    assert sorted(held) == [0, 1]
    second.kill()
    second.communicate()
    assert devices.take_card(["a", "b"]) == held[1]
    first.kill()
    first.communicate()


@pytest.mark.parametrize(
    ("visible", "count"), [("0,1", 2), ("GPU-8f6a, GPU-1c", 2), ("", 0), ("-1", 0), ("1,-1,0", 1)]
)
def test_cards_are_counted_as_cuda_counts_those_that_are_visible(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices.count_gpus.cache_clear()
    assert devices.count_gpus() == count
    devices.count_gpus.cache_clear()


def test_float32_is_not_rounded_to_tf32():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    devices.set_up_torch(torch.get_num_threads(), 0)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"


@pytest.mark.parametrize(
    ("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")]
)
@pytest.mark.parametrize(
    "run",
    [
        "import types\nfrom qwt_mmdet.runtime import step\n"
        "job = types.SimpleNamespace(rule='r', wildcards=[], log=['a.log'], params={'seed': 0},"
        " resources={'gpu': 0}, threads=1, config={'device': 'cpu'})\nwith step(job): pass",
        "from qwt_mmdet.cli.common import plain_errors\nwith plain_errors(): import torch",
    ],
    ids=["script", "command"],
)
def test_waiting_threads_sleep_unless_the_user_wants_otherwise(tmp_path, run, given, policy):
    """What OpenMP reads when torch is imported."""
    watched = """
        import os, sys
        class Watch:
            def find_spec(self, name, *rest):
                if name == "torch":
                    open("policy", "w").write(os.environ.get("OMP_WAIT_POLICY"))
        sys.meta_path.insert(0, Watch())
    """
    others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    subprocess.run(
        [sys.executable, "-c", f"{textwrap.dedent(watched)}\n{run}"],
        cwd=tmp_path, env=others | given, check=True,
    )  # fmt: skip
    assert (tmp_path / "policy").read_text() == policy
