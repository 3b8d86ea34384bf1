"""How fast other people's Lasso solvers answer the same queries to the same duality gap.

scikit-learn is one of our dependencies; celer and skglm are timed where they are installed.
"""

import importlib.util
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.sparse
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso
from torch import Tensor

from tda_core.recovery import recover
from tda_core.recovery_design import Design, Membership
from tda_core.recovery_newton import Goal

PEERS = ("sklearn", "celer", "skglm")
# A solver's own tolerance means something else in each: they are tightened until all queries reach the gap.
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)

Solver = Callable[[Tensor, Tensor], Tensor]
Matrix = np.ndarray | scipy.sparse.csc_matrix


@dataclass(frozen=True)
class Speed:
    """seconds: median over the rounds, for all queries. gap: worst relative duality gap of the queries."""

    seconds: float
    gap: float


def compare(
    membership: Membership, measurements: Tensor, lam: Tensor, *, tolerance: float = 1e-4, rounds: int = 3
) -> dict[str, Speed]:
    """Time every solver on the Lasso of all queries, in turns: {"batched" or a peer's name: Speed}.

    lam: (q,) of `recover`. Peers answer one query at a time, as they are made to, at the loosest of their tolerances
    that gives every query a gap of at most `tolerance`; one that never does is reported at its tightest. One turn is
    not counted (compilation). Peers get M dense and in the column order that they want and, where it has few entries,
    sparse as well ("celer_sparse").
    """
    design = Design.of(membership)
    y = design.measurements(measurements)
    lam = torch.as_tensor(lam, dtype=y.dtype).expand(len(y))
    matrix = np.asfortranarray(design.predict(torch.eye(design.n_examples, dtype=y.dtype)).T.numpy())
    solvers = {"batched": lambda y, lam: recover(design, y, lam, tolerance=tolerance).weights}
    forms = {"": matrix} if design.thin is None else {"": matrix, "_sparse": scipy.sparse.csc_matrix(design.thin)}
    for form, own in forms.items():
        solvers |= {name + form: _tightened(name, own, design, (y, lam, tolerance)) for name in available()}
    seconds = {name: [] for name in solvers}
    weights = {}
    for _ in range(rounds):
        for name, solver in solvers.items():
            began = time.perf_counter()
            weights[name] = solver(y, lam)
            seconds[name].append(time.perf_counter() - began)
    return {name: Speed(float(np.median(seconds[name])), worst_gap(design, y, lam, weights[name])) for name in solvers}


def available() -> tuple[str, ...]:
    """The peers that are installed."""
    return tuple(name for name in PEERS if importlib.util.find_spec(name))


def worst_gap(design: Design, y: Tensor, lam: Tensor, weights: Tensor) -> float:
    """Largest relative duality gap over queries, computed alike for every solver's weights (q, n)."""
    residuals = y - design.predict(weights)
    gaps, _ = Goal(y, lam).gaps(residuals, design.correlate(residuals), weights)
    return float(gaps.max())


def peer(name: str, matrix: Matrix, tolerance: float) -> Solver:
    """A peer as (measurements (q, K), lam (q,)) -> weights (q, n), at its own tolerance.

    matrix: (K, n), in Fortran order, or sparse. Raises ValueError for an unknown name.
    """
    if name not in PEERS:
        raise ValueError(f"unknown solver {name!r}, expected one of {list(PEERS)}")
    return partial(_one_by_one, _model(name, tolerance), matrix)


def _model(name: str, tolerance: float) -> Callable:
    """lam over K -> an estimator. Their objective is ours over K."""
    if name == "sklearn":
        return partial(Lasso, fit_intercept=False, tol=tolerance, max_iter=100_000)
    if name == "celer":
        import celer

        return partial(celer.Lasso, fit_intercept=False, tol=tolerance)
    import skglm

    # its tolerance is on the violation of the optimality conditions, in units of lam
    return lambda alpha: skglm.Lasso(alpha, fit_intercept=False, tol=tolerance * alpha)


def _one_by_one(model: Callable, matrix: Matrix, y: Tensor, lam: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what they reached is measured
        rows = zip(y.numpy(), (lam / matrix.shape[0]).tolist(), strict=True)
        return torch.from_numpy(np.stack([model(alpha).fit(matrix, row).coef_ for row, alpha in rows]))


def _tightened(name: str, matrix: Matrix, design: Design, goal: tuple[Tensor, Tensor, float]) -> Solver:
    y, lam, wanted = goal
    for tolerance in TOLERANCES:
        solver = peer(name, matrix, tolerance)
        if worst_gap(design, y, lam, solver(y, lam)) <= wanted:
            break
    return solver
