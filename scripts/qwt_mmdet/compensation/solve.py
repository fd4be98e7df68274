"""Closed-form solutions of each kind of compensation from the sums of a regression."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import CompensationSettings
from .kinds import Affine, Bias, Kind, Linear, LowRank
from .statistics import BlockStatistics, RegressionStatistics

RIDGES = (0.0, *(10.0**e for e in range(-6, 4)), float("inf"))
"""Candidates of ``ridge: auto``; an infinite ridge leaves the bias alone."""

RANK_TOLERANCE = 1e-12
"""Directions with less than this fraction of the largest variance are rounding noise of float32 data
(singular values below 1e-6 of the largest): W must not amplify them."""


@dataclass(frozen=True)
class Solution:
    """A fitted kind in float64, with the ridge strength and the path that gave it.

    ``kind`` None means that the block is better left alone.
    """

    kind: Kind | None
    ridge: float
    solver: str

    def squared_error(self, statistics: BlockStatistics) -> float:
        """Squared error that is left, summed over positions and channels."""
        if self.kind is None:
            return statistics.any.error_before()
        return self.kind.squared_error(statistics)


Solve = Callable[[BlockStatistics, Sequence[BlockStatistics], CompensationSettings], Solution]


@dataclass(frozen=True)
class Solver:
    """How a kind is fitted, and from which fields of BlockStatistics.

    ``solve`` gets the sums of the fitted images, sums of groups of held-out images, and settings.
    """

    solve: Solve
    needs: tuple[str, ...]


SOLVERS: dict[str, Solver] = {}
"""Solver by name of the kind in the settings."""


def register_solver(name: str, *needs: str) -> Callable[[Solve], Solve]:
    """Decorator: the function fits the kind ``name`` from these fields of BlockStatistics."""

    def decorate(solve: Solve) -> Solve:
        SOLVERS[name] = Solver(solve, needs)
        return solve

    return decorate


def _mean_error(statistics: RegressionStatistics) -> Solution:
    return Solution(Bias(statistics.mean_y.clone()), math.inf, "mean")


def _linear(
    statistics: RegressionStatistics, weight: Tensor, ridge: float, solver: str
) -> Solution:
    bias = statistics.mean_y - statistics.mean_x @ weight
    return Solution(Linear(weight, bias), ridge, solver)


def _penalised(statistics: RegressionStatistics, ridge: float) -> Tensor:
    xx = statistics.xx
    penalty = ridge * xx.diagonal().mean()
    return xx + penalty * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)


def solve_ridge(statistics: RegressionStatistics, ridge: float) -> Solution:
    """Minimise Σ‖y − xW − b‖² + λ‖W‖², λ = ridge · mean diagonal of the centred X'X.

    The intercept is not penalised. Cholesky; where the matrix is not safely positive definite
    (constant or duplicated channels, fewer rows than channels), the minimum-norm solution from an
    eigendecomposition. ``ridge`` 0 is ordinary least squares (QwT, arXiv 2411.13918, equation 6).
    """
    if ridge == math.inf:
        return _mean_error(statistics)
    matrix = _penalised(statistics, ridge)
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    # A tiny pivot means that a channel is (nearly) a combination of the ones before it.
    if info == 0 and (diagonal.square() > RANK_TOLERANCE * matrix.diagonal().max()).all():
        weight = torch.cholesky_solve(statistics.xy, factor)
        return _linear(statistics, weight, ridge, "cholesky")
    return solve_path(statistics, (ridge,))[0]


@dataclass(frozen=True)
class _Spectrum:
    """W for every ridge strength from one eigendecomposition of the centred X'X.

    W = vectors · diag(shrinkage) · projected, in which only the shrinkage depends on the ridge.
    Directions below RANK_TOLERANCE of the largest eigenvalue are left out (minimum norm).
    """

    statistics: RegressionStatistics
    values: Tensor
    vectors: Tensor
    projected: Tensor

    @classmethod
    def of(cls, statistics: RegressionStatistics) -> "_Spectrum":
        values, vectors = torch.linalg.eigh(statistics.xx)
        return cls(statistics, values.clamp(min=0), vectors, vectors.T @ statistics.xy)

    def shrinkage(self, ridge: float) -> Tensor:
        usable = self.values > self.values.max() * RANK_TOLERANCE
        penalty = ridge * self.statistics.xx.diagonal().mean()
        return torch.where(usable, 1 / (self.values + penalty).clamp(min=1e-300), 0.0)

    def solution(self, ridge: float) -> Solution:
        if ridge == math.inf:
            return _mean_error(self.statistics)
        weight = self.vectors @ (self.shrinkage(ridge)[:, None] * self.projected)
        return _linear(self.statistics, weight, ridge, "eigh")

    def errors(self, holdout: RegressionStatistics, ridges: Sequence[float]) -> Tensor:
        """Squared error of each ridge strength on held-out rows, without forming W: [ridges]."""
        shrinkage = torch.stack(
            [
                torch.zeros_like(self.values) if ridge == math.inf else self.shrinkage(ridge)
                for ridge in ridges
            ]
        )
        inner = self.vectors.T @ holdout.xx @ self.vectors * (self.projected @ self.projected.T)
        cross = (self.projected * (self.vectors.T @ holdout.xy)).sum(1)
        moved_x = (holdout.mean_x - self.statistics.mean_x) @ self.vectors
        moved_y = holdout.mean_y - self.statistics.mean_y
        offset = moved_y - (shrinkage * moved_x) @ self.projected
        explained = (shrinkage @ inner * shrinkage).sum(1) - 2 * shrinkage @ cross
        return holdout.variation + explained + holdout.count * offset.square().sum(1)


def solve_path(statistics: RegressionStatistics, ridges: Sequence[float]) -> list[Solution]:
    """Solutions for several ridge strengths from one eigendecomposition."""
    spectrum = _Spectrum.of(statistics)
    return [spectrum.solution(ridge) for ridge in ridges]


def choose_ridge(
    statistics: RegressionStatistics, holdout: Sequence[RegressionStatistics]
) -> Solution:
    """The solution among :data:`RIDGES` with the smallest squared error on held-out rows."""
    spectrum = _Spectrum.of(statistics)
    errors = sum((spectrum.errors(group, RIDGES) for group in holdout), torch.zeros(()))
    return spectrum.solution(RIDGES[int(errors.argmin())])


def reduce_rank(statistics: RegressionStatistics, solution: Solution, rank: int) -> Solution:
    """The best compensation of rank ``rank`` for the objective that ``solution`` minimises.

    Reduced-rank regression (Izenman, "Reduced-rank regression for the multivariate linear model",
    1975): W V Vᵀ, where V holds the leading eigenvectors of Wᵀ (X'X + λI) W, which are the leading
    directions of the fitted values.
    """
    if not isinstance(solution.kind, Linear):
        return solution
    weight = solution.kind.weight
    fitted = weight.T @ (_penalised(statistics, solution.ridge) @ weight)
    right = torch.linalg.eigh(fitted).eigenvectors[:, -rank:].T
    left = weight @ right.T
    bias = statistics.mean_y - statistics.mean_x @ left @ right
    return Solution(LowRank(left, right.contiguous(), bias), solution.ridge, solution.solver)


def solve_again(
    solution: Solution, statistics: BlockStatistics, settings: CompensationSettings
) -> Solution:
    """The same kind (there is one) at the same ridge strength, fitted to other sums."""
    if math.isfinite(solution.ridge):  # an infinite ridge has left the bias alone, without a ridge
        settings = dataclasses.replace(settings, ridge=solution.ridge)
    assert solution.kind is not None
    return SOLVERS[solution.kind.name].solve(statistics, (), settings)


@register_solver("bias", "outputs")
def solve_bias(
    fit: BlockStatistics, holdout: Sequence[BlockStatistics], settings: CompensationSettings
) -> Solution:
    """The mean error of each channel."""
    return _mean_error(fit.any)


@register_solver("affine", "outputs")
def solve_affine(
    fit: BlockStatistics, holdout: Sequence[BlockStatistics], settings: CompensationSettings
) -> Solution:
    """Scale and shift of each output channel by least squares; a constant channel is only shifted."""
    sums = fit.outputs
    varies = sums.xx > RANK_TOLERANCE * (sums.xx + sums.count * sums.mean_x.square())
    gain = torch.where(varies, sums.xy / torch.where(varies, sums.xx, 1.0), 0.0)
    return Solution(Affine(1 + gain, sums.mean_y - gain * sums.mean_x), 0.0, "per channel")


@register_solver("linear", "inputs")
def solve_linear(
    fit: BlockStatistics, holdout: Sequence[BlockStatistics], settings: CompensationSettings
) -> Solution:
    """W and b on the block's input, with the given ridge or the best one on held-out rows."""
    if settings.ridge == "auto":
        return choose_ridge(fit.inputs, [group.inputs for group in holdout])
    return solve_ridge(fit.inputs, float(settings.ridge))


@register_solver("lowrank", "inputs")
def solve_lowrank(
    fit: BlockStatistics, holdout: Sequence[BlockStatistics], settings: CompensationSettings
) -> Solution:
    """As linear, with W of rank ``settings.rank``."""
    if settings.ridge != "auto":
        return reduce_rank(
            fit.inputs, solve_ridge(fit.inputs, float(settings.ridge)), settings.rank
        )
    path = solve_path(fit.inputs, RIDGES)
    candidates = [reduce_rank(fit.inputs, solution, settings.rank) for solution in path]
    return min(candidates, key=lambda s: sum(s.squared_error(group) for group in holdout))


def simplest_within_noise(
    candidates: Sequence[Solution], holdout: Sequence[BlockStatistics]
) -> Solution:
    """The first candidate whose held-out error cannot be told from the smallest one.

    A paired test in the manner of the one-standard-error rule (Breiman et al., "Classification and
    Regression Trees", 1984): a candidate is as good as the best if the mean of their differences
    over groups of held-out images is at most twice its standard error. Images, not positions, are
    what is drawn at random: neighbouring positions resemble each other.

    Args:
        candidates: from the simplest to the most complex.
        holdout: groups of held-out images; with one group the smallest error wins.
    """
    errors = torch.tensor(
        [[c.squared_error(group) / group.elements for group in holdout] for c in candidates],
        dtype=torch.float64,
    )
    best = int(errors.mean(1).argmin())
    for index in range(best):
        excess = errors[index] - errors[best]
        noise = excess.std() / math.sqrt(len(excess)) if len(excess) > 1 else 0.0
        if excess.mean() <= 2 * noise:
            return candidates[index]
    return candidates[best]


@register_solver("auto", "inputs", "outputs")
def solve_auto(
    fit: BlockStatistics, holdout: Sequence[BlockStatistics], settings: CompensationSettings
) -> Solution:
    """The simplest of none, bias, affine and linear that held-out images do not argue against."""
    simple_to_complex = [
        Solution(None, math.inf, "none"),
        *(solve(fit, holdout, settings) for solve in (solve_bias, solve_affine, solve_linear)),
    ]
    return simplest_within_noise(simple_to_complex, holdout)
