"""Fit the compensation of a quantized detector."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..archives import add_account
from ..compensation.fit import fit_compensation
from ..compensation.state import save_compensation
from ..config import CompensationSettings, as_plain
from ..files import sha256_file, write_atomically
from ..staleness import source_hash
from .inputs import Inputs, Pathlike


def compensate(
    inputs: Inputs,
    *,
    warmup: Pathlike,
    settings: Mapping[str, Any],
    output: Pathlike,
    blocks: Pathlike,
    activation_cache: Mapping[str, float] | None = None,
) -> None:
    """Fit the compensation of a quantized detector; writes ``output`` (.pth) and ``blocks`` (.csv).

    An interrupted fit goes on after the blocks in ``{output}.unfinished``.

    Args:
        activation_cache: limits {device_gb, memory_gb} of cached activations.
    """
    import pandas as pd

    resolved = CompensationSettings.from_mapping(settings)
    reference = inputs.load()
    model = inputs.load(warmup=warmup)
    loader = inputs.loader(model)
    unfinished = Path(f"{output}.unfinished")
    compensation = fit_compensation(
        model,
        reference,
        loader,
        resolved,
        **(activation_cache or {}),
        resume=unfinished,
        resume_inputs={
            "device": inputs.job.device.partition(":")[0],  # any card can go on
            "code": source_hash("fit_compensation"),
        },
    )
    source = inputs.provenance(warmup=sha256_file(warmup), compensation=as_plain(resolved))
    with write_atomically(blocks) as partial:
        rows = [block.row() for block in compensation.blocks]
        pd.json_normalize(rows, sep="_").to_csv(partial, index=False)
    save_compensation(model, compensation, output, source)
    add_account(output, inputs.job.account())
    unfinished.unlink(missing_ok=True)
