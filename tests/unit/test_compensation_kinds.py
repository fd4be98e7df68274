"""Each kind of compensation against least squares on the stored rows."""

import copy
import dataclasses
from typing import get_args

import pytest
import tiny
import torch
from qwt_mmdet.compensation.fit import fit_compensation
from qwt_mmdet.compensation.kinds import KINDS, Affine, Bias, Linear, LowRank
from qwt_mmdet.compensation.result import BlockFit
from qwt_mmdet.compensation.solve import SOLVERS, fit_forms
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
from qwt_mmdet.quantization.convert import quantize_model

pytestmark = pytest.mark.usefixtures("device")

OLS = CompensationSettings(ridge=0, bits=32, gate="none", holdout_fraction=0.25)

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
        RegressionStatistics.zeros(x.shape[1], error.shape[1], x.device),
        ChannelStatistics.zeros(error.shape[1], error.shape[1], x.device),
    )
    for chunk in zip(x.chunk(3), output.chunk(3), error.chunk(3), strict=True):
        sums.update(*chunk)
    return sums


def solve(kind, sums, **settings):
    (form,) = fit_forms(sums, [sums], dataclasses.replace(OLS, kind=kind, **settings))
    return form.solution.kind


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
            t + 1e-3 * torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)
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

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(tiny.device)

    kind = KINDS[name](*(normal(*shape) for shape in shapes))
    x, output = (normal(2, c, 3, 4) for c in (5, 6))
    on_maps = kind.apply(x, output, 1)
    on_tokens = kind.apply(x.permute(0, 2, 3, 1), output.permute(0, 2, 3, 1), -1)
    assert torch.allclose(on_maps.permute(0, 2, 3, 1), on_tokens, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "lowrank"])
def test_eight_bits_change_little_and_take_a_byte_each(kind):
    x, output, error = rows(2000, 40, 24)
    sums = statistics(x, output, error)
    full, rounded = (solve(kind, sums, rank=4, bits=bits) for bits in (32, 8))
    for name, tensor in rounded.tensors().items():
        if tensor.dtype == torch.int8:
            assert tensor.abs().amax(0).tolist() == [127] * tensor.shape[1], name
    # A byte for each number of the matrices, four for what is left: scales of columns and the bias.
    columns = {"linear": 24, "lowrank": 4 + 24}[kind]
    matrices = {"linear": 40 * 24, "lowrank": (40 + 24) * 4}[kind]
    assert rounded.bytes == matrices + 4 * (columns + 24) < full.bytes == 4 * (matrices + 24)
    assert rounded.multiply_adds == full.multiply_adds
    errors = [k.squared_error(sums) for k in (full, rounded)]
    assert errors[0] <= errors[1] < 1.01 * errors[0]
    # What is multiplied is rounded, too: each row has a scale of its own, as an image has.
    assert left(rounded.to(x.device, torch.float32), x.float(), output.float(), error.float()) == (
        pytest.approx(errors[1], rel=0.02)
    )


def test_eight_bits_of_a_column_do_not_look_at_other_columns():
    x, output, error = rows()
    error[:, 1] *= 1e6
    sums = statistics(x, output, error)
    kind = solve("linear", sums, bits=8)
    weight = (kind.weight * kind.scale).double()
    assert torch.allclose(weight[:, 0], solve("linear", sums).weight[:, 0], rtol=0.02, atol=0.02)


def folds(*arrays, count=5):
    return [statistics(*part) for part in zip(*(a.chunk(count) for a in arrays), strict=True)]


