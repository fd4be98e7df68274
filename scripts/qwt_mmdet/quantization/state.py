"""Save the results of a calibration (the warmup file), and load them into a full-precision detector."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..archives import REMEDY, WARMUP_FORMAT, load_archive, save_with_summary
from ..config import QuantizationSettings, as_plain
from ..config.quantization import FLOAT_BITS, LEAST_BITS, MOST_BITS
from ..errors import QwtError
from ..record import NotQuantized, RangeCheck, quantization_of, record_of
from .attention import QuantizedAttention
from .convert import activation_quantizers, quantize_model, quantized_layers, quantized_units
from .folding import apply_fold
from .layers import LAYER_BUFFERS, layer_by_name
from .size import detector_bytes, full_precision_bytes

WARMUP_KEYS = ("fingerprint", "settings", "bits", "state", "summary")
"""Keys of a file that :func:`load_warmup` reads."""


def quantizer_state(model: nn.Module) -> dict[str, Tensor]:
    """All buffers that calibration has set (integer codes, scales, zero points), on the CPU."""
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


def _grids(model: nn.Module) -> Iterator[tuple[str, Tensor | None, tuple[int, ...], str, int]]:
    """All tensors that calibration sets, also missing ones: name, tensor, shape, kind of its values, bits."""
    channels, calibrated = {}, set()
    layers = quantized_layers(model)
    folded = [
        fold.layers[0]
        for fold in quantization_of(model).folds
        if all(layers[name].is_calibrated for name in fold.layers)
    ]
    for name, layer in layers.items():
        quantizer, (outputs, inputs) = layer.input_quantizer, layer.weight.shape[:2]
        channels[quantizer] = inputs = inputs * layer.weight_groups
        for key, shape, kind in (
            ("weight_codes", tuple(layer.weight.shape), "code"),
            ("weight_scale", (outputs,), "scale"),
            ("weight_zero_point", (outputs,), "code"),
            ("bias_correction", (outputs,), "number"),
            ("fold_factor", (inputs,), "scale"),
            ("fold_shift", (inputs,), "number"),
        ):
            tensor = getattr(layer, key)
            if tensor is not None:
                calibrated.add(quantizer)
            needed = key.startswith("weight") and layer.is_calibrated
            if tensor is not None or needed or (key.startswith("fold") and name in folded):
                yield f"{name}.{key}", tensor, shape, kind, layer.weight_bits
    for name, quantizer in activation_quantizers(model).items():
        if quantizer.is_calibrated or quantizer in calibrated:
            shape = (1,) if quantizer.channel_axis is None else (channels[quantizer],)
            yield f"{name}.scale", quantizer.scale, shape, "scale", quantizer.bits
            yield f"{name}.zero_point", quantizer.zero_point, shape, "code", quantizer.bits


def grid_fault(model: nn.Module) -> str | None:
    """The first fault of a quantized model's scales, zero points and codes; None without any."""
    grids = list(_grids(model))
    for name, tensor, shape, kind, bits in grids:
        passes = bits == FLOAT_BITS and ".weight" not in name
        if not passes and bits not in range(LEAST_BITS, MOST_BITS + 1):
            return f"{name} has {bits} bits, not {LEAST_BITS} to {MOST_BITS}"
        if tensor is None:
            return f"{name} is missing"
        if tuple(tensor.shape) != shape:
            return f"{name} has the shape {tuple(tensor.shape)}, not {shape}"
        expected, sound = {
            "number": ("a finite number", tensor.isfinite()),
            "scale": ("a positive number", tensor.isfinite() & (tensor > 0)),
            "code": (
                f"a whole number from 0 to {2**bits - 1}",
                (tensor >= 0) & (tensor <= 2**bits - 1) & (tensor == tensor.round()),
            ),
        }[kind]
        if not sound.all():
            return f"{name} holds {tensor[~sound][0].item():g}, which is not {expected}"
    return None if grids else "not one layer is calibrated"


