"""The gradient methods that forward-only attribution is judged against, and the controls.

All give an `Attribution`: scores(q, b) = <query side of q, train side of b>, summed over checkpoints.
A positive score means that training on b lowers q's loss. Influence scores are in the units of the
loss: the first-order increase of q's loss when b is removed from the mean over n examples.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from tda_core.examples import Examples
from tda_core.problem import Problem
from tda_core.solvers import conjugate_gradients, solve_dense
from tda_core.store import load_tensors, save_tensors

# Above this many parameters the curvature is not built as a matrix (4 p^2 bytes) but applied.
DENSE_LIMIT = 12_000


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


# -- influence functions ----------------------------------------------------------------------------


def exact_influence(
    problem: Problem | Sequence[Problem], damping: float = 1e-2, *, curvature: str = "ggn", last_layer: bool = False
) -> Attribution:
    """g_q' (H + damping I)^-1 g_b / n (Koh & Liang 2017, eq. 2), averaged over the problems given.

    H includes the weight decay. Solved densely (Cholesky) up to `DENSE_LIMIT` parameters, by conjugate
    gradients on the queries beyond. last_layer: the same for the last layer's parameters only.
    Raises ValueError where damping < 0, or H + damping I is not positive definite (an indefinite
    Hessian needs damping above minus its smallest eigenvalue).
    """
    problems = _as_tuple(problem)
    _check_damping(damping)
    solved = [p.head() if last_layer else p for p in problems]
    dense = solved[0].n_parameters <= DENSE_LIMIT
    sides = []
    for member in solved:
        gradients = member.gradients(member.train) / len(member.train)
        sides.append(solve_dense(member.curvature(curvature), gradients, damping) if dense else gradients)
    rule = QuerySide(last_layer=last_layer, damping=None if dense else damping, curvature=curvature)
    return Attribution(problems, tuple(sides), rule)


def last_layer(problem: Problem | Sequence[Problem], damping: float = 1e-2) -> Attribution:
    """Influence of the last linear layer's parameters alone, the layers below frozen."""
    return exact_influence(problem, damping, last_layer=True)


def solve_curvature(problem: Problem, goals: Tensor, damping: float, curvature: str, tolerance: float = 1e-3) -> Tensor:
    """Rows x_i with (H + damping I) x_i = goals_i by conjugate gradients on products with H: (k, p).

    Stops when every residual is below tolerance * ||goals_i||. Raises ValueError on negative curvature and
    RuntimeError where 1000 steps do not suffice, naming the residual reached.
    """
    steps = conjugate_gradients(lambda v: problem.curvature_product(v, curvature) + damping * v, goals)
    for _, (x, residuals) in zip(tqdm(range(1000), desc=f"CG, damping {damping:g}", leave=False), steps, strict=False):
        if float(residuals.max()) <= tolerance:
            return x
    raise RuntimeError(f"relative residual {float(residuals.max()):.2g} after 1000 steps, not {tolerance}")


# -- gradient products and TRAK ---------------------------------------------------------------------


def gradient_dot(problem: Problem | Sequence[Problem]) -> Attribution:
    """g_q' g_b / n: influence with the identity for a curvature; averaged over the problems given."""
    problems = _as_tuple(problem)
    return Attribution(problems, tuple(p.gradients(p.train) / len(p.train) for p in problems), QuerySide())


def tracin(checkpoints: Sequence[Problem], rates: Sequence[float]) -> Attribution:
    """Mean over checkpoints of rate * g_q' g_b / n (Pruthi et al. 2020, TracInCP).

    rates: the learning rate in force at each checkpoint.
    """
    if len(checkpoints) != len(rates) or not len(rates):
        raise ValueError(f"tracin needs one rate per checkpoint, got {len(checkpoints)} and {len(rates)}")
    sides = tuple(rate * p.gradients(p.train) / len(p.train) for p, rate in zip(checkpoints, rates, strict=True))
    return Attribution(_as_tuple(checkpoints), sides, QuerySide())


