"""Influence of projected gradients, layer by layer (LoGra: Choe et al. 2024, arXiv 2405.13954), as a reference.

An example's gradient in a linear layer is a sum over positions of delta_t x_t', with x_t what flows in and delta_t the
loss' derivative in what flows out. With projections P_in (r, d_in) and P_out (r, d_out) only the core is kept,

    g_l = sum_t (P_out delta_t) (P_in x_t)'      (r, r),

which no gradient of the layer's size is formed for. Scores sum, over layers, g_q,l' (F_l + lambda_l I)^-1 g_i,l with
F_l the mean of g g' over the training set. At full rank it is exact influence with a block-diagonal empirical Fisher.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from tda_core.examples import Examples
from tda_core.layers import Flows, outer, own_parameters
from tda_core.problem import Problem
from tda_core.store import load_tensors, save_tensors
from tda_core.token_rows import lengths_of

PROJECTIONS = ("pca", "random")
# Floats of outputs that one backward pass holds (64 MB, of which it makes several copies).
OUTPUTS = 2**24
Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LoGraSettings:
    """rank: rows of either projection, at most the layer's widths. projection: "pca" along the directions in which
    inputs and derivatives are largest over the training set, or "random", drawn by seed. damping: in units of a
    layer's mean eigenvalue. Raises ValueError for a rank below 1, an unknown projection and a damping that is not
    finite and positive."""

    rank: int = 16
    projection: str = "pca"
    damping: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be >= 1, got {self.rank}")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"unknown projection {self.projection!r}, expected one of {PROJECTIONS}")
        if not (math.isfinite(self.damping) and self.damping > 0):
            raise ValueError(f"damping must be finite and > 0, got {self.damping}")


@dataclass(frozen=True, eq=False)
class LoGra:
    """Projections by layer, P_in (r, d_in [+ 1 with a bias]) and P_out (r, d_out), and (F + lambda I)^-1 g of the
    training examples (n, f), layers side by side."""

    problem: Problem
    settings: LoGraSettings
    factors: Factors
    solved: Tensor

    def scores(self, queries: Examples) -> Tensor:
        """Scores (n_query, n_train). Raises ValueError for queries that do not fit the model."""
        self.problem.check(queries)
        return _projected(self.problem, queries, self.factors) @ self.solved.T

    def save(self, path: Path | str) -> None:
        """Write projections and solved training gradients, with the hashes of model and data, to one file."""
        tensors = {"solved": self.solved}
        for name, (p_in, p_out) in self.factors.items():
            tensors |= {f"in/{name}": p_in, f"out/{name}": p_out}
        save_tensors(Path(path), tensors, {"logra": asdict(self.settings), "made_for": self.problem.identity})

    @classmethod
    def load(cls, path: Path | str, problem: Problem) -> "LoGra":
        """Read what `save` wrote; ValueError where model or data are not the saved ones."""
        tensors, found = load_tensors(Path(path))
        if "logra" not in found:
            raise ValueError(f"{path} does not hold LoGra, but {sorted(found)}")
        problem.check_identity(path, found["made_for"])
        factors = {name: (tensors[f"in/{name}"], tensors[f"out/{name}"]) for name in _layers(problem)}
        return cls(problem, LoGraSettings(**found["logra"]), factors, tensors["solved"])


@dataclass(frozen=True, eq=False)
class LoGraFamily:
    """LoGra with the damping left open: dampings share projections and projected training gradients (n, f)."""

    problem: Problem
    settings: LoGraSettings
    factors: Factors
    features: Tensor

    @classmethod
    def of(cls, problem: Problem, settings: LoGraSettings | None = None) -> "LoGraFamily":
        """Two passes over the training set with "pca", one with "random". Raises as `fit_logra` does."""
        settings = settings or LoGraSettings()
        factors = _drawn(problem, settings) if settings.projection == "random" else _principal(problem, settings.rank)
        return cls(problem, settings, factors, _projected(problem, problem.train, factors))

    def at(self, damping: float) -> LoGra:
        """Raises ValueError for a damping that is not finite and positive."""
        settings = replace(self.settings, damping=damping)
        sizes = [len(p_in) * len(p_out) for p_in, p_out in self.factors.values()]
        solved = [_solved(part, damping) for part in self.features.split(sizes, 1)]
        return LoGra(self.problem, settings, self.factors, torch.cat(solved, 1))


def fit_logra(problem: Problem, settings: LoGraSettings | None = None) -> LoGra:
    """Project and solve the training set's gradients. Raises ValueError for parameters outside of linear layers."""
    settings = settings or LoGraSettings()
    return LoGraFamily.of(problem, settings).at(settings.damping)


