"""Algorithms by name: the configuration and the tables know the same ones, and a user can add to them."""

from typing import get_args

import pytest
import tiny
import torch
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.config.quantization import ActivationRange, Rounding, WeightRange
from qwt_mmdet.errors import QwtError
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model, quantized_layers
from qwt_mmdet.quantization.ranges import RANGES, register_range
from qwt_mmdet.quantization.rounding import ROUNDINGS, register_rounding

pytestmark = pytest.mark.usefixtures("device")


def built_in(choice) -> set[str]:
    """The names that a type of the configuration lists."""
    return set(get_args(get_args(choice)[0]))


def test_the_configuration_lists_what_the_tables_hold():
    assert built_in(WeightRange) == set(RANGES)
    assert built_in(ActivationRange) == {*RANGES, "repq"}
    assert built_in(Rounding) == set(ROUNDINGS)


@pytest.mark.parametrize("key", ["weight_range", "activation_range", "rounding"])
def test_a_name_that_nobody_registered_is_told_with_those_that_are(key):
    with pytest.raises(QwtError, match="it should be"):
        QuantizationSettings(8, 8, **{key: "mean"})
    settings = QuantizationSettings(8, 8, migrate_scales=False, **{key: "mylab.mean"})
    model = quantize_model(tiny.detector("resnet"), settings)
    with pytest.raises(QwtError, match=r"'mylab\.mean'.*Known: .*"):
        calibrate(model, tiny.batches(1))


def test_a_range_and_a_rounding_from_outside_of_the_package(monkeypatch):
    monkeypatch.setattr("qwt_mmdet.quantization.ranges.RANGES", dict(RANGES))
    monkeypatch.setattr("qwt_mmdet.quantization.rounding.ROUNDINGS", dict(ROUNDINGS))

    @register_range("mylab.half")
    def half(seen, bits, percentile):
        return seen.low / 2, seen.high / 2

    @register_rounding("mylab.down")
    def down(weight, scale, zero_point, bits, moments):
        codes = (weight / scale[..., None]).floor() + zero_point[..., None]
        return codes.clamp(0, 2**bits - 1).to(torch.uint8)

    settings = QuantizationSettings(
        4, 8, weight_range="minmax", activation_range="mylab.half", rounding="mylab.down",
        migrate_scales=False, bias_correction=False,
    )  # fmt: skip
    model = calibrate(quantize_model(tiny.detector("resnet"), settings), tiny.batches(2))
    plain = QuantizationSettings(
        4, 8, weight_range="minmax", activation_range="minmax", rounding="nearest",
        migrate_scales=False, bias_correction=False,
    )  # fmt: skip
    usual = calibrate(quantize_model(tiny.detector("resnet"), plain), tiny.batches(2))
    for name, layer in quantized_layers(model).items():
        other = quantized_layers(usual)[name]
        torch.testing.assert_close(
            2 * layer.input_quantizer.scale, other.input_quantizer.scale, rtol=1e-6, atol=0
        )
        assert (layer.weight_codes.int() <= other.weight_codes.int()).all()
