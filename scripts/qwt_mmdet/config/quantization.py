"""Settings of a quantization."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from .section import Flag, Foreign, Nested, Text, section

LEAST_BITS, MOST_BITS = 2, 8
FLOAT_BITS = 32
"""Bits of activations that are not rounded."""

Bits = Annotated[int, Strict(), Field(ge=LEAST_BITS, le=MOST_BITS)]
ActivationBits = Bits | Literal[32]
Scope = Literal["backbone", "backbone+neck", "detector"]
WeightRange = Literal["minmax", "percentile", "mse"] | Foreign
ActivationRange = Literal["minmax", "percentile", "mse", "repq"] | Foreign
Rounding = Literal["nearest", "gptq"] | Foreign
Refit = Literal["none", "sequential"] | Foreign
Grids = Literal["any", "integer", "symmetric"]


@section
class Override:
    """Other bits, or full precision, for the layers whose name matches ``pattern``."""

    pattern: Text
    """Pattern (fnmatch) of module names, such as backbone.stages.3.*"""
    weight_bits: Bits | None = None
    """Bits of these layers' weights."""
    activation_bits: ActivationBits | None = None
    """Bits of these layers' input activations; 32 leaves them in floating point."""
    skip: Flag = False
    """Leave these layers in full precision."""

    @model_validator(mode="after")
    def _bits_or_skip(self) -> "Override":
        if self.skip == (self.weight_bits is not None or self.activation_bits is not None):
            raise ValueError(
                f"{self.pattern!r} must either set weight_bits and/or activation_bits, or skip: true, "
                "not both."
            )
        return self


@section
class QuantizationSettings:
    """Post-training quantization (Nagel et al., arXiv 2106.08295; RepQ-ViT, arXiv 2212.08254).

    Raises:
        QwtError: a value is outside of what is allowed.
    """

    weight_bits: Bits
    """Bits of the weights, with a grid per output channel."""
    activation_bits: ActivationBits
    """Bits of the activations, with a grid per tensor (inputs of convolutions: see `migrate_scales`). 32 leaves them, and
    the image, in floating point (weight-only quantization): files are as small, and as fast as full precision."""
    input_bits: Bits = 8
    """Bits of the first layer's input (the image)."""
    scope: Scope = "backbone"
    """Part of the detector that is quantized."""
    weight_range: WeightRange = "mse"
    """Estimator of the clipping range of weights: `minmax`, `percentile` or `mse` (smallest squared
    error)."""
    activation_range: ActivationRange = "repq"
    """The same for activations, or `repq` (RepQ-ViT). `repq` is `mse` with two changes: after LayerNorms there is
    a range per channel, folded into the layers around; attention probabilities have a log-√2 grid."""
    rounding: Rounding = "gptq"
    """Rounding of weights: `nearest`, or `gptq` (error feedback: the next columns compensate each column's
    error)."""
    percentile: Annotated[float, Strict(), Field(ge=50, lt=100)] = 99.99
    """Two-sided percentile in percent, for the `percentile` estimator."""
    migrate_scales: Flag = True
    """Scale migration: inputs of convolutions may have a scale per channel, folded into the weights, where that
    lowers the expected error of the layer's output (after SmoothQuant, arXiv 2211.10438). Inputs of depthwise
    convolutions always have a scale per channel."""
    bias_correction: Flag = True
    """Correct the shift of each layer's mean output that quantization causes."""
    refit: Refit = "sequential"
    """`none`: each layer is calibrated by itself, on full-precision activations. `sequential`: layers are
    calibrated in running order, on the activations of the quantized layers before. Weights and biases are fitted
    to the full-precision outputs before rounding. This does not slow inference down."""
    refit_weighting: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.5
    """Weight of the detector's scores for positions in a sequential refit. 0: all positions have the same weight.
    1: weights are proportional to the largest class score (times objectness; of a two-stage detector, the score of
    its proposals)."""
    grids: Grids = "any"
    """Allowed grids. `integer`: those that integer kernels support, for fast exported files: weights of 7 and 8 bits
    symmetric around 0, one zero point per tensor of activations, a uniform grid of attention probabilities. `symmetric`:
    those that TensorRT supports, of 8 bits, where activations are symmetric around 0, too. `any`: a zero point per channel,
    and the grids of `activation_range`."""
    overrides: tuple[Annotated[Override, Nested], ...] = ()
    """Exceptions by module name; the last match wins. A pattern that matches nothing is an error."""

    @model_validator(mode="after")
    def _symmetric_has_8_bits(self) -> "QuantizationSettings":
        if self.grids != "symmetric":
            return self
        given = {
            key: getattr(self, key) for key in ("weight_bits", "activation_bits", "input_bits")
        }
        for entry in self.overrides:
            given[f"weight_bits of {entry.pattern}"] = entry.weight_bits
            given[f"activation_bits of {entry.pattern}"] = entry.activation_bits
        other = {key: bits for key, bits in given.items() if bits not in (None, MOST_BITS)}
        if other:
            raise ValueError(
                f"grids: symmetric is for TensorRT, which computes with 8 bits alone, but "
                f"{', '.join(f'{key} is {bits}' for key, bits in other.items())}; take 8, or grids: integer."
            )
        return self

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "QuantizationSettings":
        """Build from a config's dictionary.

        Raises:
            QwtError: a key is unknown or missing, or a value is not allowed.
        """
        return cls(**values)
