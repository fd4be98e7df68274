"""Uniform affine post-training quantization of mmdet detectors."""

from ..imports import import_mmdet

import_mmdet()  # before a module here does
