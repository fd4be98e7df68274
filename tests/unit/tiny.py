"""Tiny detectors with random weights, for tests of quantization and compensation."""

import contextlib
import copy
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fake_cuda import pretended_gpu
from mmdet.models.backbones import CSPDarknet, ResNet, SwinTransformer
from mmdet.structures import DetDataSample
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.record import record_of
from torch import Tensor, nn

DEMO = Path(__file__).parents[2] / "workflow/demo/mask-rcnn_swin-xxs-p4-w8_fpn_shapes.py"
SMALL_MASK_RCNN = {
    "model.backbone": {
        "_delete_": True, "type": "ResNet", "depth": 18, "base_channels": 8, "stem_channels": 8,
        "num_stages": 2, "strides": (1, 2), "dilations": (1, 1), "out_indices": (0, 1),
    },
    "model.neck": {"in_channels": [8, 16], "out_channels": 8, "num_outs": 2},
    "model.rpn_head": {
        "in_channels": 8, "feat_channels": 8, "anchor_generator": {"strides": [4, 8]},
    },
    "model.roi_head": {
        "bbox_roi_extractor": {"featmap_strides": [4, 8], "out_channels": 8},
        "bbox_head": {"in_channels": 8, "fc_out_channels": 16},
        "mask_roi_extractor": {"featmap_strides": [4, 8], "out_channels": 8},
        "mask_head": {"in_channels": 8, "conv_out_channels": 8},
    },
    "model.test_cfg.rcnn.score_thr": 0.0,
}  # fmt: skip
"""Changes to the demo's config: a small ResNet, and weights that need no training to find something."""


def photos(size: tuple[int, int] = (64, 64)) -> list[dict[str, Any]]:
    """Two batches of one image of ``size`` (height, width), for whole detectors."""
    generator = torch.Generator().manual_seed(0)
    keys = ("img_shape", "ori_shape", "batch_input_shape", "pad_shape")
    meta = {**dict.fromkeys(keys, size), "scale_factor": (1.0, 1.0)}
    return [
        {
            "inputs": [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)],
            "data_samples": [DetDataSample(metainfo=meta)],
        }
        for _ in range(2)
    ]


KINDS = ("swin", "resnet", pytest.param("cspdarknet", marks=pytest.mark.slow_if_pretended))
"""Of :func:`backbone`, for tests with each of them."""

device = torch.device("cpu")
"""Where detectors and images are; the fixture ``device`` sets it."""


@contextlib.contextmanager
def computing_on(place: str) -> Iterator[torch.device]:
    """Inside, detectors and images are on a device, or on the ``pretended`` GPU."""
    there = pretended_gpu() if place == "pretended" else contextlib.nullcontext(place)
    with there as found, mock.patch.dict(globals(), device=torch.device(found)):
        yield device


@contextlib.contextmanager
def restored(*tables: dict) -> Iterator[None]:
    """Afterwards tables of algorithms are as before, and the module ``mylab`` is imported anew."""
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
        sys.modules.pop("mylab", None)


class TinyDetector(nn.Module):
    """What forward_scope needs of an mmdet detector: a preprocessor and a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        record_of(self).fingerprint = {"model": type(backbone).__name__, "weights": "0" * 64}

    def data_preprocessor(self, batch: dict[str, Any], training: bool) -> dict[str, Any]:
        return {"inputs": torch.stack(list(batch["inputs"])), "data_samples": None}

    def extract_feat(self, x: Tensor) -> Any:
        return self.backbone(x)


def backbone(kind: str) -> nn.Module:
    if kind == "swin":
        return SwinTransformer(
            embed_dims=16, depths=(2, 2), num_heads=(2, 4), window_size=4, out_indices=(0, 1),
            strides=(4, 2), mlp_ratio=2, drop_path_rate=0.0,
        )  # fmt: skip
    if kind == "resnet":
        return ResNet(depth=18, base_channels=8, stem_channels=8, num_stages=2,
                      strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))  # fmt: skip
    return CSPDarknet(deepen_factor=0.33, widen_factor=0.125, use_depthwise=True)


def detector(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = TinyDetector(backbone(kind))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval().to(device)


def calibrated(
    kind: str, settings: QuantizationSettings, images: int, size: tuple[int, int] = (64, 64)
) -> nn.Module:
    """:func:`detector`, calibrated on :func:`batches`; what took time once is copied from then on."""
    place = type(torch.empty(0, device=device)), device
    return copy.deepcopy(_calibrated(place, kind, settings, images, size))


@functools.cache
def _calibrated(
    place: Any, kind: str, settings: QuantizationSettings, images: int, size: tuple[int, int]
) -> nn.Module:
    return calibrate(quantize_model(detector(kind), settings), batches(images, size))


def batches(count: int, size: tuple[int, int] = (64, 64), batch: int = 1) -> list[dict[str, Any]]:
    """``count`` images in batches of ``batch``; the images do not depend on ``batch``."""
    generator = torch.Generator().manual_seed(1)

    def images() -> Iterator[Tensor]:
        for _ in range(count):
            yield torch.randn(3, *size, generator=generator).to(device)

    everything = list(images())
    return [{"inputs": everything[i : i + batch]} for i in range(0, count, batch)]
