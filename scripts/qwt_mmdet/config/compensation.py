"""Settings of the compensation of blocks' quantization errors."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from .section import Flag, Foreign, Nested, Number, Text, section

Kind = Literal["linear", "lowrank", "affine", "bias", "auto"] | Foreign
Target = Literal["block", "reference"]
Gate = Literal["holdout", "fit", "none"]


@section
class MaxCost:
    """Largest cost of the compensation, in percent of the backbone."""

    multiply_adds: Number | None = None
    """Percent of the full-precision backbone's multiply-adds."""
    bytes: Number | None = None
    """Percent of the bytes of the quantized backbone's weights (quantized ones at their bits, others as float32,
    without scales and zero points). The compensation counts as it is stored: W with `bits`, all else as float32."""

    @model_validator(mode="after")
    def _not_empty(self) -> "MaxCost":
        if self.multiply_adds is None and self.bytes is None:
            raise ValueError("max_cost is empty; give multiply_adds, bytes or both, in percent.")
        return self


@section
class CompensationSettings:
    """Closed-form compensation of each block's quantization error (QwT, arXiv 2411.13918).

    Raises:
        QwtError: a value is outside of what is allowed.
    """

    kind: Kind = "linear"
    """Kind of the compensation. `linear` adds `x W + b` to a block with input x (QwT). `lowrank` does the same
    with a W of rank `rank`. `affine` scales and shifts each channel of the block's output (QwT-v2, arXiv
    2505.20932). `bias` only shifts it. `auto` chooses for each block none, bias, affine, a low-rank W or a
    full-rank W, so that all blocks together remove the most error on held-out images within `max_cost`."""
    rank: Annotated[int, Strict(), Field(ge=1, le=100_000)] = 16
    """Rank of W where the kind is `lowrank`."""
    bits: Literal[8, 32] = 8
    """Bits of W. 8: integers with a scale per column, and 8-bit inputs of W. 32: floating point (the paper)."""
    target: Target = "reference"
    """Target of a block's output. `reference`: the full-precision network's output at this block for the same
    image, so that errors of earlier blocks are corrected too. `block`: the block's full-precision output for the
    same input (the paper)."""
    ridge: Number | Literal["auto"] = "auto"
    """Ridge strength relative to the mean of the diagonal of the centred X'X. `auto` takes the value with
    the smallest error on held-out calibration images."""
    gate: Gate = "holdout"
    """Condition for keeping a block's compensation: it lowers the held-out error (`holdout`), r² on the fitted
    images is above 0 (`fit`, the paper), or none (`none`). With `holdout`, the whole compensation must also lower
    the relative error at the detector's heads on held-out images. Otherwise blocks are left out, from the last
    one on, until it does."""
    holdout_fraction: Annotated[float, Strict(), Field(ge=0, le=0.5)] = 0.2
    """Part of the calibration images in each fold of the cross-validation. 0.2: five folds; errors on a fold are
    those of a fit to the other four. The final fit is on all images. 0: no held-out images."""
    blocks: tuple[Text, ...] = ()
    """Module name patterns (fnmatch) of the blocks. Omitted: the blocks of the backbone and, if it is quantized,
    of the neck."""
    downsampling: Flag = False
    """Compensate also the layers between stages: patch merging, downsampling convolutions."""
    max_cost: Annotated[MaxCost, Nested] | None = None
    """Largest cost of the compensation. The blocks with the largest error reduction per cost are kept, and
    fitted again without the others. Omitted: no limit; for `kind: auto`, 5 % of the bytes and 3 % of the
    multiply-adds."""

    @model_validator(mode="after")
    def _has_held_out_images(self) -> "CompensationSettings":
        needed = self.gate == "holdout" or self.ridge == "auto" or self.kind == "auto"
        if needed and self.holdout_fraction == 0:
            raise ValueError(
                "holdout_fraction is 0, but gate: holdout, ridge: auto and kind: auto need held-out "
                "images; set holdout_fraction above 0, or gate: fit, a number for ridge and another "
                "kind."
            )
        return self

    @property
    def budget(self) -> MaxCost | None:
        """Largest cost of the compensation; None without a limit."""
        if self.kind == "auto" and self.max_cost is None:
            return MaxCost(multiply_adds=3.0, bytes=5.0)
        return self.max_cost

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "CompensationSettings":
        """Build from a config's dictionary.

        Raises:
            QwtError: a key is unknown or missing, or a value is not allowed.
        """
        return cls(**values)


PRESETS: Mapping[str, CompensationSettings] = {
    "qwt": CompensationSettings(),
    "paper": CompensationSettings(
        target="block", ridge=0.0, bits=32, gate="fit", holdout_fraction=0.0
    ),
    "affine": CompensationSettings(kind="affine"),
    "lowrank": CompensationSettings(kind="lowrank"),
    "bias": CompensationSettings(kind="bias"),
    "auto": CompensationSettings(kind="auto"),
}
"""Presets of compensation, by name; ``paper`` is QwT as published, where weights are not refit."""
