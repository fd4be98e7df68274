"""Properties of a quantization scheme, from its settings."""

from torch import Tensor

from ..config import QuantizationSettings
from .primitives import quantization_parameters
from .ranges import RANGES, WeightDistribution


def range_method(settings: QuantizationSettings) -> str:
    """Estimator of a single clipping range of activations."""
    return "mse" if settings.activation_range == "repq" else settings.activation_range


def folds_norms(settings: QuantizationSettings) -> bool:
    """Whether ranges per channel after LayerNorms are folded into the layers around them."""
    return settings.activation_range == "repq"


def logarithmic_attention(settings: QuantizationSettings) -> bool:
    """Whether attention probabilities get a log-√2 grid."""
    return settings.activation_range == "repq" and not integer_grids(settings)


def integer_grids(settings: QuantizationSettings) -> bool:
    """Whether integer kernels can compute with all grids."""
    return settings.grids != "any"


def symmetric_activations(settings: QuantizationSettings) -> bool:
    """Whether the grids of activations are symmetric around 0, as TensorRT's."""
    return settings.grids == "symmetric"


MOST_BITS_WITH_ZERO_POINTS = 6
"""Most bits of weights whose code minus zero point fits in 7 bits, so that sums of two products fit in 16."""


def symmetric_weights(settings: QuantizationSettings, bits: int) -> bool:
    """Whether the grids of weights are symmetric around 0.

    Integer kernels multiply signed 8-bit weights whose zero point is 0. Codes of few bits minus their zero points are
    such weights.
    """
    return integer_grids(settings) and bits > MOST_BITS_WITH_ZERO_POINTS


def weight_grid(weight: Tensor, settings: QuantizationSettings, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each output channel of a weight [out, …]; [out] each.

    Raises:
        QwtError: there is no such range method.
    """
    symmetric = symmetric_weights(settings, bits)
    channels = WeightDistribution(weight.detach().float().flatten(1), symmetric)
    limits = RANGES.find(settings.weight_range)(channels, bits, settings.percentile)
    return quantization_parameters(*limits, bits, symmetric=symmetric)
