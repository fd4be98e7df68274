"""Streaming sums of a linear regression of a layer's outputs on the inputs of its weights."""

import copy
import operator
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

RIDGES = (0.01, 0.1, 1.0, 10.0)
"""Strengths of a ridge that :func:`choose_ridge` tries, relative to the mean variance of the inputs."""
DEFAULT_RIDGE = 0.1

Pair = tuple[Tensor, Tensor]
"""One tensor of x and one of y."""


class RegressionSums:
    """Weighted means and centred second moments of vectors x [groups, n, in] and y [groups, n, out].

    Products are computed in single precision, after a shift near the mean, and summed in float64. Memory does
    not grow with the number of vectors.

    Args:
        columns: of x.
        width: of a chunk of columns. Columns of different chunks count as not correlated. With more than one
            chunk there are no moments of x with y.
        batch: number of vectors that are multiplied together, since adding up [in, in] costs more than
            multiplying a few vectors.
        origin: points near the means of x [groups, 1, in] and y [groups, 1, out]; None: the means of the first
            vectors. Sums with the same origin can be added.
    """

    def __init__(self, columns: int, width: int, batch: int, origin: Pair | None = None) -> None:
        self.widths = [len(chunk) for chunk in torch.arange(columns).split(width)]
        self.batch = batch
        self.count = 0.0
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._origin = origin
        self._sums: list[Tensor] = []

    def __add__(self, other: "RegressionSums") -> "RegressionSums":
        """The sums of all vectors of both."""
        total = copy.copy(self)
        for part in (self, other):
            part._add_waiting()
        total._sums = [a + b for a, b in zip(self._sums, other._sums, strict=True)]
        total.count = self.count + other.count
        total._waiting = []
        return total

    def update(self, x: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Add vectors with weights [n], or with ones; without y, for the moments of x alone."""
        if y is None:
            y = x.new_empty(*x.shape[:2], 0)
        if weight is None:
            weight = x.new_ones(x.shape[1])
        self._waiting.append((x, y, weight))
        if sum(len(w) for *_, w in self._waiting) >= self.batch:
            self._add_waiting()

    def _add_waiting(self) -> None:
        if not self._waiting:
            return
        x, y, weight = (
            torch.cat(parts, axis) if len(parts) > 1 else parts[0]
            for parts, axis in zip(zip(*self._waiting, strict=True), (1, 1, 0), strict=True)
        )
        self._waiting.clear()
        if self._origin is None:
            self._origin = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - self._origin[0], y - self._origin[1]
        weighted = x * weight[:, None]
        chunks = zip(weighted.split(self.widths, 2), x.split(self.widths, 2), strict=True)
        new = [
            weighted.sum(1, dtype=torch.float64),
            (y * weight[:, None]).sum(1, dtype=torch.float64),
            *[(w.transpose(1, 2) @ p).double() for w, p in chunks],
        ]
        if len(self.widths) == 1:
            new.append((weighted.transpose(1, 2) @ y).double())
        if self._sums:
            for kept, added in zip(self._sums, new, strict=True):
                kept += added
        else:
            self._sums = new
        self.count += float(weight.sum(dtype=torch.float64))

    def means(self) -> Pair:
        """Means of x [groups, in] and of y [groups, out], float64."""
        self._add_waiting()
        assert self._origin is not None
        mean_x, mean_y = (
            origin[:, 0].double() + total / self.count
            for origin, total in zip(self._origin, self._sums[:2], strict=True)
        )
        return mean_x, mean_y

    def about(self, *, centred: bool, bias: Tensor | None = None) -> Pair:
        """The points for :meth:`moments`: the means, or if not ``centred`` 0 of x and ``bias`` (or 0) of y."""
        means = self.means()
        if centred:
            return means
        return torch.zeros_like(means[0]), torch.zeros_like(means[1]) if bias is None else bias

    def moments(self, about: Pair) -> tuple[list[Tensor], Tensor | None]:
        """Second moments of x, a chunk [groups, columns, columns] each, and of x with y [groups, in, out].

        Args:
            about: the points x [groups, in] and y [groups, out] that deviations are taken from.
        """
        self._add_waiting()
        assert self._origin is not None
        near = [total / self.count for total in self._sums[:2]]  # the means, from the origins
        far = [
            point - origin[:, 0].double() for point, origin in zip(about, self._origin, strict=True)
        ]
        products = [total / self.count for total in self._sums[2:]]
        cross = None
        if len(self.widths) == 1:
            cross = _moved(products.pop(), (near[0], near[1]), (far[0], far[1]))
        chunks = (part.split(self.widths, 1) for part in (near[0], far[0]))
        squares = [
            _moved(product, (mean, mean), (point, point))
            for product, mean, point in zip(products, *chunks, strict=True)
        ]
        return squares, cross


def _moved(product: Tensor, mean: Pair, point: Pair) -> Tensor:
    """E[(x − p)(y − q)ᵀ] from E[x yᵀ], the means of x and y, and p and q."""
    (x, y), (p, q) = mean, point
    return product - x[:, :, None] * q[:, None] - p[:, :, None] * (y - q)[:, None]


def damped_factor(moments: Tensor, damping: Tensor) -> Tensor:
    """The lower Cholesky factor of moments [groups, in, in] with a damping [groups, 1] on their diagonal.

    The damping grows tenfold where rounding has made the moments indefinite; above their trace it always suffices.

    Raises:
        torch.linalg.LinAlgError: the moments are not finite.
    """
    while True:
        damped = moments + torch.diag_embed(damping.expand(-1, moments.shape[-1]))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            return factor
        if not torch.isfinite(damped).all():
            # torch documents the error, but its types do not export it.
            raise torch.linalg.LinAlgError("second moments are not finite")  # type: ignore[attr-defined]
        damping = damping * torch.where(failed[:, None] > 0, 10.0, 1.0)


def ridge_towards(weight: Tensor, squares: Tensor, cross: Tensor, strength: float) -> Tensor:
    """argmin over W of E‖y − W x‖² + λ ‖W − weight‖², λ = strength · the mean of the diagonal of E[x xᵀ].

    Args:
        weight: [groups, out, in].
        squares: E[x xᵀ], [groups, in, in]. cross: E[x yᵀ], [groups, in, out]; float64.

    Returns:
        [groups, out, in], float64. The weight of an input that is always 0 does not change.
    """
    weight = weight.double()
    left = cross - squares @ weight.transpose(1, 2)
    mean = squares.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    factor = damped_factor(squares, torch.where(mean > 0, strength * mean, 1.0))
    return weight + torch.cholesky_solve(left, factor).transpose(1, 2)


def choose_ridge(
    weight: Tensor, parts: Sequence[RegressionSums], *, centred: bool, bias: Tensor
) -> float:
    """The one of :data:`RIDGES` with the smallest error on held-out vectors, by cross-validation.

    Args:
        weight: [groups, out, in].
        parts: sums of disjoint sets of images, with one origin; each part is held out once.
        centred: whether the bias is fitted, too; otherwise it stays ``bias`` [groups, out].

    Returns:
        The strength; ``DEFAULT_RIDGE`` where there is nothing to hold out.
    """
    if len(parts) < 2:
        return DEFAULT_RIDGE
    errors = [0.0] * len(RIDGES)
    for number, held in enumerate(parts):
        fit = reduce(operator.add, [*parts[:number], *parts[number + 1 :]])
        about = fit.about(centred=centred, bias=bias)
        (squares,), cross = fit.moments(about)
        (held_squares,), held_cross = held.moments(about)
        assert cross is not None
        assert held_cross is not None
        for index, strength in enumerate(RIDGES):
            fitted = ridge_towards(weight, squares, cross, strength)
            residual = fitted @ held_squares - 2 * held_cross.transpose(1, 2)
            errors[index] += held.count * float((fitted * residual).sum())
    return RIDGES[errors.index(min(errors))]
