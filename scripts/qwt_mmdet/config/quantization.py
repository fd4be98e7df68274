"""How a detector is quantized: the bit targets of the configuration."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, model_validator

from .section import Flag, Foreign, Nested, Text, section

LEAST_BITS, MOST_BITS = 2, 8

Bits = Annotated[int, Strict(), Field(ge=LEAST_BITS, le=MOST_BITS)]
Scope = Literal["backbone", "backbone+neck", "detector"]
WeightRange = Literal["minmax", "percentile", "mse"] | Foreign
ActivationRange = Literal["minmax", "percentile", "mse", "repq"] | Foreign
Rounding = Literal["nearest", "gptq"] | Foreign
Refit = Literal["none", "sequential"]
Grids = Literal["any", "integer"]


@section
class Override:
    """Other bit widths for the layers whose name matches ``pattern``, or full precision."""

    pattern: Text
    """Pattern (fnmatch) of module names, such as backbone.stages.3.*"""
    weight_bits: Bits | None = None
    """Bits of these layers' weights."""
    activation_bits: Bits | None = None
    """Bits of these layers' input activations."""
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
    """Bits of the weights, with a grid for each output channel."""
    activation_bits: Bits
    """Bits of the activations, with a grid for each tensor (inputs of convolutions: see
    `migrate_scales`)."""
    input_bits: Bits = 8
    """Bits of the activations that enter the first layer (the image)."""
    scope: Scope = "backbone"
    """Part of the detector that is quantized."""
    weight_range: WeightRange = "mse"
    """Estimator of the clipping range of weights: `minmax`, `percentile` or `mse` (smallest squared
    error)."""
    activation_range: ActivationRange = "repq"
    """The same for activations, or `repq` (RepQ-ViT): `mse`, with a range per channel after each LayerNorm
    that is folded into the layers around it, and a log-√2 grid for attention probabilities. In a network
    without LayerNorm and attention it is `mse`."""
    rounding: Rounding = "gptq"
    """Rounding of weights: `nearest`, or `gptq`, which spreads each column's error over the next ones."""
    percentile: Annotated[float, Strict(), Field(ge=50, lt=100)] = 99.99
    """Two-sided percentile in percent, for the `percentile` estimator."""
    migrate_scales: Flag = True
    """Let inputs of convolutions have a scale per channel, whose differences move into the weights, as far
    as that lowers the expected error of the layer's output (after SmoothQuant, arXiv 2211.10438).
    Depthwise convolutions always have one."""
    bias_correction: Flag = True
    """Take back the shift of each layer's mean output that quantization causes."""
    refit: Refit = "none"
    """`none`: each layer is calibrated for itself, on full-precision activations. `sequential`: layer by layer,
    in running order, on the activations of the layers that are quantized already. Weights and biases are
    fitted to bring back the full-precision outputs before they are rounded, at no cost when the model runs."""
    refit_weighting: Annotated[float, Strict(), Field(ge=0, le=1)] = 0.0
    """How much positions where the full-precision detector sees objects count more in a sequential refit. 0:
    all count the same. 1: in proportion to the largest class score there (times objectness; of a two-stage
    detector the score of its proposals)."""
    grids: Grids = "any"
    """Grids to choose from. `integer`: those that integer kernels compute with, for an exported file that is
    to be fast. Weights are symmetric around 0, a tensor of activations has one zero point, and attention
    probabilities have a uniform grid. `any`: zero points for each channel, and what `activation_range`
    says."""
    overrides: tuple[Annotated[Override, Nested], ...] = ()
    """Exceptions by module name; the last match wins. A pattern that matches nothing is an error."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "QuantizationSettings":
        """Build from a config's dictionary.

        Raises:
            QwtError: a key is unknown or missing, or a value is not allowed.
        """
        return cls(**values)
