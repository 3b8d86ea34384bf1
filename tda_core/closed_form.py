"""Steering operators in closed form: one damped Gauss-Newton step of a linear head on fixed features.

STRIDE (Dagli et al. 2026, arXiv 2606.05165) trains an operator for each of K subsets of the training set, o_x + B(h_x)
a_k, and recovers every example's influence from the measured losses by sparse regression. Where an operator is linear
in fixed features phi and makes one damped Gauss-Newton step from the frozen network's outputs towards its subset A,

    W_A = -[H + damping I]^-1  1/n sum_{i in A} (p_i - y_i) (x) phi_i,      H = 1/n sum_j S_j (x) phi_j phi_j',

with the network's own probabilities p and S = diag p - p p', operators of subsets add up, so that no subset has to be
drawn and nothing has to be recovered: the influence of one example is the first-order fall of a query's loss,

    score(q, i) = [(p_q - y_q) (x) phi_q]' [H + damping I]^-1 [(p_i - y_i) (x) phi_i] / n.

No gradient of the network is taken, at build or query time. With the last hidden layer for features it is last-layer
influence; what other features say about the network is an empirical matter (`notebooks/stride/06_closed_form.ipynb`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tda_core.attribution import one_training_set
from tda_core.examples import Examples
from tda_core.feature_maps import FeatureMap, from_state, tensors_below
from tda_core.head_systems import BLOCK, Dense, Head, System, residuals_of, system_of
from tda_core.problem import Problem
from tda_core.solvers import by_damping, check_damping
from tda_core.store import load_tensors, save_tensors

TARGETS = ("loss", "margin")
# Floats of products that scoring holds at a time
CHUNK_FLOATS = 2**24


@dataclass(frozen=True, eq=False)
class Member:
    """One network: its features, what the training set makes of a head on them, and the system to solve."""

    problem: Problem
    features: FeatureMap
    head: Head
    system: System

    @classmethod
    def of(cls, problem: Problem, features: FeatureMap, system: str = "auto") -> "Member":
        head = Head.of(*_features_and_outputs(problem, features, problem.train), problem.train.targets, problem.loss)
        return cls(problem, features, head, system_of(head, system))

    def solved(self, queries: Examples, damping: float, target: str) -> Tensor:
        """(H + damping I)^-1 [(p_q - y_q) (x) phi_q]: (q, c, f)."""
        goals = goals_of(self.problem, self.features, queries, target)
        return self.system.solve(goals.flatten(1), damping).view(goals.shape)

    def products(self, solved: Tensor) -> Tensor:
        """Scores (q, n) of `solved` (q, c, f), in blocks of training examples."""
        q, c, f = solved.shape
        found = solved.new_empty(q, len(self.head.phi))
        size = max(1, CHUNK_FLOATS // (q * c))
        for rows in torch.arange(len(self.head.phi)).split(size):
            moved = (solved.view(q * c, f) @ self.head.phi[rows].T).view(q, c, len(rows))
            found[:, rows] = (moved * self.head.residuals[rows].T).sum(1)
        return found / len(self.head.phi)


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """Influence of training examples through a head on fixed features, averaged over the members."""

    members: tuple[Member, ...]
    damping: float
    target: str = "loss"

    def scores(self, queries: Examples) -> Tensor:
        """Scores (n_query, n_train): by example, the first-order fall of the query's loss (rise of its margin).

        Raises ValueError for queries of another shape or label range.
        """
        found = (member.products(member.solved(queries, self.damping, self.target)) for member in self.members)
        return sum(found) / len(self.members)

    def operators(self, masks: Tensor) -> list[Tensor]:
        """The steering operators W of subsets, masks (K, n) bool: for each member (K, C, f); outputs move by phi W'.

        Raises ValueError for masks of another shape or type and for an empty subset.
        """
        n = len(self.members[0].head.phi)
        if masks.dtype != torch.bool or masks.ndim != 2 or masks.shape[1] != n or not len(masks):
            raise ValueError(f"masks must be boolean (K, {n}), K >= 1, got {masks.dtype} {tuple(masks.shape)}")
        if not bool(masks.any(1).all()):
            raise ValueError(f"subset {int((~masks.any(1)).nonzero()[0])} is empty: it has no operator")
        return [self._operators(member, masks) for member in self.members]

    def _operators(self, member: Member, masks: Tensor) -> Tensor:
        head = member.head
        weights = masks.to(head.phi.dtype)
        pulls = [weights @ (column[:, None] * head.phi) for column in head.residuals.T]  # c of (K, f)
        steps = member.system.solve(-torch.cat(pulls, 1) / len(head.phi), self.damping)
        return head.contrasts @ steps.view(len(masks), len(pulls), -1)

    def save(self, path: Path | str) -> None:
        """Write features, heads and systems to one file, with the hashes of models and data."""
        tensors, members = {}, []
        for i, member in enumerate(self.members):
            held, settings = member.features.state()
            own = {"phi": member.head.phi, "p": member.head.p, "residuals": member.head.residuals}
            own |= {f"system/{name}": value for name, value in member.system.tensors().items()}
            own |= {f"features/{name}": value for name, value in held.items()}
            tensors |= {f"{i}/{name}": value for name, value in own.items()}
            members.append({"features": settings, "system": member.system.kind, "made_for": member.problem.identity})
        save_tensors(path, tensors, {"damping": self.damping, "target": self.target, "closed_form": members})

    @classmethod
    def load(cls, path: Path | str, problems: Sequence[Problem]) -> "ClosedForm":
        """Read what `save` wrote; ValueError where the models or the data are not the saved ones."""
        tensors, metadata = load_tensors(path)
        if "closed_form" not in metadata:
            raise ValueError(f"{path} does not hold a ClosedForm, but {sorted(metadata)}")
        saved = metadata["closed_form"]
        if len(problems) != len(saved):
            raise ValueError(f"{path} was made for {len(saved)} problems, but got {len(problems)}")
        members = []
        for i, (problem, settings) in enumerate(zip(problems, saved, strict=True)):
            problem.check_identity(path, settings["made_for"])
            own = tensors_below(tensors, f"{i}/")
            features = from_state(tensors_below(own, "features/"), settings["features"], problem, path)
            head = Head(own["phi"], own["p"], own["residuals"], problem.train.is_classification)
            system = system_of(head, settings["system"], tensors_below(own, "system/"))
            members.append(Member(problem, features, head, system))
        return cls(tuple(members), metadata["damping"], metadata["target"])


@dataclass(frozen=True, eq=False)
class ClosedFormFamily:
    """`stride_closed_form` with the damping left open: dampings share features, heads and the systems' matrices."""

    members: tuple[Member, ...]
    target: str = "loss"

    @classmethod
    def of(
        cls,
        problem: Problem | Sequence[Problem],
        features: FeatureMap | Sequence[FeatureMap],
        *,
        target: str = "loss",
        system: str = "auto",
    ) -> "ClosedFormFamily":
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}, expected one of {TARGETS}")
        problems = one_training_set(problem)
        maps = (features,) * len(problems) if isinstance(features, FeatureMap) else tuple(features)
        if len(maps) != len(problems):
            raise ValueError(f"give one feature map, or one a problem: got {len(maps)} for {len(problems)} problems")
        if target == "margin" and not problems[0].train.is_classification:
            raise ValueError("target 'margin' needs a classifier: for a regression use target 'loss'")
        members = (Member.of(*pair, system) for pair in zip(problems, maps, strict=True))
        return cls(tuple(members), target)

    def at(self, damping: float) -> ClosedForm:
        check_damping(damping)
        for member in self.members:
            if isinstance(member.system, Dense):
                member.system.factor(damping)  # a system without a solution is refused here, not at the first query
        return ClosedForm(self.members, damping, self.target)

    def scores(self, queries: Examples, dampings: Sequence[float]) -> dict[float, Tensor]:
        """Scores (n_query, n_train) by damping; those too small are left out as in `InfluenceFamily.scores`."""
        return by_damping(lambda rising: [self.at(damping).scores(queries) for damping in rising], dampings)


