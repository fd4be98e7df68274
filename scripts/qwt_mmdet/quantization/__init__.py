"""Uniform affine post-training quantization of mmdet detectors."""
