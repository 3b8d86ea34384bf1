"""STRIDE: attribution by steering operators of subsets and sparse recovery (Dagli et al. 2026, arXiv 2606.05165).

Fitted once: K subsets of the training set, an operator for each that shifts the frozen model as training more on its
subset would. A query is then measured under all K in one batched forward pass, y_k = Loss(o) - Loss(o~_k), and the
influences w of the training examples are recovered from y = M w by the Lasso.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from tda_core.designs import check_membership
from tda_core.examples import Examples
from tda_core.feature_maps import FeatureMap, from_state, tensors_below
from tda_core.problem import Problem
from tda_core.recovery import Penalty, Recovered, lam_scale, recover
from tda_core.recovery_choice import RULES, Folds, choose_lambda, held_out
from tda_core.steering import Operators, make_basis, site_of
from tda_core.steering_fit import Course, Monitor, Steering, fit_operators
from tda_core.store import load_tensors, save_tensors


@dataclass(frozen=True)
class Recovery:
    """How measurements become influences.

    lam: a share of `recovery.lam_scale` for each query; or one of `recovery_choice.RULES`, which choose it by the
    queries' measurements alone: no ground truth is seen. target: "loss" as published, or "margin".
    """

    lam: float | str = 0.03
    penalty: Penalty = Penalty()  # noqa: RUF009 (frozen)
    target: str = "loss"
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        if isinstance(self.lam, str):
            if self.lam not in RULES:
                raise ValueError(f"unknown lam {self.lam!r}, expected a share of the largest lam or one of {RULES}")
        elif not 0 < self.lam < float("inf"):
            raise ValueError(f"lam must be > 0 and finite, got {self.lam}")

    def but(self, **changes: object) -> "Recovery":
        return replace(self, **changes)

    def __call__(self, membership: sparse.csc_array, measurements: Tensor) -> Recovered:
        """Influences behind measurements (q, K). Raises what `recovery.recover` raises."""
        if self.penalty.kind == "correlation":
            lam = None
        elif isinstance(self.lam, str):
            lam = choose_lambda(membership, measurements, self.lam, self.penalty)
        else:
            lam = self.lam * lam_scale(membership, measurements, self.penalty)
        return recover(membership, measurements, lam, self.penalty, tolerance=self.tolerance)


@dataclass(frozen=True, eq=False)
class Stride:
    """Fitted operators with their subsets. membership: (K, n). recovery: what `scores` recovers by."""

    membership: sparse.csc_array
    operators: Operators
    course: Course
    steering: Steering
    recovery: Recovery

    def measurements(self, queries: Examples) -> Tensor:
        """y (q, K): what each operator does for each query, higher where it helps. One batched forward pass."""
        return self.operators.measurements(queries, self.recovery.target)

    def scores(self, queries: Examples) -> Tensor:
        """Influence of every training example on every query: (q, n), positive for proponents."""
        return self.recovery(self.membership, self.measurements(queries)).weights

    def recovering(self, recovery: Recovery) -> "Stride":
        """The same operators with another recovery: nothing is trained again."""
        return replace(self, recovery=recovery)

    def save(self, path: Path | str) -> None:
        """Write operators, subsets, features and settings to one file, with the hashes of model and data."""
        features, described = self.operators.features.state()
        tensors = {f"features/{name}": value for name, value in features.items()}
        tensors |= {f"basis/{name}": value for name, value in self.operators.basis.state_dict().items()}
        tensors |= {"matrices": self.operators.matrices, "losses": self.course.losses}
        tensors["indices"] = torch.from_numpy(self.membership.indices)
        tensors["indptr"] = torch.from_numpy(self.membership.indptr)
        recovery = {**vars(self.recovery), "penalty": asdict(self.recovery.penalty)}
        kept = {"checks": [list(pair) for pair in self.course.checks.items()], "kept": self.course.kept}
        settings = {"features": described, "steering": asdict(self.steering), "recovery": recovery, "course": kept}
        made_for = self.operators.problem.identity
        save_tensors(path, tensors, {"kind": "Stride", **settings, "made_for": made_for})

    @classmethod
    def load(cls, path: Path | str, problem: Problem) -> "Stride":
        """Read what `save` wrote. Raises ValueError for a file of something else, another model or other data."""
        tensors, metadata = load_tensors(path)
        if metadata.get("kind") != "Stride":
            raise ValueError(f"{path} does not hold a Stride, but {sorted(metadata)}")
        problem.check_identity(path, metadata["made_for"])
        steering = Steering(**metadata["steering"])
        recovery = Recovery(**{**metadata["recovery"], "penalty": Penalty(**metadata["recovery"]["penalty"])})
        features = from_state(tensors_below(tensors, "features/"), metadata["features"], problem, path)
        matrices = tensors["matrices"]
        basis = make_basis(steering.basis, features.n_features, steering.rank, seed=0, dtype=matrices.dtype)
        basis.load_state_dict(tensors_below(tensors, "basis/"))
        operators = Operators(
            problem, features, site_of(problem, steering.placement), basis.requires_grad_(False), matrices
        )
        course = Course(tensors["losses"], dict(metadata["course"]["checks"]), metadata["course"]["kept"])
        indices, indptr = tensors["indices"].numpy(), tensors["indptr"].numpy()
        shape = (len(matrices), len(problem.train))
        membership = sparse.csc_array((np.ones(len(indices), dtype=np.float32), indices, indptr), shape=shape)
        return cls(membership, operators, course, steering, recovery)


def fit_stride(
    problem: Problem,
    membership: sparse.sparray,
    features: FeatureMap,
    steering: Steering | None = None,
    *,
    seed: int = 0,
    monitor: Monitor | None = None,
) -> Stride:
    """Train an operator for every subset: the one costly step.

    membership: (K, n) from `tda_core.designs`. features: what operators stand on, from `tda_core.features`.
    steering: how they are trained. monitor: see `steering_fit.fit_operators`. The recovery is the Lasso of losses, as
    published; `recovering` changes it. Raises ValueError for a membership that is not one of this training set, and
    what `fit_operators` raises.
    """
    check_membership(membership)
    if membership.shape[1] != len(problem.train):
        raise ValueError(
            f"membership must have a column for each of {len(problem.train)} training examples, got {membership.shape}"
        )
    steering = Steering() if steering is None else steering
    columns = sparse.csc_array(membership, copy=True)
    columns.sum_duplicates()
    columns.eliminate_zeros()  # stored ones are no members
    operators, course = fit_operators(problem, columns, features, steering, seed=seed, monitor=monitor)
    return Stride(columns, operators, course, steering, Recovery())


def heldout_monitor(membership: sparse.sparray, probes: Examples, target: str = "loss") -> Monitor:
    """A monitor that retrains nothing: how well measurements of some subsets foretell those of others.

    1 - the held-out error of `recovery_choice.held_out`, at its best lam: the share of the variance of the probes'
    measurements that is foretold. probes: any examples but the reported queries, such as training examples.
    """

    def monitor(operators: Operators) -> float:
        choice = held_out(membership, operators.measurements(probes, target), folds=Folds(n=3, shares=(0.3, 0.1)))
        return 1 - float(choice.errors.mean(1).min())

    return monitor
