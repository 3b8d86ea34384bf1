"""Other probabilities for closed-form operators: heads that are fitted to the end, and means, as problems of their own.

A closed-form operator (`tda_core.closed_form`) takes a trained network's probabilities as they are. Three questions
ask for others. `settle`: what if the network were at the optimum of a head beside it, so that nothing is left of where
in its last steps training happened to stop? `own_fit`: what if there were no network at all? That is the control: what
it explains follows from the training set and the features, and says nothing about *this* model. `mean_network`: what if
one network's noise were averaged out before anything is solved?
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tda_core.examples import Examples
from tda_core.feature_maps import FeatureMap
from tda_core.head_systems import Head, system_of
from tda_core.problem import Problem

MAX_STEPS = 100
# Share of the objective that another Newton step would gain; in float32, no less than can be told from rounding
TOLERANCE = 1e-8


class HeadOn(nn.Module):
    """phi(x) W' (+ the outputs of a network that it stands beside): inputs (n, ...) -> (n, C)."""

    def __init__(self, features: FeatureMap, n_outputs: int, beside: Problem | None = None) -> None:
        super().__init__()
        self.features, self.beside = features, beside
        dtype = None if beside is None else beside.theta.dtype
        self.weight = nn.Parameter(torch.zeros(n_outputs, features.n_features, dtype=dtype))
        # so that a problem's identity knows them
        for i, tensor in enumerate(features.state()[0].values()):
            self.register_buffer(f"feature_{i}", tensor)
        self.register_buffer("network", None if beside is None else beside.theta)

    def forward(self, inputs: Tensor) -> Tensor:
        moved = self.features.map(inputs) @ self.weight.T
        return moved if self.beside is None else self.beside.outputs(inputs) + moved


def settle(problem: Problem, features: FeatureMap, ridge: float) -> Problem:
    """The network with a head beside it: outputs o(x) + W phi(x), W at the minimum of the training loss.

    The loss is the problem's, averaged, + ridge/2 ||W||^2; the network stays as it is, and W alone is left to attribute
    to. It is the steering operator of the whole training set, taken to convergence. Damped Newton steps, deterministic.
    Raises ValueError for a ridge that is not finite and above 0 (separable classes have no minimum without), and for
    losses as `closed_form.stride_closed_form` does; RuntimeError where Newton's method does not converge.
    """
    return _fitted(HeadOn(features, problem.n_outputs, problem).to(problem.theta.dtype), problem, ridge)


def own_fit(problem: Problem, features: FeatureMap, ridge: float) -> Problem:
    """`settle` without the network: ridge or softmax regression on the features of the problem's training set.

    Of the network nothing is used but the number of its outputs and its loss.
    """
    return _fitted(HeadOn(features, problem.n_outputs).to(problem.theta.dtype), problem, ridge)


def _fitted(module: HeadOn, problem: Problem, ridge: float) -> Problem:
    if not (math.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge must be finite and > 0, got {ridge}")
    made = Problem(
        module, torch.zeros(module.weight.numel(), dtype=module.weight.dtype), problem.loss, problem.train, ridge
    )
    phi = module.features(problem.train.inputs.to(module.weight.dtype))
    return made.at(_minimum(phi, made.outputs(problem.train.inputs), problem, ridge).flatten())


def _minimum(phi: Tensor, outputs: Tensor, problem: Problem, ridge: float) -> Tensor:
    """The W (C, f) of `settle`, by Newton's method with halved steps where a whole one does not gain."""
    targets, weights = problem.train.targets, outputs.new_zeros(outputs.shape[1], phi.shape[1])

    def objective(w: Tensor) -> float:
        return float(problem.loss(outputs + phi @ w.T, targets).mean() + ridge / 2 * (w**2).sum())

    value, tolerance = objective(weights), max(TOLERANCE, 20 * torch.finfo(phi.dtype).eps)
    for _ in range(MAX_STEPS):
        head = Head.of(phi, outputs + phi @ weights.T, targets, problem.loss)
        slope = head.residuals.T @ phi / len(phi) + ridge * head.contrasts.T @ weights
        step = -system_of(head).solve(slope.reshape(1, -1), ridge).view_as(slope)
        gain = -float((slope * step).sum()) / 2  # what a quadratic objective falls by
        if gain <= tolerance * value:
            return weights
        size = 1.0
        while (reached := objective(weights + size * head.contrasts @ step)) > value - size * gain / 2:
            size /= 2
            if size < 1e-6:
                raise RuntimeError(
                    f"Newton's method stopped at {value:.4g} with {gain:.2g} to gain: use a larger ridge"
                )
        weights, value = weights + size * head.contrasts @ step, reached
    raise RuntimeError(f"Newton's method did not converge in {MAX_STEPS} steps: use a larger ridge than {ridge:g}")


class MeanOf(nn.Module):
    """Logarithm of several classifiers' mean probabilities, or regressions' mean outputs: (n, ...) -> (n, C)."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__()
        self.problems = tuple(problems)
        self.classifies = problems[0].train.is_classification
        for i, problem in enumerate(problems):  # so that a problem's identity knows them
            self.register_buffer(f"network_{i}", problem.theta)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = torch.stack([problem.outputs(inputs) for problem in self.problems])
        if not self.classifies:
            return outputs.mean(0)
        return outputs.log_softmax(2).logsumexp(0) - math.log(len(outputs))


def mean_network(problems: Sequence[Problem], train: Examples) -> Problem:
    """Several networks as one frozen model, whose probabilities (outputs, for a regression) are their mean.

    One network's residuals hold what is particular to its seed and to the step that training stopped at; a mean holds
    less of both, and one closed form of it costs a solve instead of one for each. train: what the mean is to be
    attributed to, which may hold more than any of the networks were trained on (halves of it, say).
    Raises ValueError for no problems, for different losses, and for a training set that does not fit them.
    """
    if not problems:
        raise ValueError("give at least one problem, got none")
    if len({problem.loss for problem in problems}) > 1:
        raise ValueError(f"the problems must share one loss, got {[problem.loss.__qualname__ for problem in problems]}")
    for problem in problems:
        problem.check(train)
    return Problem(MeanOf(problems), problems[0].theta.new_zeros(0), problems[0].loss, train)
