import pytest
import torch
from qwt_mmdet.compensation.kinds import Bias
from qwt_mmdet.compensation.solve import RIDGES, Spectrum, choose_ridge, solve_ridge
from qwt_mmdet.compensation.statistics import RegressionStatistics


def collect(x, y, pieces=1):
    statistics = RegressionStatistics.zeros(x.shape[1], y.shape[1], x.device)
    for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
        statistics.update(a, b)
    return statistics


def problem(device, rows=3000, inputs=12, outputs=7, mean=0.0, condition=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), inputs) + mean
    weight = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
    y = x @ weight + 0.3 * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    return x.to(device), y.to(device)


def lstsq(x, y):
    """Predictions of ordinary least squares with intercept, from the stored data in float64."""
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype, device=x.device)], 1)
    solution = torch.linalg.lstsq(design.cpu(), y.cpu(), driver="gelsd").solution
    return design @ solution.to(x.device)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5])
def test_ordinary_least_squares_equals_lstsq(device, mean, condition):
    x, y = problem(device, mean=mean, condition=condition)
    solution = solve_ridge(collect(x, y, pieces=5), 0.0)
    expected = lstsq(x, y)
    difference = x @ solution.kind.weight + solution.kind.bias - expected
    assert difference.norm() / expected.norm() <= 1e-5


def test_duplicated_and_constant_channels_give_the_least_squares_predictions(device):
    x, y = problem(device)
    x = torch.cat([x, x[:, :3], torch.full((len(x), 1), 5.0, dtype=x.dtype, device=device)], 1)
    solution = solve_ridge(collect(x, y), 0.0)
    assert solution.solver == "eigh"
    assert torch.isfinite(solution.kind.weight).all()
    difference = x @ solution.kind.weight + solution.kind.bias - lstsq(x, y)
    assert difference.norm() / y.norm() <= 1e-5


def test_fewer_rows_than_channels_interpolates(device):
    x, y = problem(device, rows=5, inputs=20)
    solution = solve_ridge(collect(x, y), 0.0)
    assert torch.allclose(x @ solution.kind.weight + solution.kind.bias, y, atol=1e-6)


def test_ridge_solves_its_normal_equations(device):
    x, y = problem(device)
    statistics = collect(x, y)
    ridge = 0.3
    solution = solve_ridge(statistics, ridge)
    x_centred, y_centred = x - x.mean(0), y - y.mean(0)
    penalty = ridge * (x_centred.square().sum(0).mean())
    gradient = (
        x_centred.T @ (x_centred @ solution.kind.weight - y_centred)
        + penalty * solution.kind.weight
    )
    assert gradient.abs().max() < 1e-6 * statistics.xy.abs().max()
    assert torch.allclose(
        solution.kind.weight, Spectrum(statistics).solution(ridge).kind.weight, atol=1e-9
    )


def test_infinite_ridge_is_the_mean_error(device):
    x, y = problem(device)
    solution = solve_ridge(collect(x, y), float("inf"))
    assert isinstance(solution.kind, Bias)
    assert torch.allclose(solution.kind.bias, y.mean(0))


def test_errors_from_sums_equal_errors_from_data(device):
    x, y = problem(device, mean=50.0)
    statistics = collect(x, y, pieces=4)
    solution = solve_ridge(statistics, 0.01)
    expected = (y - x @ solution.kind.weight - solution.kind.bias).square().sum().item()
    assert statistics.error_after(solution.kind.weight, solution.kind.bias) == pytest.approx(
        expected, rel=1e-8
    )
    assert statistics.error_before() == pytest.approx(y.square().sum().item(), rel=1e-10)


def test_chunks_and_merges_change_nothing(device):
    x, y = problem(device, mean=100.0)
    whole, pieces = collect(x, y), collect(x, y, pieces=17)
    merged = collect(x[:1000], y[:1000])
    merged.merge(collect(x[1000:], y[1000:]))
    for other in (pieces, merged):
        assert other.count == whole.count
        for key in ("mean_x", "mean_y", "xx", "xy", "yy"):
            assert torch.allclose(getattr(other, key), getattr(whole, key), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_chosen_ridge_has_the_smallest_error_on_held_out_rows(device, pieces):
    x, y = problem(device, rows=90, inputs=40, mean=2.0, condition=1e3)
    fit, held_x, held_y = collect(x[:50], y[:50]), x[50:], y[50:]
    folds = [
        (fit, collect(a, b))
        for a, b in zip(held_x.chunk(pieces), held_y.chunk(pieces), strict=True)
    ]
    chosen = choose_ridge(folds)
    errors = {
        s.ridge: (held_y - held_x @ s.kind.weight - s.kind.bias).square().sum().item()
        for s in map(Spectrum(fit).solution, RIDGES[:-1])
    }
    assert chosen == min(errors, key=errors.get)
    assert 0 < chosen < 1e3


def test_auto_ridge_shrinks_when_the_fit_is_noise_and_not_when_it_is_signal(device):
    generator = torch.Generator().manual_seed(0)
    x, noise, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        for shape in ((60, 30), (60, 4), (30, 4))
    )
    chosen = choose_ridge([(collect(x[:40], noise[:40]), collect(x[40:], noise[40:]))])
    assert chosen >= 1
    signal = x @ weight
    chosen = choose_ridge([(collect(x[:40], signal[:40]), collect(x[40:], signal[40:]))])
    assert chosen <= 1e-5
