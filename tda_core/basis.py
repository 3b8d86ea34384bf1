"""A basis of few directions that stands in for all responses: what a query is read along.

With r_b the simulated response to removing training example b, and Q sample queries (here the examples that are
simulated themselves), the matrix of scores is S = G_Q R'. Its right singular vectors W, after each row is scaled to
unit length, span what queries really probe, each query counting alike: r_b ~ sum_j W_bj (W' R)_j, so a query is read
along the k directions W' R and scores every example by one product,

    score(q, b) = z_q . c_b,    z_q = (W' R) g_q,    c_b = W_b.

Out of the sample, c_b is linear in the response, c_b = (U' D G_Q / sigma) r_b, and, because the simulated inverse
curvature is symmetric, in the gradient as well: c_b = (U' D R_Q / sigma) g_b, which costs no simulation.
The reconstruction of the paper's readout is in papers/forward_only; this factorisation of it is ours.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.dynamics import Dynamics, pushes
from tda_core.examples import Examples
from tda_core.probes import LayerProbe, TangentProbe
from tda_core.problem import Problem
from tda_core.simulation import last_response
from tda_core.store import fingerprint

COEFFICIENTS = ("responses", "gradients")


@dataclass(frozen=True)
class BasisSettings:
    """How a basis is fitted.

    rank: directions k a query is read along; None takes the fewest that keep `keep`. keep: mean correlation
    with the full scores over held-out queries that k must reach. by_label: directions of their own for
    queries of each class, so that fewer do. coefficients: how c_b of further examples is found, from
    simulated "responses" or from "gradients". n_fit: training examples that are simulated to fit the basis (a
    random choice where there are more). energy: share of a layer's second moments that its factors keep; 1
    is exact. sketch: random directions that the residual is estimated with. block_bytes: bound on the
    parameter-sized vectors held at a time.
    """

    rank: int | None = None
    keep: float = 0.95
    by_label: bool = False
    coefficients: str = "responses"
    n_fit: int = 4000
    energy: float = 0.99
    sketch: int = 32
    block_bytes: int = 2**30
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_fit", "sketch", "block_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be >= 1, or None to choose it, got {self.rank}")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must lie in (0, 1), got {self.keep}")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must lie in (0, 1], got {self.energy}")
        if self.coefficients not in COEFFICIENTS:
            raise ValueError(f"unknown coefficients {self.coefficients!r}, expected one of {COEFFICIENTS}")


@dataclass(frozen=True, eq=False)
class Basis:
    """k directions for each of L strata (one, or one a class), and the maps to and from them.

    reading, writing: (L, k, f) coordinates of the directions that queries are read along, and of the map that
    gives an example's coefficients from its response (or gradient) in the probe's coordinates.
    kept: mean correlation with the full scores on the held-out queries; kept_at: the same for each k tried.
    The fitted examples' coefficients have orthonormal columns in each stratum.
    sketched: (s, p) random sums of responses, and sketched_by: (L, s, k) the same sums of coefficients.
    """

    problem: Problem
    dynamics: Dynamics
    setting: BasisSettings
    probe: LayerProbe | TangentProbe
    reading: Tensor
    writing: Tensor
    sketched: Tensor
    sketched_by: Tensor
    kept: float
    kept_at: dict[int, float]

    @property
    def rank(self) -> int:
        return self.reading.shape[1]

    @property
    def n_strata(self) -> int:
        return len(self.reading)

    def read(self, queries: Examples, mode: str | None = None) -> tuple[Tensor, Tensor]:
        """Readings z (n_query, k) and strata (n_query,) int64: score(q, b) = z_q . c_b of q's stratum.

        mode: "forward" for forward-mode products only, "reverse" for one backward pass to the layers'
        outputs; None takes the faster that the probe has.
        """
        mode = {} if mode is None else {"mode": mode}
        if self.n_strata == 1:
            return self.probe.read(queries, self.reading[0], **mode), torch.zeros(len(queries), dtype=torch.int64)
        self.problem.check(queries)
        if unseen := self._unseen.intersection(queries.targets.tolist()):
            raise ValueError(f"no directions for queries of class {min(unseen)}: no fitted example is of it")
        strata = queries.targets
        if isinstance(self.probe, TangentProbe):
            z = torch.zeros(len(queries), self.rank, dtype=self.reading.dtype)
            for label in strata.unique():
                rows = (strata == label).nonzero()[:, 0]
                z[rows] = self.probe.read(queries[rows], self.reading[label], **mode)
            return z, strata
        features = self.probe.features(queries, **mode)
        if len(queries) == 1:
            return features @ self.reading[int(strata)].T, strata
        z = features.new_empty(len(queries), self.rank)
        for label in strata.unique():
            rows = (strata == label).nonzero()[:, 0]
            z[rows] = features[rows] @ self.reading[label].T
        return z, strata

    def recorded(self, sizes: Sequence[int] = (1,)) -> "Basis":
        """The same basis, which reads batches of these sizes by a recording (`tda_core.recording`)."""
        return replace(self, probe=self.probe.recorded(sizes))

    @cached_property
    def _unseen(self) -> frozenset[int]:
        """Strata without directions."""
        return frozenset((self.reading == 0).all(2).all(1).nonzero()[:, 0].tolist())

    def coefficients(self, examples: Examples, coordinates: Tensor | None = None) -> Tensor:
        """c_b of each example in each stratum: (L, n, k); simulated or from gradients, as the settings say.

        coordinates: (n, f) of the examples' responses, where they have been simulated already.
        """
        self.problem.check(examples)
        expected = (len(examples), self.probe.n_features)
        if coordinates is not None and coordinates.shape != expected:
            raise ValueError(f"coordinates must be {expected}, got {tuple(coordinates.shape)}")
        parts = blocks(self.problem, examples, self.setting)
        if self.setting.coefficients == "gradients":
            found = [self.probe.features(part) for part in parts]
        elif coordinates is not None:
            found = [coordinates]
        else:
            shown = tqdm(parts, desc="simulating blocks", leave=False, disable=len(parts) == 1)
            found = [self.probe.coordinates(simulated(self.problem, self.dynamics, part)) for part in shown]
        return torch.cat(found) @ self.writing.transpose(1, 2)

    def residual(self, queries: Examples) -> Tensor:
        """Estimated share of each query's scores (in norm, over the fitted examples) that the basis misses: (n_query,).

        0: nothing is lost, 1: everything. From random sums of the responses, read along forward-mode
        products: E|sum|^2 is the squared norm, so the estimate of it has a relative spread of sqrt(2 / sketch).
        """
        z, strata = self.read(queries)
        off = self.problem.derivatives_along(queries, self.sketched)
        off -= torch.einsum("qk,qsk->qs", z, self.sketched_by[strata])
        missed = (off.double() ** 2).mean(1)  # single squares underflow
        held = (z.double() ** 2).sum(1)  # the coefficients' columns are orthonormal
        return (missed / (missed + held).clamp_min(torch.finfo(missed.dtype).tiny)).sqrt().to(z.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, to be saved with `settings`."""
        own = {name: getattr(self, name) for name in ("reading", "writing", "sketched", "sketched_by")}
        return own | {f"factor/{name}": factor for name, factor in self.probe.tensors().items()}

    def settings(self) -> dict[str, Any]:
        """What JSON can hold: the settings, the dynamics and what was kept."""
        kind = "layers" if isinstance(self.probe, LayerProbe) else "tangents"
        kept_at = {str(k): value for k, value in self.kept_at.items()}
        described = {"probe": kind, "kept": self.kept, "kept_at": kept_at}
        return described | {"fit": asdict(self.setting), "dynamics": asdict(self.dynamics)}

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over tensors and settings: shards fit together where these are equal."""
        return fingerprint({"tensors": self.tensors(), "settings": self.settings()})

    @classmethod
    def restore(cls, problem: Problem, tensors: dict[str, Tensor], settings: dict[str, Any]) -> "Basis":
        """The basis that `tensors` and `settings` describe, on the problem that it was fitted for."""
        factors = {name.removeprefix("factor/"): t for name, t in tensors.items() if name.startswith("factor/")}
        own = {name: t for name, t in tensors.items() if not name.startswith("factor/")}
        probe = TangentProbe(problem) if settings["probe"] == "tangents" else LayerProbe.restore(problem, factors)
        kept_at = {int(k): value for k, value in settings["kept_at"].items()}
        dynamics, setting = Dynamics(**settings["dynamics"]), BasisSettings(**settings["fit"])
        return cls(problem, dynamics, setting, probe, **own, kept=settings["kept"], kept_at=kept_at)


def simulated(problem: Problem, dynamics: Dynamics, examples: Examples) -> Tensor:
    """Responses to removing these examples: (n, p)."""
    return last_response(problem, dynamics, pushes(problem, examples), progress=False)


def block_size(problem: Problem, setting: BasisSettings) -> int:
    """Examples whose simulation, a few vectors of p floats each, stays in `block_bytes`."""
    return max(1, setting.block_bytes // (6 * problem.theta.element_size() * problem.n_parameters))


def blocks(problem: Problem, examples: Examples, setting: BasisSettings) -> list[Examples]:
    """The examples in parts of `block_size`."""
    size = block_size(problem, setting)
    return [examples[start : start + size] for start in range(0, len(examples), size)]
