"""Range estimation: from data to clipping ranges.

Activations are counted image by image in a histogram. Its bin width is a power of two, and its bin edges are
multiples of it. When a larger value arrives, neighbouring bins are merged. This is exact: the histogram of
all images does not depend on their order or batches.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import QwtError, Registry
from .primitives import fake_quantize, fake_quantize_log_sqrt2, quantization_parameters

BINS = 8192
CHANNEL_BINS = 2048
CHUNK = 2**18
"""Elements that are counted at a time."""
TRIED = {"cpu": 2**17, "cuda": 2**22}
"""Products of values and grids that a search for ranges rounds at a time; on the CPU they fit its cache."""
COARSE_FRACTIONS = torch.tensor([10 ** (-step / 8) for step in range(1, 17)])
FINE_FRACTIONS = torch.tensor([10 ** (step / 40) for step in (-4, -3, -2, -1, 1, 2, 3, 4)])
"""Fractions of the full range that the search for the smallest squared error tries."""
_SMALLEST_EXPONENT = -120


class Distribution(Protocol):
    """The values that ranges are estimated from: of each channel of an activation or of a weight.

    Attributes:
        symmetric: whether the grid is symmetric (see :func:`.primitives.quantization_parameters`).
    """

    @property
    def symmetric(self) -> bool: ...

    @property
    def low(self) -> Tensor:
        """The smallest value of each channel, [channels]."""

    @property
    def high(self) -> Tensor:
        """The largest value of each channel, [channels]."""

    def weighted_values(self) -> tuple[Tensor, Tensor | None]:
        """Values [channels, n] and their counts [channels, n]; None: each value occurs once."""

    def percentiles(self, percentile: float) -> tuple[Tensor, Tensor]:
        """The (100 − percentile)-th and the ``percentile``-th percentile, [channels] each."""


RangeMethod = Callable[[Distribution, int, float], tuple[Tensor, Tensor]]
"""Takes a distribution, bits and the percentile of the settings; returns low and high, [channels]."""

RANGES: Registry[RangeMethod] = Registry("The range method")
register_range = RANGES.register
"""Decorator: the function estimates ranges under a name."""


class RangeObserver:
    """Streaming, mergeable histogram of a tensor, or of each of its channels.

    Memory is fixed: ``BINS`` counts per tensor or ``CHANNEL_BINS`` per channel. The width of a bin is at most
    1/1024 (per channel: 1/512) of the largest magnitude. This bounds the error of every percentile; minimum
    and maximum are exact.

    Args:
        name: of the layer, for error messages.
        channel_axis: axis with ranges of its own, or None for one range per tensor.
        symmetric: whether the grid is symmetric.
    """

    def __init__(
        self, name: str, channel_axis: int | None = None, *, symmetric: bool = False
    ) -> None:
        self.name = name
        self.symmetric = symmetric
        self.channel_axis = channel_axis
        self.bins = BINS if channel_axis is None else CHANNEL_BINS
        # There are no channels before the first tensor has come.
        self.counts = torch.empty(0, self.bins, dtype=torch.int64)  # [channels, bins]
        self.exponent = torch.empty(0, dtype=torch.int64)  # [channels]; bin width is 2^exponent
        self.low = torch.empty(0)  # [channels]
        self.high = torch.empty(0)

    @property
    def is_empty(self) -> bool:
        """Whether no tensor with an element was seen."""
        return len(self.counts) == 0

    def update(self, x: Tensor) -> None:
        """Add a tensor of any shape (empty ones change nothing).

        Raises:
            QwtError: a value is NaN or infinite.
        """
        if x.numel() == 0:
            return
        x = x.detach().float()
        rows = (
            x.reshape(1, -1)
            if self.channel_axis is None
            else x.movedim(self.channel_axis, 0).reshape(x.shape[self.channel_axis], -1)
        )
        if len(rows) > 1:  # two passes are much faster than aminmax where channels come last
            low, high = rows.amin(1), rows.amax(1)
        else:  # over all of a tensor much faster than over the one row of a matrix
            low, high = map(torch.atleast_1d, rows.aminmax())
        largest = torch.maximum(low.abs(), high.abs())  # NaN if one of them is
        if not torch.isfinite(largest).all():
            raise QwtError(
                f"The input of layer {self.name} holds NaN or infinite values during calibration; "
                "check that the checkpoint is sound and that the full-precision model evaluates."
            )
        # frexp: largest = mantissa · 2^e with mantissa < 1, so every |x| < 2^e fits half the bins.
        _, exponent = torch.frexp(largest)
        exponent = exponent.long() - (self.bins // 2).bit_length() + 1
        exponent = torch.where(largest > 0, exponent, _SMALLEST_EXPONENT).clamp(_SMALLEST_EXPONENT)
        if self.is_empty:
            self.counts = torch.zeros(len(rows), self.bins, dtype=torch.int64, device=rows.device)
            self.exponent, self.low, self.high = exponent, low, high
        else:
            self._coarsen(torch.maximum(self.exponent, exponent))
            self.low = torch.minimum(self.low, low)
            self.high = torch.maximum(self.high, high)
        inverse_width = _power_of_two(-self.exponent, torch.float32)[:, None]
        # Every |x| is below half the bins, in units of a bin. Small chunks stay in the processor's cache.
        channels, bins = self.counts.shape
        kind = torch.int16 if channels == 1 else torch.int32
        zero = torch.arange(channels, device=rows.device, dtype=kind)[:, None] * bins + bins // 2
        for chunk in rows.split(max(CHUNK // channels, bins), dim=1):
            index = (chunk * inverse_width).floor_().to(kind).add_(zero)
            # In the order in which they lie in memory: any order counts the same.
            index = index if index.is_contiguous() else index.T
            counts = torch.bincount(index.flatten(), minlength=channels * bins)
            self.counts += counts.view_as(self.counts)

    def merge(self, other: "RangeObserver") -> None:
        """Add the histogram of ``other``; the result is the same as of one observer of all tensors."""
        if other.is_empty:
            return
        if self.is_empty:
            for key in ("counts", "exponent", "low", "high"):
                setattr(self, key, getattr(other, key).clone())
            return
        exponent = torch.maximum(self.exponent, other.exponent)
        other = copy.deepcopy(other)
        for observer in (self, other):
            observer._coarsen(exponent)
        self.counts += other.counts
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)

    def pooled(self) -> "RangeObserver":
        """The histogram of all channels together, with bins as wide as the widest of a channel."""
        whole = copy.deepcopy(self)
        whole._coarsen(self.exponent.max().expand_as(self.exponent))
        whole.channel_axis = None
        whole.counts, whole.exponent = whole.counts.sum(0, keepdim=True), whole.exponent[:1]
        whole.low, whole.high = whole.low.min().view(1), whole.high.max().view(1)
        return whole

    def mean_square(self, *, centred: bool) -> Tensor:
        """Mean square of the values, [channels]; ``centred``: of their deviations from the mean."""
        centers, counts = self.weighted_values()
        centers, total = centers.double(), counts.sum(1)
        mean = torch.linalg.vecdot(centers, counts) / total
        square = torch.linalg.vecdot(centers.square(), counts) / total
        return square - mean.square() if centred else square

    def mean_error(self, low: Tensor, high: Tensor, bits: int) -> Tensor:
        """Mean squared quantization error for clipping ranges [channels, …], of the same shape."""
        values, counts = self.weighted_values()
        limits = torch.stack((low, high)).flatten(2)
        errors = range_errors(values, counts, limits, bits, self.symmetric)
        return (errors / counts.sum(1, keepdim=True)).view_as(low)

    def _coarsen(self, exponent: Tensor) -> None:
        """Widen the bins to 2^exponent by merging neighbours; index −1 goes with −2, 0 with 1."""
        shift = (exponent - self.exponent).clamp(max=62)
        rows = torch.nonzero(shift).flatten()
        if not len(rows):
            return
        position = torch.arange(self.bins, device=self.counts.device) - self.bins // 2
        position = (position >> shift[rows, None]) + self.bins // 2
        counts = self.counts[rows]
        self.counts[rows] = torch.zeros_like(counts).scatter_add_(1, position, counts)
        self.exponent = exponent

    def estimate(self, method: str, bits: int, percentile: float) -> tuple[Tensor, Tensor]:
        """Return the clipping range (low, high) by a method of ``RANGES``, [channels] each (or [1] per tensor).

        Args:
            percentile: in percent; 99.99 cuts off 0.01 % on both sides.

        Raises:
            QwtError: there is no such method.
        """
        return RANGES.find(method)(self, bits, percentile)

    def weighted_values(self) -> tuple[Tensor, Tensor]:
        """Centres of bins and their counts, [channels, n], float32 and float64.

        Empty bins are left out, but for padding of the channels to one length.
        """
        holds = self.counts > 0
        place = torch.where(holds, holds.cumsum(1), 0)  # 0 for all empty bins
        empty = torch.zeros(len(place), int(place.max()) + 1, device=place.device)
        return (
            empty.scatter(1, place, self._centers()),
            empty.double().scatter_(1, place, self.counts.double()),
        )

    def estimate_log_scale(self, bits: int) -> Tensor:
        """The scale, [1], of a log-√2 grid with the smallest mean squared error, a fraction of the largest value."""
        values, counts = self.weighted_values()
        values = values.clamp(min=0)
        largest = self.high.clamp(min=torch.finfo(torch.float32).tiny)
        scales = largest[:, None] * largest.new_tensor([10 ** (-step / 40) for step in range(41)])
        errors = fake_quantize_log_sqrt2(values[:, None], scales[..., None], bits) - values[:, None]
        errors = torch.linalg.vecdot(errors.double().square_(), counts[:, None])
        # A tensor of its own: a view would be saved with the scales that were tried.
        return scales[:, errors.sum(0).argmin()].clone(memory_format=torch.contiguous_format)

    def _centers(self) -> Tensor:
        """The centre of each bin, clamped to the smallest and the largest value: [channels, bins], float32."""
        width = _power_of_two(self.exponent, torch.float64)[:, None]
        edges = torch.arange(self.bins, device=self.counts.device) - self.bins // 2
        centers = ((edges + 0.5) * width).float()
        return torch.maximum(torch.minimum(centers, self.high[:, None]), self.low[:, None])

    def percentiles(self, percentile: float) -> tuple[Tensor, Tensor]:
        width = _power_of_two(self.exponent, torch.float64)
        edges = torch.arange(self.bins, device=self.counts.device) - self.bins // 2
        cumulative = self.counts.cumsum(1).double()
        total = cumulative[:, -1:]
        tail = total * (1 - percentile / 100)
        first = (cumulative > tail).int().argmax(1)
        last = (cumulative >= total - tail).int().argmax(1)
        low = (edges[first] * width).float()
        high = ((edges[last] + 1) * width).float()
        return torch.maximum(low, self.low), torch.minimum(high, self.high)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Exactly 2^exponent (torch.pow and torch.ldexp may be off by a rounding)."""
    return ((exponent + 127) << 23).int().view(torch.float32).to(dtype)


