"""Detectors: built from an mmdet config and a checkpoint, and run as far as needed."""

from .. import imports  # noqa: F401  before any module here imports mmdet.models