def stride_closed_form(
    problem: Problem | Sequence[Problem], features: FeatureMap | Sequence[FeatureMap], damping: float, **options: Any
) -> ClosedForm:
    """Influence through a linear head on features, averaged over the problems given (the module's first lines).

    features: one map for all problems, or one for each (hidden layers differ by model). damping: in units of the
    features' curvature (features with mean square norm 1 have a curvature below 1); for features with a bias of the
    last hidden layer it is `gradients.last_layer` with this damping less the weight decay. options: target, "loss"
    or "margin": what a query's score is the change of (one model's ranking is the same, an average of models differs);
    system, of `head_systems.SYSTEMS`, or "auto".
    Raises ValueError for losses other than cross-entropy and squared error, and as `gradients.exact_influence` does.
    """
    return ClosedFormFamily.of(problem, features, **options).at(damping)


def goals_of(problem: Problem, features: FeatureMap, queries: Examples, target: str) -> Tensor:
    """(p_q - y_q) (x) phi_q, the gradients of the queries' target in the head: (q, c, f)."""
    phi, outputs = _features_and_outputs(problem, features, queries)
    return residuals_of(outputs, queries.targets, target)[:, :, None] * phi[:, None]


def _features_and_outputs(problem: Problem, features: FeatureMap, examples: Examples) -> tuple[Tensor, Tensor]:
    problem.check(examples)
    inputs = examples.inputs.to(problem.theta.dtype)
    with torch.no_grad():
        outputs = torch.cat([problem.outputs(block) for block in inputs.split(BLOCK)])
    return features(inputs), outputs
