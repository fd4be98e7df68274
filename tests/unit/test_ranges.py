import pytest
import tiny
import torch
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.errors import QwtError
from qwt_mmdet.quantization import ranges
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.migration import migrate_scales
from qwt_mmdet.quantization.primitives import (
    fake_quantize,
    fake_quantize_log_sqrt2,
    quantization_parameters,
)
from qwt_mmdet.quantization.ranges import RangeObserver, WeightDistribution, mse
from qwt_mmdet.quantization.scheme import weight_grid
from torch.utils._python_dispatch import TorchDispatchMode


def observe(*tensors, channel_axis=None):
    observer = RangeObserver("layer", channel_axis)
    for tensor in tensors:
        observer.update(tensor)
    return observer


def data(device, seed=0, shape=(40, 3, 50)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x * torch.logspace(-3, 2, shape[0])[:, None, None]).to(device)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("channel_axis", [None, 1])
def test_order_batching_and_merging_change_nothing(device, method, channel_axis):
    x = data(device)
    one = observe(x, channel_axis=channel_axis)
    pieces = observe(*x.split(7), channel_axis=channel_axis)
    backwards = observe(*reversed(x.split(1)), channel_axis=channel_axis)
    left = observe(x[30:], channel_axis=channel_axis)
    left.merge(observe(x[:30], channel_axis=channel_axis))
    expected = one.estimate(method, 4, 99.0)
    for other in (pieces, backwards, left):
        assert torch.equal(other.counts, one.counts)
        actual = other.estimate(method, 4, 99.0)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


def test_minmax_is_exact_and_per_channel(device):
    x = data(device, 1)
    low, high = observe(x, channel_axis=1).estimate("minmax", 8, 99.9)
    assert torch.equal(low, x.amin(dim=(0, 2)))
    assert torch.equal(high, x.amax(dim=(0, 2)))


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_is_within_one_bin_of_the_exact_one(device, percentile):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(3)).to(device)
    low, high = observe(x).estimate("percentile", 8, percentile)
    cut = round((1 - percentile / 100) * len(x))
    ordered = x.sort().values
    bin_width = x.abs().max() / 1024
    assert ordered[cut - 1] - bin_width <= low.item() <= ordered[cut]
    assert ordered[-cut - 1] <= high.item() <= ordered[-cut] + bin_width


def squared_error(x, low, high, bits):
    scale, zero_point = quantization_parameters(low, high, bits)
    return (fake_quantize(x, scale, zero_point, bits) - x).square().mean().item()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_range_is_no_worse_than_minmax_or_any_symmetric_clip(device, bits):
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(4)).to(device).exp()
    low, high = observe(x).estimate("mse", bits, 99.9)
    found = squared_error(x, low, high, bits)
    for fraction in (1.0, 0.7, 0.4, 0.2, 0.1, 0.05):
        clip = squared_error(x, torch.zeros_like(x[:1]), x.max()[None] * fraction, bits)
        assert found <= clip * 1.02


def test_mse_range_of_histogram_and_of_values_agree(device):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(5)).to(device)
    from_histogram = observe(x).estimate("mse", 4, 99.9)
    from_values = ranges.mse_range(x[None], None, x.min()[None], x.max()[None], 4)
    for a, b in zip(from_histogram, from_values, strict=True):
        assert a.item() == pytest.approx(b.item(), abs=0.05 * x.abs().max().item())


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_tensors(device, method, value):
    x = torch.full((100,), value, device=device)
    scale, zero_point = quantization_parameters(*observe(x).estimate(method, 8, 99.9), 8)
    assert torch.allclose(fake_quantize(x, scale, zero_point, 8), x, rtol=5e-3)


def test_growing_by_many_octaves_keeps_all_counts(device):
    observer = observe(
        *(torch.tensor(values, device=device) for values in ([1e-30, -1e-30], [1.0], [1e30]))
    )
    assert observer.counts.sum() == 4
    assert observer.estimate("minmax", 8, 99.9)[1].item() == pytest.approx(1e30)


