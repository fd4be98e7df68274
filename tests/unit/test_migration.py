"""Scales per input channel of convolutions: what they are worth, and that integers can compute them."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.quantization import migration
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.primitives import quantize
from qwt_mmdet.quantization.ranges import RangeObserver
from torch import nn

pytestmark = pytest.mark.usefixtures("device")


def alone(convolution: nn.Conv2d) -> nn.Module:
    return tiny.TinyDetector(nn.Sequential(convolution))


def images(spread: float, channels: int = 8) -> list[dict]:
    """Channels whose magnitudes go from 1 to ``spread``, with zeros to the left of a SiLU."""
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.logspace(0, torch.tensor(spread).log10().item(), channels)
    return [
        {"inputs": (F.silu(torch.randn(2, channels, 9, 11, generator=generator) * 3)
            * magnitude[:, None, None]).to(tiny.device)}
        for _ in range(3)
    ]  # fmt: skip


def convolution(groups: int = 1, **options) -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(8, 12, 3, padding=1, groups=groups, **options).to(tiny.device)


def quantized(layer: nn.Conv2d, batches: list[dict], bits=(8, 4), **changes) -> nn.Conv2d:
    settings = QuantizationSettings(*bits, **{"input_bits": bits[1], **changes})
    return calibrate(quantize_model(alone(copy.deepcopy(layer)), settings), batches).backbone[0]


def output_error(layer: nn.Conv2d, found: nn.Conv2d, batches: list[dict]) -> float:
    with torch.no_grad():
        return sum(float((found(b["inputs"]) - layer(b["inputs"])).square().sum()) for b in batches)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_channels_of_different_size_keep_their_codes(groups, rounding):
    batches = images(100.0)
    layer = convolution(groups)
    with torch.no_grad():  # small channels matter as much as large ones
        layer.weight /= torch.logspace(0, 2, 8).view(groups, -1).repeat_interleave(
            12 // groups, 0)[:, :, None, None].to(tiny.device)  # fmt: skip
    errors = [
        output_error(layer, quantized(layer, batches, rounding=rounding, migrate_scales=m), batches)
        for m in (True, False)
    ]
    assert errors[0] < 0.1 * errors[1]


def test_integers_compute_the_layer():
    batches, layer = images(30.0), convolution()
    found = quantized(layer, batches, rounding="nearest", bias_correction=False)
    quantizer = found.input_quantizer
    assert quantizer.scale.shape == (8,)
    x = batches[0]["inputs"]
    shape = (1, 8, 1, 1)
    codes = quantize(x, quantizer.scale.view(shape), quantizer.zero_point.view(shape), 4)
    shifted = codes.double() - quantizer.zero_point.view(shape).double()
    weights = found.weight_codes.double() - found.weight_zero_point[:, None, None, None].double()
    accumulated = F.conv2d(shifted, weights, padding=1)  # whole numbers; padding is code z
    assert torch.equal(accumulated, accumulated.round())
    scale = quantizer.scale.mean().double() * found.weight_scale.double()
    expected = accumulated * scale[:, None, None] + found.bias[:, None, None]
    torch.testing.assert_close(found(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [(8, 4), (4, 4), (3, 8), (2, 4)])
@pytest.mark.parametrize(
    "spread",
    [
        10.0,
        *(pytest.param(spread, marks=pytest.mark.slow_if_pretended) for spread in (1.0, 1000.0)),
    ],
)
def test_the_strength_is_chosen_that_the_output_asks_for(bits, spread, monkeypatch):
    batches, layer = images(spread), convolution()
    options = {"rounding": "nearest"}
    chosen = output_error(layer, quantized(layer, batches, bits, **options), batches)
    errors = []
    for strength in migration.STRENGTHS:
        monkeypatch.setattr(migration, "STRENGTHS", (strength,))
        errors.append(output_error(layer, quantized(layer, batches, bits, **options), batches))
    assert chosen <= 1.15 * min(errors)


def test_silent_channels_do_no_harm():
    batches, layer = images(3.0), convolution()
    for batch in batches:
        batch["inputs"][:, 2] = 0
    found = quantized(layer, batches, (8, 8))
    with torch.no_grad():
        power = sum(float(layer(batch["inputs"]).square().sum()) for batch in batches)
    assert output_error(layer, found, batches) < 1e-3 * power


def test_depthwise_and_linear_layers_are_left_as_they_are():
    model = alone(nn.Conv2d(8, 8, 3, groups=8))
    quantize_model(model, QuantizationSettings(4, 4))
    assert not model.backbone[0].migrates
    assert model.backbone[0].input_quantizer.channel_axis == 1


def test_pooled_channels_are_the_tensor():
    x = torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0)).to(tiny.device)
    x *= torch.logspace(-2, 1, 6, device=x.device)[:, None]
    channels, whole = RangeObserver("a", 1), RangeObserver("b")
    for part in x:
        channels.update(part[None])
        whole.update(part[None])
    pooled = channels.pooled()
    assert pooled.counts.sum() == x.numel()
    for method in ("minmax", "percentile", "mse"):
        ours, theirs = (seen.estimate(method, 4, 99.0) for seen in (pooled, whole))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(x.abs().max()))
    rows = x.transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(
        channels.mean_square(centred=True), rows.var(1, correction=0), rtol=1e-2, atol=0
    )
    torch.testing.assert_close(
        channels.mean_square(centred=False), rows.square().mean(1), rtol=1e-2, atol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_grids_have_one_zero_point_of_inputs_and_weights_for_integer_kernels(bits, groups):
    torch.manual_seed(0)
    model = alone(nn.Conv2d(8, 8, 3, padding=1, groups=groups)).to(tiny.device)
    data = images(30.0)
    full = [model.backbone(batch["inputs"]) for batch in data]
    quantize_model(model, QuantizationSettings(bits, bits, input_bits=bits, grids="integer"))
    calibrate(model, data)
    layer = model.backbone[0]
    middle = 2 ** (bits - 1)
    assert bool((layer.weight_zero_point == middle).all()) == (bits == 8)
    steps = layer.weight_codes - layer.weight_zero_point.view(-1, 1, 1, 1)
    assert steps.abs().max() <= (127 if bits == 8 else 2 * middle - 1)
    assert layer.input_quantizer.scale.numel() == 8  # the channels differ too much for one scale
    assert layer.input_quantizer.zero_point.unique().numel() == 1
    error = sum(
        float((model.backbone(batch["inputs"]) - y).square().mean() / y.square().mean())
        for batch, y in zip(data, full, strict=True)
    )
    assert error / len(data) < {4: 0.02, 8: 1e-4}[bits]
