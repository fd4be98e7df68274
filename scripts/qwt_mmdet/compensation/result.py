"""What a fit finds about each block, in memory and as plain values."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..config import CompensationSettings
from ..errors import registered
from .kinds import KINDS, Kind

BYTES_PER_PARAMETER = 4
"""What a quantized detector does not quantize is stored and computed as float32."""


class Option(NamedTuple):
    """What one form of a block's compensation leaves of the error, and what it costs.

    Errors are those of :class:`BlockFit`, held out where there are held-out images.
    """

    error: float
    bytes_percent: float
    multiply_adds_percent: float


@dataclass(frozen=True)
class BlockError:
    """How far a block's output is from its target; None where that is not known.

    Attributes:
        error_before: mean squared difference per output element without the compensation.
        error_after: the same with it.
        r2: share of the variance of the quantization error that the compensation explains.
    """

    error_before: float | None = None
    error_after: float | None = None
    r2: float | None = None


@dataclass(frozen=True)
class BlockFit:
    """The compensation of one block and what is known about it.

    Attributes:
        kind: the tensors, fitted to all images, in float32 or int8; None where leaving the block alone was
            best.
        trial: the same without the images of the first fold, for the check at the heads; not saved.
        options: all forms that the block could have taken; not saved.
        option: number of the one that it has.
        kept: whether the block runs with its compensation.
        decision: ``kept``; or what spoke against it: ``gate``, ``max_cost``, ``heads``, or ``not_finite``
            where the quantized detector's values or the fit's are NaN or infinite.
        positions: output positions (tokens, pixels) of one image, on average.
        parameters: numbers in the tensors. bytes: of these, as they are stored.
        bytes_percent: of the weights of the quantized backbone.
        multiply_adds: of the compensation for one image, on average.
        multiply_adds_percent: of the backbone's, both for the first calibration image.
        target_power: mean square of what the block's output should be.
        fit: errors on the images of the fit.
        holdout: errors by cross-validation: each image is judged by a fit to the images of other folds.
    """

    name: str
    kind: Kind | None
    trial: Kind | None
    options: tuple[Option, ...]
    option: int
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
    fit: BlockError
    holdout: BlockError

    @property
    def error_before(self) -> float:
        """The error without compensation, which held-out images and those of the fit share."""
        return self.fit.error_before or 0.0

    def row(self) -> dict[str, Any]:
        """Plain values without the tensors."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["trial"], values["options"], values["option"]
        errors = {key: dataclasses.asdict(values[key]) for key in ("fit", "holdout")}
        return {**values, **errors, "kind": self.kind.name if self.kind else "none"}

    def plain(self) -> dict[str, Any]:
        """Plain values and tensors of what was fitted, without what only the fit needs."""
        # Equal strings are one object: pickled files of equal content have equal bytes.
        row = {k: sys.intern(v) if isinstance(v, str) else v for k, v in self.row().items()}
        return {**row, "tensors": self.kind.tensors() if self.kind else {}}

    def unfinished(self) -> dict[str, Any]:
        """The same with what the fit needs."""
        trial = (sys.intern(self.trial.name), self.trial.tensors()) if self.trial else None
        options = [tuple(option) for option in self.options]
        return {**self.plain(), "trial": trial, "options": options, "option": self.option}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "BlockFit":
        """The inverse of :meth:`plain` and of :meth:`unfinished`.

        Raises:
            QwtError: no kind of this name is registered.
        """
        values = {"trial": None, "options": (), "option": 0, **values}
        tensors, kind, trial = (values.pop(key) for key in ("tensors", "kind", "trial"))
        values["options"] = tuple(Option(*option) for option in values["options"])
        values |= {key: BlockError(**values[key]) for key in ("fit", "holdout")}
        return cls(
            kind=None if kind == "none" else registered("kind", kind, KINDS)(**tensors),
            trial=KINDS[trial[0]](**trial[1]) if trial else None,
            **values,
        )


@dataclass(frozen=True)
class Compensation:
    """The fitted compensation of a quantized detector: blocks in the order in which they run.

    Attributes:
        backbone_multiply_adds: of the full-precision backbone for the first calibration image.
        heads: what the check at the heads has found: ``images`` that it looked at, ``before`` and ``after``,
            noise by signal power without and with the compensation. None where there was no check.
    """

    settings: CompensationSettings
    blocks: tuple[BlockFit, ...]
    backbone_multiply_adds: int
    heads: dict[str, float] | None = None

    def summary(self) -> dict[str, Any]:
        """Counts and costs of the kept blocks, for reports."""
        kept = [block for block in self.blocks if block.kept]
        sums = ("parameters", "bytes", "bytes_percent", "multiply_adds", "multiply_adds_percent")
        return {
            "blocks": len(self.blocks),
            "kept": len(kept),
            **{key: sum(getattr(block, key) for block in kept) for key in sums},
            "backbone_multiply_adds": self.backbone_multiply_adds,
            "heads": self.heads,
            "left_out": {
                sys.intern(block.name): sys.intern(block.decision)
                for block in self.blocks
                if not block.kept
            },
        }
