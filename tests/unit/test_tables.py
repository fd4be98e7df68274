"""Algorithms by name: the configuration and the tables know the same ones, and a user can add to them."""

import copy
from typing import get_args

import pytest
import tiny
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from qwt_mmdet.compensation.blocks import BACKBONES
from qwt_mmdet.compensation.fit import fit_compensation
from qwt_mmdet.compensation.kinds import KINDS
from qwt_mmdet.compensation.solve import SOLVERS
from qwt_mmdet.compensation.state import (
    apply_compensation,
    load_compensation,
    save_compensation,
)
from qwt_mmdet.config import CompensationSettings, QuantizationSettings
from qwt_mmdet.config.quantization import ActivationRange, Refit, Rounding, WeightRange
from qwt_mmdet.detectors.build import random_detector, resolve_config
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.errors import QwtError
from qwt_mmdet.quantization.attention import ATTENTION
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model, quantized_layers
from qwt_mmdet.quantization.ranges import RANGES, register_range
from qwt_mmdet.quantization.rounding import ROUNDINGS, register_rounding
from qwt_mmdet.quantization.weight_fit import WEIGHT_FITS
from qwt_mmdet.record import record_of

pytestmark = pytest.mark.usefixtures("device")


def built_in(choice) -> set[str]:
    """The names that a type of the configuration lists."""
    return set(get_args(get_args(choice)[0]))


def test_the_configuration_lists_what_the_tables_hold():
    assert built_in(WeightRange) == set(RANGES)
    assert built_in(ActivationRange) == {*RANGES, "repq"}
    assert built_in(Rounding) == set(ROUNDINGS)
    assert built_in(Refit) == set(WEIGHT_FITS)


@pytest.mark.parametrize("key", ["weight_range", "activation_range", "rounding", "refit"])
def test_a_name_that_nobody_registered_is_told_with_those_that_are(key):
    with pytest.raises(QwtError, match="it should be"):
        QuantizationSettings(8, 8, **{key: "mean"})
    settings = QuantizationSettings(8, 8, migrate_scales=False, **{key: "mylab.mean"})
    model = quantize_model(tiny.detector("resnet"), settings)
    with pytest.raises(QwtError, match=r"'mylab\.mean'.*Known: .*"):
        calibrate(model, tiny.batches(1))


@pytest.fixture
def restored():
    """Leave the tables as they were."""
    with tiny.restored(RANGES, ROUNDINGS, KINDS, SOLVERS, ATTENTION, BACKBONES):
        yield
    MODELS.module_dict.pop("OwnNet", None)


@pytest.mark.usefixtures("restored")
def test_a_range_and_a_rounding_from_outside_of_the_package():
    @register_range("mylab.half")
    def half(seen, bits, percentile):
        return seen.low / 2, seen.high / 2

    @register_rounding("mylab.down")
    def down(weight, scale, zero_point, bits, moments):
        codes = (weight / scale[..., None]).floor() + zero_point[..., None]
        return codes.clamp(0, 2**bits - 1).to(torch.uint8)

    def calibrated(activation_range, rounding):
        settings = QuantizationSettings(
            4, 8, weight_range="minmax", activation_range=activation_range, rounding=rounding,
            migrate_scales=False, bias_correction=False, refit="none",
        )  # fmt: skip
        return calibrate(quantize_model(tiny.detector("resnet"), settings), tiny.batches(2))

    model, usual = calibrated("mylab.half", "mylab.down"), calibrated("minmax", "nearest")
    for name, layer in quantized_layers(model).items():
        other = quantized_layers(usual)[name]
        torch.testing.assert_close(
            2 * layer.input_quantizer.scale, other.input_quantizer.scale, rtol=1e-6, atol=0
        )
        assert (layer.weight_codes.int() <= other.weight_codes.int()).all()


MYLAB = """
from dataclasses import dataclass

from mmdet.registry import MODELS
from qwt_mmdet.compensation.blocks import register_blocks
from qwt_mmdet.compensation.kinds import Kind
from qwt_mmdet.compensation.solve import Solution, register_solver
from qwt_mmdet.quantization.attention import QuantizedAttention, register_attention
from torch import Tensor, nn


class OneHead(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(-2, -1)
        return scores.softmax(-1) @ self.value(x)


@register_attention(OneHead)
class QuantizedOneHead(QuantizedAttention, OneHead):
    def forward(self, x):
        return self.attend(self.query(x), self.key(x), self.value(x), lambda s: s, 0.0)[0]


@MODELS.register_module(force=True)
class OwnNet(nn.Module):
    def __init__(self, **options):
        super().__init__()
        widths = (3, 64, 128, 256)
        self.steps = nn.ModuleList(
            nn.Conv2d(a, b, 8 if a == 3 else 2, 8 if a == 3 else 2)
            for a, b in zip(widths, widths[1:])
        )
        self.attention = OneHead(256)

    def forward(self, x):
        maps = []
        for step in self.steps:
            x = step(x).relu()
            maps.append(x)
        tokens = x.flatten(2).transpose(1, 2)
        maps[-1] = (tokens + self.attention(tokens)).transpose(1, 2).reshape(x.shape)
        return maps

    def init_weights(self):
        pass


@register_blocks("OwnNet")
def own_blocks(backbone, downsampling):
    return ["steps.1", "steps.2", "attention"]


@dataclass(frozen=True)
class Shift(Kind, name="mylab.shift"):
    bias: Tensor

    @property
    def multiply_adds(self):
        return 0

    def apply(self, x, output, axis):
        return output + (self.bias[:, None, None] if axis == 1 else self.bias)

    def squared_error(self, statistics):
        return statistics.any.constant_error(self.bias)


@register_solver("mylab.shift", "outputs")
def solve_shift(sums, ridge, settings):
    return [Solution(Shift(sums.any.mean_y.clone()), 0.0, "mean")]
"""


@pytest.mark.usefixtures("restored")
def test_a_module_of_the_users_own_brings_attention_blocks_and_kind(tmp_path, monkeypatch):
    (tmp_path / "mylab.py").write_text(MYLAB)
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "own.py"
    config.write_text(
        f"_base_ = {str(resolve_config('yolox/yolox_nano_8xb8-300e_coco.py'))!r}\n"
        "custom_imports = dict(imports=['mylab'])\n"
        "model = dict(backbone=dict(type='OwnNet'))\n"
    )
    torch.manual_seed(0)
    full = random_detector(config).to(tiny.device)
    record_of(full).fingerprint = {"model": "own", "weights": "random"}
    batches = [{**batch, "data_samples": [DetDataSample()]} for batch in tiny.batches(2)]
    settings = QuantizationSettings(
        4, 4, weight_range="minmax", activation_range="minmax", migrate_scales=False
    )
    model = calibrate(quantize_model(copy.deepcopy(full), settings), batches)
    assert type(model.backbone.attention).__name__ == "QuantizedOneHead"
    fitted = fit_compensation(
        model,
        full,
        batches,
        CompensationSettings(kind="mylab.shift", gate="none", ridge=0, holdout_fraction=0),
    )
    assert [block.name for block in fitted.blocks] == [
        "backbone.steps.1", "backbone.steps.2", "backbone.attention",
    ]  # fmt: skip
    assert all(block.fit.error_after < block.fit.error_before for block in fitted.blocks)
    save_compensation(model, fitted, tmp_path / "compensation.pth")
    image = batches[0]
    with torch.no_grad():
        expected = forward_scope(
            apply_compensation(copy.deepcopy(model), fitted), image, "backbone"
        )
        load_compensation(model, tmp_path / "compensation.pth")
        found = forward_scope(model, image, "backbone")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
