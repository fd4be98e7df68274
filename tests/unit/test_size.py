"""Bytes of weights, counted by hand."""

import pytest
import tiny
import torch
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.size import (
    detector_bytes,
    full_precision_bytes,
    tensor_bytes,
    weight_bytes,
)
from torch import nn

pytestmark = pytest.mark.usefixtures("device")


def calibrated(**settings):
    """3 -> 4 channels by 3×3 without a bias, 4 -> 4 depthwise by 3×3, and 4 -> 4 by 1×1."""
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1)
    )
    model = tiny.TinyDetector(layers).eval().to(tiny.device)
    return calibrate(quantize_model(model, QuantizationSettings(4, 8, **settings)), tiny.batches(1))


CODES = (4 * 3 * 9 + 4 * 9 + 4 * 4) / 2
BIASES = 2 * 4 * 4


def test_weights_have_their_bits_a_grid_per_channel_and_all_else_is_float32():
    model = calibrated()
    assert weight_bytes(model) == CODES + BIASES
    corrections = 4 * 4  # of the layer without a bias
    assert detector_bytes(model) == CODES + BIASES + 5 * (4 + 3 + 4 + 4 + 4 + 4) + corrections
    assert full_precision_bytes(model) == 8 * CODES + BIASES


def test_without_migration_an_input_has_one_scale_but_for_depthwise_layers():
    model = calibrated(migrate_scales=False, bias_correction=False)
    assert detector_bytes(model) == CODES + BIASES + 5 * (4 + 1 + 4 + 4 + 4 + 1)


def test_inputs_in_floating_point_have_no_scales():
    model = calibrated(overrides=({"pattern": "backbone.1", "activation_bits": 32},))
    assert detector_bytes(calibrated()) - detector_bytes(model) == 5 * 4


def test_other_bits_change_the_codes_alone():
    model = calibrated()
    fewer = detector_bytes(model, {"backbone.0": 3, "backbone.2": 0})
    assert detector_bytes(model) - fewer == 4 * 3 * 9 / 8 + 4 * 4 / 2


def test_layers_that_never_ran_stay_in_full_precision():
    model = tiny.TinyDetector(nn.Sequential(nn.Conv2d(3, 4, 1))).eval().to(tiny.device)
    model.backbone.unused = nn.Linear(8, 8).to(tiny.device)
    model.backbone.forward = lambda x: model.backbone[0](x)
    full = full_precision_bytes(model)
    calibrate(quantize_model(model, QuantizationSettings(4, 8)), tiny.batches(1))
    assert full - weight_bytes(model) == 3 * 4 * 3.5


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_size_depends_on_bits_alone_and_full_precision_on_nothing(kind):
    full = full_precision_bytes(tiny.detector(kind))
    settings = (QuantizationSettings(3, bits, rounding="nearest") for bits in (4, 8))
    few, many = (
        tiny.calibrated(kind, one, images) for one, images in zip(settings, (1, 3), strict=True)
    )
    assert detector_bytes(few) == detector_bytes(many)
    assert full_precision_bytes(few) == full_precision_bytes(many) == full


def test_tensors_are_counted_as_files_hold_them():
    tensors = [torch.zeros(3, dtype=torch.int8), torch.zeros(2, dtype=torch.float64)]
    assert tensor_bytes(tensors) == 3 + 2 * 4
