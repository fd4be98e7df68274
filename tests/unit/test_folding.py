"""RepQ-ViT's reparameterization changes no function, only where the factors stand."""

import copy

import pytest
import tiny
import torch
from mmdet.models.backbones import PyramidVisionTransformerV2
from qwt_mmdet.config import Override, QuantizationSettings
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import (
    activation_quantizers,
    full_precision,
    quantize_model,
    quantized_layers,
)
from qwt_mmdet.quantization.folding import apply_fold, factors, find_folds
from qwt_mmdet.quantization.primitives import quantization_parameters, quantize
from qwt_mmdet.quantization.state import load_warmup, save_warmup
from qwt_mmdet.record import quantization_of

pytestmark = pytest.mark.usefixtures("device")

REPQ = {"activation_range": "repq", "weight_bits": 8, "activation_bits": 8}


def detector(kind):
    if kind == "swin":
        model = tiny.detector("swin")
    else:
        torch.manual_seed(0)
        model = tiny.TinyDetector(
            PyramidVisionTransformerV2(
                embed_dims=8,
                num_layers=[1, 1, 1, 1],
                num_heads=[1, 2, 2, 4],
                sr_ratios=[4, 2, 1, 1],
                mlp_ratios=[2, 2, 2, 2],
                drop_path_rate=0.0,
            )
        )
        model = model.eval().to(tiny.device)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.uniform_(module.weight, 0.1, 3)
            torch.nn.init.normal_(module.bias, 0, 1)
    return model


@torch.no_grad()
def outputs(model, size=(64, 64)):
    return forward_scope(model, tiny.batches(1, size=size)[0], "backbone")


def assert_close(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize("kind", ["swin", "pvt"])
@pytest.mark.parametrize("size", [(64, 64), (60, 76), (36, 100)])
def test_folding_leaves_the_full_precision_function_alone(kind, size):
    """Sizes that windows do not divide included: the padding inside of attention is folded too."""
    full = detector(kind)
    model = quantize_model(copy.deepcopy(full), QuantizationSettings.from_mapping(REPQ))
    generator = torch.Generator().manual_seed(3)
    for fold in quantization_of(model).folds:
        channels = len(model.get_submodule(fold.norm).weight)
        factor = (torch.rand(channels, generator=generator) * 3 + 0.2).to(tiny.device)
        shift = torch.randn(channels, generator=generator).to(tiny.device)
        apply_fold(model, fold, factor, shift)
    assert len(quantization_of(model).folds) == (9 if kind == "swin" else 10)
    with full_precision(model, {}):
        assert_close(outputs(model, size), outputs(full, size))


@pytest.mark.usefixtures("made_there")
def test_codes_are_those_of_quantization_per_channel():
    torch.manual_seed(0)
    y = torch.randn(500, 12) * torch.logspace(-2, 2, 12) + torch.randn(12)
    scale, zero_point = quantization_parameters(y.amin(0), y.amax(0), 4)
    tensor_scale, tensor_zero_point, factor, shift = factors(scale, zero_point)
    assert tensor_scale.shape == tensor_zero_point.shape == (1,)
    folded = (y.double() + shift) / factor
    codes = quantize(folded.float(), tensor_scale, tensor_zero_point, 4)
    expected = quantize(y, scale, zero_point, 4)
    # Apart from values within rounding of the middle between two codes.
    assert (codes != expected).float().mean() < 1e-3
    assert (codes.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["swin", pytest.param("pvt", marks=pytest.mark.slow_if_pretended)])
def test_calibrated_model_quantizes_channels_as_if_each_had_a_scale_of_its_own(kind):
    """The same codes as a model that keeps the scales per channel, layer by layer."""
    batches = tiny.batches(2, size=(60, 76))
    settings = QuantizationSettings.from_mapping({**REPQ, "activation_bits": 4})
    model = calibrate(quantize_model(detector(kind), settings), batches)
    for fold in quantization_of(model).folds:
        quantizer = model.get_submodule(fold.layers[0]).input_quantizer
        assert quantizer.channel_axis is None
        assert quantizer.scale.numel() == 1
    settings = QuantizationSettings.from_mapping(
        {**REPQ, "activation_bits": 4, "activation_range": "mse"}
    )
    plain = calibrate(quantize_model(detector(kind), settings), batches)
    full = outputs(detector(kind))
    errors = [
        sum(((a - e).norm() / e.norm()).item() for a, e in zip(outputs(m), full, strict=True))
        for m in (model, plain)
    ]
    assert errors[0] < errors[1]


@pytest.mark.slow_if_pretended
def test_readers_of_one_norm_may_have_different_bits():
    """Each has the grid of its own bits, about as if all readers had as many."""
    keys = tuple(
        Override(f"backbone.layers.3.1.0.attn.attn.{n}_proj", activation_bits=8) for n in "kv"
    )
    found = {}
    for bits, overrides in ((4, keys), (8, ())):
        settings = QuantizationSettings(8, bits, refit="none", overrides=overrides)
        model = calibrate(quantize_model(detector("pvt"), settings), tiny.batches(2))
        found[bits] = quantization_of(model).sqnr_db
    for override in keys:
        assert found[4][override.pattern] == pytest.approx(found[8][override.pattern], abs=2)


def test_with_many_bits_the_quantized_model_is_the_full_precision_one():
    model = quantize_model(detector("swin"), QuantizationSettings.from_mapping(REPQ))
    for quantizer in activation_quantizers(model).values():
        quantizer.bits = 20
    for layer in quantized_layers(model).values():
        layer.weight_bits = 8
    calibrate(model, tiny.batches(2))
    weights = {n: m.weight for n, m in detector("swin").named_modules() if hasattr(m, "weight")}
    assert weights
    with torch.no_grad():
        error = [
            ((a - e).norm() / e.norm()).item()
            for a, e in zip(outputs(model), outputs(detector("swin")), strict=True)
        ]
    assert max(error) < 0.05


def test_layers_that_pad_with_zeros_are_not_folded():
    model = detector("swin")
    model.backbone.stages[0].blocks[0].attn.w_msa.qkv = torch.nn.Identity()
    quantize_model(model, QuantizationSettings.from_mapping(REPQ))
    assert not any(f.norm.endswith("stages.0.blocks.0.norm1") for f in find_folds(model))


@pytest.mark.parametrize("kind", ["swin", "pvt"])
@pytest.mark.parametrize(
    "rounding", ["nearest", pytest.param("gptq", marks=pytest.mark.slow_if_pretended)]
)
def test_saved_state_computes_bit_for_bit_the_same(kind, rounding, tmp_path):
    settings = QuantizationSettings.from_mapping({**REPQ, "weight_bits": 4, "rounding": rounding})
    model = calibrate(quantize_model(detector(kind), settings), tiny.batches(2))
    save_warmup(model, tmp_path / "warmup.pth")
    loaded = load_warmup(detector(kind), tmp_path / "warmup.pth", settings)
    for size in ((64, 64), (60, 76)):
        actual, expected = outputs(loaded, size), outputs(model, size)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
