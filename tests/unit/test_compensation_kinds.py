"""Each kind of compensation against least squares on the stored rows."""

import copy
import dataclasses
from typing import get_args

import pytest
import tiny
import torch
from qwt_mmdet.compensation.fit import fit_compensation
from qwt_mmdet.compensation.kinds import KINDS, Affine, Bias, Linear, LowRank
from qwt_mmdet.compensation.solve import SOLVERS, Solution, simplest_within_noise
from qwt_mmdet.compensation.state import apply_compensation, load_compensation, save_compensation
from qwt_mmdet.compensation.statistics import (
    BlockStatistics,
    ChannelStatistics,
    RegressionStatistics,
)
from qwt_mmdet.config import CompensationSettings, QuantizationSettings
from qwt_mmdet.config.compensation import Kind as KindName
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.errors import QwtError
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model

pytestmark = pytest.mark.usefixtures("device")

OLS = CompensationSettings(ridge=0, gate="none", holdout_fraction=0.25)

BUILT_IN = get_args(get_args(KindName)[0])


def rows(count=400, inputs=9, outputs=6, seed=0):
    """Block input, quantized output and error in float64, related in every way that kinds know."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(tiny.device)

    x, output = normal(count, inputs) + 3, normal(count, outputs) - 5
    error = x @ normal(inputs, outputs) + 0.2 * output + normal(count, outputs) + normal(outputs)
    return x, output, error


def statistics(x, output, error):
    sums = BlockStatistics(
        RegressionStatistics.zeros(x.shape[1], error.shape[1]),
        ChannelStatistics.zeros(error.shape[1], error.shape[1]),
    )
    for chunk in zip(x.chunk(3), output.chunk(3), error.chunk(3), strict=True):
        sums.update(*chunk)
    return sums


def solve(kind, sums, holdout=(), **settings):
    settings = dataclasses.replace(OLS, kind=kind, **settings)
    return SOLVERS[kind].solve(sums, holdout, settings).kind


def with_ones(x):
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype, device=x.device)], 1)


def left(kind, x, output, error):
    """Squared error after applying a kind to rows."""
    return (output + error - kind.apply(x, output, -1)).square().sum().item()


def test_every_kind_of_the_settings_has_a_solver_and_a_dataclass():
    assert set(BUILT_IN) == set(SOLVERS) == {*KINDS, "auto"}


def test_affine_is_a_least_squares_line_for_each_channel():
    x, output, error = rows()
    kind = solve("affine", statistics(x, output, error))
    for channel in range(error.shape[1]):
        line = torch.linalg.lstsq(
            with_ones(output[:, [channel]]), (output + error)[:, [channel]]
        ).solution.flatten()
        assert kind.scale[channel].item() == pytest.approx(line[0].item(), rel=1e-9)
        assert kind.bias[channel].item() == pytest.approx(line[1].item(), rel=1e-9)


def test_affine_shifts_a_constant_channel_without_scaling_it():
    x, output, error = rows()
    output[:, 2] = 4e3
    kind = solve("affine", statistics(x, output, error))
    assert kind.scale[2] == 1
    assert kind.bias[2].item() == pytest.approx(error[:, 2].mean().item())


def test_bias_is_the_mean_error():
    x, output, error = rows()
    assert torch.allclose(solve("bias", statistics(x, output, error)).bias, error.mean(0))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_low_rank_is_the_truncated_svd_of_the_fitted_values(rank):
    """Eckart and Young: the best fit of rank r projects ordinary least squares' fitted values."""
    x, output, error = rows()
    kind = solve("lowrank", statistics(x, output, error), rank=rank)
    x_centred, centred = x - x.mean(0), error - error.mean(0)
    fitted = x_centred @ torch.linalg.lstsq(x_centred, centred).solution
    u, s, vh = torch.linalg.svd(fitted, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank] + error.mean(0)
    assert kind.left.shape[1] == kind.right.shape[0] == rank
    assert torch.allclose(x @ kind.left @ kind.right + kind.bias, best, atol=1e-9)


def test_low_rank_minimises_the_penalised_error():
    """Random changes of the factors only make the ridge objective larger."""
    x, output, error = rows()
    sums = statistics(x, output, error)
    kind = solve("lowrank", sums, rank=2, ridge=0.5)
    penalty = 0.5 * sums.inputs.xx.diagonal().mean()

    def objective(a, b):
        centred = error - error.mean(0) - (x - x.mean(0)) @ a @ b
        return (centred.square().sum() + penalty * (a @ b).square().sum()).item()

    generator = torch.Generator().manual_seed(0)
    smallest = objective(kind.left, kind.right)
    for _ in range(30):
        a, b = (
            t + 1e-3 * torch.randn(t.shape, generator=generator, dtype=t.dtype)
            for t in (kind.left, kind.right)
        )
        assert objective(a, b) >= smallest


