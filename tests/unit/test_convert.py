import copy

import pytest
import tiny
import torch
from mmdet.models.backbones.swin import WindowMSA
from qwt_mmdet.compensation.modules import block_input, hooked
from qwt_mmdet.config import QuantizationSettings
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.errors import QwtError
from qwt_mmdet.quantization import layers
from qwt_mmdet.quantization.attention import QuantizedWindowMSA
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import activation_quantizers, quantize_model, quantized_layers
from qwt_mmdet.quantization.layers import QuantizedConv2d, QuantizedLinear
from qwt_mmdet.quantization.primitives import (
    fake_quantize,
    fake_quantize_log_sqrt2,
    quantization_parameters,
)
from qwt_mmdet.quantization.state import load_warmup, save_warmup, summarize_quantization
from qwt_mmdet.quantization.weights import quantize_weight
from qwt_mmdet.record import quantization_of
from torch import nn

pytestmark = pytest.mark.usefixtures("device")


def settings(bits=8, **changes):
    values = {"weight_bits": bits, "activation_bits": bits, "refit": "none"}
    ranges = {"weight_range": "minmax", "activation_range": "minmax"}
    return QuantizationSettings.from_mapping({**values, **ranges, **changes})


def outputs(model, batch):
    with torch.no_grad():
        return forward_scope(model, batch, "backbone")


def relative_error(actual, expected):
    return max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_conv_and_linear_is_quantized_and_error_falls_with_bits(kind):
    batches = tiny.batches(2)
    full = tiny.detector(kind)
    layers = [n for n, m in full.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    expected = outputs(full, batches[0])
    errors = []
    for bits in (3, 5, 8):
        model = calibrate(quantize_model(copy.deepcopy(full), settings(bits)), batches)
        assert list(quantized_layers(model)) == layers
        assert all(layer.is_calibrated for layer in quantized_layers(model).values())
        assert quantization_of(model).not_quantized == []
        errors.append(relative_error(outputs(model, batches[0]), expected))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_model_with_quantizers_switched_off_is_the_original(kind):
    batch = tiny.batches(1, size=(60, 76))[0]
    full = tiny.detector(kind)
    model = quantize_model(copy.deepcopy(full), settings())
    for quantizer in activation_quantizers(model).values():
        quantizer.enabled = False
    for actual, expected in zip(outputs(model, batch), outputs(full, batch), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("made_there")
def test_quantized_linear_by_hand():
    layer = nn.Linear(2, 1, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -0.4]]))
        layer.bias.fill_(0.25)
    layer.__class__ = QuantizedLinear
    layer._attach("layer", 2, 2)
    layer.input_quantizer.set_range(torch.tensor([0.0]), torch.tensor([3.0]))
    quantize_weight(layer, settings(2), None)
    layer.restore_weight()
    # Weight: range [-0.4, 1], step 1.4/3, zero point round(0.857) = 1: codes 3 and 0.
    step = 1.4 / 3
    assert layer.weight_codes.tolist() == [[3, 0]]
    # Input grid {0, 1, 2, 3}: 2.6 -> 3, 1.2 -> 1.
    expected = 3 * 2 * step + 1 * -1 * step + 0.25
    assert layer(torch.tensor([[2.6, 1.2]])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(37, 16), (3, 25, 16)])
def test_a_large_input_of_a_linear_layer_gives_the_same_in_parts(shape, monkeypatch):
    torch.manual_seed(0)
    layer = nn.Linear(16, 5)  # on the CPU, as a GPU computes it whole
    layer.__class__ = QuantizedLinear
    layer._attach("layer", 4, 4)
    layer.input_quantizer.set_range(torch.tensor([-2.0]), torch.tensor([2.0]))
    quantize_weight(layer, settings(4), None)
    layer.restore_weight()
    x = torch.randn(shape)
    sizes = []
    layer.input_quantizer.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    with torch.no_grad():
        expected = layer(x)
        assert len(sizes) == 1
        monkeypatch.setattr(layers, "LARGE_INPUT", 100)
        monkeypatch.setattr(layers, "CHUNK", 10 * 16)
        actual = layer(x)
    assert sizes[1:3] == [10, 10]
    assert sum(sizes[1:]) == x.numel() // 16
    assert actual.shape == expected.shape
    assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("made_there")
