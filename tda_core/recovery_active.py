"""Minimise the l1-penalised quadratics of many queries, each over its own few active examples, batched.

On the active examples the objective is a piecewise quadratic. Newton's direction on the weights' present signs and an
exact line search over all sign changes minimise it in a few steps (the feature-sign search of Lee et al. 2006,
"Efficient sparse coding algorithms", which lets in one feature at a time, with blocks).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

NEWTON_STEPS = 500
# A Newton step that a sign change cuts to less than this share is short
SHORT_STEP = 0.1
# Relative ridge that factorises dependent columns, whose small change of direction the line search makes up for.
# A smaller one lets rounding in the gradient send weights far along directions that change no measurement.
JITTER = 1e-8


@dataclass(frozen=True, eq=False)
class Quadratics:
    """1/2 (v - w)' G (v - w) - c'(v - w) + lam ||v||_1 for every query, a function of v near w.

    gram: G (q, s, s). correlations: c (q, s), minus the gradient of the smooth part at w. weights: w (q, s).
    lam: (q, 1). valid: (q, s), False for padding. floor: (q, 1), what violation of optimality is none. nonnegative:
    v >= 0.
    """

    gram: Tensor
    correlations: Tensor
    weights: Tensor
    lam: Tensor
    valid: Tensor
    floor: Tensor
    nonnegative: bool = False

    def at(self, rows: Tensor) -> "Quadratics":
        """Some of the queries."""
        parts = (self.gram, self.correlations, self.weights, self.lam, self.valid, self.floor)
        return Quadratics(*(part[rows] for part in parts), self.nonnegative)

    def moved(self, weights: Tensor, slope: Tensor) -> "Quadratics":
        """The same functions seen from other weights. slope: G times the change of the weights."""
        parts = (self.lam, self.valid, self.floor, self.nonnegative)
        return Quadratics(self.gram, self.correlations - slope, weights, *parts)


def minimise(goal: Quadratics) -> Tensor:
    """The minimisers v (q, s), to `floor`."""
    result, live = goal.weights.clone(), torch.arange(len(goal.weights), device=goal.weights.device)
    jammed = torch.zeros_like(goal.lam, dtype=torch.bool)
    for _ in range(NEWTON_STEPS):
        zero, corr = goal.weights == 0, goal.correlations
        sign = torch.where(zero, torch.ones_like(corr) if goal.nonnegative else corr.sign(), goal.weights.sign())
        pull = corr - goal.lam * sign  # minus the gradient, on the side that the sign names
        asks = goal.valid & torch.where(zero, pull * sign, pull.abs()).gt(goal.floor)
        going = asks.any(1).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(live):
            goal, live, jammed = goal.at(going), live[going], jammed[going]
            zero, sign, pull, asks = zero[going], sign[going], pull[going], asks[going]
        # after a short step the weights that there are come to rest first: else steps can shorten without end
        jammed &= (asks & ~zero).any(1, keepdim=True)
        on = goal.valid & torch.where(zero, asks & ~jammed, True)
        direction = _direction(goal.gram, pull, sign, on, zero)
        curved = (goal.gram @ direction[..., None])[..., 0]
        weights, step = _line_search(goal, direction, curved)
        jammed |= step < SHORT_STEP
        goal = goal.moved(weights, step * curved)
        result[live] = weights
    return result


def _direction(gram: Tensor, pull: Tensor, sign: Tensor, on: Tensor, zero: Tensor) -> Tensor:
    """Newton's direction (q, s) over the entries that are on, in which no zero weight leaves against its sign.

    Zero weights that would are held where they are. What remains is a descent direction, or is sought once more
    without them; where none of them can move and no other weight wants to, the one that asks most moves alone.
    """
    direction, on, new = torch.zeros_like(pull), on.clone(), on & zero
    alone = torch.where(new, pull * sign, 0).argmax(1)
    rows = torch.arange(len(pull), device=pull.device)
    while len(rows):
        part = gram if len(rows) == len(pull) else gram[rows]  # a full index would copy everything
        found = _solved(part, torch.where(on[rows], pull[rows], 0), on[rows])
        wrong = new[rows] & on[rows] & (found * sign[rows] <= 0)
        direction[rows] = torch.where(wrong, 0, found)
        on[rows] &= ~wrong
        blocked = wrong.any(1).nonzero()[:, 0]
        held = direction[rows[blocked]]
        # an exact Newton direction has as much decrease as curvature
        curvature = (held * (part[blocked] @ held[..., None])[..., 0]).sum(1)
        rows = rows[blocked][(pull[rows[blocked]] * held).sum(1) <= 1e-3 * curvature]
        idle = rows[(direction[rows].abs().amax(1) == 0) | ~(on & new)[rows].any(1)]
        on[idle] |= torch.zeros_like(on[idle]).scatter(1, alone[idle, None], True)
        new[idle] = False  # which ends the search: the next direction of these rows is taken as it is
    return direction


def _solved(gram: Tensor, goals: Tensor, on: Tensor) -> Tensor:
    """gram x = goals over the entries that are on, 0 elsewhere: (q, s)."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    jitter = JITTER
    while True:
        system = gram * on[:, :, None] * on[:, None, :]
        system.diagonal(dim1=1, dim2=2).copy_(torch.where(on, (1 + jitter) * diagonal, 1))
        factor, failed = torch.linalg.cholesky_ex(system)
        if not failed.any():
            return torch.cholesky_solve(goals[..., None], factor)[..., 0]
        jitter *= 100


def _line_search(goal: Quadratics, direction: Tensor, curved: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum of the objective along the direction, sign changes included: weights (q, s) and steps (q, 1).

    curved: G direction. The derivative along it is linear between the points where a weight crosses zero, and jumps
    up by 2 lam |direction| there (without end where weights may not be negative).
    """
    lam, weights = goal.lam, goal.weights
    curvature = (direction * curved).sum(1, keepdim=True)
    # along dependent columns it is zero up to rounding, of either sign
    own = (goal.gram.diagonal(dim1=1, dim2=2) * direction**2).sum(1, keepdim=True)
    curvature = torch.maximum(curvature, 1e-14 * own).clamp_min(torch.finfo(own.dtype).tiny)
    side = torch.where(weights == 0, direction.sign(), weights.sign())
    slope = ((lam * side - goal.correlations) * direction).sum(1, keepdim=True)
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
    step = torch.maximum(step, last)
    return torch.where(stops & (crossing == last), 0, weights + step * direction), step
