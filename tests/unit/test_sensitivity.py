import math

import pytest
import tiny
import torch
from qwt_mmdet.config import Override, QuantizationSettings
from qwt_mmdet.errors import QwtError
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.state import load_warmup, save_warmup
from qwt_mmdet.record import quantization_of
from qwt_mmdet.search.sensitivity import leave_one_out_gains, rank_layers

pytestmark = pytest.mark.usefixtures("device")


def detector():
    return tiny.detector("swin")


def warmed_up(tmp_path, bits=4, *, refit="none", **settings):
    quantization = QuantizationSettings(bits, bits, refit=refit, **settings)
    path = tmp_path / "warmup.pth"
    save_warmup(tiny.calibrated("swin", quantization, 2), path)
    return load_warmup(detector(), path, round_weights=False)


@torch.no_grad()
def relative_error_by_hand(expected, found):
    """Mean over the tensors of error power by signal power."""
    pairs = list(zip(expected, found, strict=True))
    return sum(float((a - b).square().sum() / a.square().sum()) for a, b in pairs) / len(pairs)


def test_a_layer_alone_does_what_a_model_with_that_layer_alone_quantized_does(tmp_path):
    batch = tiny.batches(1)
    ranked = {e.name: e for e in rank_layers(warmed_up(tmp_path, bias_correction=False), batch)}
    reference = detector()
    name = "backbone.stages.0.blocks.1.ffn.layers.1"
    single = calibrate(
        quantize_model(
            detector(),
            QuantizationSettings.from_mapping(
                {
                    "weight_bits": 4,
                    "activation_bits": 4,
                    "input_bits": 4,  # of the layer that runs first, which here is this one
                    "bias_correction": False,
                    "refit": "none",
                    "overrides": [
                        {"pattern": other, "skip": True} for other in ranked if other != name
                    ],
                }
            ),
        ),
        tiny.batches(2),
    )
    images = torch.stack(batch[0]["inputs"])
    with torch.no_grad():
        expected = relative_error_by_hand(reference.backbone(images), single.backbone(images))
    assert ranked[name].relative_error == pytest.approx(expected, rel=1e-4)
    assert ranked[name].sqnr_db == pytest.approx(-10 * math.log10(expected), abs=1e-3)


@pytest.mark.parametrize("activation_range", ["mse", "repq"])
def test_the_ranking_falls_and_leaves_the_model_as_it_was(tmp_path, activation_range):
    model = warmed_up(tmp_path, activation_range=activation_range)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ranked = rank_layers(model, tiny.batches(2))
    errors = [entry.relative_error for entry in ranked]
    assert all(errors)
    assert errors == sorted(errors, reverse=True)
    assert max(errors) < 1  # folded layers too are compared with the function that they belong to
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(entry.weight_bits is None for entry in ranked)  # attention has its place


@pytest.mark.parametrize("fitted", ["kept", "lost"])
def test_what_a_refit_repairs_is_no_harm_of_a_layer(tmp_path, fitted):
    """Each layer alone does about what it does without a refit."""
    refit = warmed_up(tmp_path, refit="sequential")
    if fitted == "kept":
        settings = quantization_of(refit).settings
        refit = calibrate(quantize_model(detector(), settings), tiny.batches(2), keep_weights=True)
    plain, found = (
        {entry.name: entry.relative_error for entry in rank_layers(model, tiny.batches(1))}
        for model in (warmed_up(tmp_path), refit)
    )
    for name, error in plain.items():
        assert found[name] == pytest.approx(error, rel=0.5)


def test_where_a_refit_layer_is_left_out_the_error_of_its_rounding_goes():
    """One layer has weights of 2 bits, all others of 8: its rounding is most of the error."""
    name = "backbone.stages.0.blocks.1.ffn.layers.1"
    coarse = Override(name, weight_bits=2)
    settings = QuantizationSettings(8, 8, refit="sequential", overrides=(coarse,))
    model = calibrate(quantize_model(detector(), settings), tiny.batches(2), keep_weights=True)
    gains = leave_one_out_gains(model, tiny.batches(1))
    others = sorted(abs(fall) for layer, fall in gains.items() if layer != name)
    assert gains[name] > 2 * others[-1]


def test_no_image_is_an_error(tmp_path):
    with pytest.raises(QwtError, match="no calibration images"):
        rank_layers(warmed_up(tmp_path), [])