def test_held_out_errors_are_those_of_fits_to_the_other_folds():
    x, output, error = rows(300)
    settings = dataclasses.replace(OLS, ridge=0)
    (form,) = fit_forms(statistics(x, output, error), folds(x, output, error), settings)
    expected = 0.0
    for held in torch.arange(300, device=x.device).chunk(5):
        seen = torch.ones(300, dtype=torch.bool, device=x.device)
        seen[held] = False
        solution = torch.linalg.lstsq(with_ones(x[seen]), error[seen]).solution
        expected += (error[held] - with_ones(x[held]) @ solution).square().sum().item()
        if held[0] == 0:
            assert torch.allclose(form.trial.kind.weight, solution[:-1], atol=1e-8)
    assert form.held_out == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (lambda x, output, noise: noise + 1, "bias"),
        (lambda x, output, noise: noise + 1 - 0.5 * output, "affine"),
        (lambda x, output, noise: noise + x[:, :1] - x[:, 1:2], 1),
        (lambda x, output, noise: noise + x[:, :2] @ torch.ones(2, 6).to(x), 1),
        (lambda x, output, noise: noise + x[:, :2].repeat(1, 3), 2),
    ],
)
def test_the_forms_of_auto_hold_the_one_that_made_the_error(error, expected):
    """No form leaves less of what it has not seen, and simpler ones leave more."""
    x, output, _ = rows(1000, 9, 6)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output)
    y = error(x, output, noise)
    settings = dataclasses.replace(OLS, kind="auto")
    forms = fit_forms(statistics(x, output, y), folds(x, output, y), settings)
    names = [
        "none" if (kind := form.solution.kind) is None
        else kind.left.shape[1] if isinstance(kind, LowRank) else kind.name
        for form in forms
    ]  # fmt: skip
    assert names == ["none", "bias", "affine", 1, 2, "linear"]
    errors = dict(zip(names, (form.held_out for form in forms), strict=True))
    assert errors[expected] < 1.02 * min(errors.values())
    if expected != "bias":
        assert errors["bias"] > 1.1 * errors[expected]
    assert errors["none"] > 1.1 * errors[expected]


def tiny_fit(settings, kind="resnet"):
    data = tiny.batches(3)
    full = tiny.detector(kind)
    quantization = QuantizationSettings(4, 4, activation_range="minmax", refit="none")
    model = tiny.calibrated(kind, quantization, 3)
    return model, data, fit_compensation(model, full, data, settings)


@pytest.mark.parametrize(
    "backbone", ["resnet", pytest.param("swin", marks=pytest.mark.slow_if_pretended)]
)
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
    for block in fitted.blocks:
        matrices = [t for t in block.plain()["tensors"].values() if t.dim() == 2]
        assert all(matrix.dtype == torch.int8 for matrix in matrices)


def test_what_cannot_be_computed_with_is_neither_saved_nor_loaded(tmp_path):
    settings = CompensationSettings(
        kind="lowrank", rank=2, gate="none", bits=8, holdout_fraction=0.34
    )
    model, _, fitted = tiny_fit(settings)
    path = tmp_path / "c.pth"
    save_compensation(model, fitted, path)
    block = fitted.blocks[0].name

    def refused(key, value, message):
        content = torch.load(path, weights_only=True)
        content["blocks"][0]["tensors"][key][-1] = value
        torch.save(content, tmp_path / "damaged.pth")
        with pytest.raises(QwtError, match=rf"damaged\.pth .*{key} of block {block} {message}"):
            load_compensation(copy.deepcopy(model), tmp_path / "damaged.pth")

    refused("bias", float("nan"), "holds nan, which is not a finite number")
    refused("left_scale", float("inf"), "holds inf, which is not a positive number")
    refused("right_scale", -1.0, "holds -1")
    fitted.blocks[0].kind.bias[-1] = float("nan")
    with pytest.raises(QwtError, match=r"bias of block .* larger ridge"):
        save_compensation(model, fitted, tmp_path / "new.pth")
    with pytest.raises(QwtError, match="not one layer is calibrated"):
        save_compensation(
            quantize_model(tiny.detector("resnet"), QuantizationSettings(4, 4)), fitted, path
        )


def test_a_kind_that_is_not_registered_is_named_not_passed_over():
    plain = {"kind": "lineer", "tensors": {}, "fit": {}, "holdout": {}}
    with pytest.raises(QwtError, match="did you mean linear"):
        BlockFit.from_plain(plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cubic"}, "affine"),
        ({"rank": 0}, "rank is 0"),
        ({"kind": "auto", "gate": "none", "ridge": 0, "holdout_fraction": 0}, "kind: auto"),
        ({"bits": 4}, "bits is 4"),
        ({"holdout_fraction": 0.6}, "holdout_fraction is 0.6"),
        ({"max_cost": {}}, "max_cost is empty"),
        ({"max_cost": {"multiply_adds": -1}}, "max_cost.multiply_adds"),
        ({"downsampling": 1}, "true or false"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(QwtError, match=message):
        CompensationSettings.from_mapping(settings)
