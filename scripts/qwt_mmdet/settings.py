"""Settings of a quantization and of a compensation: checked once, then never changed."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import QwtError

SCOPES = ("backbone", "backbone+neck", "detector")
WEIGHT_RANGES = ("minmax", "percentile", "mse")
ACTIVATION_RANGES = (*WEIGHT_RANGES, "repq")
ROUNDINGS = ("nearest", "gptq")
COMPENSATION_KINDS = ("linear", "lowrank", "affine", "bias", "auto")
COMPENSATION_TARGETS = ("block", "reference")
GATES = ("holdout", "fit", "none")

T = TypeVar("T")


def _check_choice(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise QwtError(f"{key} is {value!r}; choose one of {', '.join(allowed)}.")


def _check_bits(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value <= 8:
        raise QwtError(f"{key} is {value!r}; bit widths are whole numbers from 2 to 8.")


def _check_number(key: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
        raise QwtError(f"{key} is {value!r}; it must be a number from {low} to below {high}.")


def _check_bool(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise QwtError(f"{key} is {value!r}; it is true or false.")


def _from_mapping(cls: type[T], values: Mapping[str, Any]) -> T:
    known = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            raise QwtError(
                f"{key!r} is not a setting of {cls.__name__}; known: {', '.join(known)}."
            )
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
    for key in required:
        if key not in values:
            raise QwtError(f"{cls.__name__} needs {key!r}.")
    return cls(**values)


@dataclass(frozen=True)
class Override:
    """Other bit widths for the layers whose name matches ``pattern`` (fnmatch), or none at all."""

    pattern: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    skip: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise QwtError(
                f"overrides: pattern is {self.pattern!r}; it must be a module name pattern."
            )
        where = f"overrides[{self.pattern}]"
        for key in ("weight_bits", "activation_bits"):
            if getattr(self, key) is not None:
                _check_bits(f"{where}.{key}", getattr(self, key))
        has_bits = self.weight_bits is not None or self.activation_bits is not None
        if self.skip == has_bits:
            raise QwtError(
                f"{where} must either set weight_bits and/or activation_bits, or skip: true, not both."
            )


@dataclass(frozen=True)
class QuantizationSettings:
    """Post-training quantization (Nagel et al., arXiv 2106.08295; RepQ-ViT, arXiv 2212.08254).

    Args:
        weight_bits, activation_bits: 2 to 8.
        input_bits: bits of the activations that enter the first layer (the image).
        scope: which part of the detector is quantized.
        weight_range, activation_range: estimator of the clipping range. ``repq`` is ``mse`` with a
            range per channel after each LayerNorm, folded into the layers around it, and a log-√2
            grid for attention probabilities; where there is neither, it is ``mse``.
        rounding: of the weights; ``gptq`` spreads each column's error over the next ones.
        percentile: two-sided percentile in percent for the ``percentile`` estimator.
        migrate_scales: inputs of convolutions may have a scale per channel, whose differences move into
            the weights, as far as that lowers the expected error of the layer's output (after
            SmoothQuant, arXiv 2211.10438).
        bias_correction: take back the shift of each layer's mean output that weight rounding causes.
        overrides: exceptions by module name; the last match wins.

    Raises:
        QwtError: a value is outside of what is allowed.
    """

    weight_bits: int
    activation_bits: int
    input_bits: int = 8
    scope: str = "backbone"
    weight_range: str = "mse"
    activation_range: str = "repq"
    rounding: str = "gptq"
    percentile: float = 99.99
    migrate_scales: bool = True
    bias_correction: bool = True
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        for key in ("weight_bits", "activation_bits", "input_bits"):
            _check_bits(key, getattr(self, key))
        _check_choice("scope", self.scope, SCOPES)
        _check_choice("weight_range", self.weight_range, WEIGHT_RANGES)
        _check_choice("activation_range", self.activation_range, ACTIVATION_RANGES)
        _check_choice("rounding", self.rounding, ROUNDINGS)
        _check_number("percentile", self.percentile, 50, 100)
        for key in ("migrate_scales", "bias_correction"):
            _check_bool(key, getattr(self, key))

    @property
    def range_method(self) -> str:
        """Estimator of a single clipping range of activations."""
        return self.activation_range.replace("repq", "mse")

    @property
    def folds_norms(self) -> bool:
        """Whether ranges per channel after LayerNorms are folded into the layers around them."""
        return self.activation_range == "repq"

    @property
    def logarithmic_attention(self) -> bool:
        """Whether attention probabilities get a log-√2 grid."""
        return self.activation_range == "repq"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "QuantizationSettings":
        """Build from a config's dictionary; unknown or missing keys raise QwtError."""
        overrides = tuple(_from_mapping(Override, entry) for entry in values.get("overrides", ()))
        return _from_mapping(cls, {**values, "overrides": overrides})


