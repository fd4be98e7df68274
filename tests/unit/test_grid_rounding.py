import pytest
import torch
from qwt_mmdet.errors import QwtError
from qwt_mmdet.quantization import grid_rounding
from qwt_mmdet.quantization.primitives import fake_quantize, quantization_parameters


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    grid_rounding._compiled.cache_clear()
    monkeypatch.setattr(grid_rounding, "_rounded_in_place", 0)


def grid(device, bits):
    return quantization_parameters(
        torch.tensor([-2.3], device=device), torch.tensor([3.1], device=device), bits
    )


@pytest.mark.slow
@pytest.mark.slow_if_pretended  # no compiler knows the pretended GPU
def test_compiled_and_in_place_results_are_equal_bit_for_bit(device, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for bits in (2, 4, 8):
        for shape in ((7,), (3, 65, 33), (2, 16, 30, 44)):
            x = torch.randn(shape, generator=generator).to(device) * 3
            results = []
            for mode in ("always", "never"):
                monkeypatch.setenv("QWT_COMPILE", mode)
                results.append(fake_quantize(x, *grid(device, bits), bits))
            assert torch.equal(*results)
            assert results[0].shape == x.shape


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_tensor_that_is_rounded_in_chunks_gets_the_values_of_torch(device, overwrite):
    x = torch.randn(3, grid_rounding.CHUNK + 5, device=device)
    scale, zero_point = grid(device, 4)
    expected = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), 0, 15)
    before = x.clone()
    assert torch.equal(fake_quantize(x, scale, zero_point, 4, overwrite=overwrite), expected)
    assert torch.equal(x, expected if overwrite else before)


def test_automatic_compilation_starts_once_it_pays(device, monkeypatch):
    calls = []

    def compiler(device, *, required):
        calls.append((device, required))
        return grid_rounding._fused

    monkeypatch.setattr(grid_rounding, "_compiled", compiler)
    monkeypatch.setattr(grid_rounding, "WORTH_COMPILING", 1500)
    monkeypatch.delenv("QWT_COMPILE", raising=False)
    x = torch.randn(1000, device=device)
    results = [fake_quantize(x, *grid(device, 4), 4) for _ in range(3)]
    assert calls == [(device.type, False)]
    assert torch.equal(results[0], results[2])


def test_without_a_compiler_tensors_are_rounded_in_place(device, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    monkeypatch.setattr(grid_rounding, "WORTH_COMPILING", -1)
    x = torch.randn(1000, device=device)
    monkeypatch.setenv("QWT_COMPILE", "auto")
    automatic = fake_quantize(x, *grid(device, 4), 4)
    monkeypatch.setenv("QWT_COMPILE", "never")
    assert torch.equal(automatic, fake_quantize(x, *grid(device, 4), 4))
    monkeypatch.setenv("QWT_COMPILE", "always")
    with pytest.raises(QwtError, match="QWT_COMPILE is always"):
        fake_quantize(x, *grid(device, 4), 4)


def test_another_value_is_an_error(device, monkeypatch):
    monkeypatch.setenv("QWT_COMPILE", "yes")
    with pytest.raises(QwtError, match="QWT_COMPILE is 'yes'"):
        fake_quantize(torch.zeros(3, device=device), *grid(device, 4), 4)
