"""Lasso and elastic net of many queries by coordinate descent on a sparse membership matrix.

Where each example joins a few subsets, one sweep over n coordinates touches n d numbers, and scikit-learn's compiled
descent needs fewer seconds than anything batched that was tried (`notebooks/stride/01_recovery_laboratory`): so it is
used. What it reached is certified here, for all queries at once, and tightened where the gap asks for it.
"""

import warnings

import numpy as np
import torch
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ElasticNet
from torch import Tensor

from tda_core.recovery_newton import Goal, Solved

# The descent stops by its own gap over ||y||^2; the objective is less than that when lam is small.
FIRST, TIGHTER, ROUNDS = 1e-1, 1e-1, 8
MAX_SWEEPS = 100_000


def solve(matrix: sparse.csc_array, goal: Goal, *, tolerance: float, start: Tensor | None = None) -> Solved:
    """`recovery_newton.solve` for sparse matrices (K, n) float64: the same goal, gap and result.

    A query that rounding keeps from the tolerance stops with the gap that it reached, for the caller to judge.
    """
    columns = sparse.csc_matrix(matrix)  # what scikit-learn takes, with indices of 32 bits
    columns.indices, columns.indptr = (part.astype(np.int32, copy=False) for part in (columns.indices, columns.indptr))
    rows = columns.T.tocsr()
    n = matrix.shape[1]
    weights = np.zeros((len(goal.y), n)) if start is None else start.numpy().copy()
    gaps, sweeps = torch.full((len(goal.y),), torch.inf, dtype=goal.y.dtype), torch.zeros(len(goal.y), dtype=torch.long)
    going, share = torch.arange(len(goal.y)), FIRST * tolerance
    for _ in range(ROUNDS):
        for i in going.tolist():
            weights[i], taken = _descend(columns, goal, i, weights[i], share)
            sweeps[i] += taken
        part, current = goal.at(going), torch.from_numpy(weights[going.numpy()])
        residuals = part.centred(part.y - torch.from_numpy((columns @ current.numpy().T).T))
        correlations = torch.from_numpy((rows @ residuals.numpy().T).T) - goal.ridge * current
        gaps[going], _ = part.gaps(residuals, correlations, current)
        going, share = going[gaps[going] > tolerance], share * TIGHTER
        if not len(going):
            break
    return Solved(torch.from_numpy(weights), gaps, sweeps)


def _descend(
    columns: sparse.csc_matrix, goal: Goal, query: int, start: np.ndarray, share: float
) -> tuple[np.ndarray, int]:
    """One query's weights (n,) and the sweeps taken. scikit-learn's objective is ours over K."""
    lam, k = float(goal.lam[query]), columns.shape[0]
    model = ElasticNet(
        (lam + goal.ridge) / k,
        l1_ratio=lam / (lam + goal.ridge),
        fit_intercept=goal.intercept,
        positive=goal.nonnegative,
        warm_start=True,
        tol=share,
        max_iter=MAX_SWEEPS,
    )
    model.coef_ = start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what was reached is measured by the caller
        model.fit(columns, goal.y[query].numpy())
    return model.coef_, int(model.n_iter_)