def test_empty_tensors_are_ignored():
    observer = observe(torch.zeros(0, 4))
    assert observer.is_empty
    observer.update(torch.ones(2))
    assert observer.counts.sum() == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_name_the_layer(bad):
    with pytest.raises(QwtError, match="layer"):
        observe(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("grids", ["any", "integer"])
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_weight_grids_are_per_output_channel(device, method, grids):
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(6)).to(device)
    weight *= torch.tensor([1.0, 10.0, 100.0, 0.0], device=device)[:, None, None, None]
    settings = QuantizationSettings(8, 8, weight_range=method, percentile=100.0 - 1e-6, grids=grids)
    scale, zero_point = weight_grid(weight, settings, 8)
    assert scale.shape == zero_point.shape == (4,)
    assert scale[1] / scale[0] > 2
    assert scale[2] / scale[1] > 2
    rounded = fake_quantize(weight, *(p.view(4, 1, 1, 1) for p in (scale, zero_point)), 8)
    assert torch.allclose(rounded, weight, atol=scale.max().item())
    assert not rounded[3].any()
    if grids == "integer":
        assert (zero_point == 128).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_of_a_symmetric_grid_is_the_smallest_of_all_symmetric_ranges(device, bits):
    weight = torch.randn(3, 2000, generator=torch.Generator().manual_seed(8)).to(device)
    weight[1] = weight[1].abs()

    def error(scale):
        grid = scale[:, None], torch.full_like(scale, 2 ** (bits - 1))[:, None]
        return (fake_quantize(weight, *grid, bits) - weight).square().sum(1)

    limits = mse(WeightDistribution(weight, symmetric=True), bits, 99.99)
    found = error(quantization_parameters(*limits, bits, symmetric=True)[0])
    largest = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
    for fraction in torch.linspace(0.05, 1, 40):
        assert (found <= error(largest * fraction) * 1.02).all()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_log_scale_is_no_worse_than_the_largest_value(device, bits):
    x = torch.rand(50_000, generator=torch.Generator().manual_seed(7)).to(device).pow(6)
    x[0] = 3.0
    scale = observe(x).estimate_log_scale(bits)
    assert scale.shape == (1,)
    errors = [
        (fake_quantize_log_sqrt2(x, s, bits) - x).square().sum().item() for s in (scale, x.max())
    ]
    assert errors[0] <= errors[1] * 1.01


def one_range_at_a_time(values, weights, bits, symmetric):
    """The search written out: one range after the other."""
    full_low, full_high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)

    def error(low, high):
        grid = (p[:, None] for p in quantization_parameters(low, high, bits, symmetric=symmetric))
        return ((fake_quantize(values, *grid, bits) - values).square().double() * weights).sum(1)

    best_low, best_high, best = full_low, full_high, error(full_low, full_high)
    for low_moves, high_moves in [(True, True)] + [(False, True), (True, False)] * (not symmetric):
        start_low, start_high = best_low, best_high
        fraction = torch.ones_like(full_low)
        for exponents in ([-n / 8 for n in range(1, 17)], [n / 40 for n in range(-4, 5) if n]):
            middle = fraction
            for exponent in exponents:
                tried = (middle * 10**exponent).clamp(max=1)
                low = full_low * tried if low_moves else start_low
                high = full_high * tried if high_moves else start_high
                better = (found := error(low, high)) < best
                best, fraction, best_low, best_high = (
                    torch.where(better, new, old)
                    for new, old in (
                        (found, best), (tried, fraction), (low, best_low), (high, best_high)
                    )
                )  # fmt: skip
    return best_low, best_high


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("shape", [(1, 3000), (37, 400), (3, 1)])
def test_all_ranges_at_once_are_searched_as_one_after_the_other(
    device, bits, symmetric, counted, shape, monkeypatch
):
    generator = torch.Generator().manual_seed(9)
    values = torch.randn(shape, generator=generator).exp() - 1
    values *= torch.logspace(-3, 3, shape[0])[:, None]
    weights = torch.randint(0, 1000, shape, generator=generator).double()
    values, weights = values.to(device), weights.to(device)
    expected = one_range_at_a_time(values, weights if counted else 1.0, bits, symmetric)
    for at_once in (1, 5000, 2**24):
        monkeypatch.setattr(ranges, "TRIED", {"cpu": at_once, "cuda": at_once})
        found = ranges.mse_range(
            values, weights if counted else None, values.amin(1), values.amax(1), bits,
            symmetric=symmetric,
        )  # fmt: skip
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grids", ["any", "integer"])
def test_ranges_of_a_layer_take_few_operations(grids):
    settings = QuantizationSettings(8, 8, grids=grids)
    layer = quantize_model(tiny.detector("resnet"), settings).backbone.layer1[0].conv2
    observer = observe(data("cpu", 10, (4, 8, 50)), channel_axis=1)
    with Operations() as operations:
        migrate_scales(layer, observer, settings)
    assert operations.count < 2000, "one range after the other, at five strengths: more than 10,000"


def test_bins_without_values_are_left_out(device):
    observer = observe(
        torch.tensor([[[-3.0, 1.0, 1.0]], [[2.0, 2.0, 2.0]]], device=device), channel_axis=0
    )
    values, counts = observer.weighted_values()
    assert values.shape == counts.shape == (2, 3)
    held = [(v[c > 0].tolist(), c[c > 0].tolist()) for v, c in zip(values, counts, strict=True)]
    assert held[0][0] == pytest.approx([-3, 1], rel=0.01)
    assert held[1][0] == pytest.approx([2], rel=0.01)
    assert [c for _, c in held] == [[1, 2], [3]]
