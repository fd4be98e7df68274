"""Layers that are fitted on what the quantized layers before them hand over."""

import copy
from functools import partial
from unittest.mock import MagicMock

import pytest
import tiny
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import RetinaHead, YOLOXHead
from qwt_mmdet.config import Override, QuantizationSettings
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.errors import QwtError
from qwt_mmdet.quantization import regression
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.regression import (
    DEFAULT_RIDGE,
    RIDGES,
    RegressionSums,
    choose_ridge,
    ridge_towards,
)
from qwt_mmdet.quantization.scores import level_scores, score_map, scores_at
from qwt_mmdet.quantization.sequential import LayerFit, Sequential, corresponds, huber_weights
from qwt_mmdet.quantization.state import load_warmup, save_warmup
from qwt_mmdet.quantization.weight_fit import Calibration
from qwt_mmdet.record import quantization_of
from qwt_mmdet.steps import quantize as step
from torch import nn

pytestmark = pytest.mark.usefixtures("device")


def settings(bits=4, **changes):
    return QuantizationSettings(bits, bits, **{"refit": "sequential", **changes})


def rows(groups=2, count=500, inputs=5, outputs=3, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, count, inputs, generator=generator) + mean
    y = torch.randn(groups, count, outputs, generator=generator) + x[..., :outputs]
    return (
        x.to(tiny.device),
        y.to(tiny.device),
        torch.rand(count, generator=generator).to(tiny.device),
    )


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_sums_are_weighted_moments_whatever_the_pieces(mean):
    x, y, weight = rows(mean=mean)
    sums = RegressionSums(5, 5, 5)
    for piece in torch.arange(500).split([3, 40, 457]):
        sums.update(x[:, piece], y[:, piece], weight[piece])
    x, y, p = x.double(), y.double(), (weight / weight.sum(dtype=torch.float64)).double()[:, None]
    mean_x, mean_y = ((t * p).sum(1, keepdim=True) for t in (x, y))
    found_x, found_y = sums.means()
    torch.testing.assert_close(found_x, mean_x[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found_y, mean_y[:, 0], rtol=1e-6, atol=1e-6)
    for centred in (True, False):
        a, b = (x - mean_x, y - mean_y) if centred else (x, y)
        (squares,), cross = sums.moments(sums.about(centred=centred))
        torch.testing.assert_close(squares, (a * p).mT @ a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cross, (a * p).mT @ b, rtol=1e-5, atol=1e-5)


def test_columns_in_parts_have_their_own_moments_and_none_with_the_outputs():
    x, y, _ = rows()
    whole, parts = RegressionSums(5, 5, 5), RegressionSums(5, 3, 3)
    whole.update(x, y)
    parts.update(x, y)
    (squares,), _ = whole.moments(whole.about(centred=True))
    (first, second), cross = parts.moments(parts.about(centred=True))
    torch.testing.assert_close(first, squares[:, :3, :3])
    torch.testing.assert_close(second, squares[:, 3:, 3:])
    assert cross is None


def test_the_ridge_solves_the_least_squares_problem_with_the_weights_as_its_prior():
    x, y, _ = (t.double() for t in rows())
    weight = torch.randn(2, 3, 5, dtype=torch.float64, device=x.device)
    squares, cross = x.mT @ x / 500, x.mT @ y / 500
    for strength in (0.0, 0.3):
        penalty = strength * squares.diagonal(dim1=1, dim2=2).mean(1) * 500
        design = torch.cat([x, penalty.sqrt()[:, None, None] * torch.eye(5).to(x)], 1)
        target = torch.cat([y, penalty.sqrt()[:, None, None] * weight.mT], 1)
        expected = torch.linalg.lstsq(design, target).solution.mT
        torch.testing.assert_close(ridge_towards(weight, squares, cross, strength), expected)
    torch.testing.assert_close(ridge_towards(weight, squares, cross, 1e12), weight)


def test_moments_that_rounding_made_indefinite_leave_the_weights_about_as_they_were():
    """One group's inputs hardly vary, so that its variances are as good as noise, and one of them is negative."""
    weight = torch.ones(2, 3, 2)
    squares = torch.stack([torch.eye(2), torch.diag(torch.tensor([-1e-9, 2e-9]))]).double()
    cross = squares @ weight.double().transpose(1, 2)
    torch.testing.assert_close(ridge_towards(weight, squares, cross, 0.01).float(), weight)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("prior_error", "noise", "expected"), [(0.0, 1.0, max(RIDGES)), (1.0, 0.0, min(RIDGES))]
)
def test_the_ridge_is_the_one_that_serves_vectors_which_were_held_out(
    prior_error, noise, expected, centred
):
    """Noisy targets of good weights ask for a large one, exact targets of others for a small one."""
    generator = torch.Generator().manual_seed(0)
    true, other = torch.randn(2, 1, 4, 30, generator=generator)
    bias, parts = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), []
    for _ in range(3):
        x = torch.randn(1, 40, 30, generator=generator)
        y = x @ true.mT + bias + noise * torch.randn(1, 40, 4, generator=generator)
        parts.append(RegressionSums(30, 30, 30, (torch.zeros(1, 1, 30), torch.zeros(1, 1, 4))))
        parts[-1].update(x, y)
    weight = true + prior_error * other
    chosen = partial(choose_ridge, weight, centred=centred, bias=bias.double())
    assert chosen(parts) == expected
    assert chosen(parts[:1]) == DEFAULT_RIDGE, "nothing can be held out"


