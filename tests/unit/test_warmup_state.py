import pytest
import tiny
import torch
from qwt_mmdet.config import QuantizationSettings, as_plain
from qwt_mmdet.errors import QwtError
from qwt_mmdet.quantization.convert import quantize_model, quantized_layers
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
    model = tiny.calibrated("swin", SETTINGS, 2)
    path = tmp_path / "warmup.pth"
    save_warmup(model, path, {"seed": 0})
    return model, path


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


@pytest.mark.parametrize(
    ("ending", "value", "message"),
    [
        (".input_quantizer.scale", float("nan"), "holds nan, which is not a positive number"),
        (".query_quantizer.scale", float("inf"), "holds inf"),
        (".weight_scale", -1.0, "holds -1"),
        (".weight_scale", 0.0, "holds 0"),
        (
            "proj.input_quantizer.zero_point",
            64,
            "holds 64, which is not a whole number from 0 to 63",
        ),
        (".weight_zero_point", -1, "from 0 to 15"),
        (".weight_zero_point", 0.5, "holds 0.5"),
        ("ffn.layers.1.weight_codes", 16, "holds 16"),
        (".fold_shift", float("nan"), "not a finite number"),
        (".fold_factor", 0.0, "not a positive number"),
    ],
)
def test_a_file_with_values_that_calibration_never_finds_is_refused(
    warmup, tmp_path, ending, value, message
):
    content = torch.load(warmup[1], weights_only=True)
    key = next(key for key in content["state"] if key.endswith(ending))
    content["state"][key].view(-1)[-1] = value
    assert_refused(content, tmp_path, rf"damaged\.pth .*{key} .*{message}")


def assert_refused(content, folder, message):
    torch.save(content, folder / "damaged.pth")
    with pytest.raises(QwtError, match=message):
        load_warmup(plain(), folder / "damaged.pth")


def test_a_file_that_lacks_something_is_refused(warmup, tmp_path):
    content = torch.load(warmup[1], weights_only=True)
    state, bits = content["state"], content["bits"]
    name = "backbone.stages.0.blocks.0.ffn.layers.1"
    for ending in ("weight_codes", "weight_scale", "input_quantizer.scale"):
        key = f"{name}.{ending}"
        others = {k: v for k, v in state.items() if k != key}
        assert_refused({**content, "state": others}, tmp_path, f"{key} is missing")
        shorter = {**state, key: state[key][:1].repeat(2, *[1] * (state[key].dim() - 1))}
        assert_refused({**content, "state": shorter}, tmp_path, f"{key} has the shape")
    for ending in ("fold_factor", "fold_shift"):
        key = next(key for key in state if key.endswith(ending))
        others = {k: v for k, v in state.items() if k != key}
        assert_refused({**content, "state": others}, tmp_path, f"{key} is missing")
    for wrong in ({}, {**bits, f"{name}.weight": 99}):
        assert_refused({**content, "bits": wrong}, tmp_path, "bits, not 2 to 8")
    assert_refused({**content, "state": {}}, tmp_path, "not one layer is calibrated")
    del content["bits"]
    assert_refused(content, tmp_path, "holds no bits")


def test_a_model_without_sound_grids_is_not_saved(warmup, tmp_path):
    path = tmp_path / "new.pth"
    with pytest.raises(QwtError, match="not quantized"):
        save_warmup(plain(), path)
    with pytest.raises(QwtError, match="not one layer is calibrated; calibrate it first"):
        save_warmup(quantize_model(plain(), SETTINGS), path)
    model, _ = warmup
    next(iter(quantized_layers(model).values())).weight_scale[0] = float("nan")
    with pytest.raises(QwtError, match="weight_scale holds nan"):
        save_warmup(model, path)
    assert not path.exists()


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
            channels += 5 * (module.in_channels if isinstance(module, torch.nn.Conv2d) else 1)
    assert summary["weight_bytes"] == pytest.approx(full - quantized + channels, abs=1)


def test_what_could_not_be_read_again_is_not_written(warmup, tmp_path):
    model, _ = warmup
    path = tmp_path / "odd.pth"
    with pytest.raises(Exception, match="weights_only"):
        save_warmup(model, path, {"version": torch.__version__})
    assert not path.exists()
