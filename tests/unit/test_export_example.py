"""The example that runs an exported file without mmdet finds what mmdet's own code does."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from qwt_mmdet import export_onnx, load_exported
from qwt_mmdet.detectors.build import random_detector

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "run_exported.py"
SIZE = 128


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A small YOLOX with random weights, which is sure enough of some objects."""
    torch.manual_seed(0)
    pad = {"type": "Pad", "pad_to_square": True, "pad_val": {"img": (114.0, 114.0, 114.0)}}
    model = random_detector(
        "yolox/yolox_nano_8xb8-300e_coco.py",
        {
            "model.backbone.deepen_factor": 0.1,
            "model.backbone.widen_factor": 0.125,
            "model.backbone.use_depthwise": False,
            "model.neck.use_depthwise": False,
            "model.bbox_head.use_depthwise": False,
            "model.bbox_head.stacked_convs": 1,
            "model.neck.in_channels": [32, 64, 128],
            "model.neck.out_channels": 16,
            "model.bbox_head.in_channels": 16,
            "model.bbox_head.feat_channels": 16,
            "test_dataloader.dataset.pipeline": [
                {"type": "LoadImageFromFile"},
                {"type": "Resize", "scale": (SIZE, SIZE), "keep_ratio": True},
                pad,
                {"type": "PackDetInputs", "meta_keys": ("img_shape", "scale_factor", "ori_shape")},
            ],
        },
    )
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1
    model.train()
    model.bbox_head(
        model.extract_feat(255 * torch.rand(4, 3, SIZE, SIZE))
    )  # outputs vary from place to place now
    model.eval()
    for convolution in (
        *model.bbox_head.multi_level_conv_cls,
        *model.bbox_head.multi_level_conv_obj,
    ):
        torch.nn.init.normal_(convolution.weight, std=0.3)
        torch.nn.init.constant_(convolution.bias, -2)
    export_onnx(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.slow
def test_the_example_finds_what_mmdet_does(exported, tmp_path):
    assert len(EXAMPLE.read_text().splitlines()) <= 40
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), np.random.default_rng(0).integers(0, 256, (140, 150, 3), np.uint8))
    specification = importlib.util.spec_from_file_location("run_exported", EXAMPLE)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    scores, boxes, names = example.detect(exported, photo)
    detector = load_exported(exported)
    expected = detector(str(photo)).pred_instances
    classes = detector.description["classes"]
    assert len(scores) > 5
    np.testing.assert_allclose(scores, expected.scores, atol=1e-5)
    # equal scores may come in another order
    found = np.column_stack([boxes, [classes.index(name) for name in names]])
    wanted = np.column_stack([expected.bboxes, expected.labels])
    distances = np.abs(found[:, None] - wanted).max(axis=2)
    assert max(distances.min(axis=0).max(), distances.min(axis=1).max()) < 0.01
