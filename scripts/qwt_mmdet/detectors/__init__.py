"""Detectors: built from an mmdet config and a checkpoint, and run part by part."""
