"""Rank the layers of a quantized detector by their sensitivity."""

import csv
import dataclasses
import logging
from itertools import islice

from ..files import write_atomically
from ..quantization.state import load_warmup
from ..search.sensitivity import rank_layers
from .inputs import Inputs, Pathlike

logger = logging.getLogger(__name__)


def rank(inputs: Inputs, *, warmup: Pathlike, images: int, table: Pathlike) -> None:
    """Rank a quantized detector's layers; write ``table`` (.csv).

    Args:
        images: number of calibration images to use, the first ones.
    """
    model = inputs.load()
    load_warmup(model, warmup, round_weights=False)
    loader = dataclasses.replace(inputs, batch_size=1).loader(model)
    ranked = rank_layers(model, islice(loader, images))
    with (
        write_atomically(table) as partial,
        open(partial, "w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("layer", "sqnr_db", "weights", "weight_bits", "activation_bits"))
        writer.writerows(
            (entry.name, entry.sqnr_db, entry.weights, entry.weight_bits, entry.activation_bits)
            for entry in ranked
        )
    logger.info("Most sensitive layers, each quantized alone:")
    for entry in ranked[:5]:
        if entry.sqnr_db is not None:
            logger.info("  %s: %.1f dB at the heads", entry.name, entry.sqnr_db)