def layers():
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(6, 5), (1, 40, 6)),
        "linear without bias": (nn.Linear(6, 5, bias=False), (1, 40, 6)),
        "convolution": (nn.Conv2d(6, 4, 3, stride=2), (1, 6, 19, 17)),
        "grouped": (nn.Conv2d(6, 4, 3, groups=2), (1, 6, 12, 11)),
        "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (1, 6, 12, 11)),
    }


@pytest.mark.parametrize("kind", layers())
def test_a_layer_makes_up_for_inputs_that_are_scaled_and_shifted(kind, monkeypatch):
    monkeypatch.setattr(regression, "RIDGES", (1e-9,))
    layer, shape = layers()[kind]
    layer = layer.to(tiny.device)
    inputs = [torch.randn(shape, device=tiny.device) for _ in range(4)]
    axis = 1 if len(shape) == 4 else 2
    scale = torch.linspace(0.5, 2, 6, device=tiny.device).view(
        [-1 if d == axis else 1 for d in range(len(shape))]
    )
    expected = [layer(x).detach() for x in inputs]
    model = quantize_model(tiny.TinyDetector(nn.Sequential(layer)), settings(8))
    quantized = model.backbone[0]
    with torch.no_grad():
        full = Sequential(Calibration(model, [{"inputs": [x]} for x in inputs]))
        for x in inputs:
            full.watches()[quantized](x, layer._compute(x, layer.weight, layer.bias))
            full.add_image({})
        quantized.input_quantizer.channel_axis = None
        quantized.input_quantizer.set_range(
            *(torch.tensor([v], device=tiny.device) for v in (-9.0, 9.0))
        )
        before = quantized.weight.clone()
        fit = LayerFit("backbone.0", quantized, full, 0.0)
        for image, x in enumerate(inputs):
            fit.see(image, 0, x * scale + 0.7)
        fit.finish(settings(8))
        errors = [
            quantized.quantized_output(x * scale + 0.7) - y
            for x, y in zip(inputs, expected, strict=True)
        ]
    assert torch.equal(quantized.weight, before)  # calibration still needs it
    assert max(e.norm() / y.norm() for e, y in zip(errors, expected, strict=True)) < 0.04


