"""Blocks of every registered architecture: found, fitted, and closer to full precision."""

import copy

import pytest
import tiny
import torch
from mmdet.models.backbones import (
    CSPNeXt,
    HourglassNet,
    HRNet,
    MobileNetV2,
    PyramidVisionTransformer,
    PyramidVisionTransformerV2,
    ResNeXt,
    TridentResNet,
)
from mmdet.models.backbones.trident_resnet import TridentConv
from mmdet.models.necks import FPN, PAFPN, YOLOXPAFPN, ChannelMapper, CSPNeXtPAFPN
from qwt_mmdet.compensation.blocks import find_blocks
from qwt_mmdet.compensation.fit import fit_compensation
from qwt_mmdet.compensation.modules import aligned_input, channel_axis
from qwt_mmdet.compensation.state import apply_compensation
from qwt_mmdet.config import CompensationSettings, QuantizationSettings
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from torch import nn

pytestmark = pytest.mark.usefixtures("device")

# Arguments that both PVT and PVTv2 take.
PVT = {
    "embed_dims": 8, "num_layers": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
    "sr_ratios": [2, 2, 1, 1], "mlp_ratios": [2, 2, 2, 2],
}  # fmt: skip


class WithNeck(tiny.TinyDetector):
    def __init__(self, backbone, neck):
        super().__init__(backbone)
        self.neck = neck

    def extract_feat(self, images):
        return self.neck(self.backbone(images))


def timm_backbone(name, **options):
    from qwt_mmdet.detectors.timm_backbone import TimmBackbone

    return TimmBackbone(name, out_indices=(0, 1), **options)


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class Plain(nn.Module):
    """Somebody's own backbone: residual units by name, joined by convolutions."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.unit1, self.unit2 = Residual(8), Residual(8)

    def forward(self, x):
        x = self.unit1(self.stem(x))
        return x, self.unit2(self.down(x))


def chain():
    """Convolutions in a row, as in VGG."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1)
    )


def stage(modules, branches, block, *blocks):
    channels = (4, 8, 16, 32)[:branches]
    return {"num_modules": modules, "num_branches": branches, "block": block,
            "num_blocks": blocks, "num_channels": channels}  # fmt: skip


# Backbone, and how many blocks it has without and with downsampling layers.
BACKBONES = {
    "swin": (lambda: tiny.backbone("swin"), 4, 5),
    "resnet": (lambda: tiny.backbone("resnet"), 4, 4),
    "resnext": (
        lambda: ResNeXt(depth=50, groups=2, base_width=4, base_channels=8, stem_channels=8,
                        num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1)),
        7, 7,
    ),
    "cspdarknet": (lambda: tiny.backbone("cspdarknet"), 9, 9),
    "cspnext": (lambda: CSPNeXt(deepen_factor=0.167, widen_factor=0.125), 12, 12),
    "mobilenetv2": (lambda: MobileNetV2(widen_factor=0.25, out_indices=(1, 2)), 17, 17),
    "pvt": (lambda: PyramidVisionTransformer(pretrain_img_size=64, **PVT), 4, 7),
    "pvtv2": (lambda: PyramidVisionTransformerV2(**PVT), 4, 7),
    "hrnet": (
        lambda: HRNet({
            "stage1": stage(1, 1, "BOTTLENECK", 2), "stage2": stage(1, 2, "BASIC", 1, 1),
            "stage3": stage(1, 3, "BASIC", 1, 1, 1), "stage4": stage(1, 4, "BASIC", 1, 2, 1, 1),
        }),
        12, 12,
    ),
    "hourglass": (
        lambda: HourglassNet(downsample_times=1, num_stacks=2, stage_channels=(8, 8),
                             stage_blocks=(1, 2), feat_channel=8),
        12, 12,
    ),
    "trident": (
        lambda: TridentResNet(50, num_branch=3, test_branch_idx=1, trident_dilations=(1, 2, 3),
                              num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,),
                              base_channels=4, stem_channels=4),
        13, 13,
    ),
    "residual units": (Plain, 2, 2),
    "convolutions": (chain, 2, 2),
    "timm resnet": (lambda: timm_backbone("resnet18"), 2, 2),
    "timm convnext": (lambda: timm_backbone("test_convnext"), 3, 4),
    "timm efficientnet": (lambda: timm_backbone("test_efficientnet"), 5, 5),
    "timm swin": (
        lambda: timm_backbone("swin_s3_tiny_224", embed_dim=16, depths=(1, 1, 1, 1), img_size=64,
                              num_heads=(1, 1, 2, 2), window_size=4),
        2, 3,
    ),
}  # fmt: skip

NECKS = {
    "fpn": (lambda c: FPN(c, 8, num_outs=3), 4),
    "pafpn": (lambda c: PAFPN(c, 8, num_outs=2), 6),
    "channel mapper": (lambda c: ChannelMapper(c, out_channels=8, num_outs=2), 2),
    "yolox": (lambda c: YOLOXPAFPN(c, 8, num_csp_blocks=1), 6),
    "cspnext": (lambda c: CSPNeXtPAFPN(c, 8, num_csp_blocks=1), 6),
}


def detector(backbone, neck=None):
    torch.manual_seed(0)
    model = tiny.TinyDetector(backbone()) if neck is None else WithNeck(backbone(), neck)
    for module in model.modules():
        if isinstance(module, TridentConv):  # mmdet leaves it what was in memory
            nn.init.kaiming_normal_(module.weight)
    return model.eval().to(tiny.device)


