"""The device that a step computes on, and the precision that it computes with."""

import logging

import mmcv.ops
import pytest
import torch
from qwt_mmdet import devices
from qwt_mmdet.cli.common import check_cuda
from qwt_mmdet.errors import QwtError


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A GPU that torch sees; tensors stay where they are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
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
    cause = str(error).splitlines()[0].rstrip(".")
    assert f"Device: CPU (mmcv's operators do not run on the GPU ({cause})" in caplog.text
    assert "make clean env" in caplog.text
    with pytest.raises(QwtError, match="--device is cuda, but mmcv's operators do not run"):
        check_cuda()


def test_a_gpu_on_which_mmcvs_operators_run_is_used(pretended_gpu):
    assert devices.choose_device(1) == "cuda"
    check_cuda()


def test_a_gpu_that_is_full_is_not_taken_for_one_without_operators(pretended_gpu, monkeypatch):
    monkeypatch.setattr(mmcv.ops, "nms", operator(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(torch.OutOfMemoryError):
        devices.choose_device(1)


def test_no_gpu_granted_means_cpu_even_with_a_gpu(pretended_gpu):
    assert devices.choose_device(0) == "cpu"


def test_without_a_gpu_the_cpu_is_used_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    caplog.set_level(logging.INFO)
    assert devices.choose_device(1) == "cpu"
    assert "torch sees no GPU" in caplog.text
    with pytest.raises(QwtError, match="torch sees no GPU"):
        check_cuda()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_granted_gpu_is_used():
    assert devices.choose_device(1) == "cuda"


def test_float32_is_not_rounded_to_tf32():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    devices.set_up_torch(torch.get_num_threads(), 0)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"
