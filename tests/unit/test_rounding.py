import pytest
import torch
import torch.nn.functional as F
from qwt_mmdet.quantization.layers import QuantizedConv2d, exchange_class
from qwt_mmdet.quantization.moments import InputMoments
from qwt_mmdet.quantization.primitives import dequantize, quantization_parameters, quantize
from qwt_mmdet.quantization.regression import RegressionSums
from qwt_mmdet.quantization.rounding import DAMPING, gptq_codes
from torch import nn


def problem(device, groups=1, outputs=6, inputs=300, bits=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(groups, outputs, inputs, generator=generator)
    mixing = torch.randn(groups, inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(groups, 2000, inputs, generator=generator) @ mixing
    low, high = weight.to(device).aminmax(dim=2)
    moments = x.transpose(1, 2) @ x / 2000
    return weight.to(device), moments.to(device), quantization_parameters(low, high, bits)


def output_error(weight, codes, moments, grid):
    difference = (dequantize(codes, grid[0][..., None], grid[1][..., None]) - weight).double()
    return ((difference @ moments.double()) * difference).sum().item()


def one_by_one(weight, moments, grid, bits):
    """The algorithm as its paper states it, without blocks: one inverse after the other."""
    moments = moments.double()
    moments = moments + DAMPING * moments.diagonal().mean() * torch.eye(
        len(moments), device=moments.device
    )
    order = moments.diagonal().argsort(descending=True).tolist()
    left, codes = weight.double().clone(), torch.zeros_like(weight, dtype=torch.uint8)
    free = order.copy()
    for column in order:
        inverse = torch.linalg.inv(moments[free][:, free])
        code = quantize(left[:, column].float(), *grid, bits)
        codes[:, column] = code
        error = (left[:, column] - dequantize(code, *grid)) / inverse[0, 0]
        left[:, free] -= error[:, None] * inverse[0]
        free.remove(column)
    return codes


@pytest.mark.parametrize("bits", [2, 4])
def test_equals_the_algorithm_written_out(device, bits):
    weight, moments, grid = problem(device, inputs=40, bits=bits)
    codes = gptq_codes(weight, moments, *grid, bits)
    expected = one_by_one(weight[0], moments[0], (grid[0][0], grid[1][0]), bits)
    assert torch.equal(codes[0], expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_output_error_is_well_below_that_of_nearest_rounding(device, bits):
    weight, moments, grid = problem(device, bits=bits)
    nearest = quantize(weight, grid[0][..., None], grid[1][..., None], bits)
    found = output_error(weight, gptq_codes(weight, moments, *grid, bits), moments, grid)
    assert found < 0.6 * output_error(weight, nearest, moments, grid)


def test_inputs_that_are_not_correlated_are_rounded_to_nearest(device):
    weight, _, grid = problem(device, inputs=50)
    moments = torch.diag_embed(torch.rand(1, 50) + 0.1).to(device)
    nearest = quantize(weight, grid[0][..., None], grid[1][..., None], 3)
    assert torch.equal(gptq_codes(weight, moments, *grid, 3), nearest)


def test_groups_are_independent(device):
    weight, moments, grid = problem(device, groups=3, inputs=20)
    together = gptq_codes(weight, moments, *grid, 3)
    for g in range(3):
        part = slice(g, g + 1)
        alone = gptq_codes(weight[part], moments[part], grid[0][part], grid[1][part], 3)
        assert torch.equal(together[part], alone)


def test_inputs_without_data_and_constant_inputs_give_codes_of_the_grid(device):
    weight, moments, grid = problem(device, inputs=20, bits=2)
    moments[:, 3], moments[:, :, 3] = 0, 0
    for given in (moments, torch.zeros_like(moments), torch.ones_like(moments)):
        codes = gptq_codes(weight, given, *grid, 2)
        assert codes.max() <= 3
        assert output_error(weight, codes, given, grid) < 1e6


def test_moments_of_inputs_far_from_zero_keep_their_deviations(device):
    generator = torch.Generator().manual_seed(0)
    rows = 1e3 + torch.randn(1, 4000, 30, generator=generator).to(device) * 1e-2
    sums = RegressionSums(30, 30, 30)
    for part in rows.split(700, dim=1):
        sums.update(part)
    exact = rows[0].double()
    expected = torch.cov(exact.T, correction=0)
    (centred,), (raw,) = (sums.moments(sums.about(centred=centred))[0] for centred in (True, False))
    assert (centred[0] - expected).abs().max() <= 1e-3 * expected.abs().max()
    torch.testing.assert_close(raw[0], exact.T @ exact / 4000, rtol=1e-8, atol=0)


def test_moments_that_rounding_made_indefinite_are_damped_until_they_are_not(device):
    weight, moments, grid = problem(device, inputs=20, bits=4)
    moments[0] -= torch.eye(20, device=device) * moments[0].diagonal().mean() * 0.5
    assert torch.linalg.eigvalsh(moments[0])[0] < 0
    codes = gptq_codes(weight, moments, *grid, 4)
    assert codes.max() <= 15
    with pytest.raises(torch.linalg.LinAlgError, match="not finite"):
        gptq_codes(weight, moments * float("nan"), *grid, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
        {"kernel_size": (5, 2), "padding": (2, 0), "dilation": (1, 3), "groups": 6},
        {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    ],
)
@torch.no_grad()
def test_moments_of_a_convolution_are_those_of_its_unfolded_input(device, options):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 6, 13, 11, generator=generator).to(device)
    layer = exchange_class(nn.Conv2d(6, 6, **options).to(device), QuantizedConv2d)
    layer._attach("layer", 8, 8)
    layer.input_quantizer.channel_axis = None
    layer.input_quantizer.set_range(torch.tensor([-2.0], device=device), x.max().view(1))
    moments = InputMoments(layer, limit=10**6)
    moments.update(x, x)
    expected = []
    for seen in (x, layer.input_quantizer.quantized(x)):
        if layer.padding_mode == "reflect":
            padded, padding = F.pad(seen, (2, 2, 2, 2), mode="reflect"), 0
        else:
            padded, padding = seen, layer.padding
        columns = F.unfold(padded, layer.kernel_size, layer.dilation, padding, layer.stride)
        expected.append(columns.transpose(1, 2).flatten(0, 1).double())
    for mean, rows in zip(moments.means(), expected, strict=True):
        torch.testing.assert_close(mean.flatten(), rows.mean(0), rtol=0, atol=1e-12)
    (second,), _ = moments.second.moments(moments.second.about(centred=False))
    groups = expected[1].unflatten(1, (layer.groups, -1)).transpose(0, 1)
    torch.testing.assert_close(
        second, groups.transpose(1, 2) @ groups / groups.shape[1], rtol=1e-5, atol=1e-5
    )


def test_so_many_positions_of_a_call_count_towards_second_moments(device):
    layer = exchange_class(nn.Conv2d(1, 1, 1).to(device), QuantizedConv2d)
    layer._attach("layer", 8, 8)
    x = torch.arange(100.0, device=device).view(1, 1, 10, 10)
    layer.input_quantizer.set_range(
        torch.zeros(1, device=device), torch.full((1,), 255.0, device=device)
    )
    means, square = [], x.square().mean().item()
    for limit in (20, 100, 0):
        moments = InputMoments(layer, limit)
        for _ in range(3):
            moments.update(x, x)
        assert moments.positions == 300, "means are those of all positions"
        assert moments.means()[0].item() == pytest.approx(49.5)
        if limit:
            means.append(moments.second.moments(moments.second.about(centred=False))[0][0].item())
            assert moments.second.count == 3 * limit
    assert means[0] == pytest.approx(square, rel=0.03), "one position of each stretch"
    assert means[0] != means[1] == pytest.approx(square)
