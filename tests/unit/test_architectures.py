"""Detectors of mmdet's zoo, with random weights: quantize, calibrate, run, save, load, compensate."""

import copy
import math

import pytest
import torch
from mmdet.structures import DetDataSample
from qwt_mmdet.compensation.fit import fit_compensation
from qwt_mmdet.detectors.build import random_detector
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.state import load_warmup, save_warmup
from qwt_mmdet.record import quantization_of, record_of
from qwt_mmdet.settings import CompensationSettings, QuantizationSettings
from torch import nn

pytestmark = pytest.mark.slow

SIZE = (96, 128)
MANY_TOKENS = (256, 320)  # DINO chooses 900 of them
SMALL_SWIN = {"model.backbone.depths": (1, 1, 2, 1), "model.neck.1.num_blocks": 1}
TIMM = {
    "model.backbone": {
        "_delete_": True,
        "type": "TimmBackbone",
        "model_name": "convnext_atto",
        "out_indices": (0, 1, 2, 3),
    },
    "model.neck.in_channels": [40, 80, 160, 320],
}
ZOO = {
    "swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py": {},
    "swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py": {},
    "retinanet/retinanet_r50_fpn_1x_coco.py": {},
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": {},
    "pvt/retinanet_pvtv2-b0_fpn_1x_coco.py": {},
    "yolox/yolox_s_8xb8-300e_coco.py": {},
    "rtmdet/rtmdet_tiny_8xb32-300e_coco.py": {},
    "mask_rcnn/mask-rcnn_x101-32x4d_fpn_1x_coco.py": {},
    "detr/detr_r50_8xb2-150e_coco.py": {},
    "dino/dino-4scale_r50_8xb2-12e_coco.py": {},
    "dyhead/atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco.py": SMALL_SWIN,
    "ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py": {},
    "retinanet/retinanet_r50-caffe_fpn_1x_coco.py": TIMM,
}


def build(config: str, options: dict) -> nn.Module:
    torch.manual_seed(0)
    model = random_detector(config, options)
    record_of(model).fingerprint = {"model": config, "weights": "random"}
    return model


def images(size: tuple[int, int]) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    keys = ("img_shape", "ori_shape", "batch_input_shape", "pad_shape")
    shape = dict.fromkeys(keys, size)
    return [
        {
            "inputs": [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)],
            "data_samples": [DetDataSample(metainfo={**shape, "scale_factor": (1.0, 1.0)})],
        }
        for _ in range(2)
    ]


@torch.no_grad()
def outputs(model: nn.Module, batches: list[dict], scope: str) -> list[torch.Tensor]:
    """Features of the neck and, where the scope is the detector, detections."""
    found = []
    for batch in batches:
        found += forward_scope(model, copy.deepcopy(batch), "backbone+neck")
        if scope == "detector":
            for sample in forward_scope(model, copy.deepcopy(batch), scope):
                instances = sample.pred_instances
                found += [instances.bboxes, instances.scores, instances.labels]
    return found


@pytest.mark.parametrize("config", ZOO)
def test_detector_is_quantized_saved_loaded_and_compensated(config, tmp_path):
    # SSDHead of mmdet 3.3 lacks an attribute that its own predict needs.
    scope = "backbone+neck" if "ssd" in config else "detector"
    batches = images(MANY_TOKENS if "dino" in config else SIZE)
    settings = QuantizationSettings(
        weight_bits=6,
        activation_bits=6,
        scope=scope,
        weight_range="minmax",
        activation_range="repq" if "swin" in config or "pvt" in config else "minmax",
        rounding="gptq" if "yolox" in config else "nearest",
    )
    model = build(config, ZOO[config])
    reference = copy.deepcopy(model)
    calibrate(quantize_model(model, settings), batches)
    expected = outputs(model, batches, scope)
    assert torch.isfinite(expected[0]).all()  # boxes of random weights may overflow

    save_warmup(model, tmp_path / "warmup.pth")
    loaded = load_warmup(build(config, ZOO[config]), tmp_path / "warmup.pth", settings)
    for actual, wanted in zip(outputs(loaded, batches, scope), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)

    ran = [
        m
        for m in quantization_of(model).not_quantized
        if m.reason != "never ran on a calibration image"
    ]
    known = {"DeformConv2d", "ModulatedDeformConv2d", "ConvTranspose2d", "Embedding", "DINO"}
    assert {entry.type for entry in ran} <= known
    compensation = fit_compensation(
        loaded, reference, batches, CompensationSettings(holdout_fraction=0.5)
    )
    assert len(compensation.blocks) >= 4
    assert all(math.isfinite(block.fit_error_after) for block in compensation.blocks)