def mse_range(
    values: Tensor,
    weights: Tensor | None,
    low: Tensor,
    high: Tensor,
    bits: int,
    *,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Clipping range with the smallest mean squared quantization error.

    Both limits are first shrunk together, then each alone (a search as in arXiv 2106.08295, section 3.1). Each
    search tries a logarithmic series of fractions of the full range, then a finer one around the best of them.

    Args:
        values: [channels, n] values, or centres of histogram bins.
        weights: [channels, n] counts of the values, or None for ones.
        low, high: [channels] smallest and largest value.
        symmetric: whether the grid is symmetric.

    Returns:
        low, high of shape [channels], float32.
    """
    full = torch.stack((low.clamp(max=0), high.clamp(min=0)))
    best = full
    least = range_errors(values, weights, full[..., None], bits, symmetric)[:, 0]
    sides = ((True, True),) if symmetric else ((True, True), (False, True), (True, False))
    for shrinks in sides:
        start, fraction = best[..., None], torch.ones_like(low)
        for steps in (COARSE_FRACTIONS, FINE_FRACTIONS):
            tried = (fraction[:, None] * steps.to(low.device)).clamp(max=1.0)
            # One-sided searches start from the full range again, so that a limit can also grow.
            limits = torch.stack(
                [
                    whole * tried if shrink else kept.expand_as(tried)
                    for whole, kept, shrink in zip(full[..., None], start, shrinks, strict=True)
                ]
            )
            error, index = range_errors(values, weights, limits, bits, symmetric).min(1)
            better, index = error < least, index[:, None]
            least = torch.where(better, error, least)
            best = torch.where(better, limits.gather(2, index.expand(2, -1, 1))[..., 0], best)
            fraction = torch.where(better, tried.gather(1, index)[:, 0], fraction)
    return best[0], best[1]


def range_errors(
    values: Tensor,
    weights: Tensor | None,
    limits: Tensor,
    bits: int,
    symmetric: bool = False,
) -> Tensor:
    """Summed squared quantization error of each channel for each of its ranges, [channels, ranges], float64.

    Args:
        values, weights: [channels, n], as of :func:`mse_range`.
        limits: [2, channels, ranges], lower and upper ones.
    """
    low, high = limits
    scale, zero_point = quantization_parameters(low, high, bits, symmetric=symmetric)
    at_once = TRIED.get(values.device.type, TRIED["cuda"])
    count = 1 + at_once // (1 + values.shape[1] * scale.shape[1])
    parts = [values[:, None], scale[..., None], zero_point[..., None]]
    if weights is not None:
        parts.append(weights[:, None])
    sums = []
    for x, step, zero, *counts in zip(*(p.split(count) for p in parts), strict=True):
        error = fake_quantize(x, step, zero, bits).sub_(x).square_()
        if counts:
            sums.append(torch.linalg.vecdot(error.double(), *counts))
        else:
            sums.append(error.sum(2, dtype=torch.float64))
    return torch.cat(sums)


@dataclass(frozen=True)
class WeightDistribution:
    """The weights of each output channel, [channels, n], as a distribution."""

    values: Tensor
    symmetric: bool = False

    @property
    def low(self) -> Tensor:
        return self.values.amin(1)

    @property
    def high(self) -> Tensor:
        return self.values.amax(1)

    def weighted_values(self) -> tuple[Tensor, None]:
        return self.values, None

    def percentiles(self, percentile: float) -> tuple[Tensor, Tensor]:
        tail = 1 - percentile / 100
        low, high = (torch.quantile(self.values, q, dim=1) for q in (tail, 1 - tail))
        return low, high


@register_range("minmax")
def minmax(seen: Distribution, bits: int, percentile: float) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value."""
    return seen.low, seen.high


@register_range("percentile")
def percentiles(seen: Distribution, bits: int, percentile: float) -> tuple[Tensor, Tensor]:
    """Percentiles at both ends."""
    return seen.percentiles(percentile)


@register_range("mse")
def mse(seen: Distribution, bits: int, percentile: float) -> tuple[Tensor, Tensor]:
    """The range with the smallest mean squared quantization error."""
    return mse_range(*seen.weighted_values(), seen.low, seen.high, bits, symmetric=seen.symmetric)