def check_grids(model: nn.Module) -> None:
    """Check that a quantized model is calibrated, with valid scales, zero points and codes.

    Raises:
        QwtError: names the tensor and its fault.
    """
    if fault := grid_fault(model):
        raise QwtError(
            f"This quantized model cannot be used: {fault}; calibrate it first (`calibrate`), on images that "
            "are sound."
        )


def summarize_quantization(model: nn.Module) -> dict[str, Any]:
    """Summary for reports: bytes of all weights before and after, numbers of layers, what is not quantized.

    ``layer_sqnr``: signal-to-quantization-noise ratio in dB.
    """
    about, units = quantization_of(model), quantized_units(model)
    return {
        "baseline_weight_bytes": full_precision_bytes(model),
        "weight_bytes": round(detector_bytes(model)),
        "layers": sum(layer.is_calibrated for layer in quantized_layers(model).values()),
        "attention": sum(isinstance(m, QuantizedAttention) for m in model.modules()),
        "layer_sqnr": [
            {
                "name": name,
                "weight_bits": (unit := units[name.partition(" ")[0]]).weight_bits,
                "activation_bits": unit.activation_bits,
                "sqnr_db": sqnr_db,
            }
            for name, sqnr_db in about.sqnr_db.items()
        ],
        "range_check": about.range_check and dataclasses.asdict(about.range_check),
        "not_quantized": [dataclasses.asdict(entry) for entry in about.not_quantized],
    }


def save_warmup(
    model: nn.Module, path: str | os.PathLike[str], provenance: dict[str, Any] | None = None
) -> None:
    """Save a calibrated model's quantizers and integer weights.

    The file loads with ``torch.load(weights_only=True)``. It holds the settings and a fingerprint of the
    model and of its full-precision weights.

    Raises:
        QwtError: the model is not quantized or not calibrated, or has invalid scales, zero points or codes.
    """
    about = quantization_of(model)
    check_grids(model)
    content = {
        "format": WARMUP_FORMAT,
        "fingerprint": record_of(model).fingerprint,
        "settings": as_plain(about.settings),
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
        settings: those that the file must have; None accepts any.
        round_weights: False keeps the weights (folded, where the file folds them) in full precision,
            as ``full_precision`` needs them.

    Raises:
        QwtError: the file belongs to another model, other weights or other settings (the message names the
            difference), cannot be read, or holds invalid scales, zero points or codes.
    """
    content = load_archive(path, WARMUP_FORMAT, "warmup", WARMUP_KEYS)
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
    bits = content["bits"]
    state = {key: tensor.to(device) for key, tensor in content["state"].items()}
    for name, quantizer in activation_quantizers(model).items():
        quantizer.bits = bits.get(name)
        grid: Any = [state.get(f"{name}.{key}") for key in ("scale", "zero_point")]
        if grid[0] is not None:
            quantizer.set_parameters(*grid)
    for name, layer in quantized_layers(model).items():
        layer.weight_bits = bits.get(f"{name}.weight")
        for key in LAYER_BUFFERS:
            setattr(layer, key, state.get(f"{name}.{key}"))
    if fault := grid_fault(model):
        raise QwtError(f"The warmup file {path} cannot be used: {fault}; {REMEDY}.")
    for fold in about.folds:
        first = layer_by_name(model, fold.layers[0])
        if first.fold_factor is not None and first.fold_shift is not None:
            apply_fold(model, fold, first.fold_factor, first.fold_shift)
    if round_weights:
        for layer in quantized_layers(model).values():
            if layer.is_calibrated:
                layer.restore_weight()
    about.not_quantized = [NotQuantized(**v) for v in content["summary"]["not_quantized"]]
    about.sqnr_db = {v["name"]: v["sqnr_db"] for v in content["summary"]["layer_sqnr"]}
    check = content["summary"].get("range_check")
    about.range_check = check and RangeCheck(**check)
    return model
