"""Post-training quantization of MMDetection detectors with closed-form compensation (QwT)."""

__version__ = "0.1.0"
