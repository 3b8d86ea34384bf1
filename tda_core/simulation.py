"""Forward-only attribution (Ma & Nyarko 2025, arXiv 2511.19803; reconstruction in papers/forward_only).

Once, before any query: simulate what removing each training example does to the parameters. At query
time: read the stored responses out with forward evaluations only.

At trained parameters theta, with step eta, damping lambda and g_b the gradient of example b's loss, the
response r_b to removing b from the mean over n examples follows damped gradient steps from r_b = 0:

    r_b  <-  r_b - eta [ (H + lambda I) r_b - g_b / n ]

which tends to (H + lambda I)^-1 g_b / n for eta < 2 / lambda_max. After one step this is the gradient dot
product; stopping after T steps damps like 1/(eta T). The score of b for query q is the rise of q's loss.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.func import vmap
from tqdm.auto import tqdm

from tda_core.examples import Examples
from tda_core.problem import CURVATURES, Problem
from tda_core.recipes import Recipe
from tda_core.solvers import conjugate_gradients
from tda_core.store import load_tensors, save_tensors
from tda_core.training import one_thread, train_many

READOUTS = ("jvp", "two_trajectory", "one_trajectory")


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


def simulate(problem: Problem, dynamics: Dynamics, *, last_layer: bool = False) -> "ForwardOnly":
    """Simulate the responses to removing each training example, all together.

    last_layer: respond with the last linear layer's parameters only, the layers below frozen: a query then
    costs one forward pass. Raises ValueError for a rate past the stability limit, naming it.
    """
    member = problem.head() if last_layer else problem
    for step, response in enumerate(tqdm(trajectory(member, dynamics), total=dynamics.horizon, desc="simulating")):
        if step == dynamics.horizon - 1:
            return ForwardOnly(problem, response, dynamics, last_layer)
    raise AssertionError("a horizon of 1 or more always gives a response")


def trajectory(problem: Problem, dynamics: Dynamics) -> Iterator[Tensor]:
    """The responses (n, p) after each step 1..T, averaged over the tail where `tail` asks for it.

    The tensor given is overwritten by the next step, unless the tail average has begun.
    Raises ValueError for an unstable rate and FloatingPointError when a mini-batch run diverges.
    """
    n = len(problem.train)
    push = problem.gradients(problem.train) / n
    if dynamics.momentum == "adaptive":
        steps = conjugate_gradients(lambda v: _damped_product(problem, dynamics, v), push)
        yield from (response for _, (response, _) in zip(range(dynamics.horizon), steps, strict=False))
        return
    rate = stable_rate(problem, dynamics)
    bound = 1e4 * float(push.norm(dim=1).max()) * max(dynamics.horizon * rate, 1.0)
    response, velocity = torch.zeros_like(push), torch.zeros_like(push)
    tail_start = dynamics.horizon - max(1, round(dynamics.tail * dynamics.horizon))
    average = torch.zeros_like(push) if dynamics.tail else None
    batches = _batches(n, dynamics)
    for step in range(dynamics.horizon):
        curved = _damped_product(problem, dynamics, response, next(batches)) if step else torch.zeros_like(push)
        velocity.mul_(dynamics.momentum).sub_(curved.sub_(push), alpha=rate)
        response += velocity
        if step % 10 == 9 and not float(response.norm(dim=1).max()) < bound:
            raise FloatingPointError(
                f"the simulation diverged at step {step + 1} with rate {rate:.4g} and momentum {dynamics.momentum}: "
                "mini-batches have larger curvature than the mean, so lower the rate or raise batch_size"
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
    """Full-batch responses after T steps from an eigendecomposition of the dense curvature: (n, p).

    The plain reference of `trajectory`: in each eigendirection the steps are a scalar recursion. Without
    momentum it is [1 - (1 - eta h)^T] / h. Exact, but p^3: for small p only. `tail` is ignored.
    """
    if dynamics.momentum == "adaptive" or dynamics.batch_size is not None:
        raise ValueError("the closed form is for full-batch steps with a fixed momentum")
    rate = stable_rate(problem, dynamics)
    values, vectors = torch.linalg.eigh(problem.curvature(dynamics.curvature).double())
    values += dynamics.damping
    response, velocity = torch.zeros_like(values), torch.zeros_like(values)
    for _ in range(dynamics.horizon):
        velocity = dynamics.momentum * velocity - rate * (values * response - 1)
        response = response + velocity
    push = problem.gradients(problem.train).double() / len(problem.train)
    return (((push @ vectors) * response) @ vectors.T).to(problem.theta.dtype)


def simulate_literal(recipe: Recipe, problem: Problem, *, amplitude: float = 1.0, **variants) -> "ForwardOnly":
    """The paper's literal form: short training runs with example b up- and down-weighted.

    From the trained parameters, two runs of `recipe` per example, with weight 1 + amplitude and
    1 - amplitude on it; the response to removing it is half their difference over the amplitude.
    variants: `share_noise` (default True): both runs and all examples see the same mini-batches;
    `one_sided` (default False): the down-weighted run minus the unperturbed one; `seed` (default 0).
    """
    variants = {"share_noise": True, "one_sided": False, "seed": 0} | variants
    if amplitude <= 0:
        raise ValueError(f"amplitude must be > 0, got {amplitude}")
    if set(variants) != {"share_noise", "one_sided", "seed"}:
        raise TypeError(f"unknown variant in {sorted(variants)}, expected share_noise, one_sided, seed")
    n = len(problem.train)
    up = torch.zeros(n, n) if variants["one_sided"] else torch.eye(n) * amplitude
    down = -torch.eye(n) * amplitude
    first = variants["seed"]
    seeds = [[first] * n] * 2 if variants["share_noise"] else [range(first, first + n), range(first + n, first + 2 * n)]
    ends = []
    with one_thread():
        for shift, of_run in zip((up, down), seeds, strict=True):
            blocks = torch.arange(n).split(recipe.models_per_block)
            ends.append(
                torch.cat([
                    train_many(recipe, problem.train, 1 + shift[rows], [of_run[i] for i in rows], problem.theta)
                    for rows in tqdm(blocks, desc="literal runs", leave=False)
                ])
            )  # fmt: skip
    sides = 1 if variants["one_sided"] else 2
    response = (ends[1] - ends[0]) / (sides * amplitude)
    return ForwardOnly(problem, response, Dynamics(horizon=recipe.epochs, damping=0.0))


@dataclass(frozen=True, eq=False)
class ForwardOnly:
    """Stored responses (n, p) to removing each training example, and their readouts."""

    problem: Problem
    responses: Tensor
    dynamics: Dynamics
    last_layer: bool = False

    def scores(self, queries: Examples, readout: str = "jvp", *, amplitude: float = 1.0) -> Tensor:
        """Scores (n_query, n_train): the rise of each query's loss when an example is removed.

        readout, none of which runs a backward pass:
        "jvp": forward-mode derivative along each response, the amplitude -> 0 limit;
        "two_trajectory": [loss(theta + a r) - loss(theta - a r)] / 2a, bias O(a^2);
        "one_trajectory": [loss(theta + a r) - loss(theta)] / a, bias O(a). a: amplitude, 1 = removal.
        """
        if readout not in READOUTS:
            raise ValueError(f"unknown readout {readout!r}, expected one of {READOUTS}")
        if not (math.isfinite(amplitude) and amplitude > 0):
            raise ValueError(f"amplitude must be finite and > 0, got {amplitude}")
        problem = self.problem
        if self.last_layer:
            problem, queries = self._head, self.problem.featurise(queries)
        if readout == "jvp":
            return problem.derivatives_along(queries, self.responses)
        problem.check(queries)
        ahead = _losses_at(problem, problem.theta + amplitude * self.responses, queries)
        if readout == "one_trajectory":
            return (ahead - problem.losses(queries)[:, None]) / amplitude
        return (ahead - _losses_at(problem, problem.theta - amplitude * self.responses, queries)) / (2 * amplitude)

    @property
    def _head(self) -> Problem:
        return self.problem.head()

    def self_influence(self) -> Tensor:
        """Rise of each training example's own loss when it is removed: (n_train,)."""
        member = self._head if self.last_layer else self.problem
        return (member.gradients(member.train) * self.responses).sum(1)

    def save(self, path: Path | str) -> None:
        """Write responses, settings and the hashes of model and data to one file."""
        metadata = {"dynamics": asdict(self.dynamics), "last_layer": self.last_layer}
        save_tensors(Path(path), {"responses": self.responses}, metadata | self.problem.identity)

    @classmethod
    def load(cls, path: Path | str, problem: Problem) -> "ForwardOnly":
        """Read what `save` wrote; ValueError where model or data are not the saved ones."""
        tensors, metadata = load_tensors(Path(path))
        problem.check_identity(path, metadata)
        return cls(problem, tensors["responses"], Dynamics(**metadata["dynamics"]), metadata["last_layer"])


def _losses_at(problem: Problem, thetas: Tensor, queries: Examples, chunk: int = 256) -> Tensor:
    """Forward evaluation of every query under every parameter vector: (n, p) -> (n_query, n)."""

    def losses(theta: Tensor) -> Tensor:
        return problem.loss(problem.outputs(queries.inputs, theta), queries.targets)

    with torch.no_grad():
        return vmap(losses, chunk_size=chunk)(thetas).T


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
