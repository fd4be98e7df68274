"""Detectors: built from an mmdet config and a checkpoint, and run part by part."""

from . import torchvision  # noqa: F401  before any module here imports mmdet.models