class Net(nn.Module):
    """Convolutions of all sorts, with a shared one, a residual, and linear layers that read one input."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.shared = nn.Conv2d(16, 16, 1)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.last = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x):
        x = F.silu(self.stem(x))
        x = x + F.silu(self.shared(F.silu(self.depthwise(x))))
        x = F.silu(self.shared(x))
        tokens = x.flatten(2).mT
        tokens = self.query(tokens) * self.key(tokens).sigmoid()
        return [self.last(tokens.mT.unflatten(2, x.shape[2:]))]


def net():
    torch.manual_seed(3)
    return tiny.TinyDetector(Net()).to(tiny.device)


def error(model, full, images):
    with torch.no_grad():
        return sum(
            float(
                (forward_scope(model, b, "backbone")[0] - forward_scope(full, b, "backbone")[0])
                .square()
                .sum()
            )
            for b in images
        )


def calibrated(changes, images, **options):
    return calibrate(
        quantize_model(copy.deepcopy(net()), settings(3, **changes)), images, **options
    )


def test_the_error_on_images_that_were_not_seen_falls():
    images, others = tiny.batches(6, size=(32, 32)), tiny.batches(10, size=(32, 32))[6:]
    plain = error(calibrated({"refit": "none"}, images), net(), others)
    assert error(calibrated({}, images), net(), others) < 0.85 * plain


def test_a_layer_of_eight_bits_is_not_blamed_for_what_it_repairs():
    """Nor does a layer that few bits hurt look better for what others repair."""
    images = tiny.batches(6, size=(32, 32))
    eight = tuple(
        Override(f"backbone.{name}", weight_bits=8, activation_bits=8)
        for name in ("shared", "query", "key", "last")
    )
    errors = {
        refit: quantization_of(calibrated({"refit": refit, "overrides": eight}, images)).sqnr_db
        for refit in ("none", "sequential")
    }
    for name, sqnr in errors["none"].items():
        assert errors["sequential"][name] == pytest.approx(sqnr, abs=3)


@pytest.mark.parametrize(
    "changes", [{"rounding": "nearest"}, {"bias_correction": False}, {"grids": "integer"}]
)
def test_it_works_with_other_settings(changes):
    images, others = tiny.batches(6, size=(32, 32)), tiny.batches(10, size=(32, 32))[6:]
    plain = error(calibrated({"refit": "none", **changes}, images), net(), others)
    assert error(calibrated(changes, images), net(), others) < plain


def test_limits_of_memory_and_batches_change_nothing():
    images, pairs = (tiny.batches(4, size=(32, 32), batch=n) for n in (1, 2))
    found = [calibrated({}, images), calibrated({}, images, memory_gb=0.0), calibrated({}, pairs)]
    first, *others = [
        {key: value for key, value in model.state_dict().items() if "codes" in key}
        for model in found
    ]
    assert first
    for state in others:
        assert all(torch.equal(value, first[key]) for key, value in state.items())


def test_the_step_calibrates_within_the_activation_cache(monkeypatch, tmp_path):
    limits, seen = {"device_gb": 1.0, "memory_gb": 0.5}, []
    monkeypatch.setattr(step, "calibrate", lambda *_, **options: seen.append(options))
    monkeypatch.setattr(step, "save_warmup", lambda *_: None)
    monkeypatch.setattr(step, "add_account", lambda *_: None)
    inputs = MagicMock(load=net)
    step.quantize(inputs, settings=vars(settings()), output="", activation_cache=limits)
    assert seen == [limits]


def test_what_was_fitted_is_saved_and_comes_back(tmp_path):
    images = tiny.batches(2, size=(32, 32))
    model = calibrated({}, images)
    save_warmup(model, tmp_path / "warmup.pth")
    again = load_warmup(net(), tmp_path / "warmup.pth", settings(3))
    assert error(again, model, images) == 0


@pytest.mark.usefixtures("made_there")
def test_outputs_of_other_positions_do_not_correspond():
    y = torch.randn(200, 4)
    assert corresponds(y, y + 0.3 * torch.randn(200, 4))
    assert not corresponds(y, y[torch.randperm(200)])


def test_a_layer_whose_positions_do_not_correspond_aims_at_its_own_output():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).to(tiny.device)
    model = quantize_model(
        tiny.TinyDetector(nn.Sequential(layer)), settings(8, bias_correction=False)
    )
    quantized = model.backbone[0]
    x = torch.randn(300, 6, device=tiny.device)
    with torch.no_grad():
        full = Sequential(Calibration(model, [{"inputs": [x]}] * 2))
        for chosen in (x[torch.randperm(300)], x[:100]):  # another order, another number
            full.watches()[quantized](chosen, F.linear(chosen, layer.weight, layer.bias))
            full.add_image({})
        quantized.input_quantizer.set_range(
            *(torch.tensor([v], device=tiny.device) for v in (-5.0, 5.0))
        )
        fit = LayerFit("backbone.0", quantized, full, 0.0)
        for image in range(2):
            fit.see(image, 0, x)
        fit.finish(settings(8, bias_correction=False))
    assert (quantized.rounded_weight() - layer.weight).abs().max() < 0.02


def test_a_network_that_is_not_finite_is_refused():
    model = net()
    model.backbone.last.weight.data[0] = float("nan")
    with pytest.raises(QwtError, match=r"output of layer backbone\.last holds NaN"):
        calibrate(quantize_model(model, settings()), tiny.batches(1, size=(32, 32)))


def test_errors_far_from_the_others_count_less():
    errors = torch.zeros(1, 5, 2, device=tiny.device)
    errors[0, :, 0] = torch.tensor([-9.0, -1.0, 1.0, 9.0, 0.0])  # the median distance is 1
    weights = huber_weights(errors + 7, 3)
    assert weights.tolist() == pytest.approx([1 / 3, 1, 1, 1 / 3, 1])
    assert huber_weights(torch.ones_like(errors), 3).tolist() == [1] * 5


def test_layers_of_the_head_are_weighted_by_the_scores_of_their_own_level():
    model = quantize_model(
        tiny.TinyDetector(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))), settings()
    )
    body, head = (layer.to(tiny.device) for layer in model.backbone)
    full = Sequential(Calibration(model, tiny.batches(1)))
    level = torch.zeros(2, 2, device=tiny.device)
    level[0, 1] = 0.8
    full.cache["scores", 0] = [torch.full((2, 2), 0.8, device=tiny.device), level]
    full.head_layers = {head}
    chosen = torch.tensor([0, 1], device=tiny.device)
    found = [
        LayerFit("", layer, full, 0.5)._weights(0, (1, 2, 2), chosen) for layer in (body, head)
    ]
    assert found[0].tolist() == pytest.approx([1, 1])
    assert found[1].tolist() == pytest.approx([0.5, 0.5 + 0.5 * 4])


class OneStage(nn.Module):
    """A detector whose head gets what the test says."""

    def __init__(self, head, maps):
        super().__init__()
        self.bbox_head = head
        head.forward = lambda features: maps

    def data_preprocessor(self, batch, training):
        return {"inputs": None}

    def extract_feat(self, inputs):
        return []


def logit(p):
    return torch.as_tensor(p).logit()


@pytest.mark.usefixtures("made_there")
def test_scores_are_classes_times_objectness_at_their_largest_over_levels():
    fine, coarse = torch.full((1, 2, 4, 4), -50.0), torch.full((1, 2, 2, 2), -50.0)
    fine[0, 1, 0, 0], coarse[0, 0, 1, 1] = logit(0.8), logit(0.6)
    objectness = [logit(torch.full((1, 1, n, n), 0.5)) for n in (4, 2)]
    boxes = [torch.zeros(1, 4, n, n) for n in (4, 2)]
    head = YOLOXHead(num_classes=2, in_channels=4, feat_channels=4)
    levels = level_scores(OneStage(head, ([fine, coarse], boxes, objectness)), {})
    assert [tuple(level.shape) for level in levels] == [(4, 4), (2, 2)]
    assert levels[1].max().item() == pytest.approx(0.3)
    scores = score_map(levels)
    assert scores[0, 0].item() == pytest.approx(0.4)
    assert scores[1, 1].item() == pytest.approx(0.4)  # widened by one place
    assert scores[3, 3].item() == pytest.approx(0.3)
    head = RetinaHead(num_classes=2, in_channels=4, feat_channels=4)  # without objectness
    anchors = torch.full((1, 18, 4, 4), -50.0)
    anchors[0, 7, 2, 2] = logit(0.9)
    scores = score_map(level_scores(OneStage(head, ([anchors], [torch.zeros(1, 36, 4, 4)])), {}))
    assert scores.max().item() == pytest.approx(0.9)


def test_detectors_without_a_map_of_scores_have_none():
    assert level_scores(tiny.TinyDetector(nn.Identity()), {}) is None
    head = RetinaHead(num_classes=7, in_channels=4, feat_channels=4)
    of_others = OneStage(
        head, ([torch.zeros(1, 18, 4, 4)],)
    )  # 18 channels are not of seven classes
    assert level_scores(of_others, {}) is None


@pytest.mark.usefixtures("made_there")
def test_scores_at_the_positions_of_maps_and_tokens():
    scores = torch.zeros(6, 8)
    scores[5, 0] = 1.0
    assert scores_at(scores, (1, 3, 4)).view(3, 4)[2, 0] == 1
    assert scores_at(scores, (1, 12, 16)).sum() == 4
    assert torch.equal(scores_at(scores, (1, 12)), scores_at(scores, (1, 3, 4)))
    assert scores_at(scores, (5, 49)) is None  # windows
    assert scores_at(scores, (1, 47)) is None
