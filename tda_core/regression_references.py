"""What an example does to a linear regression: gradient inner products, influence, and exact refits with it added.

Losses are half squared errors, (w'x - y)^2 / 2. All scores are gains of every query by every candidate, (t, n, m): the
query's loss less its loss once the candidate is learnt from, so positive for proponents. The regression starts from
the ridge fit of the background (0 where that is empty) with penalty ridge ||w||^2 / 2.
"""

import math

import torch
from torch import Tensor

from tda_core.regression_tasks import Pairs, Predictor, Tasks

# Contexts that a predictor is given at a time: with 100 queries each, an attention layer holds 40 MB of weights
BLOCK = 250


def ridge_fit(pairs: Pairs, ridge: float) -> Tensor:
    """argmin_w sum_i (w'x_i - y_i)^2 / 2 + ridge ||w||^2 / 2, the posterior mean for ridge = noise^2: (t, d).

    Raises ValueError for a ridge below 0, and for 0 with fewer examples than dimensions.
    """
    return torch.linalg.solve(_hessian(pairs, ridge), _moments(pairs))


def least_squares_fit(pairs: Pairs) -> Tensor:
    """The shortest w of least squared error: (t, d)."""
    return (torch.linalg.pinv(pairs.inputs) @ pairs.targets[:, :, None])[:, :, 0]


def one_step_fit(pairs: Pairs, eta: float) -> Tensor:
    """w after one step of gradient descent from 0 on the mean loss: eta / k sum_i y_i x_i, and 0 for none: (t, d)."""
    return eta / max(1, len(pairs)) * _moments(pairs)


def ridge_predictor(ridge: float) -> Predictor:
    return lambda context, inputs: predict(ridge_fit(context, ridge), inputs)


def least_squares_predictor(context: Pairs, inputs: Tensor) -> Tensor:
    return predict(least_squares_fit(context), inputs)


def one_step_predictor(eta: float) -> Predictor:
    return lambda context, inputs: predict(one_step_fit(context, eta), inputs)


def predict(weights: Tensor, inputs: Tensor) -> Tensor:
    """w'x for weights (t, d) and inputs (t, m, d): (t, m)."""
    return (inputs @ weights[:, :, None])[:, :, 0]


def inner_product(tasks: Tasks, ridge: float) -> Tensor:
    """<g_q, g_z> of the gradients of both losses at the background's fit: (t, n, m)."""
    own, others = _gradients(tasks, ridge)
    return own @ others.mT


def influence(tasks: Tasks, ridge: float, *, damping: float = 0.0) -> Tensor:
    """g_q' (H + damping I)^{-1} g_z, with H the Hessian of the background's penalised objective: (t, n, m).

    Without a background H is ridge I, and it is the inner product up to a factor.
    """
    _check_penalty("damping", damping)
    own, others = _gradients(tasks, ridge)
    hessian = _hessian(tasks.background, ridge, extra=damping)
    return own @ torch.linalg.solve(hessian, others.mT)


def leave_one_in(tasks: Tasks, ridge: float) -> Tensor:
    """The exact change by refitting with the candidate: loss of the background's fit less that of the refit (t, n, m).

    By Sherman and Morrison the refit differs by H^{-1} x (y - w'x) / (1 + x'H^{-1}x), so that no system is solved for
    each candidate. `loss_changes(ridge_predictor(ridge), tasks)` is the plain reference.
    """
    weights = ridge_fit(tasks.background, ridge)
    candidates, queries = tasks.candidates, tasks.queries
    solved = torch.linalg.solve(_hessian(tasks.background, ridge), candidates.inputs.mT).mT  # H^{-1} x: (t, n, d)
    leverage = (solved * candidates.inputs).sum(2)
    step = solved * ((candidates.targets - predict(weights, candidates.inputs)) / (1 + leverage))[:, :, None]
    errors = (predict(weights, queries.inputs) - queries.targets)[:, None]  # (t, 1, m)
    moved = step @ queries.inputs.mT
    return -moved * errors - moved**2 / 2


