"""The Lasso of many queries that share one dense M: block active sets and exact Newton steps, batched.

A query starts from no weight at all and takes in, a block at a time, the examples whose correlation with the residual
exceeds the penalty most; `recovery_active` minimises over those. All queries move together: products with M
are one matrix product, the small systems one batched Cholesky factorisation. A query leaves when its duality gap,
which holds whatever happened before, is small enough.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda_core.recovery_active import Quadratics, minimise
from tda_core.recovery_design import Dense

# A block takes in examples whose excess over the penalty is at least this share of the largest excess,
SHARE_OF_EXCESS = 0.5
# as many as are active already, or this many, but not so many that the active columns become dependent.
SMALLEST_BLOCK, LARGEST_SUPPORT = 8, 0.9
# Blocks without progress after which a query is given up
IDLE_BLOCKS = 5
# Share of the largest excess, or of the tolerance, that small systems are solved to; of a correlation that is rounding
EXACTNESS, ROUNDING = 0.1, 1e-13
# Floats of the small systems factorised together: about what fits the cache (8 MB)
CHUNK_FLOATS = 2**20


@dataclass(frozen=True, eq=False)
class Solved:
    """weights (q, n); gaps (q,): certified duality gap over the objective; blocks (q,): products with M it took."""

    weights: Tensor
    gaps: Tensor
    blocks: Tensor


@dataclass(frozen=True, eq=False)
class Goal:
    """What is minimised for every row y of `y` (q, K), lam (q,) its penalty:

    1/2 ||y - M w||^2 + lam ||w||_1 + ridge/2 ||w||^2, over w >= 0 where nonnegative; with an intercept, y and the
    columns of M have their means taken off.
    """

    y: Tensor
    lam: Tensor
    ridge: float = 0.0
    nonnegative: bool = False
    intercept: bool = False

    def at(self, rows: Tensor) -> "Goal":
        return Goal(self.y[rows], self.lam[rows], self.ridge, self.nonnegative, self.intercept)

    def centred(self, values: Tensor) -> Tensor:
        """values (q, K) less each row's mean, where there is an intercept."""
        return values - values.mean(1, keepdim=True) if self.intercept else values

    def strength(self, correlations: Tensor) -> Tensor:
        """How far each correlation argues for a weight: its size, or its value where weights are not negative."""
        return correlations if self.nonnegative else correlations.abs()

    def gaps(self, residuals: Tensor, correlations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Each query's duality gap over its objective, a bound on the relative suboptimality, and the objective: (q,).

        residuals: centred(y - M w) (q, K). correlations: M'r - ridge w (q, n). The dual point is the residual, scaled
        until no correlation exceeds lam: D = s <y, r> - s^2/2 (||r||^2 + ridge ||w||^2) (the elastic net is the Lasso
        of M over sqrt(ridge) I; Fercoq et al. 2015, section 2). 0 where y is 0.
        """
        squared = (residuals**2).sum(1) + self.ridge * (weights**2).sum(1)
        primal = squared / 2 + self.lam * weights.abs().sum(1)
        along = (self.centred(self.y) * residuals).sum(1)
        tiny = torch.finfo(primal.dtype).tiny
        bound = self.lam / self.strength(correlations).amax(1).clamp_min(tiny)
        scale = torch.clamp(along / squared.clamp_min(tiny), max=bound)
        lowest = torch.zeros_like(bound) if self.nonnegative else -bound
        scale = torch.maximum(scale, lowest)
        dual = scale * along - scale**2 / 2 * squared
        return (primal - dual).clamp_min(0) / primal.clamp_min(tiny), primal


def solve(dense: Dense, goal: Goal, *, tolerance: float, start: Tensor | None = None) -> Solved:
    """Minimise the goal of every query to a relative duality gap of at most `tolerance`.

    start: (q, n) weights to begin from, sparse ones. A query that rounding keeps from
    the tolerance stops with the gap that it reached, for the caller to judge.
    """
    matrix = dense.matrix
    weights = goal.y.new_zeros(len(goal.y), matrix.shape[1]) if start is None else start.clone()
    gaps, least_gap, least = goal.y.new_full((3, len(goal.y)), torch.inf)
    live, part = torch.arange(len(goal.y), device=goal.y.device), goal
    blocks, idle = torch.zeros_like(live), torch.zeros_like(live)
    while True:
        current = weights[live]
        residuals = part.centred(part.y - current @ matrix.T)
        correlations = residuals @ matrix - part.ridge * current
        found, objective = part.gaps(residuals, correlations, current)
        gaps[live] = found
        blocks[live] += 1
        # every block lowers the objective, in the end by less than its last digit, and the gap: else what is left is
        # rounding
        better = (objective < (1 - 1e-14) * least[live]) | (found < 0.9 * least_gap[live])
        idle[live] = torch.where(better, 0, idle[live] + 1)
        least[live] = torch.minimum(objective, least[live])
        least_gap[live] = torch.minimum(found, least_gap[live])
        going = ((found > tolerance) & (idle[live] < IDLE_BLOCKS)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(live):
            live, part = live[going], part.at(going)
            current, correlations = current[going], correlations[going]
        excess = part.strength(correlations) - part.lam[:, None]
        active = _grown(excess, current, LARGEST_SUPPORT * matrix.shape[0] if not part.ridge else torch.inf)
        # what the small systems leave is little beside what the others ask for, or beside the gap
        floor = torch.maximum(EXACTNESS * excess.amax(1), EXACTNESS * tolerance * part.lam)
        floor = torch.maximum(floor, ROUNDING * correlations.abs().amax(1))[:, None]
        weights[live] = _minimised(dense, part, Moves(correlations, current, active, floor))
    return Solved(weights, gaps, blocks)


def refit(dense: Dense, goal: Goal, weights: Tensor) -> Tensor:
    """Least squares (with the goal's ridge, and its sign constraint) on each row's nonzero weights: (q, n).

    The Lasso's weights are too small by what the penalty takes; this gives it back (Belloni & Chernozhukov 2013).
    Dependent columns share their weight.
    """
    free = replace(goal, lam=torch.zeros_like(goal.lam))
    residuals = free.centred(free.y - weights @ dense.matrix.T)
    correlations = residuals @ dense.matrix - free.ridge * weights
    moves = Moves(correlations, weights, weights != 0, ROUNDING * correlations.abs().amax(1, keepdim=True))
    return _minimised(dense, free, moves)


@dataclass(frozen=True, eq=False)
class Moves:
    """Where each query stands and which examples may move: correlations, weights, active (q, n).

    floor: (q, 1), how far a correlation may exceed the penalty afterwards.
    """

    correlations: Tensor
    weights: Tensor
    active: Tensor
    floor: Tensor


def _minimised(dense: Dense, goal: Goal, moves: Moves) -> Tensor:
    """Weights (q, n) that minimise over each query's active examples alone."""
    result = torch.zeros_like(moves.weights)
    for rows in _chunks(moves.active.sum(1), dense.rows.shape[1]):
        index, valid = _padded(moves.active[rows])
        gram = dense.gram(index, centred=goal.intercept)
        gram.diagonal(dim1=1, dim2=2).add_(goal.ridge)
        start = moves.weights[rows].gather(1, index) * valid
        correlations = moves.correlations[rows].gather(1, index)
        parts = (goal.lam[rows, None], valid, moves.floor[rows], goal.nonnegative)
        found = minimise(Quadratics(gram, correlations, start, *parts))
        result[rows] = torch.zeros_like(moves.weights[rows]).scatter_add_(1, index, found * valid)
    return result


def _grown(excess: Tensor, weights: Tensor, most: float) -> Tensor:
    """What each query works on next: examples with weight, and a block of those that ask for one. (q, n) bool.

    most: the number of examples that blocks stop at, but one at a time goes on.
    """
    used = weights != 0
    excess = torch.where(used, -torch.inf, excess)
    new = (excess >= SHARE_OF_EXCESS * excess.amax(1, keepdim=True)) & (excess > 0)
    count = used.sum(1)
    room = torch.minimum(count.clamp_min(SMALLEST_BLOCK), (most - count).clamp_min(1)).long()
    over = (new.sum(1) > room).nonzero()[:, 0]
    if len(over):
        top = excess[over].topk(min(int(room[over].max()), excess.shape[1]), dim=1).indices
        kept = torch.arange(top.shape[1], device=top.device) < room[over, None]
        new[over] &= torch.zeros_like(new[over]).scatter_(1, top, kept)
    return used | new


def _chunks(counts: Tensor, n_subsets: int) -> list[Tensor]:
    """Rows of similar counts together, so that little is padded and each chunk's systems stay in the cache."""
    order = counts.argsort(descending=True)
    chunks, start = [], 0
    while start < len(order):
        widest = max(int(counts[order[start]]), 1)
        size = max(1, CHUNK_FLOATS // (widest * (widest + n_subsets)))
        chunks.append(order[start : start + size])
        start += size
    return chunks


def _padded(active: Tensor) -> tuple[Tensor, Tensor]:
    """Column numbers of the True entries of each row, and which of them are not padding: (q, s) twice."""
    count = active.sum(1)
    rows, columns = active.nonzero(as_tuple=True)
    place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
    index = torch.zeros(len(active), max(int(count.max()), 1), dtype=torch.long, device=rows.device)
    valid = torch.zeros_like(index, dtype=torch.bool)
    index[rows, place], valid[rows, place] = columns, True
    return index, valid
