"""Activation replay: running a detector in steps, with cached activations."""