@dataclass(frozen=True)
class MaxCost:
    """Most that compensation may cost, in percent of the backbone.

    Args:
        multiply_adds: of the full-precision backbone's multiply-adds.
        bytes: of the quantized backbone's weights (quantized ones at their bits, others as float16);
            compensation counts as float16.
    """

    multiply_adds: float | None = None
    bytes: float | None = None

    def __post_init__(self) -> None:
        if self.multiply_adds is None and self.bytes is None:
            raise QwtError("max_cost is empty; give multiply_adds, bytes or both, in percent.")
        for key in ("multiply_adds", "bytes"):
            if getattr(self, key) is not None:
                _check_number(f"max_cost.{key}", getattr(self, key), 0, float("inf"))


@dataclass(frozen=True)
class CompensationSettings:
    """Closed-form compensation of each block's quantization error (QwT, arXiv 2411.13918).

    Args:
        kind: form of the compensation. ``linear`` adds ``x W + b`` to a block with input x (QwT),
            ``lowrank`` does so with a W of rank ``rank``, ``affine`` scales and shifts each channel
            of the block's output (QwT-v2, arXiv 2505.20932), ``bias`` only shifts it. ``auto`` takes
            for each block the simplest of none, bias, affine and linear whose held-out error cannot
            be told from the smallest.
        rank: of ``lowrank``.
        target: ``reference`` fits the full-precision network's output at the block for the same
            image, and so also repairs what earlier blocks left; ``block`` fits the block's own
            full-precision output for the same input (the paper).
        ridge: strength relative to the mean of the diagonal of the centred X'X, or ``auto``: the
            value with the smallest error on the held-out images.
        gate: ``holdout`` keeps a block's compensation only where it lowers the held-out error,
            ``fit`` where r2 on the fitting images is above 0 (the paper), ``none`` always.
        holdout_fraction: part of the calibration images that is kept out of the fit.
        refit: once kind, ridge and gate are decided, fit what was kept to all images, held-out ones
            included, for the next blocks and the result.
        blocks: module name patterns (fnmatch); empty means the blocks registered for the backbone
            and, where the neck is quantized, for the neck, or else repeated modules; the log names them.
        downsampling: also the layers between stages (patch merging, downsampling convolutions) that
            are no blocks; for registered blocks.
        max_cost: keep only the blocks with the most error reduction per cost, within these limits.

    Raises:
        QwtError: a value is outside of what is allowed.
    """

    kind: str = "linear"
    rank: int = 16
    target: str = "reference"
    ridge: float | str = "auto"
    gate: str = "holdout"
    holdout_fraction: float = 0.2
    refit: bool = True
    blocks: tuple[str, ...] = ()
    downsampling: bool = False
    max_cost: MaxCost | None = None

    def __post_init__(self) -> None:
        _check_choice("kind", self.kind, COMPENSATION_KINDS)
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise QwtError(f"rank is {self.rank!r}; it must be a whole number from 1.")
        _check_choice("target", self.target, COMPENSATION_TARGETS)
        _check_choice("gate", self.gate, GATES)
        if self.ridge != "auto":
            _check_number("ridge", self.ridge, 0, float("inf"))
        _check_number("holdout_fraction", self.holdout_fraction, 0, 1)
        for key in ("refit", "downsampling"):
            _check_bool(key, getattr(self, key))
        needs_holdout = self.gate == "holdout" or self.ridge == "auto" or self.kind == "auto"
        if needs_holdout and self.holdout_fraction == 0:
            raise QwtError(
                "holdout_fraction is 0, but gate: holdout, ridge: auto and kind: auto need held-out "
                "images; set holdout_fraction above 0, or gate: fit, a number for ridge and another "
                "kind."
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "CompensationSettings":
        """Build from a config's dictionary; unknown or missing keys raise QwtError."""
        limits = values.get("max_cost")
        return _from_mapping(
            cls,
            {
                **values,
                "blocks": tuple(values.get("blocks", ())),
                "max_cost": None if limits is None else _from_mapping(MaxCost, limits),
            },
        )


def settings_to_plain(settings: Any) -> dict[str, Any]:
    """A settings dataclass as dictionaries and lists (what a config holds)."""
    plain = dataclasses.asdict(settings)
    return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}


def settings_to_config(settings: QuantizationSettings) -> dict[str, Any]:
    """The settings as a config entry: what equals its default is left out."""

    def short(entry: Any) -> dict[str, Any]:
        fields = {field.name: field.default for field in dataclasses.fields(entry)}
        return {k: v for k, v in vars(entry).items() if k not in fields or v != fields[k]}

    entry = short(settings)
    if settings.overrides:
        entry["overrides"] = [short(override) for override in settings.overrides]
    return entry
