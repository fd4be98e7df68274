"""Save what calibration found (the warmup state) and put it onto a freshly loaded detector."""

import dataclasses
import os
from typing import Any

from torch import Tensor, nn

from ..archives import WARMUP_FORMAT, load_archive, save_with_summary
from ..config import QuantizationSettings, as_plain
from ..errors import QwtError
from ..record import NotQuantized, RangeCheck, quantization_of, record_of
from .attention import QuantizedAttention
from .convert import activation_quantizers, quantize_model, quantized_layers, quantized_units
from .folding import apply_fold
from .layers import LAYER_BUFFERS


def quantizer_state(model: nn.Module) -> dict[str, Tensor]:
    """All buffers that calibration set: integer codes, scales, zero points (on the CPU)."""
    state: dict[str, Tensor] = {}
    for name, layer in quantized_layers(model).items():
        for key in LAYER_BUFFERS:
            if getattr(layer, key) is not None:
                state[f"{name}.{key}"] = getattr(layer, key).cpu()
    for name, quantizer in activation_quantizers(model).items():
        if quantizer.is_calibrated:
            scale, zero_point = quantizer.grid
            state[f"{name}.scale"], state[f"{name}.zero_point"] = scale.cpu(), zero_point.cpu()
    return state


def summarize_quantization(model: nn.Module) -> dict[str, Any]:
    """Sizes and exceptions, for reports: bytes of all weights before and after, layer counts.

    ``weight_bytes`` counts quantized weights at their bit width plus a float32 scale and a one-byte
    zero point per output channel and per scale of the input, and everything else as float32, with the bias that a correction or
    a fold gives to a layer without one. ``layer_sqnr``: signal-to-quantization-noise ratio in dB.
    """
    layers = quantized_layers(model)
    full = sum(p.numel() for p in model.parameters()) * 4
    saved = 0.0
    for layer in layers.values():
        if layer.is_calibrated:
            count = layer.weight.numel()
            scales = len(layer.weight) + layer.input_quantizer.grid[0].numel()
            saved += count * 4 - (count * layer.weight_bits / 8 + scales * 5)
        if not layer.had_bias and layer.bias is not None:
            full -= layer.bias.numel() * 4
        if not layer.had_bias and layer.effective_bias() is not None:
            saved -= len(layer.weight) * 4
    attention = [m for m in model.modules() if isinstance(m, QuantizedAttention)]
    check = quantization_of(model).range_check
    return {
        "baseline_weight_bytes": full,
        "weight_bytes": round(full - saved),
        "layers": sum(layer.is_calibrated for layer in layers.values()),
        "attention": len(attention),
        "layer_sqnr": _layer_noise(model),
        "range_check": check and dataclasses.asdict(check),
        "not_quantized": [
            dataclasses.asdict(entry) for entry in quantization_of(model).not_quantized
        ],
    }


def _layer_noise(model: nn.Module) -> list[dict[str, Any]]:
    units, rows = quantized_units(model), []
    for name, decibels in quantization_of(model).signal_noise.items():
        unit = units[name.partition(" ")[0]]
        rows.append(
            {
                "name": name,
                "weight_bits": unit.weight_bits,
                "activation_bits": unit.activation_bits,
                "sqnr_db": decibels,
            }
        )
    return rows


def save_warmup(
    model: nn.Module, path: str | os.PathLike[str], provenance: dict[str, Any] | None = None
) -> None:
    """Save a calibrated model's quantizers and integer weights.

    The file loads with ``torch.load(weights_only=True)`` and carries a fingerprint of the model,
    its full-precision weights and the settings.
    """
    content = {
        "format": WARMUP_FORMAT,
        "fingerprint": record_of(model).fingerprint,
        "settings": as_plain(quantization_of(model).settings),
        "bits": {
            **{f"{n}.weight": m.weight_bits for n, m in quantized_layers(model).items()},
            **{n: q.bits for n, q in activation_quantizers(model).items()},
        },
        "state": quantizer_state(model),
        "summary": summarize_quantization(model),
        "provenance": provenance or {},
    }
    save_with_summary(content, path)


def load_warmup(
    model: nn.Module,
    path: str | os.PathLike[str],
    settings: QuantizationSettings | None = None,
    *,
    round_weights: bool = True,
) -> nn.Module:
    """Quantize a freshly loaded full-precision detector with a saved warmup state, in place.

    Args:
        model: from ``load_detector``, in full precision.
        settings: what the caller expects to find; None takes the file's.
        round_weights: False keeps the weights (folded, where the file folds them) in full precision,
            as ``full_precision`` needs them.

    Raises:
        QwtError: the file belongs to another model, other weights or other settings (the message
            names what differs), or cannot be read.
    """
    content = load_archive(path, WARMUP_FORMAT, "warmup")
    fingerprint = record_of(model).fingerprint
    if content["fingerprint"] != fingerprint:
        differing = [
            f"{key} ({content['fingerprint'].get(key, 'none')!s:.16} in the file, {value!s:.16} here)"
            for key, value in fingerprint.items()
            if content["fingerprint"].get(key) != value
        ]
        raise QwtError(
            f"The warmup file {path} was made for something else: {', '.join(differing)} differ; "
            "use the model and checkpoint that it was made with, or remove it from the config."
        )
    found = QuantizationSettings.from_mapping(content["settings"])
    if settings is not None and settings != found:
        ours, theirs = as_plain(settings), as_plain(found)
        differing = [
            f"{k} ({theirs[k]} in the file, {v} here)" for k, v in ours.items() if theirs[k] != v
        ]
        raise QwtError(
            f"The warmup file {path} was made with other settings: {', '.join(differing)}; "
            "use the same settings, or remove the file from the config."
        )
    quantize_model(model, found)
    about = quantization_of(model)
    device = next(model.parameters()).device
    state, bits = content["state"], content["bits"]
    for fold in about.folds:
        keys = [f"{fold.layers[0]}.{key}" for key in ("fold_factor", "fold_shift")]
        if keys[0] in state:
            apply_fold(model, fold, *(state[key].to(device) for key in keys))
    for name, quantizer in activation_quantizers(model).items():
        quantizer.bits = bits[name]
        if f"{name}.scale" in state:
            quantizer.set_parameters(
                *(state[f"{name}.{key}"].to(device) for key in ("scale", "zero_point"))
            )
    for name, layer in quantized_layers(model).items():
        layer.weight_bits = bits[f"{name}.weight"]
        if f"{name}.weight_codes" in state:
            for key in LAYER_BUFFERS:
                if f"{name}.{key}" in state:
                    setattr(layer, key, state[f"{name}.{key}"].to(device))
            if round_weights:
                layer.restore_weight()
    about.not_quantized = [NotQuantized(**v) for v in content["summary"]["not_quantized"]]
    about.signal_noise = {v["name"]: v["sqnr_db"] for v in content["summary"]["layer_sqnr"]}
    check = content["summary"].get("range_check")
    about.range_check = check and RangeCheck(**check)
    return model
