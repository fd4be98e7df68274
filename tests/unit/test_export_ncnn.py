"""Files of ncnn compute what the quantized network does, with integer weights."""

from pathlib import Path

import numpy as np
import onnx_ir
import pytest
import test_export
import torch
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.errors import QwtError
from qwt_mmdet.export import ncnn as form
from qwt_mmdet.export import onnx_file, runtimes
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from torch import Tensor, nn

pytest.importorskip("ncnn")
pytest.importorskip("pnnx")

images = test_export.images  # the fixture


class Sliced(nn.Module):
    """Pixels in four parts, as YOLOX takes them, and a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(12, 3, 3, padding=1), test_export.Residual()

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        return self.block(self.stem(torch.cat(parts, 1)))


def network(images: list[dict], **settings: object) -> nn.Module:
    """The network, quantized if there are settings."""
    torch.manual_seed(1)
    model = test_export.Network().eval()
    model.backbone = Sliced().eval()
    if settings:
        quantize_model(model, QuantizationSettings(8, 8, **settings))
        calibrate(model, images)
    return model


def graph_of(model: nn.Module, **options: object) -> onnx_ir.Model:
    return onnx_file.trace(model, {"image": torch.zeros(1, 3, 8, 8)}, ["output"], **options)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"grids": "symmetric"}])
def test_ncnn_computes_what_the_network_does(images, settings, tmp_path):
    model = network(images, **settings)
    graph = graph_of(model)
    run = runtimes.open_model(graph, "ncnn")
    for batch in images:
        expected = model(batch["inputs"][0][None])[0].numpy()
        found = run({"image": batch["inputs"][0][None].numpy()})["output"]
        assert found.shape == expected.shape
        # a tie may be rounded the other way
        error = np.abs(found - expected)
        assert error.max() < 1e-5 if not settings else np.median(error) < 0.01 * expected.std()
    form.write_ncnn(graph, tmp_path / "model.param")
    lines = (tmp_path / "model.param").read_text().splitlines()
    convolutions = [line for line in lines if line.startswith("Convolution ")]
    integers = [line for line in convolutions if line.endswith(f"{form.INT8}=1")]
    assert len(convolutions) == 5
    assert len(integers) == (5 if settings else 0)
    if settings:
        weights = (tmp_path / "model.bin").stat().st_size
        form.write_ncnn(graph_of(network(images)), tmp_path / "full.param")
        assert weights < 0.5 * (tmp_path / "full.bin").stat().st_size


@torch.no_grad()
def test_a_layer_in_full_precision_is_not_taken_for_another_of_its_shape(images, tmp_path):
    torch.manual_seed(1)
    model = test_export.Network().eval()
    model.backbone = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))).eval()
    skipped = [{"pattern": "backbone.0", "skip": True}]
    settings = QuantizationSettings(8, 8, grids="symmetric", overrides=skipped)
    calibrate(quantize_model(model, settings), images)
    graph = graph_of(model)
    run = runtimes.open_model(graph, "ncnn")
    image = images[0]["inputs"][0][None]
    expected = model(image)[0].numpy()
    error = np.abs(run({"image": image.numpy()})["output"] - expected)
    assert np.median(error) < 0.01 * expected.std()
    form.write_ncnn(graph, tmp_path / "model.param")
    lines = (tmp_path / "model.param").read_text().splitlines()
    marked = [line.endswith(f"{form.INT8}=1") for line in lines if line.startswith("Convolution ")]
    assert marked == [False, True, True]


def test_a_graph_that_ncnn_cannot_have_is_refused(images, monkeypatch, tmp_path):
    path = tmp_path / "model.param"
    with pytest.raises(QwtError, match=r"signed codes alone, but the node .*grids: symmetric"):
        form.write_ncnn(graph_of(network(images, grids="integer")), path)
    free = graph_of(network(images), dynamic_shapes=({2: torch.export.Dim.AUTO},))
    with pytest.raises(QwtError, match=r"size, and that of the input image varies.*input: fixed"):
        form.write_ncnn(free, path)
    lacking = "7767517\n2 2\nInput in0 0 1 in0\nTensor.slice slice_0 1 1 in0 out0\n"
    monkeypatch.setattr(form, "_parameters", lambda folder: lacking)
    with pytest.raises(QwtError, match=r"no layer for the operator Tensor\.slice"):
        form.write_ncnn(graph_of(network(images)), path)
    assert not path.exists()


def test_what_pnnx_says_is_told(images, monkeypatch, tmp_path):
    broken = Path(tmp_path, "pnnx")
    broken.write_text("#!/bin/sh\necho it has no such operator >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(form, "_program", lambda: broken)
    with pytest.raises(QwtError, match=r"pnnx cannot translate .* it has no such operator"):
        form.write_ncnn(graph_of(network(images)), tmp_path / "model.param")
