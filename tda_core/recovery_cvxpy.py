"""Sparse recovery by cvxpy: the reference that the batched solver is tested against, and the home of group penalties.

A problem is written and compiled once, with y and the penalty's weight as parameters (DPP), so that another query
costs a solve only. The solver is named and its status checked: what is not "optimal" is an error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cvxpy
import numpy as np
import torch
from torch import Tensor

from tda_core.recovery_design import Design, Membership

SOLVER = "CLARABEL"


@dataclass(frozen=True)
class Objective:
    """1/2 ||y - c - M w||^2 + lam penalty(w) + ridge/2 ||w||^2.

    groups: None for the penalty ||w||_1 (the Lasso); else the group number of each example (n,), for the group Lasso
    sum_g sqrt(|g|) ||w_g|| (Yuan & Lin 2006). nonnegative: w >= 0. intercept: c is free, else 0.
    """

    ridge: float = 0.0
    nonnegative: bool = False
    intercept: bool = False
    groups: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"ridge must be finite and >= 0, got {self.ridge}")


class Reference:
    """One compiled problem for a membership matrix (K, n); `solve` answers queries, `weights` whole batches.

    Raises ValueError for what `Design.of` refuses, for groups that do not name one group an example, and for a
    solver that is not installed.
    """

    def __init__(self, membership: Membership, objective: Objective | None = None, *, solver: str = SOLVER) -> None:
        if solver not in cvxpy.installed_solvers():
            raise ValueError(f"unknown solver {solver!r}, expected one of {sorted(cvxpy.installed_solvers())}")
        self.design, self.solver = Design.of(membership), solver
        self.objective = Objective() if objective is None else objective
        n = self.design.n_examples
        self.w = cvxpy.Variable(n, nonneg=self.objective.nonnegative)
        self.c = cvxpy.Variable() if self.objective.intercept else cvxpy.Constant(0.0)
        self.y, self.lam = cvxpy.Parameter(self.design.n_subsets), cvxpy.Parameter(nonneg=True)
        held = self.design.held if self.design.is_sparse else self.design.held.cpu().numpy()
        # the residual is a variable of its own: its square then is a small diagonal, not M'M
        residual = cvxpy.Variable(self.design.n_subsets)
        cost = cvxpy.sum_squares(residual) / 2 + self.lam * _norm(self.w, self.objective.groups, n)
        if self.objective.ridge:
            cost = cost + self.objective.ridge / 2 * cvxpy.sum_squares(self.w)
        self.problem = cvxpy.Problem(cvxpy.Minimize(cost), [residual == self.y - held @ self.w - self.c])

    def solve(self, y: Tensor | np.ndarray, lam: float, **settings: float) -> tuple[np.ndarray, float]:
        """Weights (n,) and intercept for the measurements y (K,) of one query.

        settings: the solver's own, its tolerances for example. Raises ValueError for y of another shape or not finite
        and for lam <= 0, RuntimeError naming solver and status for any status but "optimal".
        """
        if not (math.isfinite(lam) and lam > 0):
            raise ValueError(f"lam must be finite and > 0, got {lam}")
        self.y.value = self.design.measurements(torch.as_tensor(y)[None])[0].cpu().numpy()
        self.lam.value = float(lam)
        run(self.problem, self.solver, enforce_dpp=True, **settings)
        return np.asarray(self.w.value), float(self.c.value)

    def weights(self, measurements: Tensor, lam: Tensor | float, **settings: float) -> Tensor:
        """`solve` for every row of measurements (q, K), lam one or one a query: (q, n) float64."""
        y = self.design.measurements(measurements).cpu()
        each = torch.as_tensor(lam, dtype=torch.float64).expand(len(y)).tolist()
        found = [self.solve(row, value, **settings)[0] for row, value in zip(y, each, strict=True)]
        return torch.from_numpy(np.stack(found))


def debiased(
    membership: Membership, y: Tensor | np.ndarray, weights: np.ndarray, *, solver: str = SOLVER
) -> np.ndarray:
    """Least squares on the support of `weights` (n,) for the measurements y (K,) of one query: (n,).

    Raises what `Reference.solve` raises.
    """
    design = Design.of(membership)
    support = np.flatnonzero(weights)
    result = np.zeros(design.n_examples)
    if len(support):
        free = cvxpy.Variable(len(support))
        fitted = design.columns(torch.from_numpy(support)).cpu().numpy() @ free
        goal = design.measurements(torch.as_tensor(y)[None])[0].cpu().numpy()
        run(cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(goal - fitted))), solver)
        result[support] = free.value
    return result


def run(problem: cvxpy.Problem, solver: str, **settings: float) -> None:
    """Solve by the named solver. Raises RuntimeError naming solver and status for any status but "optimal"."""
    try:
        problem.solve(solver=solver, **settings)
    except cvxpy.SolverError as error:
        raise RuntimeError(f"{solver} failed: {error}") from error
    if problem.status != cvxpy.OPTIMAL:
        raise RuntimeError(f"{solver} ended with status {problem.status!r}, expected {cvxpy.OPTIMAL!r}")


def _norm(w: cvxpy.Variable, groups: Sequence[int] | None, n: int) -> cvxpy.Expression:
    if groups is None:
        return cvxpy.norm1(w)
    groups = np.asarray(groups)
    if groups.shape != (n,):
        raise ValueError(f"groups must name the group of each of {n} examples, got shape {groups.shape}")
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    return cvxpy.sum([math.sqrt(len(of_group)) * cvxpy.norm2(w[of_group]) for of_group in members])
