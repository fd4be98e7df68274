"""In how many shards an evaluation was done. What is done stays, although other input files would run it again."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..staleness import source_hash
from .files import Variant, without_repeat


def shards_note(config: Mapping[str, Any], variant: Variant) -> tuple[str, str]:
    """Where it is noted in how many shards an evaluation was run, and a hash of what that holds for.

    Args:
        config: resolved config of the workflow.
    """
    entry = config["models"][variant.model]
    quantization, compensation = variant.quantization, variant.compensation
    decides = [
        entry,
        config["datasets"][entry["dataset"]],
        quantization and config["quantization"][without_repeat(quantization)],
        compensation and config["compensation"][compensation],
        config["seed"],
        config["evaluation"]["batch_size"],
        source_hash("evaluate_shard"),
    ]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    return f"{variant.evaluated}/shards.json", digest


def noted_shards(config: Mapping[str, Any], variant: Variant) -> int | None:
    """In how many shards an evaluation was run, if nothing else that decides it has changed since."""
    path, current = shards_note(config, variant)
    try:
        note = json.loads(Path(path).read_text(encoding="utf-8"))
        return int(note["shards"]) if note["of"] == current else None
    except (OSError, ValueError, TypeError, KeyError):
        return None  # there is none, or it is cut off
