"""What the settings of a quantization stand for."""

from ..config import QuantizationSettings


def range_method(settings: QuantizationSettings) -> str:
    """Estimator of a single clipping range of activations."""
    return "mse" if settings.activation_range == "repq" else settings.activation_range


def folds_norms(settings: QuantizationSettings) -> bool:
    """Whether ranges per channel after LayerNorms are folded into the layers around them."""
    return settings.activation_range == "repq"


def logarithmic_attention(settings: QuantizationSettings) -> bool:
    """Whether attention probabilities get a log-√2 grid."""
    return settings.activation_range == "repq"
