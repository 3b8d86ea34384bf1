"""What the gradient methods give back: an `Attribution`, scores(q, b) = <query side of q, train side of b>.

Its train sides are computed once; what is done to a query's gradient is plain data, so that it can be saved.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.examples import Examples
from tda_core.problem import Problem
from tda_core.solvers import conjugate_gradients, shifted_conjugate_gradients
from tda_core.store import load_tensors, save_tensors

# Steps of conjugate gradients before they are given up.
MAX_STEPS = 1000


@dataclass(frozen=True)
class QuerySide:
    """What is done to a query's gradient before the product with the train side.

    target: scalar that is differentiated. last_layer: use the head's gradient. projection: (k, seed) of
    a random projection, drawn anew for each model. damping, curvature: solve (H + damping I) x = g by
    conjugate gradients.
    times_error: multiply by dloss/doutput (regression TRAK).
    """

    target: str = "loss"
    last_layer: bool = False
    projection: tuple[int, int] | None = None
    damping: float | None = None
    curvature: str = "ggn"
    times_error: bool = False

    def __call__(self, problem: Problem, queries: Examples, number: int = 0) -> Tensor:
        """(n_query, k) vectors of the model that is `number` in the attribution."""
        if self.last_layer:
            problem, queries = problem.head(), problem.featurise(queries)
        vectors = problem.gradients(queries, self.target)
        if self.times_error:
            vectors *= (problem.outputs(queries.inputs)[:, :1] - queries.targets[:, None]).detach()
        if self.projection:
            k, seed = self.projection
            vectors = vectors @ projection_matrix(problem.n_parameters, k, seed + number, dtype=vectors.dtype)
        if self.damping is not None:
            vectors = solve_curvature(problem, vectors, self.damping, self.curvature)
        return vectors


@dataclass(frozen=True, eq=False)
class Attribution:
    """A fitted gradient method: one train side (n, k) per checkpoint and the rule for queries."""

    problems: tuple[Problem, ...]
    train_sides: tuple[Tensor, ...]
    query_side: QuerySide

    def scores(self, queries: Examples) -> Tensor:
        """Scores of every training example for every query: (n_query, n_train)."""
        self.problems[0].check(queries)
        total = torch.zeros(len(queries), len(self.train_sides[0]), dtype=self.train_sides[0].dtype)
        for number, (problem, train_side) in enumerate(zip(self.problems, self.train_sides, strict=True)):
            total += self.query_side(problem, queries, number) @ train_side.T
        return total / len(self.problems)

    def recorded(self, sizes: Sequence[int] = (1,)) -> "Attribution":
        """The same method, which differentiates batches of these sizes by a recording (`tda_core.recording`)."""
        if self.query_side.last_layer:
            raise ValueError("a last-layer method runs the layers below by themselves, and cannot be recorded")
        return replace(self, problems=tuple(p.recorded(sizes, self.query_side.target) for p in self.problems))

    def self_influence(self, chunk_size: int = 500) -> Tensor:
        """Each training example's score for itself as query: (n_train,)."""
        total = torch.zeros(len(self.train_sides[0]), dtype=self.train_sides[0].dtype)
        for number, (problem, train_side) in enumerate(zip(self.problems, self.train_sides, strict=True)):
            for rows in torch.arange(len(train_side)).split(chunk_size):
                total[rows] += (self.query_side(problem, problem.train[rows], number) * train_side[rows]).sum(1)
        return total / len(self.problems)

    def save(self, path: Path | str) -> None:
        """Write the train sides, the query rule and the hashes of model and data to one file."""
        tensors = {f"train_side_{i}": side.contiguous() for i, side in enumerate(self.train_sides)}
        save_tensors(
            Path(path), tensors, {"query_side": vars(self.query_side), "made_for": [p.identity for p in self.problems]}
        )

    @classmethod
    def load(cls, path: Path | str, problems: Sequence[Problem]) -> "Attribution":
        """Read what `save` wrote; ValueError where the models or the data are not the saved ones."""
        tensors, metadata = load_tensors(Path(path))
        if "query_side" not in metadata:
            raise ValueError(f"{path} does not hold an Attribution, but {sorted(metadata)}")
        rule = metadata["query_side"]
        if len(problems) != len(metadata["made_for"]):
            raise ValueError(f"{path} was made for {len(metadata['made_for'])} problems, but got {len(problems)}")
        for problem, identity in zip(problems, metadata["made_for"], strict=True):
            problem.check_identity(path, identity)
        rule["projection"] = tuple(rule["projection"]) if rule["projection"] else None
        sides = tuple(tensors[f"train_side_{i}"] for i in range(len(tensors)))
        return cls(tuple(problems), sides, QuerySide(**rule))


def one_training_set(problem: Problem | Sequence[Problem]) -> tuple[Problem, ...]:
    """The problems given as a tuple; ValueError where there are none, or their training sets differ."""
    problems = (problem,) if isinstance(problem, Problem) else tuple(problem)
    if not problems:
        raise ValueError("give at least one problem, got none")
    hashes = list(dict.fromkeys(member.train.hash[:16] for member in problems))
    if len(hashes) > 1:  # their scores would be added example by example
        raise ValueError(f"the problems must share one training set, got data {hashes[0]} and {hashes[1]}")
    return problems


def solve_curvature(problem: Problem, goals: Tensor, damping: float, curvature: str, tolerance: float = 1e-3) -> Tensor:
    """Rows x_i with (H + damping I) x_i = goals_i by conjugate gradients on products with H: (k, p).

    Stops when every residual is below tolerance * ||goals_i||. Raises ValueError on negative curvature and
    RuntimeError where 1000 steps do not suffice, naming the residual reached.
    """
    steps = conjugate_gradients(lambda v: problem.curvature_product(v, curvature) + damping * v, goals)
    return _iterate(steps, f"CG, damping {damping:g}", tolerance)


def solve_dampings(
    problem: Problem, goals: Tensor, dampings: Sequence[float], curvature: str, tolerance: float = 1e-3
) -> Tensor:
    """`solve_curvature` for every damping with the products of the smallest alone: (s, k, p)."""

    def product(vectors: Tensor) -> Tensor:
        return problem.curvature_product(vectors, curvature)

    steps = shifted_conjugate_gradients(product, goals, dampings, tolerance=tolerance)
    return _iterate(steps, f"CG, damping {min(dampings):g} and above", tolerance)


def _iterate(steps: Iterator[tuple[Tensor, Tensor]], description: str, tolerance: float) -> Tensor:
    bar = tqdm(range(MAX_STEPS), desc=description, leave=False)
    for _, (x, residuals) in zip(bar, steps, strict=False):
        if float(residuals.max()) <= tolerance:
            return x
    raise RuntimeError(f"relative residual {float(residuals.max()):.2g} after {MAX_STEPS} steps, not {tolerance}")


@functools.lru_cache(maxsize=2)
def projection_matrix(p: int, k: int, seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Johnson-Lindenstrauss projection (p, k), entries N(0, 1/k): it keeps inner products on average."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(p, k, generator=generator, dtype=torch.float32).to(dtype) / k**0.5
