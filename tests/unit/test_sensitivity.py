import itertools
import math

import pytest
import tiny
import torch
import yaml
from qwt_mmdet.config import Override, QuantizationSettings, as_entry
from qwt_mmdet.errors import QwtError
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.state import load_warmup, save_warmup
from qwt_mmdet.record import quantization_of
from qwt_mmdet.search.sensitivity import (
    Sensitivity,
    choose_bits,
    leave_one_out_gains,
    mixed_precision,
    rank_layers,
)

pytestmark = pytest.mark.usefixtures("device")


def detector():
    return tiny.detector("swin")


def warmed_up(tmp_path, bits=4, **settings):
    quantization = QuantizationSettings(bits, bits, **settings)
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


def entry(name, weights, error, bits=4):
    return Sensitivity(name, bits, bits, weights, error)


def total_error(ranked, bits):
    return sum(e.relative_error * 4.0 ** (e.weight_bits - bits[e.name]) for e in ranked)


@pytest.mark.parametrize("average", [2.5, 3, 4, 5.25])
def test_chosen_bits_are_the_best_of_all_for_layers_of_one_size(average):
    ranked = [entry("a", 10, 0.5), entry("b", 10, 0.01), entry("c", 10, 0.2), entry("d", 10, 1e-5)]
    chosen = choose_bits(ranked, average)
    possible = [
        dict(zip("abcd", bits, strict=True))
        for bits in itertools.product(range(2, 9), repeat=4)
        if sum(bits) / 4 <= average
    ]
    best = min(total_error(ranked, bits) for bits in possible)
    assert sum(chosen.values()) / 4 <= average
    assert total_error(ranked, chosen) == pytest.approx(best)


def test_small_layers_are_served_before_large_ones_of_equal_error():
    chosen = choose_bits([entry("large", 1000, 0.1), entry("small", 10, 0.1)], 4)
    assert chosen["small"] > chosen["large"]


def test_layers_without_error_or_weights_keep_their_bits():
    unmeasured = [Sensitivity("roi", 4, 4, 10, None), Sensitivity("attention", None, 4, 0, 0.3)]
    assert choose_bits([*unmeasured, entry("a", 10, 0.1)], 8) == {"a": 8}


@pytest.mark.parametrize("average", [1.9, 8.1])
def test_an_impossible_average_is_refused(average):
    with pytest.raises(QwtError, match="average_bits"):
        choose_bits([entry("a", 10, 0.1)], average)


@pytest.mark.slow_if_pretended
@pytest.mark.parametrize(("before", "after"), [(4, 5), (8, 4)])
def test_the_suggested_entry_quantizes_a_detector_to_the_bits_that_it_names(
    tmp_path, before, after
):
    model = warmed_up(tmp_path, before)
    ranked = rank_layers(model, tiny.batches(1))
    chosen = choose_bits(ranked, after)
    settings = mixed_precision(quantization_of(model).settings, ranked, chosen)
    text = yaml.safe_dump(as_entry(settings))
    read = QuantizationSettings.from_mapping(yaml.safe_load(text))
    assert read == settings
    mixed = quantize_model(detector(), read)
    assert {n: mixed.get_submodule(n).weight_bits for n in chosen} == chosen
    weights = {e.name: e.weights for e in ranked}
    average = sum(chosen[n] * weights[n] for n in chosen) / sum(weights[n] for n in chosen)
    assert after - 0.5 < average <= after
    calibrate(mixed, tiny.batches(1))
    (stem,) = (mixed.get_submodule(entry.name) for entry in ranked if entry.sees_image)
    assert stem is mixed.backbone.patch_embed.projection
    assert (stem.weight_bits < 8, stem.activation_bits) == (True, 8), "the image keeps its bits"


def test_no_image_is_an_error(tmp_path):
    with pytest.raises(QwtError, match="no calibration images"):
        rank_layers(warmed_up(tmp_path), [])