def with_candidates(tasks: Tasks) -> Pairs:
    """The contexts of background and one candidate: (t n, k + 1), candidates running fastest, and last in the context.

    The candidate comes after the background, next to the query, as a demonstration does that is added to a prompt.
    """
    t, n, d = tasks.candidates.inputs.shape
    background = tasks.background
    inputs = torch.cat(
        [background.inputs[:, None].expand(t, n, -1, d), tasks.candidates.inputs[:, :, None]], dim=2
    ).flatten(0, 1)
    targets = torch.cat([background.targets[:, None].expand(t, n, -1), tasks.candidates.targets[:, :, None]], dim=2)
    return Pairs(inputs, targets.flatten(0, 1))


@torch.no_grad()
def changes_of_prediction(predictor: Predictor, tasks: Tasks) -> tuple[Tensor, Tensor]:
    """Predictions for the queries without a candidate (t, 1, m) and with each of them (t, n, m)."""
    t, n, _ = tasks.candidates.inputs.shape
    before = _in_blocks(predictor, tasks.background, tasks.queries.inputs)
    contexts = with_candidates(tasks)
    after = _in_blocks(predictor, contexts, tasks.queries.inputs.repeat_interleave(n, 0))
    return before[:, None], after.view(t, n, -1)


def loss_changes(predictor: Predictor, tasks: Tasks) -> Tensor:
    """The continuous score of in-context probing: a query's loss less its loss with the candidate in context (t, n, m).

    Raises ValueError as `falls_of_loss` does.
    """
    return falls_of_loss(*changes_of_prediction(predictor, tasks), tasks.queries)


def falls_of_loss(before: Tensor, after: Tensor, queries: Pairs) -> Tensor:
    """Losses of predictions before (t, 1, m) less those after (t, n, m). Raises ValueError for NaN or infinity."""
    targets = queries.targets[:, None]
    gains = (before - targets) ** 2 / 2 - (after - targets) ** 2 / 2
    if not torch.isfinite(gains).all():
        raise ValueError(f"predictions must be finite: {int((~torch.isfinite(gains)).sum())} loss changes are not")
    return gains


def indicator(gains: Tensor) -> Tensor:
    """The published score, the share of queries whose loss falls, strictly: (t, n, m) -> (t, n)."""
    return (gains > 0).to(gains.dtype).mean(-1)


def squared_errors(predictor: Predictor, context: Pairs, queries: Pairs) -> Tensor:
    """Mean squared error on each task's queries, given the context: (t,)."""
    return ((_in_blocks(predictor, context, queries.inputs) - queries.targets) ** 2).mean(1)


@torch.no_grad()
def _in_blocks(predictor: Predictor, context: Pairs, inputs: Tensor) -> Tensor:
    blocks = (slice(start, start + BLOCK) for start in range(0, len(inputs), BLOCK))
    return torch.cat([predictor(Pairs(context.inputs[b], context.targets[b]), inputs[b]) for b in blocks])


def _gradients(tasks: Tasks, ridge: float) -> tuple[Tensor, Tensor]:
    """Gradients of the losses of candidates (t, n, d) and of queries (t, m, d) at the background's fit."""
    weights = ridge_fit(tasks.background, ridge)
    errors = ((predict(weights, pairs.inputs) - pairs.targets, pairs) for pairs in (tasks.candidates, tasks.queries))
    own, others = (error[:, :, None] * pairs.inputs for error, pairs in errors)
    return own, others


def _moments(pairs: Pairs) -> Tensor:
    return (pairs.inputs * pairs.targets[:, :, None]).sum(1)


def _hessian(pairs: Pairs, ridge: float, *, extra: float = 0.0) -> Tensor:
    _check_penalty("ridge", ridge)
    d = pairs.inputs.shape[2]
    if ridge + extra == 0 and len(pairs) < d:
        raise ValueError(f"without a ridge a fit needs at least {d} examples, got {len(pairs)}")
    return pairs.inputs.mT @ pairs.inputs + (ridge + extra) * torch.eye(d, dtype=pairs.inputs.dtype)


def _check_penalty(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value}")