@pytest.mark.parametrize("kind", ["bias", "affine", "lowrank", "linear"])
def test_error_from_sums_is_the_error_on_rows(kind):
    x, output, error = rows()
    sums = statistics(x, output, error)
    fitted = solve(kind, sums, rank=2)
    assert fitted.squared_error(sums) == pytest.approx(left(fitted, x, output, error), rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "parameters", "multiply_adds"),
    [
        (Bias(torch.zeros(7)), 7, 0),
        (Affine(torch.ones(7), torch.zeros(7)), 14, 7),
        (LowRank(torch.ones(5, 2), torch.ones(2, 7), torch.zeros(7)), 31, 24),
        (Linear(torch.ones(5, 7), torch.zeros(7)), 42, 35),
    ],
)
def test_cost_of_a_position(kind, parameters, multiply_adds):
    assert (kind.parameters, kind.multiply_adds) == (parameters, multiply_adds)


@pytest.mark.parametrize("name", KINDS)
def test_maps_and_tokens_get_the_same(name):
    generator = torch.Generator().manual_seed(0)
    sizes = {"bias": [(6,)], "affine": [(6,), (6,)], "lowrank": [(5, 2), (2, 6), (6,)]}
    shapes = sizes.get(name, [(5, 6), (6,)])
    kind = KINDS[name](*(torch.randn(shape, generator=generator) for shape in shapes))
    x, output = (torch.randn(2, c, 3, 4, generator=generator) for c in (5, 6))
    on_maps = kind.apply(x, output, 1)
    on_tokens = kind.apply(x.permute(0, 2, 3, 1), output.permute(0, 2, 3, 1), -1)
    assert torch.allclose(on_maps.permute(0, 2, 3, 1), on_tokens, atol=1e-5)


def groups(x, output, error, count=8):
    parts = zip(x.chunk(count), output.chunk(count), error.chunk(count), strict=True)
    return [statistics(*part) for part in parts]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lambda x, output, noise: noise, None),
        (lambda x, output, noise: noise + 1, Bias),
        (lambda x, output, noise: noise + 1 - 0.5 * output, Affine),
        (lambda x, output, noise: noise + x[:, :6], Linear),
    ],
)
def test_auto_finds_the_simplest_form_that_made_the_error(error, expected):
    x, output, _ = rows(4000)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    y = error(x, output, noise)
    sums = statistics(x[:2000], output[:2000], y[:2000])
    kind = solve("auto", sums, groups(x[2000:], output[2000:], y[2000:]), ridge="auto")
    assert kind is None if expected is None else isinstance(kind, expected)


def test_one_group_of_held_out_images_takes_the_smallest_error():
    x, output, error = rows()
    sums = statistics(x, output, error)
    candidates = [Solution(solve(kind, sums), 0, "") for kind in ("bias", "affine", "linear")]
    assert simplest_within_noise(candidates, [sums]) is candidates[2]


def tiny_fit(settings, kind="resnet"):
    data = tiny.batches(6)
    full = tiny.detector(kind)
    quantization = QuantizationSettings(weight_bits=4, activation_bits=4, activation_range="minmax")
    model = calibrate(quantize_model(copy.deepcopy(full), quantization), data)
    return model, data, fit_compensation(model, full, data, settings)


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
@pytest.mark.parametrize("kind", BUILT_IN)
def test_saved_kinds_compute_the_same(kind, backbone, tmp_path):
    settings = CompensationSettings(kind=kind, rank=2, holdout_fraction=0.34, gate="none")
    model, data, fitted = tiny_fit(settings, backbone)
    save_compensation(model, fitted, tmp_path / "c.pth")
    loaded = copy.deepcopy(model)
    assert load_compensation(loaded, tmp_path / "c.pth").settings == settings
    applied = copy.deepcopy(apply_compensation(model, fitted))
    with torch.no_grad():
        results = [forward_scope(m, data[0], "backbone") for m in (loaded, applied)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    if kind != "auto":
        assert {block.row()["kind"] for block in fitted.blocks} <= {kind, "bias"}
        assert all(block.kept for block in fitted.blocks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cubic"}, "affine"),
        ({"rank": 0}, "rank is 0"),
        ({"kind": "auto", "gate": "none", "ridge": 0, "holdout_fraction": 0}, "kind: auto"),
        ({"max_cost": {}}, "max_cost is empty"),
        ({"max_cost": {"multiply_adds": -1}}, "max_cost.multiply_adds"),
        ({"downsampling": 1}, "true or false"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(QwtError, match=message):
        CompensationSettings.from_mapping(settings)
