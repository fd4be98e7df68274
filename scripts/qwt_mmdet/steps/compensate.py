"""Fit the compensation of a quantized detector."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..compensation.fit import fit_compensation
from ..compensation.state import save_compensation
from ..config import CompensationSettings, as_plain
from ..data.loaders import make_loader
from ..detectors.build import load_detector
from ..files import sha256_file, write_atomically
from ..staleness import source_hash
from .load import load_quantized
from .provenance import Pathlike, provenance


def compensate(
    *,
    config: str,
    checkpoint: Pathlike,
    config_options: Mapping[str, Any] | None,
    annotations: Pathlike,
    warmup: Pathlike,
    settings: Mapping[str, Any],
    output: Pathlike,
    blocks: Pathlike,
    device: str,
    batch_size: int,
    workers: int,
    seed: int,
    activation_cache: Mapping[str, float] | None = None,
) -> None:
    """Fit the compensation of a quantized detector; writes ``output`` (.pth) and ``blocks`` (.csv).

    A fit that was interrupted goes on after its last finished block; until the end these lie in
    ``{output}.unfinished``.

    Args:
        activation_cache: {device_gb, memory_gb}, limits beyond which activations wait elsewhere.
    """
    import pandas as pd

    resolved = CompensationSettings.from_mapping(settings)
    reference = load_detector(config, checkpoint, device=device, config_options=config_options)
    model = load_quantized(
        config, checkpoint, warmup=warmup, device=device, config_options=config_options
    )
    loader = make_loader(model.cfg, annotations, batch_size=batch_size, workers=workers)
    unfinished = Path(f"{output}.unfinished")
    compensation = fit_compensation(
        model,
        reference,
        loader,
        resolved,
        **(activation_cache or {}),
        resume=unfinished,
        resume_inputs={"device": device, "code": source_hash("fit_compensation")},
    )
    source = provenance(
        checkpoint=checkpoint,
        annotations=annotations,
        device=device,
        seed=seed,
        config=config,
        config_options=dict(config_options or {}),
        warmup=sha256_file(warmup),
        compensation=as_plain(resolved),
    )
    with write_atomically(blocks) as partial:
        rows = [block.row() for block in compensation.blocks]
        pd.DataFrame(rows).to_csv(partial, index=False)
    save_compensation(model, compensation, output, source)
    unfinished.unlink(missing_ok=True)
