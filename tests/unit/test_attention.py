"""Quantized attention classes compute what the originals compute, as long as nothing is rounded."""

import copy

import pytest
import tiny
import torch
from mmcv.cnn.bricks.transformer import MultiheadAttention as WrappedAttention
from qwt_mmdet.quantization.attention import ATTENTION, split_projections
from qwt_mmdet.quantization.convert import activation_quantizers, quantized_layers
from qwt_mmdet.quantization.layers import QuantizedLinear
from torch import nn

pytestmark = pytest.mark.usefixtures("device")

BATCH, QUERIES, KEYS, CHANNELS, HEADS = 3, 5, 7, 16, 4


def quantized(attention: nn.Module) -> nn.Module:
    copied = copy.deepcopy(attention).eval()
    for module in list(copied.modules()):
        if type(module) is nn.MultiheadAttention:
            split_projections(module)
    for name, module in copied.named_modules():
        if type(module) in ATTENTION:
            module.__class__ = ATTENTION[type(module)]
            module._attach(name, 8)
            for quantizer in module.quantizers():
                quantizer.enabled = False
    return copied


def randomize(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval().to(tiny.device)


def assert_same(actual, expected):
    if expected is None:
        assert actual is None
    else:
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 12, "vdim": 20},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True, "kdim": 12, "vdim": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("masks", ["none", "boolean", "additive", "per head"])
def test_torchs_attention(options, batch_first, need_weights, masks):
    torch.manual_seed(0)
    attention = randomize(
        nn.MultiheadAttention(CHANNELS, HEADS, batch_first=batch_first, **options)
    )
    query = torch.randn(BATCH, QUERIES, CHANNELS, device=tiny.device)
    key = torch.randn(BATCH, KEYS, options.get("kdim", CHANNELS), device=tiny.device)
    value = torch.randn(BATCH, KEYS, options.get("vdim", CHANNELS), device=tiny.device)
    if not batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    arguments = {"need_weights": need_weights}
    if masks != "none":
        arguments["key_padding_mask"] = torch.rand(BATCH, KEYS, device=tiny.device) > 0.8
        shape = (BATCH * HEADS, QUERIES, KEYS) if masks == "per head" else (QUERIES, KEYS)
        arguments["attn_mask"] = torch.rand(shape, device=tiny.device) > 0.8
    if masks == "additive":
        arguments = {
            k: v if isinstance(v, bool) else torch.where(v, -3.0, 0.5) for k, v in arguments.items()
        }
    with torch.no_grad():
        expected = attention(query, key, value, **arguments)
        actual = quantized(attention)(query, key, value, **arguments)
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)


def test_torchs_attention_without_a_batch_and_with_weights_per_head():
    torch.manual_seed(0)
    attention = randomize(nn.MultiheadAttention(CHANNELS, HEADS))
    query, key = (
        torch.randn(QUERIES, CHANNELS, device=tiny.device),
        torch.randn(KEYS, CHANNELS, device=tiny.device),
    )
    mask = torch.rand(KEYS, device=tiny.device) > 0.7
    arguments = {"key_padding_mask": mask, "average_attn_weights": False}
    with torch.no_grad():
        expected = attention(query, key, key, **arguments)
        actual = quantized(attention)(query, key, key, **arguments)
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)


def test_wrapper_of_mmcv():
    torch.manual_seed(0)
    attention = randomize(WrappedAttention(CHANNELS, HEADS, batch_first=True))
    query, key = (
        torch.randn(BATCH, QUERIES, CHANNELS, device=tiny.device),
        torch.randn(BATCH, KEYS, CHANNELS, device=tiny.device),
    )
    position, key_position = torch.randn_like(query), torch.randn_like(key)
    arguments = {"query_pos": position, "key_pos": key_position}
    with torch.no_grad():
        expected = attention(query, key, key, **arguments)
        actual = quantized(attention)(query, key, key, **arguments)
    assert_same(actual, expected)


def test_torchs_transformer_layer_takes_no_short_cut_around_the_quantizers():
    torch.manual_seed(0)
    layer = randomize(nn.TransformerEncoderLayer(CHANNELS, HEADS, 32, batch_first=True))
    x = torch.randn(BATCH, QUERIES, CHANNELS, device=tiny.device)
    with torch.no_grad():
        expected = layer(x)
        copied = quantized(layer)
        calls = []
        copied.self_attn.query_quantizer.register_forward_hook(lambda *_: calls.append(1))
        assert_same(copied(x), expected)
    assert calls


def test_projections_become_layers_with_quantizers_of_their_own():
    from qwt_mmdet.config import QuantizationSettings
    from qwt_mmdet.quantization.convert import quantize_model

    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.attention = nn.MultiheadAttention(CHANNELS, HEADS)
    quantize_model(model, QuantizationSettings(weight_bits=4, activation_bits=4))
    prefix = "backbone.attention"
    assert set(quantized_layers(model)) == {
        f"{prefix}.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    assert isinstance(model.backbone.attention.out_proj, QuantizedLinear)
    assert len(activation_quantizers(model)) == 8
    assert sum(p.numel() for p in model.parameters()) == 4 * (CHANNELS**2 + CHANNELS)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True, "norm_layer": nn.LayerNorm}, {"gated": True}]
)
def test_timms_attention(timm_layers, masked, options):
    torch.manual_seed(0)
    attention = randomize(timm_layers.Attention(CHANNELS, HEADS, qkv_bias=True, **options))
    x = torch.randn(BATCH, QUERIES, CHANNELS, device=tiny.device)
    mask = torch.rand(BATCH, 1, QUERIES, QUERIES, device=tiny.device) > 0.3 if masked else None
    if masked:
        mask[..., 0] = True
    with torch.no_grad():
        assert_same(quantized(attention)(x, mask), attention(x, mask))
        assert_same(quantized(attention)(x, is_causal=True), attention(x, is_causal=True))


def test_timms_window_attention(timm_layers):
    torch.manual_seed(0)
    attention = randomize(timm_layers.WindowAttention(CHANNELS, HEADS, window_size=(3, 5)))
    x = torch.randn(8, 15, CHANNELS, device=tiny.device)
    masked = torch.where(torch.rand(4, 15, 15, device=tiny.device) > 0.7, -100.0, 0.0)
    with torch.no_grad():
        for mask in (None, masked):
            assert_same(quantized(attention)(x, mask), attention(x, mask))


@pytest.fixture(scope="module")
def timm_layers():
    from qwt_mmdet.quantization import timm_models

    return timm_models