def _solved(features: Tensor, damping: float) -> Tensor:
    """(G'G / n + lambda I)^-1 g for the rows g of G (n, f), solved among features or examples, whichever are fewer."""
    n, f = features.shape
    wide = features.double()
    gram = wide.T @ wide if f <= n else wide @ wide.T
    shift = damping * gram.diagonal().sum() / n / f
    system = gram / n + shift.clamp_min(torch.finfo(gram.dtype).tiny) * torch.eye(len(gram), dtype=gram.dtype)
    factor = torch.linalg.cholesky(system)
    found = torch.cholesky_solve(wide.T, factor).T if f <= n else torch.cholesky_solve(wide, factor)
    return found.to(features.dtype)


def _drawn(problem: Problem, settings: LoGraSettings) -> Factors:
    """Gaussian projections that keep lengths on average."""
    generator = torch.Generator().manual_seed(settings.seed)
    factors = {}
    for name, (x, delta) in next(_flows(problem, problem.train[:1])).items():
        widths = x.shape[-1], delta.shape[-1]
        shapes = [(min(settings.rank, width), width) for width in widths]
        factors[name] = tuple(torch.randn(s, generator=generator, dtype=x.dtype) / math.sqrt(s[0]) for s in shapes)
    return factors


def _principal(problem: Problem, rank: int) -> Factors:
    """The directions of largest mean square of inputs and of derivatives, over all positions of the training set."""
    moments: dict[str, tuple[Tensor, Tensor]] = {}
    size = _block(problem, problem.train)
    blocks = zip(_flows(problem, problem.train), torch.arange(len(problem.train)).split(size), strict=True)
    for flowed, numbers in tqdm(blocks, desc="directions of the layers", leave=False):
        reach = lengths_of(problem.train[numbers]) if problem.train.is_sequence else None
        for name, pair in flowed.items():
            rows = [_read(value, reach) for value in pair]
            found = tuple(value.T @ value for value in rows)
            moments[name] = tuple(map(torch.add, moments[name], found)) if name in moments else found
    dtype = problem.theta.dtype
    # eigenvalues rise
    return {
        name: tuple(torch.linalg.eigh(m).eigenvectors.T[-rank:].to(dtype) for m in pair)
        for name, pair in moments.items()
    }


def _projected(problem: Problem, examples: Examples, factors: Factors) -> Tensor:
    """Cores of the examples' gradients, flattened, layers side by side: (n, f)."""
    rows = []
    for flowed in tqdm(_flows(problem, examples), desc="projected gradients", leave=False):
        cores = [outer(delta @ factors[name][1].T, x @ factors[name][0].T) for name, (x, delta) in flowed.items()]
        rows.append(torch.cat(cores, 1))
    return torch.cat(rows)


def _flows(problem: Problem, examples: Examples) -> Iterator[Flows]:
    """What flows through the layers, by blocks of examples, with a 1 behind the inputs of a layer whose bias counts."""
    names = _layers(problem)
    for rows in torch.arange(len(examples)).split(_block(problem, examples)):
        flowed = problem.flows(examples.inputs[rows], examples.targets[rows])
        yield {n: (F.pad(flowed[n][0], (0, 1), value=1.0) if names[n] else flowed[n][0], flowed[n][1]) for n in names}


def _block(problem: Problem, examples: Examples) -> int:
    """Examples that one backward pass takes."""
    positions = examples.inputs.shape[1] if examples.is_sequence else 1
    return max(1, OUTPUTS // (positions * problem.n_outputs))


def _read(value: Tensor, reach: Tensor | None) -> Tensor:
    """Rows (N, d) of what flowed at the positions up to each sequence's last label; padding teaches nothing."""
    if reach is None:
        return value.flatten(0, -2).double()
    return value[torch.arange(value.shape[1]) < reach[:, None]].double()


def _layers(problem: Problem) -> dict[str, bool]:
    """Linear layers in the order of their parameters, and whether their bias is attributed to.

    Raises ValueError where other parameters are, or a bias without its weight.
    """
    if problem.flow_layers is None:
        raise ValueError("LoGra needs parameters that all lie in linear layers, each run once: name some of those")
    held = set(problem.names)
    found = {}
    for name, layer in problem.flow_layers.items():
        kinds = {kind for kind in own_parameters(layer) if f"{name}.{kind}".lstrip(".") in held}
        if kinds == {"bias"}:
            raise ValueError(f"LoGra needs the weight of layer {name!r}, whose bias alone is attributed to")
        found[name] = "bias" in kinds
    return found
