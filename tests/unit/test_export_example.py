"""The example that runs an exported file without mmdet finds what mmdet's own code does."""

import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmdet.apis import inference_detector
from mmdet.models import BaseDetector
from mmdet.registry import MODELS
from qwt_mmdet import QuantizationSettings, calibrate, export_onnx, load_exported, quantize_model
from qwt_mmdet.detectors.build import random_detector
from qwt_mmdet.errors import QwtError

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "run_exported.py"
SIZE = 128


def let_outputs_vary(model: BaseDetector, head: torch.nn.Module) -> None:
    """Give batch norms the statistics of random images, so that outputs vary from place to place."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1
    model.train()
    head(model.extract_feat(255 * torch.rand(4, 3, SIZE, SIZE)))
    model.eval()


@pytest.fixture
def detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BaseDetector]:
    """A small YOLOX with random weights, which is sure enough of some objects, and a backbone of its own module."""
    (tmp_path / "own_darknet.py").write_text(
        "from mmdet.models.backbones import CSPDarknet\n"
        "from mmdet.registry import MODELS\n"
        "@MODELS.register_module()\n"
        "class OwnDarknet(CSPDarknet):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("own_darknet")
    torch.manual_seed(0)
    pad = {"type": "Pad", "pad_to_square": True, "pad_val": {"img": (114.0, 114.0, 114.0)}}
    model = random_detector(
        "yolox/yolox_nano_8xb8-300e_coco.py",
        {
            "custom_imports": {"imports": ["own_darknet"]},
            "model.backbone.type": "OwnDarknet",
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
                {
                    "type": "PackDetInputs",
                    "meta_keys": ("img_id", "img_shape", "scale_factor", "ori_shape"),
                },
            ],
        },
    )
    let_outputs_vary(model, model.bbox_head)
    for convolution in (
        *model.bbox_head.multi_level_conv_cls,
        *model.bbox_head.multi_level_conv_obj,
    ):
        torch.nn.init.normal_(convolution.weight, std=0.3)
        torch.nn.init.constant_(convolution.bias, -2)
    yield model
    MODELS.module_dict.pop("OwnDarknet", None)
    sys.modules.pop("own_darknet", None)


@pytest.fixture
def example() -> Any:
    """The example as a module."""
    specification = importlib.util.spec_from_file_location("run_exported", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def same_detections(
    model: BaseDetector, found: Any, expected: Any, *, scores_by: float, pixels: float
) -> None:
    """Scores, boxes and class names of the example are mmdet's; equal scores may come in another order."""
    scores, boxes, names = found
    assert len(scores) > 5
    np.testing.assert_allclose(scores, expected.scores, atol=scores_by)
    classes = model.dataset_meta["classes"]
    found = np.column_stack([boxes, [classes.index(name) for name in names]])
    wanted = np.column_stack([expected.bboxes, expected.labels])
    distances = np.abs(found[:, None] - wanted).max(axis=2)
    assert max(distances.min(axis=0).max(), distances.min(axis=1).max()) < pixels