@pytest.mark.slow_if_pretended
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_is_fitted_and_comes_closer_to_full_precision(name):
    build, plain, with_downsampling = BACKBONES[name]
    full = detector(build)
    images = tiny.batches(2)
    assert len(find_blocks(full, images[0])) == plain
    assert len(find_blocks(full, images[0], downsampling=True)) == with_downsampling
    quantization = QuantizationSettings(4, 6, activation_range="minmax", refit="none")
    model = calibrate(quantize_model(copy.deepcopy(full), quantization), images)
    settings = CompensationSettings(
        downsampling=True, ridge=0.01, gate="none", holdout_fraction=0, target="reference"
    )
    fitted = fit_compensation(model, full, images, settings)
    assert len(fitted.blocks) == with_downsampling
    assert all(block.fit.error_after < block.fit.error_before for block in fitted.blocks)
    compensated = apply_compensation(copy.deepcopy(model), fitted)
    with torch.no_grad():
        outputs = [forward_scope(m, images[0], "backbone")[-1] for m in (full, model, compensated)]
    assert (outputs[2] - outputs[0]).norm() < (outputs[1] - outputs[0]).norm()


@pytest.mark.slow_if_pretended
@pytest.mark.parametrize("name", NECKS)
def test_necks_are_compensated_where_they_are_quantized(name):
    build, blocks = NECKS[name]
    full = detector(BACKBONES["resnet"][0], build([8, 16]))
    images = tiny.batches(2)
    quantization = QuantizationSettings(
        weight_bits=4, activation_bits=6, scope="backbone+neck", activation_range="minmax"
    )
    model = calibrate(quantize_model(copy.deepcopy(full), quantization), images)
    settings = CompensationSettings(ridge=0.01, gate="none", holdout_fraction=0)
    fitted = fit_compensation(model, full, images, settings)
    names = [block.name for block in fitted.blocks]
    assert sum(name.startswith("neck.") for name in names) == blocks
    assert len(names) == 4 + blocks
    assert all(block.fit.error_after < block.fit.error_before for block in fitted.blocks)


def test_a_neck_without_blocks_is_named_and_left_out(caplog):
    full, image = detector(BACKBONES["resnet"][0], nn.Identity()), tiny.batches(1)[0]
    names = find_blocks(full, image, scope="detector")
    assert names == find_blocks(full, image)
    assert "The neck, of class Identity, stays without compensation" in caplog.text


class Pyramid(nn.Module):
    """A neck that nothing is registered for; one convolution runs for both of its levels."""

    def __init__(self):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in (8, 16))
        self.shared = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, maps):
        return [self.shared(layer(x)) for layer, x in zip(self.lateral, maps, strict=True)]


def test_found_blocks_run_once_and_the_log_says_how_to_name_others(caplog):
    caplog.set_level("INFO")
    full = detector(BACKBONES["resnet"][0], Pyramid())
    names = find_blocks(full, tiny.batches(1)[0], scope="backbone+neck")
    assert names[-2:] == ["neck.lateral.0", "neck.lateral.1"]
    assert "neck.lateral.0, neck.lateral.1. To choose others, set 'blocks'" in caplog.text


def test_a_registered_block_that_cannot_be_compensated_is_left_out(caplog):
    full = detector(BACKBONES["resnet"][0])
    block = full.backbone.layer1[1]
    forward = full.backbone.layer1.forward
    full.backbone.layer1.forward = lambda x: block(forward(x))
    names = find_blocks(full, tiny.batches(1)[0])
    assert names == ["backbone.layer1.0", "backbone.layer2.0", "backbone.layer2.1"]
    assert "backbone.layer1.1 stays without compensation: it runs twice" in caplog.text


def test_patch_merging_reads_every_second_token_of_both_axes():
    """Also of odd maps: 3×5 tokens become 2×3."""
    full = tiny.detector("swin")
    merging = full.backbone.stages[0].downsample
    x = torch.arange(15.0, device=tiny.device).view(1, 15, 1).repeat(1, 1, 16)
    arguments = (x, (3, 5)), {}
    output, size = merging(*arguments[0])
    aligned = aligned_input(arguments, output, -1)
    assert tuple(size) == (2, 3)
    assert aligned[0, :, 0].tolist() == [0, 2, 4, 10, 12, 14]


def test_a_block_of_linear_layers_has_its_channels_last():
    maps = torch.zeros(1, 4, 4, 4)
    assert channel_axis(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), maps) == -1
    assert channel_axis(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(4, 4)), maps) == 1
    assert channel_axis(nn.Conv2d(4, 4, 1), torch.zeros(1, 16, 4)) == -1


class Stem(nn.Module):
    """A stem whose output several blocks read, one of them after another step that runs twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.pool = nn.AvgPool2d(3, 1, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.pool(self.a(x))
        return self.b(self.pool(y) + x)


def test_what_lies_between_blocks_runs_once_per_image_and_model():
    full = tiny.TinyDetector(Stem()).eval().to(tiny.device)
    settings = QuantizationSettings(weight_bits=3, activation_bits=4)
    model = calibrate(quantize_model(copy.deepcopy(full), settings), tiny.batches(3))
    calls = []
    for part in (full, model):
        for name in ("stem", "pool", "a", "b"):
            module = getattr(part.backbone, name)
            forward = module.forward

            def counted(*args, name=name, forward=forward):
                calls.append(name)
                return forward(*args)

            module.forward = counted
    blocks = ("backbone.a", "backbone.b")
    compensation = CompensationSettings(
        blocks=blocks, gate="none", ridge=0, holdout_fraction=0, target="reference"
    )
    fit_compensation(model, full, tiny.batches(3), compensation)
    # One pass of the full-precision model records what is read when, another counts multiply-adds.
    per_model = {"stem": 1, "pool": 2, "a": 1, "b": 1}
    images_of_both = 2 * 3
    for name, times in per_model.items():
        assert calls.count(name) == times * (images_of_both + 2), name
