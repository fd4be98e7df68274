"""Sensitivity of layers, and mixed-precision search."""