def trak(
    problem: Problem | Sequence[Problem], damping: float = 0.0, *, dimension: int | None = 512, seed: int = 0
) -> Attribution:
    """TRAK (Park et al. 2023, eq. 13): phi_q' (Phi'Phi/n + damping I)^-1 phi_b (1 - p_b) / n.

    phi: gradient of the margin (of the output for regression), projected to `dimension` Gaussian
    directions (None: not projected, solved in the n x n dual). The original has damping 0.
    Raises ValueError where damping 0 leaves a singular system or dimension < 1.
    """
    problems = _as_tuple(problem)
    _check_damping(damping)
    if dimension is not None and dimension < 1:
        raise ValueError(f"dimension must be >= 1 or None, got {dimension}")
    classifies = problems[0].train.is_classification
    target = "margin" if classifies else "output"
    sides = []
    for number, member in enumerate(problems):
        n = len(member.train)
        phi = member.gradients(member.train, target)
        if dimension is None:
            gram = phi @ phi.T / n
            weighted = solve_dense(gram, torch.eye(n, dtype=phi.dtype), damping) @ phi
        else:
            phi = phi @ projection_matrix(member.n_parameters, dimension, seed + number, dtype=phi.dtype)
            weighted = solve_dense(phi.T @ phi / n, phi, damping)
        # minus dloss/dmargin = 1 - p_y; for regression dloss/doutput, whose square is the loss effect
        with torch.no_grad():
            outputs = member.outputs(member.train.inputs)
            pull = torch.sigmoid(-member.margins(member.train)) if classifies else outputs[:, 0] - member.train.targets
        sides.append(weighted * pull[:, None] / n)
    projection = None if dimension is None else (dimension, seed)
    return Attribution(problems, tuple(sides), QuerySide(target, projection=projection, times_error=not classifies))


@functools.lru_cache(maxsize=2)
def projection_matrix(p: int, k: int, seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Johnson-Lindenstrauss projection (p, k), entries N(0, 1/k): it keeps inner products on average."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(p, k, generator=generator, dtype=torch.float32).to(dtype) / k**0.5


# -- controls ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Similarity:
    """Cosine similarity of inputs, or of features: what a method must beat to be worth its cost."""

    vectors: Tensor
    problem: Problem
    of_features: bool

    def scores(self, queries: Examples) -> Tensor:
        """Cosine similarities (n_query, n_train), in [-1, 1]."""
        self.problem.check(queries)
        found = self.problem.features(queries.inputs) if self.of_features else queries.inputs.flatten(1)
        return F.normalize(found, dim=1) @ self.vectors.T


def input_similarity(problem: Problem) -> Similarity:
    """Control: cosine similarity of raw inputs."""
    return Similarity(F.normalize(problem.train.inputs.flatten(1), dim=1), problem, False)


def feature_similarity(problem: Problem) -> Similarity:
    """Control: cosine similarity of the features that flow into the last linear layer."""
    return Similarity(F.normalize(problem.features(problem.train.inputs), dim=1), problem, True)


def random_scores(n_query: int, n_train: int, *, seed: int) -> Tensor:
    """Control: standard normal scores (n_query, n_train)."""
    return torch.randn(n_query, n_train, generator=torch.Generator().manual_seed(seed))


def _as_tuple(problem: Problem | Sequence[Problem]) -> tuple[Problem, ...]:
    problems = (problem,) if isinstance(problem, Problem) else tuple(problem)
    if not problems:
        raise ValueError("give at least one problem, got none")
    hashes = list(dict.fromkeys(member.train.hash[:16] for member in problems))
    if len(hashes) > 1:  # their scores would be added example by example
        raise ValueError(f"the problems must share one training set, got data {hashes[0]} and {hashes[1]}")
    return problems


def _check_damping(damping: float) -> None:
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be finite and >= 0, got {damping}")
