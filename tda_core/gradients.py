"""The gradient methods that forward-only attribution is judged against, and the controls.

All give an `Attribution`: scores(q, b) = <query side of q, train side of b>, summed over checkpoints.
A positive score means that training on b lowers q's loss. Influence scores are in the units of the
loss: the first-order increase of q's loss when b is removed from the mean over n examples.

A family is a method of one model whose damping is left open: at(damping) is the method, scores(queries,
dampings) gives {damping: scores} with the work that dampings share done once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from tda_core.attribution import Attribution, QuerySide, one_training_set, solve_dampings
from tda_core.examples import Examples
from tda_core.problem import Problem
from tda_core.solvers import by_damping, check_damping, solve_dense

# Above this many parameters the curvature is not built as a matrix (4 p^2 bytes) but applied.
DENSE_LIMIT = 12_000


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
    check_damping(damping)
    options = {"curvature": curvature, "last_layer": last_layer}
    return _averaged([InfluenceFamily.of(member, **options).at(damping) for member in one_training_set(problem)])


def last_layer(problem: Problem | Sequence[Problem], damping: float = 1e-2) -> Attribution:
    """Influence of the last linear layer's parameters alone, the layers below frozen."""
    return exact_influence(problem, damping, last_layer=True)


@dataclass(frozen=True, eq=False)
class InfluenceFamily:
    """`exact_influence` of one model with the damping left open.

    gradients: (n, p) of the training losses, over n, in the parameters that respond.
    """

    problem: Problem
    gradients: Tensor
    curvature: str
    last_layer: bool

    @classmethod
    def of(cls, problem: Problem, *, curvature: str = "ggn", last_layer: bool = False) -> "InfluenceFamily":
        solved = problem.head() if last_layer else problem
        return cls(problem, solved.gradients(solved.train) / len(solved.train), curvature, last_layer)

    def at(self, damping: float) -> Attribution:
        check_damping(damping)
        side = solve_dense(self._matrix, self.gradients, damping) if self._dense else self.gradients
        of_queries = None if self._dense else damping
        rule = QuerySide(last_layer=self.last_layer, damping=of_queries, curvature=self.curvature)
        return Attribution((self.problem,), (side,), rule)

    def scores(self, queries: Examples, dampings: Sequence[float]) -> dict[float, Tensor]:
        """Scores (n_query, n_train) by damping, for the curvature products of the smallest damping alone.

        Dampings with which the system is not positive definite are left out: NotPositiveDefinite where all are.
        Raises ValueError for no damping, and one that is negative or not finite.
        """
        goals = QuerySide(last_layer=self.last_layer)(self.problem, queries)

        def solve(rising: list[float]) -> Sequence[Tensor]:
            if self._dense:
                return [solve_dense(self._matrix, goals, damping) for damping in rising]
            return solve_dampings(self._solved, goals, rising, self.curvature)

        return {damping: solved @ self.gradients.T for damping, solved in by_damping(solve, dampings).items()}

    @property
    def _solved(self) -> Problem:
        return self.problem.head() if self.last_layer else self.problem

    @property
    def _dense(self) -> bool:
        return self.gradients.shape[1] <= DENSE_LIMIT

    @property
    def _matrix(self) -> Tensor:
        return self._solved.curvature(self.curvature)


# -- gradient products and TRAK ---------------------------------------------------------------------


def gradient_dot(problem: Problem | Sequence[Problem]) -> Attribution:
    """g_q' g_b / n: influence with the identity for a curvature; averaged over the problems given."""
    problems = one_training_set(problem)
    return Attribution(problems, tuple(p.gradients(p.train) / len(p.train) for p in problems), QuerySide())


def tracin(checkpoints: Sequence[Problem], rates: Sequence[float]) -> Attribution:
    """Mean over checkpoints of rate * g_q' g_b / n (Pruthi et al. 2020, TracInCP).

    rates: the learning rate in force at each checkpoint.
    """
    if len(checkpoints) != len(rates) or not len(rates):
        raise ValueError(f"tracin needs one rate per checkpoint, got {len(checkpoints)} and {len(rates)}")
    sides = tuple(rate * p.gradients(p.train) / len(p.train) for p, rate in zip(checkpoints, rates, strict=True))
    return Attribution(one_training_set(checkpoints), sides, QuerySide())


def trak(
    problem: Problem | Sequence[Problem], damping: float = 0.0, *, dimension: int | None = 512, seed: int = 0
) -> Attribution:
    """TRAK (Park et al. 2023, eq. 13): phi_q' (Phi'Phi/n + damping I)^-1 phi_b (1 - p_b) / n.

    phi: gradient of the margin (of the output for regression), projected to `dimension` Gaussian
    directions (None: not projected, solved in the n x n dual). The original has damping 0.
    Raises ValueError where damping 0 leaves a singular system or dimension < 1.
    """
    check_damping(damping)
    members = enumerate(one_training_set(problem))
    return _averaged([TrakFamily.of(p, dimension=dimension, seed=seed + i).at(damping) for i, p in members])


@dataclass(frozen=True, eq=False)
class TrakFamily:
    """`trak` of one model with the damping left open.

    phi: (n, k). pull: (n,) the training examples' -dloss/dmargin, over n. system: Phi'Phi/n (k, k), or in the
    dual Phi Phi'/n (n, n). query_side: what is done to queries.
    """

    problem: Problem
    phi: Tensor
    pull: Tensor
    system: Tensor
    query_side: QuerySide

    @classmethod
    def of(cls, problem: Problem, *, dimension: int | None = 512, seed: int = 0) -> "TrakFamily":
        if dimension is not None and dimension < 1:
            raise ValueError(f"dimension must be >= 1 or None, got {dimension}")
        n, classifies = len(problem.train), problem.train.is_classification
        projection = None if dimension is None else (dimension, seed)
        features = QuerySide("margin" if classifies else "output", projection=projection)
        phi = features(problem, problem.train)
        # minus dloss/dmargin = 1 - p_y; for regression dloss/doutput, whose square is the loss effect
        with torch.no_grad():
            if classifies:
                pull = torch.sigmoid(-problem.margins(problem.train))
            else:
                pull = problem.outputs(problem.train.inputs)[:, 0] - problem.train.targets
        system = phi @ phi.T / n if dimension is None else phi.T @ phi / n
        return cls(problem, phi, pull / n, system, replace(features, times_error=not classifies))

    def at(self, damping: float) -> Attribution:
        check_damping(damping)
        if self._dual:
            weighted = solve_dense(self.system, torch.eye(len(self.phi), dtype=self.phi.dtype), damping) @ self.phi
        else:
            weighted = solve_dense(self.system, self.phi, damping)
        return Attribution((self.problem,), (weighted * self.pull[:, None],), self.query_side)

    def scores(self, queries: Examples, dampings: Sequence[float]) -> dict[float, Tensor]:
        """Scores (n_query, n_train) by damping; those too small are left out as in `InfluenceFamily.scores`."""
        goals = self.query_side(self.problem, queries)
        if self._dual:
            goals = goals @ self.phi.T
        solved = by_damping(lambda rising: [solve_dense(self.system, goals, d) for d in rising], dampings)
        return {d: (x if self._dual else x @ self.phi.T) * self.pull for d, x in solved.items()}

    @property
    def _dual(self) -> bool:
        return self.query_side.projection is None


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


def _averaged(members: Sequence[Attribution]) -> Attribution:
    """One attribution of several models; they differ in their projections alone, whose seeds count up."""
    problems, sides = (tuple(getattr(m, name)[0] for m in members) for name in ("problems", "train_sides"))
    return Attribution(problems, sides, members[0].query_side)
