"""Mixed-precision search: what is measured, what is chosen, and what is refused."""

import itertools
import json
from dataclasses import replace
from functools import partial
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import yaml
from qwt_mmdet.archives import Finished
from qwt_mmdet.config import Best, Override, QuantizationSettings, Search, Smallest, as_entry
from qwt_mmdet.errors import QwtError
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import activation_quantizers, quantize_model, quantized_layers
from qwt_mmdet.quantization.size import detector_bytes, size_range
from qwt_mmdet.quantization.state import summarize_quantization
from qwt_mmdet.search.judge import DISCREPANCY, EXPONENT, LEAST, Loss, LossModel, Scored, cheapest
from qwt_mmdet.search.mixed import (
    Measurement,
    ParetoFront,
    SearchedLayer,
    measure_candidates,
    recipe_settings,
)
from qwt_mmdet.search.sensitivity import rank_layers
from qwt_mmdet.steps import search as steps

A8 = {8: 0.0}


def layer(name, weights, error, gain=None, activation_errors=A8, share=50.0):
    """A layer whose error at 4 bits is ``error`` and falls by 6 dB per bit."""
    by_bits = {bits: error * 4.0 ** (4 - bits) for bits in (3, 4, 6, 8)}
    gain = by_bits[3] if gain is None else gain
    return SearchedLayer(name, weights, share, by_bits, activation_errors, gain)


LAYERS = [
    layer("a", 10, 0.5),
    layer("b", 10, 0.01),
    layer("c", 10, 0.2),
    layer("d", 10, 1e-5),
]


def test_recipes_of_the_front_have_the_smallest_error_of_all_for_their_bytes():
    everything = [
        (
            sum(c.weights * bits / 8 for c, bits in zip(LAYERS, chosen, strict=True)),
            sum(c.relative_error(bits, 8) for c, bits in zip(LAYERS, chosen, strict=True)),
        )
        for chosen in itertools.product((3, 4, 6, 8), repeat=4)
    ]
    front = ParetoFront(LAYERS, "bytes")
    recipes = [front[index] for index in range(len(front))]
    assert (recipes[0].bytes, recipes[-1].bytes) == (4 * 10 * 3 / 8, 4 * 10)
    for recipe, error in zip(recipes, front.relative_errors(), strict=True):
        best = min(error for size, error in everything if size <= recipe.bytes)
        assert recipe.relative_error == pytest.approx(best) == pytest.approx(error)


def test_a_budget_is_used_but_not_exceeded():
    for budget in (15, 17.5, 23, 40):
        recipe = ParetoFront(LAYERS, "bytes").within(budget)
        assert budget - 10 * 2 / 8 < recipe.bytes <= budget or recipe.bytes == 40
    with pytest.raises(QwtError, match="below"):
        ParetoFront(LAYERS, "bytes").within(14.9)


def test_an_exported_file_stores_four_bits_or_eight():
    assert Search(best=Best(5)).weight_candidates() == [3, 4, 5, 6, 8]
    assert Search(best=Best(5), storage="onnx").weight_candidates() == [4, 8]
    assert Search(best=Best(5), storage="onnx", candidates=(2, 3, 5, 6)).weight_candidates() == [
        3,
        6,
    ]
    front = ParetoFront(LAYERS, "bytes", "onnx")
    found = [front[index] for index in range(len(front))]
    assert {c.weight_bits for recipe in found for c in recipe.choices.values()} == {4, 8}
    assert [recipe.bytes for recipe in found] == [20, 25, 30, 35, 40]


def test_activation_bits_matter_for_bit_operations_alone():
    both = {4: 0.004, 8: 0.001}
    layers = [
        layer("busy", 10, 0.001, activation_errors=both, share=90),
        layer("idle", 10, 0.001, activation_errors=both, share=10),
    ]
    assert {c.activation_bits for c in ParetoFront(layers, "bytes")[-1].choices.values()} == {8}
    front = ParetoFront(layers, "bit_operations")
    assert front[-1].bit_operations == pytest.approx(100)
    assert front[0].bit_operations == pytest.approx(100 * 3 * 4 / 64)
    halfway = front.within(50).choices
    product = {name: c.weight_bits * c.activation_bits for name, c in halfway.items()}
    assert product["busy"] < product["idle"]


