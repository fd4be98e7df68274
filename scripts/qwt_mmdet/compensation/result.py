"""The results of a fit, in memory and as plain values."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..config import CompensationSettings
from .kinds import KINDS, Kind


class Option(NamedTuple):
    """The remaining error of one form of a block's compensation, and its cost.

    The error is that on held-out images if there are any, else that on all images (see :class:`BlockFit`).
    """

    error: float
    bytes_percent: float
    multiply_adds_percent: float


@dataclass(frozen=True)
class BlockError:
    """The error of a block's output; None where it was not measured.

    Attributes:
        error_before: mean squared difference per output element without the compensation.
        error_after: the same with it.
        r2: share of the variance of the quantization error that the compensation explains.
    """

    error_before: float | None = None
    error_after: float | None = None
    r2: float | None = None


@dataclass(frozen=True, kw_only=True)
class BlockFit:
    """The compensation of one block, with its errors and its cost.

    Attributes:
        kind: the tensors, fitted to all images, in float32 or int8; None where no compensation was best.
        trial: the same without the images of the first fold, for the check at the heads; not saved.
        options: all forms of the compensation that were fitted; not saved.
        option: index of the chosen form.
        kept: whether the block runs with its compensation.
        decision: ``kept``, or why it was left out: ``gate``, ``max_cost``, ``heads``, or ``not_finite`` where
            values of the quantized detector or of the fit are NaN or infinite.
        positions: output positions (tokens, pixels) of one image, on average.
        parameters: number of elements of the tensors. bytes: of these, as they are stored.
        bytes_percent: in percent of the quantized backbone's, as ``max_cost`` counts.
        multiply_adds: of the compensation for one image, on average.
        multiply_adds_percent: of the backbone's, both for the first calibration image.
        target_power: mean square of the target of the block's output.
        fit: errors on the images of the fit.
        holdout: errors by cross-validation: on each fold, with a fit to the other folds.
    """

    name: str
    kind: Kind | None = None
    trial: Kind | None = None
    options: tuple[Option, ...] = ()
    option: int = 0
    kept: bool = False
    decision: str
    ridge: float = 0.0
    solver: str = "none"
    positions: float = 0.0
    parameters: int = 0
    bytes: int = 0
    bytes_percent: float = 0
    multiply_adds: float = 0
    multiply_adds_percent: float = 0
    target_power: float = 0.0
    fit: BlockError = BlockError()
    holdout: BlockError = BlockError()

    @property
    def error_before(self) -> float:
        """The error without compensation."""
        return self.fit.error_before or 0.0

    def row(self) -> dict[str, Any]:
        """Plain values without the tensors."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["trial"], values["options"], values["option"]
        errors = {key: dataclasses.asdict(values[key]) for key in ("fit", "holdout")}
        return {**values, **errors, "kind": self.kind.name if self.kind else "none"}

    def plain(self) -> dict[str, Any]:
        """Plain values and tensors, without those that only a running fit needs."""
        # Equal strings are one object: pickled files of equal content have equal bytes.
        row = {k: sys.intern(v) if isinstance(v, str) else v for k, v in self.row().items()}
        return {**row, "tensors": self.kind.tensors() if self.kind else {}}

    def unfinished(self) -> dict[str, Any]:
        """The same with all that a running fit needs."""
        trial = (sys.intern(self.trial.name), self.trial.tensors()) if self.trial else None
        options = [tuple(option) for option in self.options]
        return {**self.plain(), "trial": trial, "options": options, "option": self.option}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "BlockFit":
        """The inverse of :meth:`plain` and of :meth:`unfinished`.

        Raises:
            QwtError: no kind of this name is registered.
        """
        values = {"trial": None, "options": (), **values}
        tensors, kind, trial = (values.pop(key) for key in ("tensors", "kind", "trial"))
        values["kind"] = None if kind == "none" else KINDS.find(kind)(**tensors)
        values["trial"] = KINDS[trial[0]](**trial[1]) if trial else None
        values["options"] = tuple(Option(*option) for option in values["options"])
        return cls(**values | {key: BlockError(**values[key]) for key in ("fit", "holdout")})


@dataclass(frozen=True)
class Compensation:
    """The fitted compensation of a quantized detector: blocks in running order.

    Attributes:
        backbone_multiply_adds: of the full-precision backbone for the first calibration image.
        heads: result of the check at the heads: number of ``images``; ``before`` and ``after``, the relative
            error without and with the compensation. None where there was no check.
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
