"""Detectors of mmdet's zoo, with random weights: quantize, calibrate, run, save, load, compensate."""

import copy
import math

import pytest
import tiny
import torch
from mmdet.structures import DetDataSample
from qwt_mmdet.compensation.fit import fit_compensation
from qwt_mmdet.config import CompensationSettings, QuantizationSettings
from qwt_mmdet.detectors.build import random_detector
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.state import load_warmup, save_warmup
from qwt_mmdet.record import quantization_of, record_of
from torch import nn
from walk_zoo import SIZES, walk

pytestmark = pytest.mark.slow

SIZE = (96, 128)
MANY_TOKENS = (256, 320)  # DINO chooses 900 of them
SMALL_SWIN = {"model.backbone.depths": (1, 1, 2, 1), "model.neck.1.num_blocks": 1}
SHALLOW = {"model.backbone.depth": 18, "model.neck.in_channels": [64, 128, 256, 512]}
ONE_MAP = {"model.backbone.depth": 18, "model.neck.in_channels": [512]}
FIRST_NECK = {"model.backbone.depth": 18, "model.neck.0.in_channels": [64, 128, 256, 512]}
LAYERS = {"model.encoder.num_layers": 1, "model.decoder.num_layers": 2}
TIMM = {
    "model.backbone": {
        "_delete_": True,
        "type": "TimmBackbone",
        "model_name": "convnext_atto",
        "out_indices": (0, 1, 2, 3),
    },
    "model.neck.in_channels": [40, 80, 160, 320],
}
SMALLEST_SWIN = {"model.backbone.depths": (1, 1, 1, 1)}
ALWAYS = {
    "swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py": SMALLEST_SWIN,
    "retinanet/retinanet_r18_fpn_1x_coco.py": {},
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": SHALLOW,
    "yolox/yolox_tiny_8xb8-300e_coco.py": {},
    "rtmdet/rtmdet_tiny_8xb32-300e_coco.py": {},
    "detr/detr_r50_8xb2-150e_coco.py": ONE_MAP | LAYERS,
    "ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py": {},
    "retinanet/retinanet_r50-caffe_fpn_1x_coco.py": TIMM,
}
ZOO = {
    "pvt/retinanet_pvtv2-b0_fpn_1x_coco.py": {},
    "dino/dino-4scale_r50_8xb2-12e_coco.py": LAYERS,
    "hrnet/fcos_hrnetv2p-w18-gn-head_4xb4-1x_coco.py": {},
    "yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py": {},
    "efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py": {
        "model.backbone.arch": "b0", "model.neck.in_channels": [40, 112, 320],
    },
    "tridentnet/tridentnet_r50-caffe_1x_coco.py": {},
}  # fmt: skip
"""One config for each kind of backbone, neck and head that differs in how it is quantized; the others run with
``-m zoo``."""

FAMILIES = {
    "atss/atss_r50_fpn_1x_coco.py": SHALLOW,
    "autoassign/autoassign_r50-caffe_fpn_1x_coco.py": SHALLOW,
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py": SHALLOW,
    "cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py": SHALLOW,
    "centernet/centernet_r18_8xb16-crop512-140e_coco.py": {},
    "centripetalnet/centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco.py": {},
    "condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py": SHALLOW,
    "conditional_detr/conditional-detr_r50_8xb2-50e_coco.py": ONE_MAP | LAYERS,
    "cornernet/cornernet_hourglass104_10xb5-crop511-210e-mstest_coco.py": {},
    "dab_detr/dab-detr_r50_8xb2-50e_coco.py": ONE_MAP | LAYERS,
    "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": {},
    "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py": {},
    "ddod/ddod_r50_fpn_1x_coco.py": SHALLOW,
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py": LAYERS,
    "detectors/detectors_cascade-rcnn_r50_1x_coco.py": {},
    "double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py": SHALLOW,
    "dyhead/atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco.py": SMALL_SWIN,
    "dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py": SHALLOW,
    "empirical_attention/faster-rcnn_r50-attn0010-dcn_fpn_1x_coco.py": {},
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py": SHALLOW,
    "foveabox/fovea_r50_fpn_4xb4-1x_coco.py": SHALLOW,
    "fpg/faster-rcnn_r50_fpg-chn128_crop640-50e_coco.py": SHALLOW,
    "free_anchor/freeanchor_r50_fpn_1x_coco.py": SHALLOW,
    "fsaf/fsaf_r50_fpn_1x_coco.py": SHALLOW,
    "gcnet/mask-rcnn_r50-gcb-r4-c3-c5_fpn_1x_coco.py": {},
    "gfl/gfl_r50_fpn_1x_coco.py": SHALLOW,
    "ghm/retinanet_r50_fpn_ghm-1x_coco.py": SHALLOW,
    "gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py": {},
    "gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco.py": {},
    "grid_rcnn/grid-rcnn_r50_fpn_gn-head_1x_coco.py": SHALLOW,
    "groie/faste-rcnn_r50_fpn_groie_1x_coco.py": SHALLOW,
    "htc/htc-without-semantic_r50_fpn_1x_coco.py": SHALLOW,
    "libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py": FIRST_NECK,
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py": {},
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py": SHALLOW,
    "ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco.py": SHALLOW,
    "nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py": SHALLOW,
    "nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py": SHALLOW,
    "paa/paa_r50_fpn_1x_coco.py": SHALLOW,
    "pafpn/faster-rcnn_r50_pafpn_1x_coco.py": SHALLOW,
    "pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py": SHALLOW,
    "point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py": SHALLOW,
    "queryinst/queryinst_r50_fpn_1x_coco.py": SHALLOW,
    "regnet/retinanet_regnetx-800MF_fpn_1x_coco.py": {},
    "reppoints/reppoints-moment_r50_fpn_1x_coco.py": SHALLOW,
    "res2net/faster-rcnn_res2net-101_fpn_2x_coco.py": {"model.backbone.depth": 50},
    "resnest/faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco.py": {},
    "sabl/sabl-retinanet_r50_fpn_1x_coco.py": SHALLOW,
    "scnet/scnet_r50_fpn_1x_coco.py": SHALLOW,
    "solo/decoupled-solo-light_r50_fpn_3x_coco.py": SHALLOW,
    "solov2/solov2-light_r18_fpn_ms-3x_coco.py": {},
    "sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py": SHALLOW,
    "tood/tood_r50_fpn_1x_coco.py": SHALLOW,
    "vfnet/vfnet_r50_fpn_1x_coco.py": SHALLOW,
    "yolact/yolact_r50_1xb8-55e_coco.py": {},
    "yolof/yolof_r50-c5_8xb8-1x_coco.py": ONE_MAP | {"model.neck.in_channels": 512},
}
"""One config for each other folder of detectors in the zoo (``-m zoo``)."""