def test_window_attention_rounds_its_operands_by_hand():
    torch.manual_seed(0)
    attention = WindowMSA(embed_dims=16, num_heads=4, window_size=(3, 5)).eval()
    attention.init_weights()
    attention.__class__ = QuantizedWindowMSA
    attention._attach("attention", 4, logarithmic_probability=True)
    grids = {
        name: (torch.tensor([0.03]), torch.tensor([7.0])) for name in ("query", "key", "value")
    }
    grids["probability"] = torch.tensor([0.5]), torch.tensor([0.0])
    for name, grid in grids.items():
        getattr(attention, f"{name}_quantizer").set_parameters(*grid)
    x = torch.randn(2, 15, 16)
    original = x.clone()
    with torch.no_grad():
        query, key, value = attention.qkv(x).reshape(2, 15, 3, 4, 4).permute(2, 0, 3, 1, 4)
        query, key, value = (
            fake_quantize(operand, *grids[name], 4)
            for name, operand in (("query", query * 0.5), ("key", key), ("value", value))
        )
        table = attention.relative_position_bias_table[attention.relative_position_index.view(-1)]
        bias = table.view(15, 15, 4).permute(2, 0, 1)
        probability = (query @ key.transpose(-2, -1) + bias).softmax(-1)
        probability = fake_quantize_log_sqrt2(probability, grids["probability"][0], 4)
        expected = attention.proj((probability @ value).transpose(1, 2).reshape(2, 15, 16))
        actual = attention(x)
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(x, original)


@pytest.mark.usefixtures("made_there")
def test_depthwise_input_scales_are_per_channel_and_fold_into_the_weight():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    x = torch.randn(2, 4, 8, 8) * torch.tensor([1.0, 10.0, 100.0, 0.01]).view(1, 4, 1, 1)
    original = conv.weight.detach().clone()
    conv.__class__ = QuantizedConv2d
    conv._attach("conv", 8, 8)
    low, high = x.amin(dim=(0, 2, 3)), x.amax(dim=(0, 2, 3))
    conv.input_quantizer.set_range(low, high)
    assert conv.input_quantizer.scale.shape == (4,)
    # Integer inputs and a weight that carries the factor give the same result.
    scale, zero = (p.view(1, 4, 1, 1) for p in quantization_parameters(low, high, 8))
    integers = (x / scale).round().add(zero).clamp(0, 255) - zero
    folded = original * scale.view(4, 1, 1, 1)
    expected = nn.functional.conv2d(integers, folded, groups=4)
    assert torch.allclose(conv(x), expected, rtol=1e-4, atol=1e-4)


def test_first_layer_has_input_bits_and_overrides_win():
    entries = [
        {"pattern": "backbone.layer1.*", "weight_bits": 6},
        {"pattern": "backbone.layer1.0.conv1", "activation_bits": 7},
        {"pattern": "backbone.layer2.0.conv1", "skip": True},
    ]
    model = quantize_model(tiny.detector("resnet"), settings(4, overrides=entries))
    calibrate(model, tiny.batches(1))
    layers = quantized_layers(model)
    assert layers["backbone.conv1"].input_quantizer.bits == 8
    assert layers["backbone.conv1"].weight_bits == 4
    assert layers["backbone.layer1.1.conv2"].weight_bits == 6
    assert layers["backbone.layer1.1.conv2"].input_quantizer.bits == 4
    # The last matching entry decides alone.
    assert layers["backbone.layer1.0.conv1"].weight_bits == 4
    assert layers["backbone.layer1.0.conv1"].input_quantizer.bits == 7
    assert "backbone.layer2.0.conv1" not in layers
    assert [entry.name for entry in quantization_of(model).not_quantized] == [
        "backbone.layer2.0.conv1"
    ]


