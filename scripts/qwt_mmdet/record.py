"""What a detector of ours carries beside its modules: one typed object.

mmdet's own functions also look for ``cfg`` and ``dataset_meta`` on a model; these two stay where mmdet
expects them.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .config import QuantizationSettings
from .errors import QwtError

if TYPE_CHECKING:
    from .quantization.folding import Fold


@dataclass(frozen=True)
class NotQuantized:
    """A module with weights or matrix products that stays in full precision, and why.

    Args:
        multiply_adds_percent: its share in the convolutions and matrix products of all that is in
            scope; None where torch's counter knows none in it (mmcv's own operators).
    """

    name: str
    type: str
    reason: str
    multiply_adds_percent: float | None = None


@dataclass(frozen=True)
class RangeCheck:
    """How ranges generalize that are estimated from half of the calibration images.

    Args:
        images: number of calibration images.
        seen_db, unseen_db: SQNR at the outputs of the quantized scope, with weights in full precision, on images
            of this half and of the other one; None without any error, or of a single image.
    """

    images: int
    seen_db: float | None
    unseen_db: float | None


@dataclass
class Quantization:
    """The record of a quantized detector.

    Attributes:
        settings: of the quantization.
        folds: LayerNorms whose ranges per channel fold into the layers around them.
        not_quantized: modules that stay in full precision.
        sqnr_db: signal-to-quantization-noise ratio in dB of each layer and each operand of attention
            (:func:`.quantization.sqnr.measure_sqnr`), None without any error; empty before calibration.
        range_check: None before calibration.
        fitted: weights and bias of each layer after a sequential refit, before they were rounded; empty unless
            calibration keeps the weights in full precision.
    """

    settings: QuantizationSettings
    folds: list["Fold"] = field(default_factory=list)
    not_quantized: list[NotQuantized] = field(default_factory=list)
    sqnr_db: dict[str, float | None] = field(default_factory=dict)
    range_check: RangeCheck | None = None
    fitted: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    @property
    def folded_layers(self) -> set[str]:
        """Names of the layers that read a folded LayerNorm."""
        return {name for fold in self.folds for name in fold.layers}


@dataclass
class Record:
    """What a detector carries.

    Attributes:
        fingerprint: hashes of its config and of its full-precision weights, by ``model`` and ``weights``.
        quantization: None while it is in full precision.
    """

    fingerprint: dict[str, str] = field(default_factory=dict)
    quantization: Quantization | None = None


def record_of(model: nn.Module) -> Record:
    """The model's record; an empty one is made where there is none."""
    return vars(model).setdefault("qwt_record", Record())


def quantization_of(model: nn.Module) -> Quantization:
    """The record of a quantized model.

    Raises:
        QwtError: it is in full precision.
    """
    found = record_of(model).quantization
    if found is None:
        raise QwtError("This model is not quantized; call quantize_model or load_warmup first.")
    return found