def test_what_other_layers_hide_counts_half():
    alone, hidden = layer("a", 10, 0.1), layer("a", 10, 0.1, gain=0.0)
    assert hidden.relative_error(4, 8) == pytest.approx(alone.relative_error(4, 8) / 2)


class Detector(tiny.TinyDetector):
    """Of whose two levels of features the heads read the first alone."""

    def extract_feat(self, images):
        return self.backbone(images)[:1]


def detector():
    torch.manual_seed(0)
    return Detector(tiny.backbone("swin")).eval().to(tiny.device)


STEM = "backbone.patch_embed.projection"
"""The layer that sees the image."""


def calibrated(settings):
    return calibrate(quantize_model(detector(), settings), tiny.batches(1), keep_weights=True)


@pytest.fixture(scope="module")
def measured():
    kept = Override("backbone.stages.0.blocks.0.ffn.layers.1", activation_bits=6)
    settings = QuantizationSettings(8, 8, refit="none", overrides=(kept,))
    with tiny.computing_on("pretended"):
        found = measure_candidates(calibrated, settings, (3, 5), (4, 8), tiny.batches(1))
    return settings, found


def test_errors_fall_with_bits_and_layers_that_overrides_name_keep_theirs(measured):
    settings, found = measured
    layers = [c for c in found.layers if c.weights]
    assert all(c.weight_errors[3] > c.weight_errors[5] for c in layers)
    assert settings.overrides[0].pattern not in {c.name for c in layers}
    assert sum(c.multiply_adds_percent for c in found.layers) == pytest.approx(100)
    assert [c for c in found.layers if not c.weights]  # attention


@pytest.mark.parametrize("objective", ["bytes", "bit_operations"])
def test_what_was_measured_is_what_the_chosen_recipe_does(measured, objective):
    settings, found = measured
    recipe = ParetoFront(found.layers, objective)[0]
    ranked = rank_layers(calibrated(recipe_settings(settings, recipe)), tiny.batches(1))
    runs = {entry.name: entry for entry in ranked}
    for layer in found.layers:
        bits = recipe.choices[layer.name].weight_bits, recipe.choices[layer.name].activation_bits
        assert (runs[layer.name].weight_bits, runs[layer.name].activation_bits) == bits
        if bits[1] == 8:
            said = layer.weight_errors[bits[0]] if layer.weights else layer.activation_errors[8]
            assert runs[layer.name].relative_error == pytest.approx(said)
    assert runs[STEM].activation_bits == settings.input_bits == 8
    assert recipe.choices[STEM].bit_operations == pytest.approx(
        next(c.multiply_adds_percent for c in found.layers if c.name == STEM) * 3 * 8 / 64
    )


def test_one_number_of_bits_for_weights_leaves_the_activations_to_search():
    found = measure_candidates(
        calibrated, QuantizationSettings(8, 8), (8,), (4, 8), tiny.batches(1)
    )
    bits = {(*c.weight_errors, *c.activation_errors) for c in found.layers if c.weights}
    assert bits == {(8, 4, 8), (8, 8)}  # the second of the layer that sees the image


def test_a_measurement_that_was_stopped_goes_on_after_its_finished_bits(tmp_path):
    path, asked = tmp_path / "c.json.unfinished", []

    def measure(stop=None, seed=0):
        def noted(settings):
            asked.append((settings.weight_bits, settings.activation_bits))
            if len(asked) == stop:
                raise KeyboardInterrupt
            return calibrated(settings)

        asked.clear()
        finished, settings = Finished(path, {"seed": seed}), QuantizationSettings(8, 8)
        return measure_candidates(noted, settings, (3, 5), (4, 8), tiny.batches(1), finished)

    expected = measure()
    assert asked == [(5, 4), (5, 8), (3, 8)]
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        measure(stop=2)
    assert measure() == expected
    assert asked == [(5, 8), (3, 8)]
    assert measure() == expected
    assert asked == [(3, 8)], "whose detector tells what one layer gains"
    measure(seed=1)
    assert len(asked) == 3