FULL_PRECISION = {
    "ConvTranspose2d", "ConvWS2d", "DINO", "DeformConv2d", "Embedding", "ModulatedDeformConv2d",
    "SAConv2d", "TridentConv",
}  # fmt: skip
"""Types with weights that have no quantized form."""


def build(config: str, options: dict) -> nn.Module:
    torch.manual_seed(0)
    model = random_detector(config, options)
    record_of(model).fingerprint = {"model": config, "weights": "random"}
    return model.to(tiny.device)


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
def outputs(model: nn.Module, batches: list[dict]) -> list[torch.Tensor]:
    """Features of the neck and detections."""
    found = []
    for batch in batches:
        found += forward_scope(model, copy.deepcopy(batch), "backbone+neck")
        for sample in forward_scope(model, copy.deepcopy(batch), "detector"):
            instances = sample.pred_instances
            found += [instances.bboxes, instances.scores, instances.labels]
    return found


@pytest.mark.slow_if_pretended  # test_steps.py has a small detector there
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "config",
    [
        *ALWAYS,
        *(pytest.param(name, marks=pytest.mark.zoo) for name in ZOO),
    ],
)
def test_detector_is_quantized_saved_loaded_and_compensated(config, tmp_path):
    options = (ALWAYS | ZOO)[config]
    batches = images(MANY_TOKENS if "dino" in config else SIZE)
    settings = QuantizationSettings(
        weight_bits=6,
        activation_bits=6,
        scope="detector",
        weight_range="minmax",
        activation_range="repq" if "swin" in config or "pvt" in config else "minmax",
        rounding="gptq" if "yolox" in config else "nearest",
    )
    model = build(config, options)
    reference = copy.deepcopy(model)
    calibrate(quantize_model(model, settings), batches)
    expected = outputs(model, batches)
    assert torch.isfinite(expected[0]).all()  # boxes of random weights may overflow

    save_warmup(model, tmp_path / "warmup.pth")
    loaded = load_warmup(build(config, options), tmp_path / "warmup.pth", settings)
    for actual, wanted in zip(outputs(loaded, batches), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)

    ran = [
        m
        for m in quantization_of(model).not_quantized
        if m.reason != "never ran on a calibration image"
    ]
    assert {entry.type for entry in ran} <= FULL_PRECISION
    compensation = fit_compensation(
        loaded, reference, batches, CompensationSettings(ridge=0.01, holdout_fraction=0.5)
    )
    assert len(compensation.blocks) >= 4
    assert all(math.isfinite(block.fit.error_after) for block in compensation.blocks)


@pytest.mark.zoo
@pytest.mark.parametrize("config", FAMILIES)
def test_family_goes_through_all_steps_by_its_own_test_pipeline(config):
    found = walk(
        config, SIZES["ddod" in config], changes=FAMILIES[config]
    )  # DDOD's kernels are large
    assert found["layers"] >= (6 if "gn+ws" in config else 20)  # standardised weights stay
    assert found["blocks"] >= 4
