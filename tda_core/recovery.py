"""Sparse recovery: which few examples' influences w explain K measurements y of subsets, y = M w + noise.

The Lasso and its kin for many queries that share the membership matrix M (K, n), dense or sparse, with a duality gap
certified for each query (STRIDE, arXiv 2606.05165, step 4); ridge regression and plain correlation as controls with
the same calling form. `recovery_cvxpy` is the reference that tests compare with, `recovery_choice` chooses lambda.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_core import recovery_descent
from tda_core.recovery_design import Dense, Design, Membership
from tda_core.recovery_newton import Goal, Solved, refit, solve

KINDS = ("lasso", "ridge", "correlation")
# Examples that each query takes in at a time where M is sparse and large, and correlations held at a time (256 MB)
CANDIDATES, HELD_FLOATS = 500, 2**25


@dataclass(frozen=True)
class Penalty:
    """What is asked of w besides fitting y.

    kind: "lasso", 1/2 ||y - M w||^2 + lam ||w||_1; "ridge", lam/2 ||w||^2 instead; "correlation", w = M'y.
    ridge: adds ridge/2 ||w||^2 to the Lasso (the elastic net). nonnegative: w >= 0 (Lasso only). intercept: a base
    shift c that all subsets share, y = c + M w. debias: least squares on the Lasso's support afterwards.
    Raises ValueError for an unknown kind, a ridge below 0, and what a kind cannot do.
    """

    kind: str = "lasso"
    ridge: float = 0.0
    nonnegative: bool = False
    intercept: bool = False
    debias: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown penalty {self.kind!r}, expected one of {list(KINDS)}")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"ridge must be finite and >= 0, got {self.ridge}")
        if self.kind != "lasso" and (self.ridge or self.nonnegative or self.debias):
            raise ValueError(f"ridge, nonnegative and debias are for the lasso, got them with {self.kind!r}")


@dataclass(frozen=True, eq=False)
class Recovered:
    """Influences w of every query, as they were asked for.

    weights: (q, n), in the measurements' floating-point type. intercepts: (q,), zeros without one. lam: (q,).
    gaps: (q,) duality gap over the objective, before debiasing: the objective is at most this share above its
    minimum (0 for the closed forms). steps: (q,) products with M'.
    """

    weights: Tensor
    intercepts: Tensor
    lam: Tensor
    gaps: Tensor
    steps: Tensor

    def to(self, dtype: torch.dtype) -> "Recovered":
        """Weights, intercepts and lam of another floating-point type."""
        return Recovered(self.weights.to(dtype), self.intercepts.to(dtype), self.lam.to(dtype), self.gaps, self.steps)

    def predict(self, membership: Membership) -> Tensor:
        """Measurements that the weights foretell for subsets (K, n): (q, K)."""
        return self.intercepts[:, None] + Design.of(membership).predict(self.weights.double()).to(self.weights.dtype)


def recover(
    membership: Membership,
    measurements: Tensor,
    lam: Tensor | float | None = None,
    penalty: Penalty | None = None,
    *,
    tolerance: float = 1e-4,
) -> Recovered:
    """Recover the influences behind measurements (q, K), one row a query.

    membership: (K, n), see `Design.of`. lam: > 0, one for all or one a query (None for "correlation"); a share of
    `lam_scale`, or chosen by `recovery_choice`. penalty: default the Lasso. tolerance: relative duality gap, > 0.
    Raises ValueError for bad membership, measurements, lam and tolerance, and RuntimeError where rounding keeps a
    query from the tolerance.
    """
    return next(follow_path(membership, measurements, [lam], penalty, tolerance=tolerance))


def recover_path(
    membership: Membership,
    measurements: Tensor,
    lams: Sequence[Tensor | float | None],
    penalty: Penalty | None = None,
    *,
    tolerance: float = 1e-4,
) -> list[Recovered]:
    """`recover` for every lam of a path, each begun from the one before: best in falling order. Raises the same."""
    return list(follow_path(membership, measurements, lams, penalty, tolerance=tolerance))


def follow_path(
    membership: Membership,
    measurements: Tensor,
    lams: Sequence[Tensor | float | None],
    penalty: Penalty | None = None,
    *,
    tolerance: float = 1e-4,
) -> Iterator[Recovered]:
    """`recover_path`, solved as it is asked for, so that it can be left early."""
    penalty = Penalty() if penalty is None else penalty
    design = Design.of(membership)
    y = design.measurements(measurements)
    dtype = measurements.dtype if getattr(measurements, "is_floating_point", lambda: False)() else torch.float32
    if not len(lams):
        raise ValueError("a path needs at least one lam, got none")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance must be finite and > 0, got {tolerance}")
    return (found.to(dtype) for found in _path(design, y, lams, penalty, tolerance))


def _path(
    design: Design, y: Tensor, lams: Sequence[Tensor | float | None], penalty: Penalty, tolerance: float
) -> Iterator[Recovered]:
    start = None
    for lam in lams:
        each = _checked_lam(lam, penalty, y)
        goal = Goal(y, each, penalty.ridge, penalty.nonnegative, penalty.intercept)
        if penalty.kind == "lasso":
            solved = _solve(design, goal, tolerance, start)
            start = solved.weights
            check_gaps(solved.gaps, tolerance)
            weights = _refit(design, goal, start) if penalty.debias else start
        else:
            weights = _closed_form(design, goal, penalty.kind)
            solved = Solved(weights, torch.zeros_like(each), torch.ones_like(each, dtype=torch.long))
        shift = _intercepts(design, goal, weights)
        yield Recovered(weights, shift, each, solved.gaps, solved.blocks)


def lam_scale(membership: Membership, measurements: Tensor, penalty: Penalty | None = None) -> Tensor:
    """The lam of every query (q,) that shares are shares of.

    Lasso: lam_max, the smallest lam whose solution is zero, the largest |M'y| (of M'y where nonnegative). Ridge: the
    mean eigenvalue of M M'. Of centred y and M with an intercept. Never below the smallest positive number, so that
    a query whose measurements are all alike has a lam > 0 and recovers zeros.
    """
    penalty = Penalty() if penalty is None else penalty
    design = Design.of(membership)
    y = design.measurements(measurements)
    goal = Goal(y, y.new_ones(len(y)), penalty.ridge, penalty.nonnegative, penalty.intercept)
    if penalty.kind == "ridge":
        found = design.squared_norms(centred=penalty.intercept).sum().expand(len(y)) / design.n_subsets
    else:
        parts = goal.centred(y).split(max(1, HELD_FLOATS // design.n_examples))
        found = torch.cat([goal.strength(design.correlate(part)).amax(1) for part in parts])
    tiny = torch.finfo(torch.float32).tiny
    return found.clamp_min(tiny).to(y.dtype)


def _checked_lam(lam: Tensor | float | None, penalty: Penalty, y: Tensor) -> Tensor:
    """lam of every query: (q,) float64."""
    if penalty.kind == "correlation":
        if lam is not None:
            raise ValueError(f"correlation has no lam, got {lam}")
        return y.new_zeros(len(y))
    if lam is None:
        raise ValueError(f"{penalty.kind} needs a lam > 0, one for all queries or one each, got None")
    each = torch.as_tensor(lam, dtype=y.dtype, device=y.device).detach()
    if each.shape not in ((), (len(y),)):
        raise ValueError(f"lam must be a number or ({len(y)},), one a query, got shape {tuple(each.shape)}")
    each = each.expand(len(y)).clone()
    bad = (~(torch.isfinite(each) & (each > 0))).nonzero()[:, 0]
    if len(bad):
        raise ValueError(f"lam must be finite and > 0, got {each[bad[0]].item()} for query {int(bad[0])}")
    return each


def check_gaps(gaps: Tensor, tolerance: float) -> None:
    """Raise RuntimeError where a query was not solved to the tolerance, naming the worst."""
    worst = int(gaps.argmax())
    if not gaps[worst] <= tolerance:  # NaN included
        raise RuntimeError(
            f"query {worst} was solved to a relative duality gap of {float(gaps[worst]):.1e} only, tolerance "
            f"{tolerance:.1e}: rounding allows no more; ask for less, or for a larger lam"
        )


def _solve(design: Design, goal: Goal, tolerance: float, start: Tensor | None) -> Solved:
    """Solve a chunk of queries at a time: by active sets and Newton steps all together where M is dense, by coordinate
    descent one by one where it is sparse."""
    size = max(1, HELD_FLOATS // design.n_examples)
    parts = []
    for rows in torch.arange(len(goal.y), device=goal.y.device).split(size):
        begin = None if start is None else start[rows]
        if design.is_sparse:
            parts.append(_solve_sparse(design, goal.at(rows), tolerance, begin))
        elif design.thin is not None:
            parts.append(recovery_descent.solve(design.thin, goal.at(rows), tolerance=tolerance, start=begin))
        else:
            parts.append(solve(design.dense, goal.at(rows), tolerance=tolerance, start=begin))
    return Solved(*(torch.cat([getattr(part, name) for part in parts]) for name in ("weights", "gaps", "blocks")))


def _solve_sparse(design: Design, goal: Goal, tolerance: float, start: Tensor | None) -> Solved:
    """Solve on a working set of candidates that all queries share, and add to it until the gap holds for all of M.

    So M' is applied to residuals a few times only.
    """
    shape = (len(goal.y), design.n_examples)
    weights = goal.y.new_zeros(shape) if start is None else start.clone()
    chosen = (weights != 0).any(0)
    gaps, steps = goal.y.new_full(shape[:1], torch.inf), torch.zeros(shape[0], dtype=torch.long)
    while True:
        residuals = goal.centred(goal.y - design.predict(weights))
        correlations = design.correlate(residuals) - goal.ridge * weights
        gaps, _ = goal.gaps(residuals, correlations, weights)
        steps += 1
        going = (gaps > tolerance).nonzero()[:, 0]
        if not len(going):
            break
        excess = goal.at(going).strength(correlations[going]) - goal.lam[going, None]
        excess[:, chosen] = -torch.inf
        top = excess.topk(min(CANDIDATES, shape[1]), dim=1)
        new = top.indices[top.values > 0].unique()
        if not len(new):
            break  # the candidates' own gap is what rounding allows
        chosen[new] = True
        index = chosen.nonzero()[:, 0]
        begin = weights[going][:, index]
        # a smaller gap than asked for, because examples outside can only make it larger
        columns = design.held[:, index.numpy()]
        inside = recovery_descent.solve(columns, goal.at(going), tolerance=tolerance / 4, start=begin)
        weights[going[:, None], index] = inside.weights
    return Solved(weights, gaps, steps)


def _refit(design: Design, goal: Goal, weights: Tensor) -> Tensor:
    index = (weights != 0).any(0).nonzero()[:, 0]
    result = torch.zeros_like(weights)
    if len(index):
        result[:, index] = refit(Dense.of(design.columns(index)), goal, weights[:, index])
    return result


def _closed_form(design: Design, goal: Goal, kind: str) -> Tensor:
    """Ridge regression M' (M M' + lam I)^-1 y, or correlation M'y, of centred M and y with an intercept: (q, n)."""
    y = goal.centred(goal.y)
    if kind == "correlation":
        return design.correlate(y)
    # centring rows and columns of M M' gives the kernel of the centred M
    kernel = goal.centred(goal.centred(design.kernel()).T)
    values, vectors = torch.linalg.eigh(kernel)
    dual = ((y @ vectors) / (values.clamp_min(0) + goal.lam[:, None])) @ vectors.T
    return design.correlate(goal.centred(dual))


def _intercepts(design: Design, goal: Goal, weights: Tensor) -> Tensor:
    """The best c of y = c + M w: (q,)."""
    if not goal.intercept:
        return goal.y.new_zeros(len(goal.y))
    return goal.y.mean(1) - weights @ design.means