@pytest.mark.slow
@pytest.mark.parametrize("nms", [False, True])
def test_the_example_finds_what_mmdet_does(detector, example, nms, tmp_path):
    photo, path = tmp_path / "photo.png", tmp_path / "model.onnx"
    cv2.imwrite(str(photo), np.random.default_rng(0).integers(0, 256, (140, 150, 3), np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # torch has some about mmdet's code
        export_onnx(detector, path, nms=nms)
    scores, boxes, names = example.detect(path, photo)
    expected = inference_detector(detector, str(photo)).pred_instances
    same_detections(detector, (scores, boxes, names), expected, scores_by=2e-5, pixels=0.01)
    if nms:
        return
    # as a process that has only the file, and the folder of the modules in PYTHONPATH
    del MODELS.module_dict["OwnDarknet"], sys.modules["own_darknet"]
    again = load_exported(path)(str(photo)).pred_instances
    torch.testing.assert_close(again.bboxes, expected.bboxes, atol=0.01, rtol=0)
    del MODELS.module_dict["OwnDarknet"], sys.modules["own_darknet"]
    (tmp_path / "own_darknet.py").unlink()
    with pytest.raises(QwtError, match="needs the Python module own_darknet"):
        load_exported(path)


RESNET = {
    "model.backbone": {
        "_delete_": True, "type": "ResNet", "depth": 18, "base_channels": 8, "stem_channels": 8,
        "num_stages": 3, "strides": (1, 2, 2), "dilations": (1, 1, 1), "out_indices": (0, 1, 2),
    },
    "model.neck": {"in_channels": [8, 16, 32], "out_channels": 8, "num_outs": 3, "start_level": 0},
}  # fmt: skip
DENSE = {"model.bbox_head.in_channels": 8, "model.bbox_head.feat_channels": 8}
ANCHORS = {"model.bbox_head.anchor_generator.strides": [4, 8, 16]}
TWO_STAGES = {
    **RESNET,
    "model.rpn_head": {
        "in_channels": 8, "feat_channels": 8, "anchor_generator": {"strides": [4, 8, 16]},
    },
    "model.roi_head.bbox_roi_extractor": {"featmap_strides": [4, 8], "out_channels": 8},
    "model.roi_head.bbox_head": {"in_channels": 8, "fc_out_channels": 16},
}  # fmt: skip
Scored = torch.nn.Conv2d | torch.nn.Linear
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "retinanet": ("retinanet/retinanet_r18_fpn_1x_coco.py", RESNET | DENSE | ANCHORS, r"retina_cls"),
    "atss": (
        "atss/atss_r50_fpn_1x_coco.py",
        RESNET | DENSE | ANCHORS | {"model.bbox_head.norm_cfg": {"type": "BN"}},
        r"atss_cls",
    ),
    "rtmdet": (
        "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
        {
            "model.backbone.deepen_factor": 0.1, "model.backbone.widen_factor": 0.125,
            "model.neck.in_channels": [32, 64, 128], "model.neck.out_channels": 16,
            "model.neck.num_csp_blocks": 1, "model.bbox_head.in_channels": 16,
            "model.bbox_head.feat_channels": 16, "model.bbox_head.stacked_convs": 1,
        },
        r"rtm_cls",
    ),
    "ssd": (
        "ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py",
        {"model.bbox_head.init_cfg": None},
        r"cls_convs\.\d+\.1",
    ),
    "faster r-cnn": ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", TWO_STAGES, r"rpn_cls|fc_cls"),
    "mask r-cnn": (
        "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
        {
            **TWO_STAGES,
            "model.roi_head.mask_roi_extractor": {"featmap_strides": [4, 8], "out_channels": 8},
            "model.roi_head.mask_head": {"in_channels": 8, "conv_out_channels": 8, "num_convs": 1},
        },
        r"rpn_cls|fc_cls",
    ),
}  # fmt: skip
"""Config, changes that make it small, and the layers of its scores."""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_model_json_is_enough_to_find_what_mmdet_does(family, example, tmp_path):
    config, changes, layers = FAMILIES[family]
    torch.manual_seed(0)
    small = {"scale": (2 * SIZE, SIZE), "keep_ratio": True}
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", **small},
        {
            "type": "PackDetInputs",
            "meta_keys": ("img_id", "img_shape", "scale_factor", "ori_shape"),
        },
    ]
    model = random_detector(
        config,
        changes
        | {
            "test_dataloader.dataset.pipeline": pipeline,
            "model.data_preprocessor.pad_size_divisor": 32,
        },
    )
    heads = [
        model.get_submodule(name) for name in ("bbox_head", "rpn_head") if hasattr(model, name)
    ]
    for module in (m for head in heads for m in head.modules() if isinstance(m, torch.nn.Conv2d)):
        torch.nn.init.kaiming_normal_(module.weight)
    let_outputs_vary(model, heads[0])
    for name, module in model.named_modules():
        if re.search(rf"({layers})(\.\d+)?$", name) and isinstance(module, Scored):
            torch.nn.init.kaiming_normal_(module.weight)
            torch.nn.init.constant_(module.bias, -2)
    photo, path = tmp_path / "photo.png", tmp_path / "model.onnx"
    cv2.imwrite(str(photo), np.random.default_rng(0).integers(0, 256, (140, 190, 3), np.uint8))
    export_onnx(model, path)
    scores, boxes, names = example.detect(path, photo)
    expected = inference_detector(model, str(photo)).pred_instances
    # the SSD's random layers have large values, so float32's noise is larger
    noise = (
        {"scores_by": 1e-3, "pixels": 0.1}
        if family == "ssd"
        else {"scores_by": 1e-4, "pixels": 0.01}
    )
    same_detections(model, (scores, boxes, names), expected, **noise)


@pytest.mark.slow
@pytest.mark.parametrize("overflow", [False, True])
def test_integer_files_of_layers_that_levels_share_are_opened(
    overflow, example, tmp_path, monkeypatch
):
    """ONNX Runtime's kernels without overflow refuse weights that several nodes read."""
    torch.manual_seed(0)
    model = random_detector(str(tiny.DEMO), tiny.SMALL_MASK_RCNN)
    settings = QuantizationSettings(8, 8, scope="detector", grids="integer", refit="none")
    calibrate(quantize_model(model, settings), tiny.photos())
    photo, path = tmp_path / "photo.png", tmp_path / "model.onnx"
    cv2.imwrite(str(photo), np.random.default_rng(0).integers(0, 256, (140, 190, 3), np.uint8))
    export_onnx(model, path)
    monkeypatch.setattr(example, "sums_overflow", lambda: overflow)
    scores, boxes, names = example.detect(path, photo)
    expected = load_exported(path)(str(photo)).pred_instances
    same_detections(model, (scores, boxes, names), expected, scores_by=1e-4, pixels=0.01)


def test_the_example_says_what_it_cannot_do(example, tmp_path):
    rule = {"head": "FoveaHead", "scores": None, "second_stage": None}
    about = {"suppression": None, "postprocessing": rule, "region_heads": {}}
    (tmp_path / "model.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit, match="a FoveaHead, whose boxes only mmdet's own"):
        example.detect(tmp_path / "model.onnx", tmp_path / "photo.png")
    about["suppression"] = {"most": 100}
    (tmp_path / "model.json").write_text(json.dumps(about))
    with pytest.raises(SystemExit, match=r"photo\.png is no image"):
        example.detect(tmp_path / "model.onnx", tmp_path / "photo.png")
