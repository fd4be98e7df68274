"""Closed-form solution of each kind of compensation, from the sums of a regression."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import CompensationSettings
from .kinds import BITS, Affine, Bias, Kind, Linear, LowRank
from .statistics import BlockStatistics, RegressionStatistics, merged

RIDGES = (0.0, *(10.0**e for e in range(-6, 4)), float("inf"))
"""Ridge strengths that ``ridge: auto`` tries; an infinite one gives a bias without W."""

RANK_TOLERANCE = 1e-12
"""Directions with less than this fraction of the largest variance are rounding errors of float32
(singular values below 1e-6 of the largest): W must not amplify them."""


@dataclass(frozen=True)
class Solution:
    """A fitted kind in float64, with the ridge strength and the path that gave it.

    ``kind`` None means no compensation.
    """

    kind: Kind | None
    ridge: float
    solver: str

    def rounded(self, statistics: BlockStatistics) -> "Solution":
        """The same with matrices in eight bits (:meth:`.kinds.Kind.rounded`)."""
        if self.kind is None:
            return self
        return replace(self, kind=self.kind.rounded(statistics))

    def squared_error(self, statistics: BlockStatistics) -> float:
        """Squared error that is left, summed over positions and channels."""
        if self.kind is None:
            return statistics.any.error_before()
        return self.kind.squared_error(statistics)


Solve = Callable[[BlockStatistics, float, CompensationSettings], Sequence[Solution]]


@dataclass(frozen=True)
class Solver:
    """The function that fits a kind, and the fields of BlockStatistics that it needs.

    ``solve`` takes sums, a ridge strength and the settings. It returns the possible forms of the compensation:
    the same forms in the same order for all sums of a block.
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

    The intercept is not penalised. The solver is Cholesky. Where the matrix is not safely positive definite
    (constant or duplicated channels, fewer positions than channels), it is the minimum-norm solution from an
    eigendecomposition. ``ridge`` 0 is ordinary least squares (QwT, arXiv 2411.13918, equation 6).
    """
    if ridge == math.inf:
        return _mean_error(statistics)
    matrix = _penalised(statistics, ridge)
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    # A tiny pivot means that a channel is nearly a linear combination of earlier ones.
    if info == 0 and (diagonal.square() > RANK_TOLERANCE * matrix.diagonal().max()).all():
        weight = torch.cholesky_solve(statistics.xy, factor)
        return _linear(statistics, weight, ridge, "cholesky")
    return Spectrum(statistics).solution(ridge)


class Spectrum:
    """W for every ridge strength from one eigendecomposition of the centred X'X.

    W = vectors · diag(shrinkage) · projected, in which only the shrinkage depends on the ridge.
    Directions below RANK_TOLERANCE of the largest eigenvalue are left out (minimum norm).
    """

    def __init__(self, statistics: RegressionStatistics) -> None:
        values, self.vectors = torch.linalg.eigh(statistics.xx)
        self.statistics, self.values = statistics, values.clamp(min=0)
        self.projected = self.vectors.T @ statistics.xy

    def shrinkage(self, ridge: float) -> Tensor:
        usable = self.values > self.values.max() * RANK_TOLERANCE
        penalty = ridge * self.statistics.xx.diagonal().mean()
        return torch.where(usable, 1 / (self.values + penalty).clamp(min=1e-300), 0.0)

    def solution(self, ridge: float) -> Solution:
        """The minimum-norm solution for a finite ridge strength."""
        weight = self.vectors @ (self.shrinkage(ridge)[:, None] * self.projected)
        return _linear(self.statistics, weight, ridge, "eigh")

    def errors(self, holdout: RegressionStatistics, ridges: Sequence[float]) -> Tensor:
        """Squared error of each ridge strength on held-out data, without forming W: [ridges]."""
        shrinkage = torch.stack([self.shrinkage(ridge) for ridge in ridges])
        inner = self.vectors.T @ holdout.xx @ self.vectors * (self.projected @ self.projected.T)
        cross = (self.projected * (self.vectors.T @ holdout.xy)).sum(1)
        moved_x = (holdout.mean_x - self.statistics.mean_x) @ self.vectors
        moved_y = holdout.mean_y - self.statistics.mean_y
        offset = moved_y - (shrinkage * moved_x) @ self.projected
        explained = (shrinkage @ inner * shrinkage).sum(1) - 2 * shrinkage @ cross
        return holdout.variation + explained + holdout.count * offset.square().sum(1)


def choose_ridge(folds: Iterable[tuple[RegressionStatistics, RegressionStatistics]]) -> float:
    """The one of :data:`RIDGES` with the smallest squared error on held-out data.

    Args:
        folds: pairs of the sums of a fit and of its held-out data.
    """
    errors = [Spectrum(fit).errors(held, RIDGES) for fit, held in folds]
    return RIDGES[int(torch.stack(errors).sum(0).argmin())]


def reduce_rank(
    statistics: RegressionStatistics, solution: Solution, ranks: Sequence[int]
) -> list[Solution]:
    """The best compensations of these ranks for the objective that ``solution`` minimises.

    Reduced-rank regression (Izenman, "Reduced-rank regression for the multivariate linear model",
    1975): W V Vᵀ, where V holds the leading eigenvectors of Wᵀ (X'X + λI) W, which are the leading
    directions of the fitted values.
    """
    if not isinstance(solution.kind, Linear):
        return [solution for _ in ranks]
    weight = solution.kind.weight
    fitted = weight.T @ (_penalised(statistics, solution.ridge) @ weight)
    vectors = torch.linalg.eigh(fitted).eigenvectors
    reduced = []
    for rank in ranks:
        right = vectors[:, -rank:].T
        left = weight @ right.T
        bias = statistics.mean_y - statistics.mean_x @ left @ right
        kind = LowRank(left, right.contiguous(), bias)
        reduced.append(Solution(kind, solution.ridge, solution.solver))
    return reduced


@register_solver("bias", "outputs")
def solve_bias(
    sums: BlockStatistics, ridge: float, settings: CompensationSettings
) -> Sequence[Solution]:
    """The mean error of each channel."""
    return [_mean_error(sums.any)]


@register_solver("affine", "outputs")
def solve_affine(
    sums: BlockStatistics, ridge: float, settings: CompensationSettings
) -> Sequence[Solution]:
    """Scale and shift of each output channel by least squares; a constant channel is only shifted."""
    of = sums.outputs
    varies = of.xx > RANK_TOLERANCE * (of.xx + of.count * of.mean_x.square())
    gain = torch.where(varies, of.xy / torch.where(varies, of.xx, 1.0), 0.0)
    return [Solution(Affine(1 + gain, of.mean_y - gain * of.mean_x), 0.0, "per channel")]


@register_solver("linear", "inputs")
def solve_linear(
    sums: BlockStatistics, ridge: float, settings: CompensationSettings
) -> Sequence[Solution]:
    """W and b on the block's input."""
    return [solve_ridge(sums.inputs, ridge)]


@register_solver("lowrank", "inputs")
def solve_lowrank(
    sums: BlockStatistics, ridge: float, settings: CompensationSettings
) -> Sequence[Solution]:
    """As linear, with W of rank ``settings.rank``."""
    return reduce_rank(sums.inputs, solve_ridge(sums.inputs, ridge), [settings.rank])


@register_solver("auto", "inputs", "outputs")
def solve_auto(
    sums: BlockStatistics, ridge: float, settings: CompensationSettings
) -> Sequence[Solution]:
    """None, bias, affine, W of ranks 1, 2, 4, … if cheaper than full rank, and linear."""
    inputs, outputs = sums.inputs.xy.shape
    ranks = [2**n for n in range(20) if 2**n * (inputs + outputs) < inputs * outputs]
    linear = solve_ridge(sums.inputs, ridge)
    return [
        Solution(None, math.inf, "none"),
        *solve_bias(sums, ridge, settings),
        *solve_affine(sums, ridge, settings),
        *reduce_rank(sums.inputs, linear, ranks),
        linear,
    ]


@dataclass(frozen=True)
class FittedForm:
    """One form of a block's compensation.

    Attributes:
        solution: fitted to all images.
        trial: fitted to all images but the first fold, for the check at the heads; None without folds.
        held_out: squared error by cross-validation, summed over all folds; None without folds.
    """

    solution: Solution
    trial: Solution | None
    held_out: float | None


def fit_forms(
    sums: BlockStatistics, groups: Sequence[BlockStatistics], settings: CompensationSettings
) -> list[FittedForm]:
    """Fit all forms of a kind, in the bits of the settings, and cross-validate them.

    Args:
        sums: of all images.
        groups: sums of each fold; with a single one there is no cross-validation.
    """
    solver = SOLVERS[settings.kind]
    folds = [
        (merged([*groups[:number], *groups[number + 1 :]]), held)
        for number, held in enumerate(groups)
        if len(groups) > 1
    ]
    ridge = 0.0 if settings.ridge == "auto" else float(settings.ridge)
    if settings.ridge == "auto" and "inputs" in solver.needs:
        ridge = choose_ridge((fit.inputs, held.inputs) for fit, held in folds)

    def solve(fit: BlockStatistics) -> list[Solution]:
        found = solver.solve(fit, ridge, settings)
        return [solution.rounded(fit) for solution in found] if settings.bits == BITS else [*found]

    solutions, trials = solve(sums), [solve(fit) for fit, _ in folds]
    if not folds:
        return [FittedForm(solution, None, None) for solution in solutions]
    errors = [
        sum(trial.squared_error(held) for trial, (_, held) in zip(forms, folds, strict=True))
        for forms in zip(*trials, strict=True)
    ]
    return [FittedForm(*form) for form in zip(solutions, trials[0], errors, strict=True)]
