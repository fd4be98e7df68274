"""Closed-form solutions for W and b from the sums of a regression."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import RegressionStatistics

RIDGES = (0.0, *(10.0**e for e in range(-6, 4)), float("inf"))
"""Candidates of ``ridge: auto``; an infinite ridge leaves the bias alone."""


RANK_TOLERANCE = 1e-12
"""Directions with less than this part of the largest variance are rounding noise of float32 data
(singular values below 1e-6 of the largest): W must not amplify them."""


@dataclass(frozen=True)
class Solution:
    """W [in, out] and b [out] in float64, with the ridge strength and the path that gave them."""

    weight: Tensor
    bias: Tensor
    ridge: float
    solver: str


def _solution(
    statistics: RegressionStatistics, weight: Tensor, ridge: float, solver: str
) -> Solution:
    bias = statistics.mean_y - statistics.mean_x @ weight
    return Solution(weight, bias, ridge, solver)


def solve_ridge(statistics: RegressionStatistics, ridge: float) -> Solution:
    """Minimise Σ‖y − xW − b‖² + λ‖W‖², λ = ridge · mean diagonal of the centred X'X.

    The intercept is not penalised. Cholesky; where the matrix is not safely positive definite
    (constant or duplicated channels, fewer rows than channels), the minimum-norm solution from an
    eigendecomposition. ``ridge`` 0 is ordinary least squares (QwT, arXiv 2411.13918, equation 6).
    """
    if ridge == float("inf"):
        return _solution(statistics, torch.zeros_like(statistics.xy), ridge, "bias")
    xx = statistics.xx
    size = len(xx)
    matrix = xx + ridge * xx.diagonal().mean() * torch.eye(size, dtype=xx.dtype, device=xx.device)
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    # A tiny pivot means that a channel is (nearly) a combination of the ones before it.
    if info == 0 and (diagonal.square() > RANK_TOLERANCE * matrix.diagonal().max()).all():
        weight = torch.cholesky_solve(statistics.xy, factor)
        return _solution(statistics, weight, ridge, "cholesky")
    return solve_path(statistics, (ridge,))[0]


def solve_path(statistics: RegressionStatistics, ridges: tuple[float, ...]) -> list[Solution]:
    """Solutions for several ridge strengths from one eigendecomposition of the centred X'X.

    Directions below RANK_TOLERANCE of the largest eigenvalue are left out (minimum norm).
    """
    values, vectors = torch.linalg.eigh(statistics.xx)
    values = values.clamp(min=0)
    projected = vectors.T @ statistics.xy
    usable = values > values.max() * RANK_TOLERANCE
    scale = statistics.xx.diagonal().mean()
    solutions = []
    for ridge in ridges:
        if ridge == float("inf"):
            solutions.append(solve_ridge(statistics, ridge))
            continue
        inverse = torch.where(usable, 1 / (values + ridge * scale).clamp(min=1e-300), 0.0)
        weight = vectors @ (inverse[:, None] * projected)
        solutions.append(_solution(statistics, weight, ridge, "eigh"))
    return solutions


def choose_ridge(fit: RegressionStatistics, holdout: RegressionStatistics) -> Solution:
    """The solution among :data:`RIDGES` with the smallest squared error on held-out rows."""
    candidates = solve_path(fit, RIDGES)
    return min(candidates, key=lambda s: holdout.error_after(s.weight, s.bias))