@pytest.mark.parametrize("refit", ["none", "sequential"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_with_32_bits_for_activations_only_weights_are_rounded(kind, refit, tmp_path):
    batches = tiny.batches(2)
    model = tiny.detector(kind)
    bits = {"weight_bits": 4, "activation_bits": 32, "refit": refit}
    calibrate(quantize_model(model, QuantizationSettings(**bits)), batches)
    by_hand = tiny.detector(kind)
    assert quantization_of(model).folds == []
    for name, layer in quantized_layers(model).items():
        assert layer.weight_codes.unique().numel() <= 16
        assert layer.most_input_scales == 0
        own = by_hand.get_submodule(name)
        own.weight.data = layer.rounded_weight()
        own.bias = nn.Parameter(layer.effective_bias())
    expected = outputs(by_hand, batches[0])
    assert relative_error(outputs(model, batches[0]), expected) < 1e-5
    save_warmup(model, tmp_path / "warmup.pth")
    loaded = load_warmup(tiny.detector(kind), tmp_path / "warmup.pth")
    assert relative_error(outputs(loaded, batches[0]), outputs(model, batches[0])) == 0
    summary = summarize_quantization(loaded)
    assert all(layer["activation_bits"] == 32 for layer in summary["layer_sqnr"])
    assert summary["range_check"]["unseen_db"] is None, "no range can be too narrow"


def test_layers_beside_one_with_32_bits_keep_their_grids():
    entries = [{"pattern": "*ffn.layers.0.0", "activation_bits": 32}]
    folding = settings(4, overrides=entries, activation_range="repq")
    model = quantize_model(tiny.detector("swin"), folding)
    calibrate(model, tiny.batches(1))
    for name, layer in quantized_layers(model).items():
        assert layer.input_quantizer.rounds != name.endswith("ffn.layers.0.0")
    assert any("qkv" in name for fold in quantization_of(model).folds for name in fold.layers)
    assert not any("ffn" in name for fold in quantization_of(model).folds for name in fold.layers)


def test_what_is_not_quantized_has_its_share_of_the_multiply_adds():
    model, spent = tiny.detector("resnet"), {}

    def count(name, convolution, _, output):
        spent[name] = output.numel() * convolution.weight[0].numel()

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    with hooked(model, names, count):
        outputs(model, tiny.batches(1)[0])
    skipped = ["backbone.layer1.*", "backbone.layer2.0.conv1"]
    entries = [{"pattern": pattern, "skip": True} for pattern in skipped]
    model = calibrate(
        quantize_model(tiny.detector("resnet"), settings(overrides=entries)), tiny.batches(2)
    )
    shares = {
        entry.name: entry.multiply_adds_percent for entry in quantization_of(model).not_quantized
    }
    assert len(shares) == 5
    for name, share in shares.items():
        assert share == pytest.approx(100 * spent[name] / sum(spent.values()))


def test_override_that_matches_nothing_is_an_error():
    entries = [{"pattern": "bakbone.*", "skip": True}]
    with pytest.raises(QwtError, match=r"bakbone\.\*"):
        quantize_model(tiny.detector("resnet"), settings(overrides=entries))


def test_weights_have_at_most_two_to_the_bits_values_per_channel():
    model = calibrate(quantize_model(tiny.detector("resnet"), settings(3)), tiny.batches(1))
    for layer in quantized_layers(model).values():
        on_grid = layer.weight * layer.input_factor() / layer.weight_scale[:, None, None, None]
        assert (on_grid - on_grid.round()).abs().max() < 1e-4
        assert max(len(row.unique()) for row in on_grid.round().flatten(1)) <= 8


def test_weights_shared_by_two_parents_stay_shared():
    model = tiny.detector("resnet")
    model.backbone.layer1[1].conv2 = model.backbone.layer1[0].conv2
    model = calibrate(quantize_model(model, settings()), tiny.batches(1))
    assert model.backbone.layer1[1].conv2 is model.backbone.layer1[0].conv2
    assert isinstance(model.backbone.layer1[1].conv2, QuantizedConv2d)


def test_layer_that_never_ran_is_reported_and_raises_when_it_runs():
    model = tiny.detector("resnet")
    model.backbone.spare = nn.Linear(3, 3)
    calibrate(quantize_model(model, settings()), tiny.batches(1))
    assert [entry.name for entry in quantization_of(model).not_quantized] == ["backbone.spare"]
    with pytest.raises(QwtError, match="spare"):
        model.backbone.spare(torch.zeros(1, 3, device=tiny.device))


def test_unknown_attention_is_reported_not_silently_passed_over():
    class OwnAttention(nn.MultiheadAttention):
        pass

    model = tiny.detector("resnet")
    model.backbone.attention = OwnAttention(8, 2)
    quantize_model(model, settings())
    assert [(e.name, e.type) for e in quantization_of(model).not_quantized] == [
        ("backbone.attention", "OwnAttention")
    ]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_signal_to_noise_ratios_are_those_of_each_layer_alone(kind):
    batches = tiny.batches(2)
    full = tiny.detector(kind)
    model = calibrate(quantize_model(copy.deepcopy(full), settings(4)), batches)
    sums, layers = {}, quantized_layers(model)

    def compare(name, module, arguments, output):
        signal, noise = sums.get(name, (0, 0))
        difference = layers[name](block_input(arguments)) - output
        sums[name] = signal + output.square().sum(), noise + difference.square().sum()

    with hooked(full, layers, compare):
        for batch in batches:
            outputs(full, batch)
    for name, (signal, noise) in sums.items():
        expected = 10 * torch.log10(signal / noise).item()
        assert quantization_of(model).sqnr_db[name] == pytest.approx(expected, abs=0.02)
    operands = set(quantization_of(model).sqnr_db) - set(sums)
    assert len(operands) == (16 if kind == "swin" else 0)


@pytest.mark.parametrize(
    "kind", ["resnet", pytest.param("cspdarknet", marks=pytest.mark.slow_if_pretended)]
)
def test_calibration_does_not_depend_on_the_batch_size(kind):
    """Not in one bit, and not with images of two sizes, of which one would be padded."""
    images = [batch["inputs"][0] for batch in tiny.batches(4)]
    images[1] = images[1][:, :48, :32].contiguous()
    found = []
    for size in (1, 2, 4):
        model = quantize_model(tiny.detector(kind), settings(activation_range="percentile"))
        calibrate(model, [{"inputs": images[i : i + size]} for i in range(0, 4, size)])
        state = {name: q.scale for name, q in activation_quantizers(model).items()}
        state |= {name: layer.weight_codes for name, layer in quantized_layers(model).items()}
        found.append((state, quantization_of(model).sqnr_db))
    for state, noise in found[1:]:
        assert noise == found[0][1]
        assert all(torch.equal(state[name], tensor) for name, tensor in found[0][0].items())


class Regions(nn.Module):
    """A convolution, and heads for two regions of its map; an image that is dark has none."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.convolution, self.linear = nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, image):
        corner = self.first(image)[:, :, :5, :5]
        regions = torch.cat([corner, corner.flip(2)])[: 0 if image.mean() < 0 else 2]
        return self.linear(self.convolution(regions).relu().mean((2, 3)))


@pytest.mark.parametrize("refit", ["none", "sequential"])
def test_an_image_without_proposals_tells_heads_of_regions_nothing(refit):
    images = [image + 1 for image in tiny.batches(3)[1]["inputs"]]
    dark = {"inputs": [-image for image in images]}
    found = []
    for loader in ([dark, {"inputs": images}], [{"inputs": images}]):
        torch.manual_seed(0)
        model = tiny.TinyDetector(Regions()).eval().to(tiny.device)
        quantize_model(model, QuantizationSettings(4, 4, rounding="gptq", refit=refit))
        calibrate(model, loader)
        heads = model.backbone.convolution, model.backbone.linear
        found.append([tensor for head in heads for tensor in (head.weight, head.bias_correction)])
    assert all(tensor.isfinite().all() for tensor in found[0])
    if refit == "none":  # else the first layer is another, too
        torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("refit", ["none", "sequential"])
def test_no_calibration_images_is_an_error(refit):
    with pytest.raises(QwtError, match="no calibration images"):
        calibrate(quantize_model(tiny.detector("resnet"), settings(refit=refit)), [])


def test_quantizing_twice_is_an_error():
    model = quantize_model(tiny.detector("resnet"), settings())
    with pytest.raises(QwtError, match="quantized already"):
        quantize_model(model, settings())


@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "float64"), (torch.half, "float16")])
def test_a_model_of_another_precision_is_an_error(dtype, name):
    message = rf"parameters in {name}; .* call model\.float\(\) first"
    with pytest.raises(QwtError, match=message):
        quantize_model(tiny.detector("resnet").to(dtype), settings())
    with pytest.raises(QwtError, match=message):
        calibrate(quantize_model(tiny.detector("resnet"), settings()).to(dtype), tiny.batches(1))


def test_scope_without_layers_is_an_error():
    with pytest.raises(QwtError, match="scope"):
        quantize_model(nn.Sequential(nn.Linear(2, 2)), settings())


def test_observers_are_gone_after_an_exception():
    model = quantize_model(tiny.detector("resnet"), settings())
    bad = [{"inputs": [torch.full((3, 64, 64), float("nan"), device=tiny.device)]}]
    with pytest.raises(QwtError, match=r"backbone\.conv1"):
        calibrate(model, bad)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(quantizer.enabled for quantizer in activation_quantizers(model).values())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_bias_correction_restores_the_mean_output_of_every_layer(kind):
    """On the calibration images, with full-precision inputs, exactly: padding, strides, groups."""
    batches = tiny.batches(3, size=(60, 76))
    full = tiny.detector(kind)
    model = quantize_model(copy.deepcopy(full), settings(3, bias_correction=True))
    calibrate(model, batches)
    shifts, plain, layers = {}, {}, quantized_layers(model)

    def compare(name, module, arguments, output):
        layer, x = layers[name], block_input(arguments)
        axes = (0, 2, 3) if output.dim() == 4 else tuple(range(output.dim() - 1))
        shifts[name] = shifts.get(name, 0) + (layer(x) - output).sum(axes)
        correction, layer.bias_correction = layer.bias_correction, None
        plain[name] = plain.get(name, 0) + (layer(x) - output).sum(axes)
        layer.bias_correction = correction

    with hooked(full, layers, compare):
        for batch in batches:
            outputs(full, batch)
    assert shifts.keys() == layers.keys()
    for name in shifts:
        assert shifts[name].abs().max() <= 1e-3 * plain[name].abs().max()
