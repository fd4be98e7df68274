"""Uniform affine post-training quantization of mmdet detectors."""

from ..detectors import torchvision  # noqa: F401  before any module here imports mmdet.models
