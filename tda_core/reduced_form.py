"""A closed form that is read along few directions: what a query costs is a product with a small matrix.

Scores are q' (H + damping I)^-1 G' / n for a query's q and the training examples' rows of G. With H + damping I = L L',
the directions are the leading left singular vectors V of L^-1 G', which keep most of all training examples' scores for
each other:

    score(q, i) = z_q . c_i,      z_q = V' L^-1 q / n (k,),      c_i = V' L^-1 g_i (k,).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tda_core.closed_form import ClosedForm, goals_of
from tda_core.examples import Examples
from tda_core.feature_maps import FeatureMap, from_state, tensors_below
from tda_core.head_systems import Dense
from tda_core.problem import Problem
from tda_core.solvers import leading_eigenvectors
from tda_core.store import load_tensors, save_tensors

BLOCK = 1024


@dataclass(frozen=True, eq=False)
class ReducedForm:
    """Scores of one network's closed form along k directions. reading: (c f, k). coefficients: (n, k).

    kept: the share of the training examples' scores for themselves, summed, that the directions hold.
    """

    problem: Problem
    features: FeatureMap
    target: str
    reading: Tensor
    coefficients: Tensor
    kept: float

    def scores(self, queries: Examples) -> Tensor:
        """Scores (n_query, n_train), positive for proponents."""
        goals = goals_of(self.problem, self.features, queries, self.target)
        return goals.flatten(1) @ self.reading @ self.coefficients.T

    def save(self, path: Path | str) -> None:
        """Write it to one file, with the hashes of model and data."""
        held, settings = self.features.state()
        tensors = {"reading": self.reading, "coefficients": self.coefficients}
        tensors |= {f"features/{name}": value for name, value in held.items()}
        metadata = {"target": self.target, "kept": self.kept, "made_for": self.problem.identity}
        save_tensors(path, tensors, {"reduced_form": settings, **metadata})

    @classmethod
    def load(cls, path: Path | str, problem: Problem) -> "ReducedForm":
        """Read what `save` wrote; ValueError where the model or the data are not the saved ones."""
        tensors, metadata = load_tensors(path)
        if "reduced_form" not in metadata:
            raise ValueError(f"{path} does not hold a ReducedForm, but {sorted(metadata)}")
        problem.check_identity(path, metadata["made_for"])
        features = from_state(tensors_below(tensors, "features/"), metadata["reduced_form"], problem, path)
        held = tensors["reading"], tensors["coefficients"]
        return cls(problem, features, metadata["target"], *held, metadata["kept"])


def reduce(method: ClosedForm, rank: int) -> list[ReducedForm]:
    """Each member of a closed form along its `rank` leading directions (their scores are to be averaged).

    Streams over the training examples; holds matrices of (c f)^2. Raises ValueError for a rank outside 1..c f, and
    for systems that are not dense.
    """
    return [_reduced(method, number, rank) for number in range(len(method.members))]


def _reduced(method: ClosedForm, number: int, rank: int) -> ReducedForm:
    member = method.members[number]
    if not isinstance(member.system, Dense):
        raise ValueError(f"only a dense system has directions, got {member.system.kind}: use fewer features")
    size = member.head.n_unknowns
    if not 1 <= rank <= size:
        raise ValueError(f"rank must lie in 1..{size}, classes less one x features, got {rank}")
    factor = member.system.factor(method.damping).to(member.head.phi.dtype)
    second = sum(rows.T @ rows for rows in _gradients(member.head.residuals, member.head.phi))
    half = torch.linalg.solve_triangular(factor, second, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
    values, vectors = leading_eigenvectors((whitened + whitened.T) / 2, rank)
    directions = torch.linalg.solve_triangular(factor.T, vectors, upper=True)  # L'^-1 V
    coefficients = torch.cat([rows @ directions for rows in _gradients(member.head.residuals, member.head.phi)])
    kept = float(values.sum() / whitened.diagonal().sum())
    reading = directions / len(coefficients)
    return ReducedForm(member.problem, member.features, method.target, reading, coefficients, kept)


def _gradients(residuals: Tensor, phi: Tensor) -> Iterator[Tensor]:
    """The rows of G, block by block: (b, c f)."""
    pairs = zip(residuals.split(BLOCK), phi.split(BLOCK), strict=True)
    return ((r[:, :, None] * f[:, None]).flatten(1) for r, f in pairs)