def test_the_recipe_quantizes_a_detector_to_the_bits_and_the_bytes_that_it_names(measured):
    settings, found = measured
    front = ParetoFront(found.layers, "bytes")
    recipe = front[len(front) // 2]
    entry = yaml.safe_load(yaml.safe_dump(as_entry(recipe_settings(settings, recipe))))
    model = quantize_model(detector(), QuantizationSettings.from_mapping(entry))
    bits = {name: model.get_submodule(name).weight_bits for name in recipe.choices}
    assert bits == {name: choice.weight_bits for name, choice in recipe.choices.items()}
    assert {3, 5} <= set(bits.values())
    assert model.get_submodule(settings.overrides[0].pattern).weight_bits == 8
    unseen = "backbone.stages.1.blocks.0.ffn.layers.1"
    assert unseen not in bits
    assert model.get_submodule(unseen).weight_bits == 8
    size = summarize_quantization(calibrate(model, tiny.batches(1)))["weight_bytes"]
    assert size == round(recipe.bytes + found.fixed_bytes)


def test_a_detector_has_the_size_that_its_budget_allows_whatever_images_calibrate_it():
    """Each convolution's input has one scale or one per channel, as bits and images want it."""

    def calibrated(settings, images=1):
        model = quantize_model(tiny.detector("resnet"), settings)
        return calibrate(model, tiny.batches(images), keep_weights=True)

    settings = QuantizationSettings(8, 8, rounding="nearest")
    found = measure_candidates(calibrated, settings, (3, 8), (8,), tiny.batches(1))
    ends = ParetoFront(found.layers, "bytes")[0], ParetoFront(found.layers, "bytes")[-1]
    budget = sum(recipe.bytes + found.fixed_bytes for recipe in ends) / 2
    search = Search(best=Best(max_size_mb=budget / 1e6), candidates=(3, 8))
    asks = steps.Chooser("mixed", search, settings, found)
    scales = set()
    for recipe in (asks.within_budget(), *ends):
        model = calibrated(recipe_settings(settings, recipe), images=3)
        size = summarize_quantization(model)["weight_bytes"]
        assert size == asks.weight_bytes(recipe)
        scales.add(sum(q.grid[0].numel() for q in activation_quantizers(model).values()))
    assert asks.weight_bytes(asks.within_budget()) <= budget
    assert len(scales) > 1, "or this shows nothing"


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_sizes_are_known_before_a_calibration(kind):
    settings = QuantizationSettings(8, 8, rounding="nearest", refit="none")
    found = quantize_model(tiny.detector(kind), settings)
    ends = size_range(found, dict.fromkeys(quantized_layers(found), (3, 8)))
    for bits, expected in zip((3, 8), ends, strict=True):
        model = tiny.calibrated(kind, replace(settings, weight_bits=bits), images=1)
        assert detector_bytes(model) == pytest.approx(expected, rel=0.01)
    megabytes = sum(ends) / 2e6
    steps.check_sizes(found, {"between": Search(best=Best(max_size_mb=megabytes))})
    for size in (0.5 * ends[0] / 1e6, 2 * ends[1] / 1e6):
        with pytest.raises(
            QwtError, match=r"quantization.mixed.best.max_size_mb is .* MB; choose a size"
        ):
            steps.check_sizes(found, {"mixed": Search(best=Best(max_size_mb=size))})
    narrow = Search(best=Best(max_size_mb=megabytes), candidates=(7, 8))
    replaced = quantize_model(tiny.detector(kind), replace(settings, weight_bits=7))
    with pytest.raises(QwtError, match="other candidates"):
        steps.check_sizes(replaced, {"mixed": narrow})


@pytest.fixture
def annotations(tmp_path):
    """Ten images, of which eight have objects, one of these a crowd alone."""

    def write(images=10, objects=8):
        path = tmp_path / "calibration.json"
        content = {
            "images": [{"id": number} for number in range(images)],
            "annotations": [
                {"id": n, "image_id": n, "iscrowd": int(n == 0)} for n in range(objects)
            ],
        }
        path.write_text(json.dumps(content))
        return path

    return write


def test_no_image_calibrates_what_it_scores_and_each_annotated_one_scores_once(annotations):
    def ids(path):
        return {image["id"] for image in json.loads(path.read_text())["images"]}

    with steps.cross_fitting(annotations()) as parts:
        assert ids(parts.scored) == {1, 2, 3, 4, 5, 6, 7}, "a crowd alone is no object"
        folds = [(ids(calibration), ids(scored)) for calibration, scored in parts.folds]
        first = json.loads(parts.folds[0][1].read_text())
    assert folds == [({0, 2, 4, 6, 8, 9}, {1, 3, 5, 7}), ({0, 1, 3, 5, 7, 8, 9}, {2, 4, 6})]
    assert {a["image_id"] for a in first["annotations"]} == {1, 3, 5, 7}


def chooser(**search):
    return steps.Chooser(
        "mixed", Search(**search), QuantizationSettings(8, 8), Measurement(LAYERS, 1000.0)
    )


LUCK = 1 + 0.1 * np.random.default_rng(0).standard_normal(1000)
"""Ratios of the losses under resamples to the loss."""


def worst(confidence, luck=LUCK):
    """The upper end of an interval by the value."""
    return 1 + NormalDist().inv_cdf(confidence) * np.hypot(np.std(luck), DISCREPANCY)


def loss_of(estimate):
    """Of a recipe whose error at the heads is twice the estimate."""
    return (2 * estimate) ** EXPONENT / 10


@pytest.fixture
def scorer(monkeypatch):
    """A scorer whose recipes lose AP with their errors; notes the bits that it was asked for."""
    asked = []

    class Scorer:
        baseline, images, fingerprint = 0.5, 10, {"model": "tiny"}
        luck, scale = LUCK, 1.0

        def __init__(self, *_):
            pass

        def score(self, settings):
            bits = {entry.pattern: entry.weight_bits for entry in settings.overrides}
            asked.append(bits)
            error = sum(c.relative_error(bits.get(c.name, 8), 8) for c in LAYERS)
            drop = self.scale * loss_of(error)
            return {"error": 2 * error, "drop": drop, "drops": (drop * self.luck).tolist()}

    monkeypatch.setattr(steps, "Scorer", Scorer)
    return asked


@pytest.mark.parametrize("confidence", [0.5, 0.9])
@pytest.mark.parametrize("max_drop", [0.0005, 0.001, 0.01, 0.1])
def test_the_smallest_recipe_is_the_cheapest_that_surely_loses_at_most_so_much(
    max_drop, confidence, scorer, annotations
):
    asks = chooser(smallest=Smallest(max_drop, confidence=confidence), rounds=20)
    answer = asks.smallest(SimpleNamespace(annotations=annotations()))
    front, most = asks.front(), worst(confidence)
    fitting = [i for i, e in enumerate(front.relative_errors()) if most * loss_of(e) <= max_drop]
    assert answer.recipe == front[fitting[0]]
    assert len(answer.rounds) == len(scorer) <= 3  # of 13 recipes
    assert answer.loss.value == pytest.approx(loss_of(answer.recipe.relative_error))
    assert answer.loss.high == pytest.approx(most * answer.loss.value, rel=0.01)
    assert answer.images_to_tell is None


@pytest.mark.parametrize(("limit", "tells"), [(1.27, True), (0.9, False)])
def test_a_limit_that_no_recipe_surely_meets_takes_the_largest_and_says_what_would_tell(
    scorer, annotations, caplog, limit, tells
):
    front = chooser(smallest=Smallest(0.1)).front()
    steps.Scorer.scale = 0.01 / loss_of(front[-1].relative_error)
    asks = chooser(smallest=Smallest(0.01 * limit))
    found = asks.smallest(SimpleNamespace(annotations=annotations()))
    assert found.recipe == front[-1]
    if not tells:
        assert found.images_to_tell is None
        assert "Its predicted loss is above the limit" in caplog.text
        return
    assert f"About {found.images_to_tell} annotated images would tell" in caplog.text
    luck = np.std(LUCK) * (10 / found.images_to_tell) ** 0.5  # of so many in the place of 10
    assert 0.01 * worst(0.9, [1 - luck, 1 + luck]) == pytest.approx(0.0127, rel=0.002)


@pytest.mark.parametrize("errors", [{8: 0.1}, {4: 0.2, 8: 0.1}, {3: 0.3, 4: 0.29, 8: 0.01}])
def test_a_front_of_few_recipes_ends_the_search(scorer, annotations, errors):
    """Also where the largest recipe is the only one with half of the first one's error."""
    asks = chooser(smallest=Smallest(0.001), rounds=20)
    own = replace(
        asks, measurement=Measurement([SearchedLayer("a", 10, 100.0, errors, A8, 0.0)], 0.0)
    )
    answer = own.smallest(SimpleNamespace(annotations=annotations()))
    indices = [one.index for one in answer.rounds]
    assert indices[0] == len(own.front()) - 1
    assert len(indices) == len({*indices}) <= len(own.front())


def test_rounds_bound_the_recipes_that_are_scored(scorer, annotations):
    answer = chooser(smallest=Smallest(0.01), rounds=1).smallest(
        SimpleNamespace(annotations=annotations())
    )
    assert len(answer.rounds) == len(scorer) == 1
    assert worst(0.9) * loss_of(answer.recipe.relative_error) <= 0.01


def test_where_no_loss_is_seen_a_worse_recipe_is_scored_next(scorer, annotations):
    steps.Scorer.luck = 1 + 20 * np.random.default_rng(0).standard_normal(1000)
    asks = chooser(smallest=Smallest(0.1), rounds=20)
    answer = asks.smallest(SimpleNamespace(annotations=annotations()))
    errors = [one.relative_error for one in answer.rounds]
    assert errors[1] >= 4 * errors[0]
    assert 0 in [one.index for one in answer.rounds]


def scored(estimate, drop, spread=0.1, error=None):
    luck = 1 + spread * np.random.default_rng(1).standard_normal(1000)
    return Scored(estimate, estimate if error is None else error, drop, (drop * luck).tolist())


def test_the_loss_is_proportional_to_a_power_of_the_error_that_was_measured():
    model = LossModel(
        [scored(0.1, 0.4**EXPONENT, error=0.4), scored(0.01, 0.01**EXPONENT, error=0.01)], 0.9
    )
    assert model.error(0.1) == pytest.approx(0.4)
    assert model.error(0.055) == pytest.approx(0.205), "on the line between"
    assert model.error(0.19) == pytest.approx(0.79), "and beyond"
    assert 0 < model.error(0.001) < 1e-6, "but never below 0"
    loss = model.loss(0.01)
    assert loss.value == pytest.approx(0.01**EXPONENT)
    assert loss.high == pytest.approx(loss.value * worst(0.9, [0.9, 1.1]), rel=0.02)
    quantiles = [NormalDist().inv_cdf(probability) for probability in (0.9, LEAST)]
    assert (loss.value - loss.low) / (loss.high - loss.value) == pytest.approx(
        quantiles[1] / quantiles[0]
    )
    assert LossModel([scored(0.1, 0.1, error=0.4)], 0.9).error(0.2) == pytest.approx(0.8)


@pytest.mark.parametrize("errors", [(0.003, 0.016), (0.0053, 0.0156)])
def test_the_luck_that_all_recipes_share_is_no_loss(errors):
    """Full precision's own, on images that it was trained on."""
    offset = 0.005 * (1 + np.random.default_rng(2).standard_normal(1000))

    def shifted(error):
        loss = 4 * error**EXPONENT
        return Scored(error, error, loss + 0.005, (loss + offset).tolist())

    found = LossModel([*map(shifted, errors)], 0.9).loss(0.006)
    assert found.value == pytest.approx(4 * 0.006**EXPONENT, rel=0.05)
    assert found.high == pytest.approx(found.systematic, rel=0.05), (
        "the same luck in both says nothing of the factor"
    )
    assert LossModel([shifted(0.003)], 0.9).loss(0.003).value == pytest.approx(
        4 * 0.003**EXPONENT + 0.005
    )


def test_a_recipe_whose_loss_is_known_better_counts_more():
    known, vague = scored(0.1, 0.1, 0.01), scored(0.1001, 0.3, 2.0)
    assert LossModel([known, vague], 0.9).loss(0.1).value == pytest.approx(0.1, rel=0.02)


def test_a_gain_is_no_negative_loss():
    loss = LossModel([scored(0.1, -0.01)], 0.9).loss(0.1)
    assert (loss.low, loss.value, loss.systematic) == (0, 0, 0)
    assert 0 < loss.high < 0.02, "by luck, and by what full precision gains on these images"
    assert not LossModel([scored(0.1, -0.01)], 0.9).is_seen


def test_images_that_would_tell_narrow_the_interval_to_the_limit():
    assert Loss(0.01, 0.0, 0.03, 0.01).images_to_tell(100, 0.02) == 400
    assert Loss(0.01, 0.0, 0.015, 0.01).images_to_tell(100, 0.02) is None, "it is told"
    assert Loss(0.03, 0.0, 0.05, 0.03).images_to_tell(100, 0.02) is None, "it is missed"
    assert Loss(0.01, 0.0, 0.03, 0.021).images_to_tell(100, 0.02) is None, (
        "images are not the reason"
    )
    losses = [Loss(value, value, value, value) for value in (0.4, 0.1, 0.2, 0.05, 0.01)]
    assert [cheapest(losses, limit) for limit in (1, 0.15, 0.02, 0.001)] == [0, 3, 4, 4]


def test_a_search_that_was_stopped_goes_on_after_its_finished_rounds(
    scorer, annotations, tmp_path, monkeypatch
):
    (tmp_path / "images").mkdir()
    path = annotations()
    content = json.loads(path.read_text())
    content["info"] = {"image_root": str(tmp_path / "images")}
    for image in content["images"]:
        image["file_name"] = f"{image['id']}.jpg"
        (tmp_path / "images" / image["file_name"]).write_bytes(b"pixels")
    path.write_text(json.dumps(content))
    inputs = SimpleNamespace(annotations=path, job=SimpleNamespace(device="cpu"), seed=0)
    candidates, recipe, summary = (tmp_path / name for name in ("c.json", "r.yaml", "r.json"))
    dump = partial(steps._MEASUREMENT.dump_json, by_alias=True)
    candidates.write_bytes(dump(Measurement(LAYERS, 1000.0)))
    monkeypatch.setattr(inputs.job, "account", dict, raising=False)

    def choose(stop=None, **changes):
        """Choose a recipe, or be stopped in round ``stop``; return how many recipes were calibrated."""
        score = steps.Scorer.score

        def stopped(self, settings):
            if stop is not None and len(scorer) == stop:
                raise KeyboardInterrupt
            return score(self, settings)

        scorer.clear()
        search = {"smallest": {"max_drop": 0.001}, "rounds": 20} | changes
        with monkeypatch.context() as patch:
            patch.setattr(steps.Scorer, "score", stopped)
            steps.choose(
                inputs, name="mixed", search=search, settings={"weight_bits": 8, "activation_bits": 8},
                candidates=candidates, recipe=recipe, summary=summary,
            )  # fmt: skip
        return len(scorer)

    whole = choose()
    expected = recipe.read_text(), summary.read_text()
    assert whole > 1

    def stop_after_one():
        with pytest.raises(KeyboardInterrupt):
            choose(stop=1)

    stop_after_one()
    assert choose() == whole - 1
    assert (recipe.read_text(), summary.read_text()) == expected
    assert not (tmp_path / "r.json.unfinished").exists()

    stop_after_one()
    assert choose(rounds=21) == whole  # other settings
    stop_after_one()
    (tmp_path / "images" / "3.jpg").write_bytes(b"others")
    assert choose() == whole
    stop_after_one()
    candidates.write_bytes(dump(Measurement(LAYERS, 1001.0)))
    assert choose() == whole
    stop_after_one()
    steps.Scorer.fingerprint = {"model": "other"}
    assert choose() == whole
    stop_after_one()
    (tmp_path / "r.json.unfinished").write_text('{"inputs"')  # cut off
    assert choose() == whole


@pytest.mark.parametrize("size", [0.001, 0.002])
def test_a_size_that_no_recipe_has_is_refused(size):
    with pytest.raises(QwtError, match=r"max_size_mb is 0\.00\d, but .* from 0\.00102 to 0\.00104"):
        chooser(best=Best(max_size_mb=size)).within_budget()


def test_a_size_between_is_kept():
    asks = chooser(best=Best(max_size_mb=0.00103))
    assert asks.weight_bytes(asks.within_budget()) <= 1030


@pytest.mark.parametrize(
    ("images", "metric", "message"),
    [((), "bbox", "scored on 7 images"), ((20, 20), "segm", "no masks; use bbox")],
)
def test_recipes_that_cannot_be_scored_are_an_error(annotations, images, metric, message):
    inputs = Unloaded("", {}, "", annotations(*images), None, 0, 1, 0)
    with pytest.raises(QwtError, match=message):
        chooser(smallest=Smallest(0.01, metric)).smallest(inputs)


def stop_after_calibration(*_):
    raise InterruptedError


def test_a_recipe_is_calibrated_within_the_activation_cache(annotations, monkeypatch):
    limits, seen = {"device_gb": 1.0, "memory_gb": 0.5}, []
    monkeypatch.setattr(steps, "check_scoring", lambda *_: 10)
    metrics = {"bbox": {"AP": 0.5}}
    monkeypatch.setattr(steps, "evaluate_detector", lambda *_, **__: (metrics, []))
    monkeypatch.setattr(steps, "predict", stop_after_calibration)
    monkeypatch.setattr(steps.Inputs, "loader", lambda *_: [])
    monkeypatch.setattr(steps, "quantize_model", lambda model, settings: model)
    monkeypatch.setattr(steps, "calibrate", lambda *_, **options: seen.append(options))
    inputs = Unloaded("", {}, "", annotations(20, 20), None, 0, 1, 0)
    with pytest.raises(InterruptedError):
        chooser(smallest=Smallest(0.01), rounds=1).smallest(inputs, activation_cache=limits)
    assert limits.items() <= seen[0].items()


class Unloaded(steps.Inputs):
    """Inputs whose detector has no masks and cannot run."""

    def load(self, **_):
        return SimpleNamespace(with_mask=False)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({}, "either smallest or best"),
        ({"smallest": Smallest(0.1), "best": Best(5)}, "either smallest or best"),
        ({"best": Best(2.5)}, r"average_weight_bits is 2\.5, but candidates go from 3 to 8"),
        ({"best": Best(5), "candidates": (4, 4)}, "two different"),
        ({"best": Best(5), "candidates": (8,)}, r"candidates is \(8,\); .* at least 2 entries"),
        ({"best": Best(5), "candidates": (8, 9)}, r"candidates\[1\] is 9; .* 8\.$"),
        (
            {"best": Best(5), "min_activation_bits": 8, "max_activation_bits": 6},
            "min_activation_bits is 8, more than",
        ),
        ({"best": Best(5), "objective": "bit_operations"}, "contradicts"),
        (
            {"smallest": Smallest(0.1), "objective": "bit_operations", "max_activation_bits": 32},
            "max_activation_bits is at most 8",
        ),
        (
            {"best": Best(6), "candidates": (5, 6, 8), "storage": "onnx"},
            "candidates are 5, 6, 8, which all take 8 bits with storage: onnx",
        ),
        ({"best": Best(3.5), "storage": "onnx"}, r"is 3\.5, but candidates go from 4 to 8"),
    ],
)
def test_contradictions_are_told(search, message):
    with pytest.raises(QwtError, match=message):
        Search(**search)


@pytest.mark.parametrize("budgets", [{}, {"average_weight_bits": 5, "max_size_mb": 3}])
def test_one_budget_is_asked_for(budgets):
    with pytest.raises(QwtError, match="either average_weight_bits or max_size_mb"):
        Best(**budgets)
