"""Layers of classes that inherit from nn.Linear and nn.Conv2d."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmcv.cnn.bricks.conv_ws import ConvAWS2d, ConvWS2d
from mmdet.models.backbones import EfficientNet
from mmdet.models.layers import NormedConv2d, NormedLinear
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.imports import importable_torchvision
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import (
    full_precision,
    quantize_model,
    quantized_layers,
)
from qwt_mmdet.quantization.layers import QuantizedConv2d
from qwt_mmdet.record import quantization_of
from torch import nn

pytestmark = pytest.mark.usefixtures("device")

EIGHT = QuantizationSettings(8, 8)


class Cropping(nn.Conv2d):
    """Changes its input by itself, not by way of the base's forward."""

    def forward(self, x):
        return 2 * F.conv2d(
            input=x[:, :, 1:], weight=self.weight, bias=self.bias, padding=self.padding
        )


class Padding(nn.Conv2d):
    """Changes the input in what the base's forward calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (2, 2, 2, 2)), weight, bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x / 2)


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias)


class Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + super().forward(-x)


class Offset(nn.Conv2d):
    def forward(self, x, offset=None):
        return super().forward(x)


class Normed(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / self.weight.norm()


class Conv2dSubclass(nn.Conv2d):
    pass


class Failing(nn.Linear):
    def forward(self, x):
        raise ValueError("no")


def timm_layer(name, *arguments, **options):
    with importable_torchvision():
        from timm import layers
    return getattr(layers, name)(*arguments, **options)


def one_layer(layer):
    """A detector whose backbone is the layer, on maps [1, 3, 16, 16] with channels where it wants them."""

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x if isinstance(layer, nn.Conv2d) else x.movedim(1, -1))

    return tiny.TinyDetector(Backbone()).eval().to(tiny.device)


QUANTIZED = {
    "adaptive padding": lambda: Conv2dAdaptivePadding(3, 4, 3, stride=2),
    "timm's padding": lambda: timm_layer("Conv2dSame", 3, 6, 3, stride=2, groups=3),
    "own product": lambda: Cropping(3, 4, 3, padding=1),
    "own padding": lambda: Padding(3, 4, 5, bias=False),
    "scaled input": lambda: Scaled(3, 4),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_layer_whose_forward_is_the_bases_on_a_changed_input_is_quantized(name):
    torch.manual_seed(0)
    full = one_layer(QUANTIZED[name]())
    original = full.backbone.layer
    images = tiny.batches(2, (17, 16))
    x = torch.stack(images[0]["inputs"])
    model = quantize_model(copy.deepcopy(full), EIGHT)
    with torch.no_grad():
        with full_precision(model, {}):
            assert torch.equal(model.backbone(x), full.backbone(x))
        calibrate(model, images)
        layer = model.backbone.layer
        assert isinstance(layer, type(original))
        assert not quantization_of(model).not_quantized
        expected, actual = full.backbone(x), model.backbone(x)
        assert 0 < (actual - expected).norm() < 0.02 * expected.norm()
        assert torch.equal(copy.deepcopy(model).backbone(x), actual)


REFUSED = {
    "standardised": (lambda: ConvWS2d(3, 4, 3), "in another way"),
    "standardised with a scale": (lambda: ConvAWS2d(3, 4, 3), "in another way"),
    "timm's standardised": (lambda: timm_layer("StdConv2d", 3, 4, 3), "in another way"),
    "normed convolution": (lambda: NormedConv2d(3, 4, 3), "in another way"),
    "normed linear": (lambda: NormedLinear(3, 4), "in another way"),
    "masked weight": (lambda: Masked(3, 4), "in another way (mul)"),
    "norm of the weight": (lambda: Normed(3, 4, 3), "in another way (norm)"),
    "two products": (lambda: Twice(3, 4, 3), "2 times"),
    "two inputs": (lambda: Offset(3, 4, 3), "takes more than the input"),
    "weight norm": (lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), "from other tensors"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "from other tensors",
    ),
    "reflecting": (
        lambda: Conv2dSubclass(3, 4, 3, padding=1, padding_mode="reflect"), "in another way (conv2d)",
    ),
    "failing": (lambda: Failing(3, 4), "fails on a tensor of shape (1, 3) (ValueError)"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_layer_that_uses_its_weight_itself_stays_in_full_precision(name):
    build, reason = REFUSED[name]
    model = one_layer(nn.ModuleList([build(), nn.Linear(3, 4)]))
    before = type(model.backbone.layer[0])
    quantize_model(model, EIGHT)
    assert type(model.backbone.layer[0]) is before
    assert list(quantized_layers(model)) == ["backbone.layer.1"]
    reasons = {entry.name: entry.reason for entry in quantization_of(model).not_quantized}
    assert reason in reasons["backbone.layer.0"]


def test_all_convolutions_of_mmdets_efficientnet_are_quantized():
    backbone = EfficientNet(arch="b0", out_indices=(3,))
    model = quantize_model(tiny.TinyDetector(backbone).to(tiny.device), EIGHT)
    assert not quantization_of(model).not_quantized
    convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    assert all(isinstance(module, QuantizedConv2d) for module in convolutions)
