"""Rank the layers of a quantized detector by their sensitivity."""

import dataclasses
import logging
from itertools import islice

import yaml

from ..config import as_entry
from ..files import write_atomically
from ..quantization.state import load_warmup
from ..record import quantization_of
from ..search.sensitivity import choose_bits, mixed_precision, rank_layers
from .inputs import Inputs, Pathlike

logger = logging.getLogger(__name__)


def rank(
    inputs: Inputs,
    *,
    warmup: Pathlike,
    name: str,
    images: int,
    average_bits: float | None,
    table: Pathlike,
    suggestion: Pathlike,
) -> None:
    """Rank a quantized detector's layers; write ``table`` (.csv) and ``suggestion`` (.yaml).

    Args:
        name: of the quantization; the suggested entry is called ``{name}-mixed``.
        images: number of calibration images to use, the first ones.
        average_bits: bits per weight of the suggestion; None: as many as now.
    """
    import pandas as pd  # takes a while, and most steps write no table

    model = inputs.load()
    load_warmup(model, warmup, round_weights=False)
    loader = dataclasses.replace(inputs, batch_size=1).loader(model)
    images = min(images, len(loader))
    ranked = rank_layers(model, islice(loader, images))
    bits = {e.name: e.weight_bits for e in ranked if e.weight_bits is not None and e.relative_error}
    layers = [entry for entry in ranked if entry.name in bits]
    weights = sum(entry.weights for entry in layers)
    if average_bits is None:
        average_bits = sum(entry.weights * bits[entry.name] for entry in layers) / weights
    chosen = choose_bits(ranked, average_bits)
    rows = [
        {
            "layer": entry.name,
            "sqnr_db": entry.sqnr_db,
            "weights": entry.weights,
            "weight_bits": entry.weight_bits,
            "activation_bits": entry.activation_bits,
            "suggested_weight_bits": chosen.get(entry.name),
        }
        for entry in ranked
    ]
    settings = mixed_precision(quantization_of(model).settings, ranked, chosen)
    reached = sum(entry.weights * chosen[entry.name] for entry in layers) / weights
    note = (
        f"# Suggested from {images} calibration images: {reached:.2f} bits per weight on average.\n"
        "# Put this entry under `quantization:`.\n"
    )
    with write_atomically(table) as partial:
        pd.DataFrame(rows).astype(
            {"suggested_weight_bits": "Int64", "weight_bits": "Int64"}
        ).to_csv(partial, index=False)
    with write_atomically(suggestion) as partial:
        suggested = {f"{name}-mixed": as_entry(settings)}
        partial.write_text(note + yaml.safe_dump(suggested, sort_keys=False), encoding="utf-8")
    logger.info("Most sensitive layers, each quantized alone:")
    for entry in ranked[:5]:
        if entry.sqnr_db is not None:
            logger.info("  %s: %.1f dB at the heads", entry.name, entry.sqnr_db)
