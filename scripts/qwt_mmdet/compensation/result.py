"""What a fit finds about each block, in memory and as plain values."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import CompensationSettings
from .kinds import KINDS, Kind

BYTES_PER_PARAMETER = 4
"""Compensation is stored and computed as float32, and so is what a quantized detector does not quantize."""


@dataclass(frozen=True)
class BlockFit:
    """The compensation of one block and what is known about it.

    Errors are mean squared differences per output element to the target, r² is the share of the
    variance of the quantization error that the compensation explains. With ``refit`` they are those of
    the fit that the held-out images judged; the tensors come from the fit to all images after it.

    Attributes:
        kind: the fitted tensors in float32; None where leaving the block alone was best.
        kept: whether the block runs with its compensation.
        decision: ``kept``; or what spoke against it: ``gate``, ``max_cost``, or ``not_finite`` where
            the quantized detector's values or the fit's are NaN or infinite.
        positions: output positions (tokens, pixels) of one image, on average.
        parameters: numbers in the tensors. bytes: of these, as they are stored.
        bytes_percent: of the weights of the quantized backbone.
        multiply_adds: of the compensation for one image, on average.
        multiply_adds_percent: of the backbone's, both for the first calibration image.
        target_power: mean square of what the block's output should be.
    """

    name: str
    kind: Kind | None
    kept: bool
    decision: str
    ridge: float
    solver: str
    positions: float
    parameters: int
    bytes: int
    bytes_percent: float
    multiply_adds: float
    multiply_adds_percent: float
    target_power: float
    fit_error_before: float | None
    fit_error_after: float | None
    fit_r2: float | None
    holdout_error_before: float | None
    holdout_error_after: float | None
    holdout_r2: float | None

    def row(self) -> dict[str, Any]:
        """Plain values without the tensors: a row of blocks.csv."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "kind": self.kind.name if self.kind else "none"}

    def plain(self) -> dict[str, Any]:
        """Plain values and tensors, from which :meth:`from_plain` makes the same again."""
        # Equal strings are one object: pickled files of equal content have equal bytes.
        row = {k: sys.intern(v) if isinstance(v, str) else v for k, v in self.row().items()}
        return {**row, "tensors": self.kind.tensors() if self.kind else {}}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "BlockFit":
        """The inverse of :meth:`plain`."""
        values = dict(values)
        tensors, kind = values.pop("tensors"), values.pop("kind")
        return cls(kind=KINDS[kind](**tensors) if kind in KINDS else None, **values)


@dataclass(frozen=True)
class Compensation:
    """The fitted compensation of a quantized detector: blocks in the order in which they run.

    Attributes:
        backbone_multiply_adds: of the full-precision backbone for the first calibration image.
    """

    settings: CompensationSettings
    blocks: tuple[BlockFit, ...]
    backbone_multiply_adds: int

    def summary(self) -> dict[str, Any]:
        """Counts and costs of the kept blocks, for reports."""
        kept = [block for block in self.blocks if block.kept]
        sums = ("parameters", "bytes", "bytes_percent", "multiply_adds", "multiply_adds_percent")
        return {
            "blocks": len(self.blocks),
            "kept": len(kept),
            **{key: sum(getattr(block, key) for block in kept) for key in sums},
            "backbone_multiply_adds": self.backbone_multiply_adds,
        }
