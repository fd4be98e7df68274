"""Post-training quantization of MMDetection detectors with closed-form compensation (QwT)."""

import os
from importlib import import_module
from typing import Any

if os.name != "posix":  # fcntl, resource, os.getuid and more are missing
    raise ImportError(
        "qwt-mmdet runs on Linux and, untested, on macOS; on Windows, install it inside of WSL 2 "
        "(https://learn.microsoft.com/windows/wsl/install)."
    )

__version__ = "0.1.0"

_HOMES = {
    "CompensationSettings": "config",
    "QuantizationSettings": "config",
    "QwtError": "errors",
    "apply_compensation": "compensation.state",
    "calibrate": "quantization.calibrate",
    "evaluate_detector": "steps.evaluate",
    "export_onnx": "export.onnx_file",
    "fit_compensation": "compensation.fit",
    "load_compensation": "compensation.state",
    "load_detector": "detectors.build",
    "load_exported": "export.loading",
    "load_warmup": "quantization.state",
    "make_loader": "data.loaders",
    "quantize_model": "quantization.convert",
    "save_compensation": "compensation.state",
    "save_warmup": "quantization.state",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import what is asked for; Snakemake reads this package often and needs neither torch nor mmdet."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value
