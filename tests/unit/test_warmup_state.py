import pytest
import tiny
import torch
from qwt_mmdet.config import QuantizationSettings, as_plain
from qwt_mmdet.detectors.forward import forward_scope
from qwt_mmdet.errors import QwtError
from qwt_mmdet.quantization.calibrate import calibrate
from qwt_mmdet.quantization.convert import quantize_model
from qwt_mmdet.quantization.state import (
    load_warmup,
    save_warmup,
    summarize_quantization,
)
from qwt_mmdet.record import record_of

pytestmark = pytest.mark.usefixtures("device")

SETTINGS = QuantizationSettings.from_mapping(
    {
        "weight_bits": 4,
        "activation_bits": 6,
        "overrides": [{"pattern": "*.qkv", "weight_bits": 8}],
    }
)


def plain(kind="swin"):
    return tiny.detector(kind)


@pytest.fixture
def warmup(tmp_path):
    model = calibrate(quantize_model(plain(), SETTINGS), tiny.batches(2))
    path = tmp_path / "warmup.pth"
    save_warmup(model, path, {"seed": 0})
    return model, path


@torch.no_grad()
def output(model):
    return forward_scope(model, tiny.batches(1)[0], "backbone")


def test_loaded_model_computes_bit_for_bit_the_same(warmup):
    model, path = warmup
    loaded = load_warmup(plain(), path, SETTINGS)
    assert all(torch.equal(a, b) for a, b in zip(output(loaded), output(model), strict=True))


def test_file_loads_with_weights_only_and_equal_states_give_equal_bytes(warmup, tmp_path):
    model, path = warmup
    content = torch.load(path, weights_only=True)
    assert content["settings"] == as_plain(SETTINGS)
    again = tmp_path / "again.pth"
    save_warmup(model, again, {"seed": 0})
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("key", ["model", "weights"])
def test_warmup_of_another_model_names_what_differs(warmup, key):
    _, path = warmup
    other = plain()
    record_of(other).fingerprint = {**record_of(other).fingerprint, key: "different"}
    with pytest.raises(QwtError, match=f"{key} .*different"):
        load_warmup(other, path)


def test_warmup_of_other_settings_names_what_differs(warmup):
    _, path = warmup
    other = QuantizationSettings(weight_bits=4, activation_bits=8)
    with pytest.raises(QwtError, match=r"activation_bits \(6 in the file, 8 here\)"):
        load_warmup(plain(), path, other)


def test_truncated_missing_and_foreign_files_are_named(warmup, tmp_path):
    _, path = warmup
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(QwtError, match=r"truncated\.pth"):
        load_warmup(plain(), truncated)
    with pytest.raises(QwtError, match="does not exist"):
        load_warmup(plain(), tmp_path / "absent.pth")
    foreign = tmp_path / "foreign.pth"
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(QwtError, match="not a warmup file"):
        load_warmup(plain(), foreign)


def test_size_counts_bits(warmup):
    model, _ = warmup
    summary = summarize_quantization(model)
    full = sum(p.numel() for p in plain().parameters()) * 4
    assert summary["baseline_weight_bytes"] == full
    quantized = channels = 0
    for name, module in plain().named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            bits = 8 if name.endswith(".qkv") else 4
            quantized += module.weight.numel() * (4 - bits / 8)
            channels += len(module.weight) * (5 if module.bias is not None else 9)
            channels += model.get_submodule(name).input_quantizer.scale.numel() * 5
    assert summary["weight_bytes"] == pytest.approx(full - quantized + channels, abs=1)


def test_what_could_not_be_read_again_is_not_written(warmup, tmp_path):
    model, _ = warmup
    path = tmp_path / "odd.pth"
    with pytest.raises(Exception, match="weights_only"):
        save_warmup(model, path, {"version": torch.__version__})
    assert not path.exists()
