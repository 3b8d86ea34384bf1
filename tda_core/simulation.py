"""Forward-only attribution (Ma & Nyarko 2025, arXiv 2511.19803; reconstruction in papers/forward_only).

Once, before any query: simulate what removing each training example does to the parameters. At query
time: read the stored responses out with forward evaluations only.

The responses come from the steps in `tda_core.dynamics`. The score of b for query q is the rise of q's loss
when b is removed: positive for a proponent.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import joblib
import torch
from torch import Tensor
from torch.func import vmap
from tqdm.auto import tqdm

from tda_core.dynamics import Dynamics, pushes, trajectory
from tda_core.examples import Examples
from tda_core.problem import Problem
from tda_core.recipes import Recipe
from tda_core.store import load_tensors, save_tensors
from tda_core.threads import one_thread
from tda_core.training import train_many

READOUTS = ("jvp", "two_trajectory", "one_trajectory")


def simulate(
    problem: Problem, dynamics: Dynamics, *, last_layer: bool = False, groups: Tensor | None = None
) -> "ForwardOnly":
    """Simulate the responses to removing each training example, or each group of them, all together.

    last_layer: respond with the last linear layer's parameters only, the layers below frozen: a query then
    costs one forward pass. groups: (n,) int64, the group (a source, a publisher) of each training example, 0
    to the highest; the units of the scores are then the groups, and a group is removed as one.
    Raises ValueError for a rate past the stability limit, naming it, and for groups of another length.
    """
    member = problem.head() if last_layer else problem
    push = pushes(member)
    if groups is not None:
        push = sum_groups(push, groups)
    return ForwardOnly(problem, last_response(member, dynamics, push), dynamics, last_layer)


def last_response(problem: Problem, dynamics: Dynamics, push: Tensor, *, progress: bool = True) -> Tensor:
    """The responses (n, p) at the end of the trajectory that `push` (n, p) drives."""
    steps = trajectory(problem, dynamics, push)
    for response in tqdm(steps, total=dynamics.horizon, desc="simulating", disable=not progress):
        final = response
    return final


def sum_groups(rows: Tensor, groups: Tensor) -> Tensor:
    """Sums of rows that share a group: (n, p), (n,) int64 -> (n_groups, p). Raises what `count_groups` raises."""
    n_groups = count_groups(groups, len(rows))
    return torch.zeros(n_groups, rows.shape[1], dtype=rows.dtype).index_add_(0, groups, rows)


def count_groups(groups: Tensor, n: int) -> int:
    """How many groups n rows fall in, given the group of each.

    Raises ValueError where groups are not n whole numbers from 0 on, or a number in between is missing.
    """
    if groups.dtype != torch.int64 or groups.shape != (n,):
        raise ValueError(f"groups must be {n} int64 numbers, got {groups.dtype} of shape {tuple(groups.shape)}")
    if not n:
        raise ValueError("there is nothing to group: 0 rows")
    counts = torch.bincount(groups.clamp_min(0))
    if int(groups.min()) < 0 or bool((counts == 0).any()):
        empty = int(groups.min()) if int(groups.min()) < 0 else int((counts == 0).nonzero()[0])
        raise ValueError(f"groups must be numbered 0 to {len(counts) - 1} without gaps, but look at {empty}")
    return len(counts)


def simulate_literal(recipe: Recipe, problem: Problem, *, amplitude: float = 1.0, **variants) -> "ForwardOnly":
    """The paper's literal form: short training runs with example b up- and down-weighted.

    From the trained parameters, two runs of `recipe` per example, with weight 1 + amplitude and
    1 - amplitude on it; the response to removing it is half their difference over the amplitude.
    variants: `share_noise` (default True): both runs and all examples see the same mini-batches;
    `one_sided` (default False): the down-weighted run minus the unperturbed one; `seed` (default 0).
    """
    variants = {"share_noise": True, "one_sided": False, "seed": 0} | variants
    if not (math.isfinite(amplitude) and amplitude > 0):
        raise ValueError(f"amplitude must be finite and > 0, got {amplitude}")
    if set(variants) != {"share_noise", "one_sided", "seed"}:
        raise TypeError(f"unknown variant in {sorted(variants)}, expected share_noise, one_sided, seed")
    n = len(problem.train)
    down = -amplitude * torch.eye(n, dtype=recipe.dtype)
    up = torch.zeros_like(down) if variants["one_sided"] else -down
    first = variants["seed"]
    seeds = [[first] * n] * 2 if variants["share_noise"] else [range(first, first + n), range(first + n, first + 2 * n)]
    blocks = torch.arange(n).split(recipe.models_per_block)
    jobs = [
        joblib.delayed(_end_points)(recipe, problem.train, problem.theta, 1 + shift[rows], [of_run[i] for i in rows])
        for shift, of_run in zip((up, down), seeds, strict=True)
        for rows in blocks
    ]
    # a few blocks are done here before worker processes have started
    results = joblib.Parallel(n_jobs=-1 if len(jobs) > 4 else 1, return_as="generator")(jobs)
    ends = torch.cat(list(tqdm(results, total=len(jobs), desc="literal runs", leave=False))).view(2, n, -1)
    sides = 1 if variants["one_sided"] else 2
    response = (ends[1] - ends[0]) / (sides * amplitude)
    return ForwardOnly(problem, response, Dynamics(horizon=recipe.epochs, damping=0.0))


def _end_points(recipe: Recipe, data: Examples, start: Tensor, weights: Tensor, seeds: list[int]) -> Tensor:
    """Where the runs end that begin at `start`: (M, p)."""
    with one_thread():
        return train_many(recipe, data, weights, seeds, start)


@dataclass(frozen=True, eq=False)
class ForwardOnly:
    """Stored responses (n, p) to removing each training example (or group), and their readouts."""

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
            problem, queries = problem.head(), problem.featurise(queries)
        if readout == "jvp":
            return problem.derivatives_along(queries, self.responses)
        problem.check(queries)
        ahead = _losses_at(problem, problem.theta + amplitude * self.responses, queries)
        if readout == "one_trajectory":
            return (ahead - problem.losses(queries)[:, None]) / amplitude
        return (ahead - _losses_at(problem, problem.theta - amplitude * self.responses, queries)) / (2 * amplitude)

    def self_influence(self) -> Tensor:
        """Rise of each training example's own loss when it is removed: (n_train,). ValueError for groups."""
        member = self.problem.head() if self.last_layer else self.problem
        if len(self.responses) != len(member.train):
            raise ValueError(f"self-influence is of single examples, but these are {len(self.responses)} groups")
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
