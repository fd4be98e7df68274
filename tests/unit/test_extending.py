"""The classes on the pages of docs/extending do what the pages say, in a module of the user's own."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import test_export
import tiny
import torch
from mmdet.structures import DetDataSample
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.detectors.build import random_detector, resolve_config
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.errors import QwtError
from qwt_mmdet.export import cut, loading, onnx_file, runtimes
from qwt_mmdet.quantization import weight_fit
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.record import quantization_of

PAGES = Path(__file__).parents[2] / "docs" / "extending"


@pytest.fixture
def mylab(tmp_path, monkeypatch):
    """Write the class of a page as the module ``mylab``, which can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(page: str) -> None:
        (block,) = re.findall(r"^```python\n(.*?)^```$", (PAGES / page).read_text(), re.M | re.S)
        (tmp_path / "mylab.py").write_text(block)

    with tiny.restored(weight_fit.WEIGHT_FITS, runtimes.RUNTIMES, cut.CUTS):
        yield write


def test_a_runtime(mylab, tmp_path):
    mylab("runtime.md")
    generator = torch.Generator().manual_seed(0)
    images = [{"inputs": [torch.randn(3, 8, 8, generator=generator)]} for _ in range(2)]
    model = test_export.quantized(images, weight_bits=8, activation_bits=8)
    path, image = tmp_path / "model.onnx", {"image": images[0]["inputs"][0][None].numpy()}
    onnx_ir.save(test_export.graph_of(model), path)
    found, expected = (
        runtimes.open_graph(path, name)(image)["output"]
        for name in ("mylab.reference", "onnxruntime")
    )
    assert np.mean(np.abs(found - expected)) < 0.02 * expected.std()
    own = runtimes.runtime_by_name("mylab.reference")
    kernels = list(own.kernels(runtimes.read_graph(path), image))
    assert kernels == [(False, 8 * 8 * 8 * 27), (False, 8 * 8 * 8 * 9)]
    assert own.version == onnx.__version__


@torch.no_grad()
def test_a_cut(mylab, tmp_path):
    config, path = tmp_path / "own.py", tmp_path / "model.onnx"
    base = resolve_config("conditional_detr/conditional-detr_r50_8xb2-50e_coco.py")
    backbone = tiny.SMALL_MASK_RCNN["model.backbone"] | {"out_indices": (1,)}
    changes = {"model.backbone": backbone, "model.neck.in_channels": [16]}
    changes |= {f"model.{part}.num_layers": 1 for part in ("encoder", "decoder")}
    torch.manual_seed(0)
    model = random_detector(base, changes)
    del cut.CUTS["transformer"]  # which has it, too
    with pytest.raises(QwtError, match="A ConditionalDETR cannot be exported"):
        cut.check_exportable(model)
    mylab("cut.md")
    config.write_text(f"_base_ = {str(base)!r}\ncustom_imports = dict(imports=['mylab'])\n")
    torch.manual_seed(0)
    model = random_detector(config, changes)
    onnx_file.export_onnx(model, path, size=test_export.SIZE, dynamic=False)
    outputs = json.loads(path.with_suffix(".json").read_text())["outputs"]
    assert outputs == {name: name for name in ("layer_cls_scores", "layer_bbox_preds")}
    sys.modules.pop("mylab")  # as in a fresh process
    del cut.CUTS["mylab.detr"]
    exported = loading.load_exported(path).model
    found, expected = (
        forward_scope(detector, tiny.photos()[0], "detector")[0].pred_instances
        for detector in (exported, model)
    )
    torch.testing.assert_close(found.bboxes, expected.bboxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_a_fit_of_weights(mylab, tmp_path):
    mylab("weight_fit.md")
    config = tmp_path / "own.py"
    config.write_text(f"_base_ = {str(tiny.DEMO)!r}\ncustom_imports = dict(imports=['mylab'])\n")

    def sqnr(refit: str) -> dict[str, float]:
        torch.manual_seed(0)
        model = random_detector(config, tiny.SMALL_MASK_RCNN)
        options = {"refit": refit, "rounding": "nearest", "bias_correction": False}
        quantize_model(model, QuantizationSettings(3, 8, **options))
        batches = [{**batch, "data_samples": [DetDataSample()]} for batch in tiny.batches(3)]
        return quantization_of(calibrate(model, batches)).sqnr_db

    plain, scaled = sqnr("none"), sqnr("mylab.scaled")
    assert all(scaled[name] > plain[name] for name in plain)
    with pytest.raises(QwtError, match=r"refit is 'mylab\.scale', .*did you mean mylab\.scaled"):
        sqnr("mylab.scale")
