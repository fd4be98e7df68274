"""Fingerprints: short hashes that tell whether two files belong together."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Hash of the names, shapes, types and values of a state dict (sha256, hexadecimal)."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        raw = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor
        digest.update(np.ascontiguousarray(raw.numpy()).data)
    return digest.hexdigest()


def settings_fingerprint(settings: Any) -> str:
    """Hash of a JSON-like value, independent of the order of its keys (sha256, hexadecimal)."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
