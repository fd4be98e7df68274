import pytest
import torch
from qwt_mmdet.quantization.primitives import (
    dequantize,
    fake_quantize,
    fake_quantize_log_sqrt2,
    quantization_parameters,
    quantize,
)


def parameters(device, low, high, bits):
    return quantization_parameters(
        torch.tensor([low], device=device), torch.tensor([high], device=device), bits
    )


def test_hand_computed_two_bit_case(device):
    # Range [-1, 2] in 4 levels: steps of 1, zero at code 1.
    scale, zero_point = parameters(device, -1.0, 2.0, 2)
    assert scale.item() == 1.0
    assert zero_point.item() == 1.0
    x = torch.tensor([-5.0, -1.0, -0.5, 0.0, 0.5, 0.6, 1.5, 2.0, 9.0], device=device)
    # Halves round to even: -0.5 -> 0, 0.5 -> 0, 1.5 -> 2.
    assert fake_quantize(x, scale, zero_point, 2).tolist() == [-1, -1, 0, 0, 0, 1, 2, 2, 2]
    assert quantize(x, scale, zero_point, 2).tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("low", "high"), [(-3.1, 2.2), (0.0, 6.0), (-4.0, 0.0), (0.5, 1.5)])
def test_equals_torch_per_tensor(device, bits, low, high):
    scale, zero_point = parameters(device, low, high, bits)
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(bits)).to(device) * 3
    expected = torch.fake_quantize_per_tensor_affine(
        x, scale.item(), int(zero_point.item()), 0, 2**bits - 1
    )
    assert torch.equal(fake_quantize(x, scale, zero_point, bits), expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_torch_per_channel(device, bits):
    generator = torch.Generator().manual_seed(bits)
    x = (
        torch.randn(5, 7, 11, generator=generator).to(device)
        * torch.tensor([0.1, 1, 3, 10, 0.0], device=device)[:, None, None]
    )
    low, high = x.flatten(1).aminmax(dim=1)
    scale, zero_point = quantization_parameters(low, high, bits)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 0, 0, 2**bits - 1)
    shape = (5, 1, 1)
    actual = fake_quantize(x, scale.view(shape), zero_point.view(shape), bits)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_and_fake_quantization_agree(device, bits):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(device)
    scale, zero_point = parameters(device, -2.0, 1.7, bits)
    codes = quantize(x, scale, zero_point, bits)
    assert codes.max() <= 2**bits - 1
    assert torch.equal(
        dequantize(codes, scale, zero_point), fake_quantize(x, scale, zero_point, bits)
    )


@pytest.mark.parametrize(("low", "high"), [(1.0, 5.0), (-5.0, -1.0), (-1.0, 3.3), (0.0, 0.0)])
def test_zero_is_exact(device, low, high):
    scale, zero_point = parameters(device, low, high, 4)
    assert scale.item() > 0
    assert fake_quantize(torch.zeros(3, device=device), scale, zero_point, 4).tolist() == [0, 0, 0]


def test_input_is_left_alone(device):
    x = torch.tensor([0.3, 0.7], device=device)
    fake_quantize(x, *parameters(device, 0.0, 1.0, 2), 2)
    fake_quantize_log_sqrt2(x, torch.tensor([1.0], device=device), 2)
    assert x.tolist() == pytest.approx([0.3, 0.7])


@pytest.mark.parametrize(
    "quantizer",
    [
        lambda x, **options: fake_quantize(x, *parameters(x.device, 0.0, 1.0, 2), 2, **options),
        lambda x, **options: fake_quantize_log_sqrt2(x, torch.ones_like(x[:1]), 2, **options),
    ],
)
def test_input_gives_its_place_when_asked(device, quantizer, monkeypatch):
    monkeypatch.setenv("QWT_COMPILE", "never")
    x = torch.tensor([0.3, 0.7], device=device)
    expected = quantizer(x)
    assert torch.equal(quantizer(x, overwrite=True), expected)
    assert torch.equal(x, expected)


def test_hand_computed_log_sqrt2_case(device):
    # Three bits: 1, 2^-0.5, 2^-1, … 2^-3, and zero for the eighth code.
    x = torch.tensor([2.0, 1.0, 0.85, 0.83, 0.5, 0.25, 0.11, 0.10, 0.0], device=device)
    # Borders lie in the middle of the exponents: 2^-0.25 = 0.841, 2^-3.25 = 0.105.
    expected = [1, 1, 1, 2**-0.5, 0.5, 0.25, 0.125, 0, 0]
    actual = fake_quantize_log_sqrt2(x, torch.tensor([1.0], device=device), 3)
    assert actual.tolist() == pytest.approx(expected)
    scaled = fake_quantize_log_sqrt2(x * 0.7, torch.tensor([0.7], device=device), 3)
    assert scaled.tolist() == pytest.approx([0.7 * e for e in expected])


@pytest.mark.parametrize("bits", range(2, 9))
def test_log_sqrt2_equals_its_formula(device, bits):
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(bits)).to(device).square()
    scale = torch.tensor([0.8], device=device)
    code = (-2 * torch.log2(x.double() / 0.8)).round().clamp(min=0)
    expected = torch.where(code > 2**bits - 2, 0.0, scale.double() * 2 ** (-code / 2))
    actual = fake_quantize_log_sqrt2(x, scale, bits)
    # Apart from values within rounding of the middle between two codes.
    assert ((actual - expected).abs() > 1e-6).float().mean() < 1e-3
    assert len(actual.unique()) <= 2**bits


def test_log_sqrt2_keeps_the_relative_error_of_small_values(device):
    x = torch.logspace(-3, 0, 1000, device=device)
    error = (fake_quantize_log_sqrt2(x, torch.tensor([1.0], device=device), 6) - x) / x
    assert error.abs().max() <= 2**0.25 - 1 + 1e-6


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_gradient_is_torchs_own(device, bits):
    scale, zero_point = parameters(device, -1.3, 2.2, bits)
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(bits)).to(device) * 3
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    weights = torch.rand(10_000, device=device)
    found = fake_quantize(ours, scale, zero_point, bits, overwrite=True)
    assert torch.equal(found, fake_quantize(values, scale, zero_point, bits))
    (found * weights).sum().backward()
    expected = torch.fake_quantize_per_tensor_affine(
        theirs, scale.item(), int(zero_point.item()), 0, 2**bits - 1
    )
    (expected * weights).sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


def test_the_gradient_on_the_log_sqrt2_grid_stops_where_values_are_clipped(device):
    # Clipped is what would round to a power above the largest: over 2^0.25 = 1.19 times the scale.
    x = torch.tensor([2.0, 1.2, 1.1, 0.5, 0.0], device=device, requires_grad=True)
    found = fake_quantize_log_sqrt2(x, torch.tensor([1.0], device=device), 3, overwrite=True)
    assert torch.equal(
        found, fake_quantize_log_sqrt2(x.detach(), torch.tensor([1.0], device=device), 3)
    )
    found.sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1]
