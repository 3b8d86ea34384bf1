"""Tangent dynamics: how the parameters respond, step by step, to removing a training example.

At trained parameters theta, with step eta, damping lambda and g_b the gradient of example b's loss, the
response r_b to removing b from the mean over n examples follows damped gradient steps from r_b = 0:

    r_b  <-  r_b - eta [ (H + lambda I) r_b - g_b / n ]

which tends to (H + lambda I)^-1 g_b / n for eta < 2 / lambda_max. One step is the gradient dot product;
stopping after T steps damps like 1/(eta T); momentum keeps the fixed point and gets there sooner.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_core.curvature import CURVATURES
from tda_core.examples import Examples
from tda_core.problem import Problem
from tda_core.solvers import conjugate_gradients


@dataclass(frozen=True)
class Dynamics:
    """How responses are simulated.

    horizon: steps T. damping: lambda, on top of the problem's weight decay. rate: eta; None takes
    1/lambda_max. momentum: heavy-ball beta, or "adaptive": rate and momentum of each step and example
    chosen for the fastest descent, which is conjugate gradients (full batch; rate and tail do not apply).
    batch_size: training examples per curvature product; None is full batch. tail: share of the last steps
    whose responses are averaged (0: the last one alone), which is what makes mini-batches work. seed:
    order of the mini-batches.
    """

    horizon: int = 20
    damping: float = 1e-2
    rate: float | None = None
    momentum: float | str = "adaptive"
    batch_size: int | None = None
    tail: float = 0.0
    curvature: str = "ggn"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise ValueError(f"horizon must be >= 1 step, got {self.horizon}")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping must be finite and >= 0, got {self.damping}")
        if self.rate is not None and not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate must be finite and > 0, or None for 1/lambda_max, got {self.rate}")
        if self.momentum == "adaptive":
            if self.rate is not None or self.batch_size is not None or self.tail:
                raise ValueError("adaptive momentum is full batch: leave rate, batch_size and tail at their defaults")
        elif isinstance(self.momentum, str) or not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1) or 'adaptive', got {self.momentum!r}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, or None for full batch, got {self.batch_size}")
        if not 0 <= self.tail <= 1:
            raise ValueError(f"tail must be in [0, 1], got {self.tail}")
        if self.curvature not in CURVATURES:
            raise ValueError(f"unknown curvature {self.curvature!r}, expected one of {CURVATURES}")


def heavy_ball(smallest: float, largest: float) -> tuple[float, float]:
    """The (rate, momentum) that contract fastest when curvatures lie in [smallest, largest] (Polyak 1964)."""
    if not 0 < smallest <= largest:
        raise ValueError(f"need 0 < smallest <= largest curvature, got {smallest} and {largest}")
    low, high = math.sqrt(smallest), math.sqrt(largest)
    return 4 / (low + high) ** 2, ((high - low) / (high + low)) ** 2


def pushes(problem: Problem, examples: Examples | None = None) -> Tensor:
    """What removing each example adds to the training objective's gradient, negated: g_b / n_train, (n, p).

    examples: default the training set. n_train is the problem's in any case.
    """
    return problem.gradients(problem.train if examples is None else examples) / len(problem.train)


def trajectory(problem: Problem, dynamics: Dynamics, push: Tensor | None = None) -> Iterator[Tensor]:
    """The responses (n, p) after each step 1..T, averaged over the tail where `tail` asks for it.

    push: (n, p) what pulls each response; default `pushes(problem)`, all training examples one by one. Rows do
    not touch each other, so blocks of rows give what all together give. The tensor given is overwritten by
    the next step, unless the tail average has begun.
    Raises ValueError for an unstable rate and FloatingPointError when a run diverges (mini-batches, or a
    curvature that is not positive).
    """
    push = pushes(problem) if push is None else push
    if dynamics.momentum == "adaptive":
        steps = conjugate_gradients(lambda v: _damped_product(problem, dynamics, v), push)
        yield from (response for _, (response, _) in zip(range(dynamics.horizon), steps, strict=False))
        return
    rate = stable_rate(problem, dynamics)
    # Steps against a curvature >= 0 end nearer than steps without any curvature would: no run may pass 10 times that.
    bound = 10 * dynamics.horizon * rate / (1 - dynamics.momentum) * float(push.norm(dim=1).max())
    response, velocity = torch.zeros_like(push), torch.zeros_like(push)
    tail_start = dynamics.horizon - max(1, round(dynamics.tail * dynamics.horizon))
    average = torch.zeros_like(push) if dynamics.tail else None
    batches = _batches(len(problem.train), dynamics)
    for step in range(dynamics.horizon):
        curved = _damped_product(problem, dynamics, response, next(batches)) if step else torch.zeros_like(push)
        velocity.mul_(dynamics.momentum).sub_(curved.sub_(push), alpha=rate)
        response += velocity
        checked = step % 10 == 9 or step == dynamics.horizon - 1
        if checked and not float(response.norm(dim=1).max()) < bound:
            advice = (
                "the curvature has negative eigenvalues, so raise the damping or use the GGN"
                if dynamics.batch_size is None
                else "mini-batches have larger curvature than the mean, so lower the rate or raise batch_size"
            )
            raise FloatingPointError(
                f"the simulation diverged at step {step + 1} with rate {rate:.4g} and momentum {dynamics.momentum}: "
                + advice
            )
        if average is None or step < tail_start:
            yield response
        else:
            average += (response - average) / (step - tail_start + 1)
            yield average


def _damped_product(problem: Problem, dynamics: Dynamics, vectors: Tensor, rows: Tensor | None = None) -> Tensor:
    return problem.curvature_product(vectors, dynamics.curvature, rows).add_(vectors, alpha=dynamics.damping)


def stable_rate(problem: Problem, dynamics: Dynamics) -> float:
    """The step to take: `dynamics.rate` if heavy-ball descent is stable with it, 1/lambda_max if None.

    Raises ValueError for a rate at or past 2 (1 + momentum) / lambda_max, naming both.
    """
    largest = problem.largest_curvature(dynamics.curvature) + dynamics.damping
    if largest == 0:
        raise ValueError("curvature and damping 0.0 are both zero: no step is fixed, use a damping above 0")
    if dynamics.rate is None:
        return 1 / largest
    limit = 2 * (1 + dynamics.momentum) / largest
    if dynamics.rate >= limit:
        raise ValueError(
            f"rate {dynamics.rate:g} is past the stability limit 2 (1 + momentum) / lambda_max = {limit:.4g} "
            f"(lambda_max {largest:.4g}): the simulation would diverge"
        )
    return dynamics.rate


def closed_form(problem: Problem, dynamics: Dynamics) -> Tensor:
    """Full-batch responses after T steps, (n, p), without taking them: the plain reference of `trajectory`."""
    return ClosedForm.of(problem, dynamics.curvature).responses(dynamics)


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """Responses from an eigendecomposition of the dense curvature: exact, but p^3, so for small p only.

    values: (p,) eigenvalues. vectors: (p, p). push: (n, p), the gradients over n in the eigenbasis.
    """

    problem: Problem
    curvature: str
    values: Tensor
    vectors: Tensor
    push: Tensor

    @classmethod
    def of(cls, problem: Problem, curvature: str = "ggn") -> "ClosedForm":
        values, vectors = torch.linalg.eigh(problem.curvature(curvature))
        push = problem.gradients(problem.train) @ vectors / len(problem.train)
        return cls(problem, curvature, values, vectors, push)

    def filter(self, dynamics: Dynamics) -> Tensor:
        """What T steps make of a unit push in each eigendirection: (p,); 1 / (h + damping) for T to infinity.

        Without momentum it is [1 - (1 - eta h)^T] / h with h including the damping. `tail` is ignored.
        """
        if dynamics.momentum == "adaptive" or dynamics.batch_size is not None:
            raise ValueError("the closed form is for full-batch steps with a fixed momentum")
        if dynamics.curvature != self.curvature:
            raise ValueError(f"the closed form is of curvature {self.curvature!r}, not {dynamics.curvature!r}")
        damped = self.values.double() + dynamics.damping
        rate = dynamics.rate or 1 / float(damped.max())
        response, velocity = torch.zeros_like(damped), torch.zeros_like(damped)
        for _ in range(dynamics.horizon):
            velocity = dynamics.momentum * velocity - rate * (damped * response - 1)
            response = response + velocity
        return response.to(self.values.dtype)

    def responses(self, dynamics: Dynamics) -> Tensor:
        """The responses (n, p)."""
        return (self.push * self.filter(dynamics)) @ self.vectors.T

    def scores(self, queries: Examples, factors: Tensor) -> Tensor:
        """Scores (n_query, n_train) for filter factors (p,), such as `filter(dynamics)`."""
        return (self.problem.gradients(queries) @ self.vectors * factors) @ self.push.T


def _batches(n: int, dynamics: Dynamics) -> Iterator[Tensor | None]:
    """Mini-batches of row indices, reshuffled each epoch; None for full batch."""
    generator = torch.Generator().manual_seed(dynamics.seed)
    size = dynamics.batch_size
    while True:
        if size is None or size >= n:
            yield None
            continue
        # every batch equally large, so that each counts alike in the average
        yield from torch.randperm(n, generator=generator)[: n // size * size].split(size)
