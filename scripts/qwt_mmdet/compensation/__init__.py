"""Closed-form compensation of the quantization error of backbone blocks (QwT)."""
