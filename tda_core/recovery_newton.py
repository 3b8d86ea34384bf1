"""The Lasso of many queries that share one dense M: block active sets and exact Newton steps, batched.

A query starts from no weight at all and takes in, a block at a time, the examples whose correlation with the residual
exceeds the penalty most. On its few active examples the objective is a piecewise quadratic, which Newton's direction
and an exact line search over all sign changes minimise in a few steps (the feature-sign search of Lee et al. 2006,
"Efficient sparse coding algorithms", with blocks for single features). All queries move together: products with M
are one matrix product, the small systems one batched Cholesky factorisation. A query leaves when its duality gap,
which holds whatever happened before, is small enough.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A block takes in examples whose excess over the penalty is at least this share of the largest excess,
SHARE_OF_EXCESS = 0.5
# as many as are active already, or this many, but not so many that the active columns become dependent.
SMALLEST_BLOCK, LARGEST_SUPPORT = 16, 0.9
NEWTON_STEPS, IDLE_BLOCKS = 500, 3
# A Newton step that a sign change cuts to less than this share is short
SHORT_STEP = 0.1
# Share of the largest correlation that counts as none
ROUNDING = 1e-13
# Relative ridge that factorises equal columns; the line search makes up for the tiny change of direction.
JITTER = 1e-10
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


def solve(matrix: Tensor, goal: Goal, *, tolerance: float, start: Tensor | None = None) -> Solved:
    """Minimise the goal of every query to a relative duality gap of at most `tolerance`.

    matrix: (K, n) float64 dense. start: (q, n) weights to begin from, sparse ones. A query that rounding keeps from
    the tolerance stops with the gap that it reached, for the caller to judge.
    """
    transposed = matrix.T.contiguous()
    weights = goal.y.new_zeros(len(goal.y), matrix.shape[1]) if start is None else start.clone()
    gaps, lowest = goal.y.new_full((2, len(goal.y)), torch.inf)
    live, part = torch.arange(len(goal.y), device=goal.y.device), goal
    blocks, idle = torch.zeros_like(live), torch.zeros_like(live)
    while True:
        current = weights[live]
        residuals = part.centred(part.y - current @ transposed)
        correlations = residuals @ matrix - part.ridge * current
        gaps[live], objective = part.gaps(residuals, correlations, current)
        blocks[live] += 1
        # every block lowers the objective: where it does not, what is left is rounding
        idle[live] = torch.where(objective < lowest[live] * (1 - 1e-14), 0, idle[live] + 1)
        lowest[live] = torch.minimum(lowest[live], objective)
        going = ((gaps[live] > tolerance) & (idle[live] < IDLE_BLOCKS)).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(live):
            live, part = live[going], part.at(going)
            current, correlations = current[going], correlations[going]
        active = _grown(part, correlations, current, matrix.shape[0])
        weights[live] = _minimised(transposed, part, correlations, current, active)
    return Solved(weights, gaps, blocks)


def refit(matrix: Tensor, goal: Goal, weights: Tensor) -> Tensor:
    """Least squares (with the goal's ridge, and its sign constraint) on each row's nonzero weights: (q, n).

    The Lasso's weights are too small by what the penalty takes; this gives it back (Belloni & Chernozhukov 2013).
    Dependent columns share their weight.
    """
    free = replace(goal, lam=torch.zeros_like(goal.lam))
    residuals = free.centred(free.y - weights @ matrix.T)
    correlations = residuals @ matrix - free.ridge * weights
    return _minimised(matrix.T.contiguous(), free, correlations, weights, weights != 0)


def _minimised(transposed: Tensor, goal: Goal, correlations: Tensor, weights: Tensor, active: Tensor) -> Tensor:
    """Weights (q, n) that minimise over each query's active examples alone. correlations: at `weights`."""
    n_subsets, means = transposed.shape[1], transposed.mean(1)
    result = torch.zeros_like(weights)
    for rows in _chunks(active.sum(1), n_subsets):
        index, valid = _padded(active[rows])
        columns = transposed[index]
        gram = columns @ columns.mT
        if goal.intercept:
            centre = means[index]
            gram -= n_subsets * centre[:, :, None] * centre[:, None, :]
        gram.diagonal(dim1=1, dim2=2).add_(goal.ridge)
        start = weights[rows].gather(1, index) * valid
        small = _newton(gram, goal.at(rows), correlations[rows].gather(1, index), start, valid)
        result[rows] = torch.zeros_like(weights[rows]).scatter_add_(1, index, small * valid)
    return result


def _grown(goal: Goal, correlations: Tensor, weights: Tensor, n_subsets: int) -> Tensor:
    """What each query works on next: examples with weight, and a block of those that ask for one. (q, n) bool."""
    used = weights != 0
    excess = torch.where(used, -torch.inf, goal.strength(correlations) - goal.lam[:, None])
    largest = excess.amax(1, keepdim=True)
    new = (excess >= SHARE_OF_EXCESS * largest) & (excess > 0)
    count = used.sum(1)
    room = count.clamp_min(SMALLEST_BLOCK)
    if not goal.ridge:
        room = torch.minimum(room, int(LARGEST_SUPPORT * n_subsets) - count).clamp_min(1)
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


def _newton(gram: Tensor, goal: Goal, correlations: Tensor, start: Tensor, valid: Tensor) -> Tensor:
    """Minimise over the active examples alone, from `start` (q, s), where the correlations are known.

    gram: (q, s, s) with the ridge. Returns weights (q, s).
    """
    weights, live = start.clone(), torch.arange(len(start), device=start.device)
    lam, floor = goal.lam[:, None], ROUNDING * (correlations * valid).abs().amax(1, keepdim=True)
    jammed = torch.zeros_like(lam, dtype=torch.bool)
    for _ in range(NEWTON_STEPS):
        moved = (weights - start)[live, :, None]
        corr = correlations[live] - (gram[live] @ moved)[..., 0]
        here, zero = weights[live], weights[live] == 0
        sign = torch.where(zero, torch.ones_like(corr) if goal.nonnegative else corr.sign(), here.sign())
        pull = corr - lam[live] * sign  # minus the gradient, on the side that the sign names
        asks = valid[live] & torch.where(zero, pull * sign, pull.abs()).gt(floor[live])
        going = asks.any(1).nonzero()[:, 0]
        if not len(going):
            break
        rows = slice(None) if len(going) == len(live) else going  # a full index would copy everything
        live, part, here, corr, asks = live[rows], gram[live[rows]], here[rows], corr[rows], asks[rows]
        # after a short step the weights that there are come to rest first: else steps can shorten without end
        unrest = (asks & (here != 0)).any(1, keepdim=True)
        jammed[live] &= unrest
        on = valid[live] & torch.where(here == 0, asks & ~jammed[live], True)
        direction = _direction(part, pull[rows], sign[rows], on, here == 0)
        weights[live], step = _line_search(part, goal.at(live), corr, here, direction)
        jammed[live] |= step < SHORT_STEP
    return weights


def _direction(gram: Tensor, pull: Tensor, sign: Tensor, on: Tensor, zero: Tensor) -> Tensor:
    """Newton's direction (q, s) over the entries that are on, in which no zero weight leaves against its sign.

    Zero weights that would are held where they are. What remains is a descent direction, or is sought once more
    without them; where none of them can move and no other weight wants to, the one that asks most moves alone.
    """
    direction, on, new = torch.zeros_like(pull), on.clone(), on & zero
    alone = torch.where(new, pull * sign, 0).argmax(1)
    rows = torch.arange(len(pull), device=pull.device)
    while len(rows):
        found = _solved(gram[rows], torch.where(on[rows], pull[rows], 0), on[rows])
        wrong = new[rows] & on[rows] & (found * sign[rows] <= 0)
        held = torch.where(wrong, 0, found)
        curvature = (held * (gram[rows] @ held[..., None])[..., 0]).sum(1)
        # an exact Newton direction has as much decrease as curvature
        again = wrong.any(1) & ((pull[rows] * held).sum(1) <= 1e-3 * curvature)
        direction[rows] = held
        on[rows] &= ~wrong
        rows = rows[again]
        idle = rows[(direction[rows].abs().amax(1) == 0) | ~(on & new)[rows].any(1)]
        on[idle] |= torch.zeros_like(on[idle]).scatter(1, alone[idle, None], True)
        new[idle] = False  # which ends the search: the next direction of these rows is taken as it is
    return direction


def _solved(gram: Tensor, goals: Tensor, on: Tensor) -> Tensor:
    """gram x = goals over the entries that are on, 0 elsewhere: (q, s)."""
    system = gram * (on[:, :, None] & on[:, None, :])
    diagonal = gram.diagonal(dim1=1, dim2=2)
    jitter = JITTER
    while True:
        system.diagonal(dim1=1, dim2=2).copy_(torch.where(on, (1 + jitter) * diagonal, 1))
        factor, failed = torch.linalg.cholesky_ex(system)
        if not failed.any():
            return torch.cholesky_solve(goals[..., None], factor)[..., 0]
        jitter *= 100


def _line_search(gram: Tensor, goal: Goal, corr: Tensor, weights: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum of the objective along the direction, sign changes included: weights (q, s) and steps (q, 1).

    The derivative along it is linear between the points where a weight crosses zero, and jumps up by
    2 lam |direction| there (without end where weights may not be negative).
    """
    lam = goal.lam[:, None]
    curvature = (direction * (gram @ direction[..., None])[..., 0]).sum(1, keepdim=True)
    # along dependent columns it is zero up to rounding, of either sign
    own = (gram.diagonal(dim1=1, dim2=2) * direction**2).sum(1, keepdim=True)
    curvature = torch.maximum(curvature, 1e-14 * own).clamp_min(torch.finfo(own.dtype).tiny)
    side = torch.where(weights == 0, direction.sign(), weights.sign())
    slope = ((lam * side - corr) * direction).sum(1, keepdim=True)
    crossing = torch.where(weights * direction < 0, -weights / direction, torch.inf)
    ordered = crossing.sort(1)
    jump = (2 * lam * direction.abs()).gather(1, ordered.indices)
    if goal.nonnegative:
        jump = torch.full_like(jump, torch.inf)
    total = torch.cat([torch.zeros_like(slope), jump.cumsum(1)], 1)
    before = slope + ordered.values * curvature + total[:, :-1]  # the derivative just before each crossing
    passed = (before < 0).sum(1, keepdim=True)
    last = torch.cat([torch.zeros_like(slope), ordered.values], 1).gather(1, passed)
    step = -(slope + total.gather(1, passed)) / curvature
    stops = step <= last  # the minimum is at a crossing, whose weight becomes zero
    moved = weights + torch.maximum(step, last) * direction
    return torch.where(stops & (crossing == last), 0, moved), torch.maximum(step, last)
