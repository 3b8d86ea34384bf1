"""Fitting a `Basis`: one simulation of some training examples, then linear algebra in the probe's coordinates.

No array of n x p floats is ever held: examples are simulated in blocks, and each block is projected as it comes.
"""

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.basis import Basis, BasisSettings, block_size, blocks, simulated
from tda_core.dynamics import Dynamics
from tda_core.examples import Examples
from tda_core.probes import LayerProbe, TangentProbe, layer_probe
from tda_core.problem import Problem

log = logging.getLogger(__name__)

MAX_RANK = 1024  # that a search tries
FEWEST_OTHERS = 3  # a correlation over two examples is 1 or -1


@dataclass(frozen=True, eq=False)
class Fitted:
    """A basis, and the training examples that were simulated to fit it: rows (m,), coefficients (L, m, k)."""

    basis: Basis
    rows: Tensor
    coefficients: Tensor


def fit_basis(
    problem: Problem,
    dynamics: Dynamics,
    held_out: Examples,
    setting: BasisSettings | None = None,
    *,
    responses: Tensor | None = None,
) -> Fitted:
    """Simulate the responses of up to `n_fit` training examples and fit the directions that queries probe.

    held_out: validation queries, on which `kept` is measured and the rank chosen; the directions do not
    depend on them. Where there are more training examples than are fitted, `kept` is measured on a quarter
    as many others (3 at least), because the fitted ones flatter it. responses: (n_train, p) of the whole
    training set by the same dynamics, where they exist already. Raises ValueError for queries or responses of
    another shape, a rank above the examples or parameters there are, by_label for a regression, and by_label
    with held-out queries of a class that no fitted example is of.
    """
    setting = setting or BasisSettings()
    problem.check(held_out)
    if responses is not None and responses.shape != (len(problem.train), problem.n_parameters):
        expected = (len(problem.train), problem.n_parameters)
        raise ValueError(f"responses must be {expected}, got {tuple(responses.shape)}")
    if setting.by_label and not problem.train.is_classification:
        raise ValueError("by_label needs class labels, but the targets of this problem are numbers")
    generator = torch.Generator().manual_seed(setting.seed)
    order = torch.randperm(len(problem.train), generator=generator)
    probe: LayerProbe | TangentProbe = TangentProbe(problem)
    if problem.linear_layers is not None:
        probe = layer_probe(problem, problem.train[order[: setting.n_fit]], setting.energy)
    n = _n_fitted(problem, probe, setting)
    signs = torch.randint(0, 2, (setting.sketch, n), generator=generator).to(problem.theta.dtype) * 2 - 1

    fit = _Fit(problem, dynamics, held_out, setting, probe, responses)
    others = min(n // 4, len(order) - n)
    rows = order[: n + others] if others >= FEWEST_OTHERS else order[:n]
    simulation = fit.simulate(rows[:n], signs)
    features = torch.cat([probe.features(part) for part in blocks(problem, problem.train[rows[:n]], setting)])
    reading, writing = fit.directions(features, simulation.coordinates, problem.train.targets[rows[:n]])
    source = simulation.coordinates if setting.coefficients == "responses" else features
    c = source @ writing.transpose(1, 2)
    whole = Basis(problem, dynamics, setting, probe, reading, writing, simulation.sketched, signs @ c, 0.0, {})
    judged = c
    if len(rows) > n:
        simulation = fit.simulate(rows[n:])
        judged = whole.coefficients(problem.train[rows[n:]], simulation.coordinates)
        c = torch.cat([c, judged], 1)
    kept_at = _kept_at(whole, held_out, simulation.full, judged)
    rank = setting.rank or next((k for k, kept in kept_at.items() if kept >= setting.keep), max(kept_at))
    if setting.rank is None and kept_at[rank] < setting.keep:
        log.warning("rank %d, the highest there is, keeps %.3f, below %.3f", rank, kept_at[rank], setting.keep)
    return Fitted(_truncated(whole, rank, kept_at), rows, c[..., :rank].clone())


def _n_fitted(problem: Problem, probe: LayerProbe | TangentProbe, setting: BasisSettings) -> int:
    """How many examples are fitted: their features and responses are held together, so memory bounds them too."""
    room = setting.block_bytes // (2 * problem.theta.element_size() * probe.n_features)
    n = min(setting.n_fit, len(problem.train), max(room, 1))
    if n < min(setting.n_fit, len(problem.train)):
        log.info("fitting %d examples, as many as block_bytes %d holds", n, setting.block_bytes)
    if setting.rank is not None and setting.rank > min(n, problem.n_parameters):
        limit = f"{n} fitted examples and {problem.n_parameters} parameters"
        raise ValueError(f"rank must be at most the least of {limit}, got {setting.rank}")
    return n


@dataclass(frozen=True, eq=False)
class _Simulation:
    """coordinates: (n, f) of the responses. full: (n_held_out, n) scores. sketched: (s, p) random sums."""

    coordinates: Tensor
    full: Tensor
    sketched: Tensor


@dataclass(frozen=True, eq=False)
class _Fit:
    problem: Problem
    dynamics: Dynamics
    held_out: Examples
    setting: BasisSettings
    probe: LayerProbe | TangentProbe
    responses: Tensor | None

    def simulate(self, rows: Tensor, signs: Tensor | None = None) -> _Simulation:
        """Simulate training examples in blocks; signs (s, n): the random sums that are kept of their responses."""
        signs = self.problem.theta.new_zeros(0, len(rows)) if signs is None else signs
        sketched = self.problem.theta.new_zeros(len(signs), self.problem.n_parameters)
        coordinates, full, start = [], [], 0
        for part in tqdm(rows.split(block_size(self.problem, self.setting)), desc="fitting the basis", leave=False):
            known = self.responses is not None
            responses = (
                self.responses[part] if known else simulated(self.problem, self.dynamics, self.problem.train[part])
            )
            sketched += signs[:, start : start + len(part)] @ responses
            coordinates.append(self.probe.coordinates(responses))
            queries = blocks(self.problem, self.held_out, self.setting)
            full.append(torch.cat([self.problem.gradients(query) @ responses.T for query in queries]))
            start += len(part)
        return _Simulation(torch.cat(coordinates), torch.cat(full, 1), sketched)

    def directions(self, features: Tensor, coordinates: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """reading and writing (L, k, f) of the highest rank, from features and coordinates (n, f) and targets (n,).

        A stratum with fewer directions than others is filled up with zeros.
        """
        members = [slice(None)]
        if self.setting.by_label:
            members = [(targets == label).nonzero()[:, 0] for label in range(self.problem.n_outputs)]
        found = [_subspace(features, coordinates, rows, self.setting) for rows in members]
        k = self.setting.rank or min(MAX_RANK, max(len(reading) for reading, _ in found))
        reading, writing = (features.new_zeros(len(found), k, features.shape[1]) for _ in range(2))
        for stratum, (read, write) in enumerate(found):
            reading[stratum, : len(read)], writing[stratum, : len(write)] = read[:k], write[:k]
        return reading, writing


def _subspace(
    features: Tensor, coordinates: Tensor, rows: slice | Tensor, setting: BasisSettings
) -> tuple[Tensor, Tensor]:
    """Directions that queries like the examples `rows` probe, strongest first: reading and writing (k, f)."""
    queries = features[rows]
    scores = (queries @ coordinates.T).double()
    size, kind = scores.norm(dim=1, keepdim=True), torch.finfo(features.dtype)
    # every query counts alike, however large its loss; but one whose scores underflow probes nothing
    scale = torch.where(size > kind.tiny / kind.eps, 1 / size, 0)
    scores *= scale
    squares, left = torch.linalg.eigh(scores @ scores.T)
    sigma, left = squares.flip(0).clamp_min(0).sqrt(), left.flip(1)
    # below, a direction is rounding error: of the scores, or of the squares' eigenvalues
    floor = max(100 * kind.eps, 1e-7) * sigma[:1].sum()
    kept = (sigma > floor).nonzero()[: setting.rank or MAX_RANK, 0]
    back = ((left[:, kept] / sigma[kept]).T * scale.T).to(features.dtype)  # U' D / sigma
    if setting.coefficients == "responses":
        writing, source = back @ queries, coordinates
    else:
        writing, source = back @ coordinates[rows], features
    # orthonormal up to rounding, or up to what an unconverged simulation lacks in symmetry
    c, triangle = torch.linalg.qr((source @ writing.T).double())
    writing = torch.linalg.solve_triangular(triangle.T, writing.double(), upper=False).to(features.dtype)
    return c.T.to(features.dtype) @ coordinates, writing


def _kept_at(basis: Basis, queries: Examples, full: Tensor, c: Tensor) -> dict[int, float]:
    """Mean correlation with the full scores (n_query, n) for a row of ranks up to the highest.

    The mean is over queries whose full scores differ from each other; 0 where there are none.
    """
    z, strata = basis.read(queries)
    tried = sorted({k for k in (round(2 ** (i / 4)) for i in range(40)) if k < basis.rank} | {basis.rank})
    expected = _standardised(full)
    defined = expected.any(1)
    scores, done, found = torch.zeros_like(full), 0, {}
    for k in tried:
        for stratum in strata.unique():
            rows = (strata == stratum).nonzero()[:, 0]
            scores[rows] += z[rows, done:k] @ c[stratum, :, done:k].T
        done = k
        correlations = (_standardised(scores) * expected).sum(1)[defined]
        found[k] = float(correlations.mean()) if len(correlations) else 0.0
    return found


def _standardised(scores: Tensor) -> Tensor:
    """Rows of mean 0 and length 1, or of zeros where all are equal, in double precision: they may be very small."""
    centred = scores.double() - scores.double().mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(torch.finfo(centred.dtype).tiny)


def _truncated(basis: Basis, rank: int, kept_at: dict[int, float]) -> Basis:
    cut = {name: getattr(basis, name)[:, :rank].clone() for name in ("reading", "writing")}
    sketched_by = basis.sketched_by[..., :rank].clone()
    return replace(basis, **cut, sketched_by=sketched_by, kept=kept_at[rank], kept_at=kept_at)
