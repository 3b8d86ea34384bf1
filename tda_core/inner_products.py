"""Influence by inner products of gradients, in the variants that in-context probing is compared with.

g_q, g_z: gradients of a query's and of a training example's loss. With s_k the inner product over tensor k,

    dot                  <g_q, g_z>: minus a query's change of loss a step along -g_z, to first order
    cosine               the same over both norms
    released_log         sum of log s_k over tensors with s_k > 0, each gradient entry first clamped to
                         sign(g) clip(|g|, 1e-4, 1): what the released scores of ICP were made with
    released_signed_log  sum of sign(s_k) log |s_k|, clamped alike: what the released code does now
    adam_dot             <g_q, g_z / (sqrt(v) + eps)>, v the mean squared gradient of the training set, which Adam's
                         second moment tracks
    less                 the cosine of g_q and that direction (after Xia et al. 2024, arXiv 2402.04333)
    damped               g_q' (G'G / n + damping I)^-1 g_z, G (n, p) the training set's gradients: the empirical
                         Fisher matrix, which TRAK's kernel is made of, solved among the n examples

Sources: Jiao et al. 2025 (arXiv 2407.12259) and its released code for the clamp, the logarithms and both sign rules.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.examples import Examples
from tda_core.problem import Problem
from tda_core.store import load_tensors, save_tensors

KINDS = ("dot", "cosine", "released_log", "released_signed_log", "adam_dot", "less", "damped")
CLAMP = (1e-4, 1.0)
HALVES = (torch.bfloat16, torch.float16)
EPSILON = 1e-8
# Floats of gradients that are held (4 GB): of all training examples, which are computed anew where they are more; of
# the queries of one pass over them; and of a chunk.
HELD = 2**30


@dataclass(frozen=True, eq=False)
class GradientProducts:
    """Inner products of one model's gradients, kind by kind, with what its training set has to be passed over for.

    damping: of "damped" alone, in units of the mean squared norm of a training gradient over n, which is the mean
    eigenvalue of G'G / n among the n directions that it spans. unit: what gradients are multiplied with before the
    clamp of the released rules, whose order depends on it: a logarithm changes its sign where s_k passes 1. Gradients
    in a half-precision type are multiplied and summed in float32. Raises ValueError for a damping or a unit that is
    not positive.
    """

    problem: Problem
    damping: float = 0.1
    unit: float = 1.0
    chunk_size: int = 64

    def __post_init__(self) -> None:
        for name in ("damping", "unit"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")

    def scores(self, queries: Examples, kind: str = "dot") -> Tensor:
        """Scores (n_query, n_train) of one kind, positive for proponents; the logarithms may be negative anywhere."""
        return self.all_scores(queries, (kind,))[kind]

    def all_scores(self, queries: Examples, kinds: Sequence[str] = KINDS) -> dict[str, Tensor]:
        """Scores by kind, for one pass over the training set a block of queries. ValueError for an unknown kind."""
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"unknown kind {kind!r}, expected one of {KINDS}")
        blocks = [self._block(queries[rows], kinds) for rows in torch.arange(len(queries)).split(self._queries_at_once)]
        return {kind: torch.cat([block[kind] for block in blocks]) for kind in kinds}

    def _block(self, queries: Examples, kinds: Sequence[str]) -> dict[str, Tensor]:
        """Scores of queries whose gradients are held, with the training gradients passed over once."""
        goals = _single(self.problem.gradients(queries, chunk_size=self._chunk))
        released = [kind for kind in kinds if kind.startswith("released")]
        clamped = _clamped(self.unit * goals) if released else goals
        simple = [kind for kind in kinds if kind not in ("damped", *released)]
        found = {kind: [] for kind in kinds if kind != "damped"}
        for part in self._training_gradients() if found else ():
            for kind in simple:
                found[kind].append(self._products(kind, goals, part))
            by_tensor = self._by_tensor(clamped, _clamped(self.unit * part)) if released else []
            for kind in released:
                found[kind].append(sum(_logarithm(s, kind) for s in by_tensor))
        joined = {kind: torch.cat(parts, 1) for kind, parts in found.items()}
        return joined | ({"damped": self._damped(goals)} if "damped" in kinds else {})

    def _products(self, kind: str, goals: Tensor, part: Tensor) -> Tensor:
        if kind in ("adam_dot", "less"):
            part = part / (self.second_moment.sqrt() + EPSILON)
        products = goals @ part.T
        if kind in ("cosine", "less"):
            products /= _norms(goals)[:, None] * _norms(part)
        return products

    def _by_tensor(self, goals: Tensor, part: Tensor) -> list[Tensor]:
        return [goals[:, place] @ part[:, place].T for place in self.problem.offsets.values()]

    @property
    def _queries_at_once(self) -> int:
        """Queries whose gradients are held while all training gradients pass."""
        return max(1, HELD // self.problem.n_parameters)

    @property
    def _chunk(self) -> int:
        """Examples whose gradients are taken at a time."""
        return max(1, min(self.chunk_size, HELD // self.problem.n_parameters))

    def _training_gradients(self) -> Iterator[Tensor]:
        if self.held is not None:
            yield from map(_single, self.held.split(self._chunk))
            return
        chunks = torch.arange(len(self.problem.train)).split(self._chunk)
        for rows in tqdm(chunks, desc="training gradients", leave=False):
            yield _single(self.problem.gradients(self.problem.train[rows]))

    @cached_property
    def held(self) -> Tensor | None:
        """All training gradients (n, p), where they fit."""
        if len(self.problem.train) * self.problem.n_parameters > HELD:
            return None
        return self.problem.gradients(self.problem.train, chunk_size=self._chunk)

    @cached_property
    def second_moment(self) -> Tensor:
        """Mean squared training gradient, entry by entry: (p,)."""
        total = torch.zeros_like(_single(self.problem.theta))
        for part in self._training_gradients():
            total += part.square().sum(0)
        return total / len(self.problem.train)

    def _damped(self, goals: Tensor) -> Tensor:
        """With K = G G': K_qT (K / n + damping I)^-1, equal to the solve among the p parameters for z in T."""
        kernel, n = self.kernel, len(self.problem.train)
        damping = self.damping * float(kernel.diagonal().mean()) / n
        system = kernel / n + damping * torch.eye(n, dtype=kernel.dtype, device=kernel.device)
        mixed = torch.cat([goals @ part.T for part in self._training_gradients()], 1).double()
        return torch.cholesky_solve(mixed.T, torch.linalg.cholesky(system)).T.to(goals.dtype)

    @cached_property
    def kernel(self) -> Tensor:
        """Inner products of the training gradients, (n, n) float64; a block of rows at a time where they do not fit."""
        rows = [
            torch.cat([part @ other.T for other in self._training_gradients()], 1)
            for part in self._training_gradients()
        ]
        return torch.cat(rows).double()

    def save(self, path: Path | str) -> None:
        """Write the settings, the hashes of model and data, and Adam's second moment to one file."""
        settings = {name: getattr(self, name) for name in ("damping", "unit", "chunk_size")}
        metadata = {"gradient_products": settings, "made_for": self.problem.identity}
        save_tensors(Path(path), {"second_moment": self.second_moment}, metadata)

    @classmethod
    def load(cls, path: Path | str, problem: Problem) -> "GradientProducts":
        """Read what `save` wrote; ValueError where the model or the data are not the saved ones."""
        tensors, found = load_tensors(Path(path))
        if "gradient_products" not in found:
            raise ValueError(f"{path} does not hold gradient products, but {sorted(found)}")
        problem.check_identity(path, found["made_for"])
        loaded = cls(problem, **found["gradient_products"])
        loaded.__dict__["second_moment"] = tensors["second_moment"].to(problem.theta.device)
        return loaded


def one_step_changes(problem: Problem, queries: Examples, rate: float, rows: Tensor | None = None) -> Tensor:
    """How far each query's loss falls by one gradient step on one training example: (n_query, k), in nats.

    rate: of the step theta - rate g_z, which all methods here stand for. rows: (k,) training examples, default all.
    A model in a half-precision type is copied to float32: small steps would be lost in its rounding. Raises ValueError
    for a rate that is not positive.
    """
    if not rate > 0:
        raise ValueError(f"rate must be positive, got {rate}")
    rows = torch.arange(len(problem.train)) if rows is None else rows
    if problem.theta.dtype in HALVES:
        problem = replace(problem, module=copy.deepcopy(problem.module).float(), theta=problem.theta.float())
    before, changes = problem.losses(queries), []
    for row in tqdm(rows.tolist(), desc="one step on each example", leave=False):
        step = problem.gradients(problem.train[row : row + 1])[0]
        changes.append(before - problem.losses(queries, problem.theta - rate * step))
    return torch.stack(changes, 1)


def _single(values: Tensor) -> Tensor:
    return values.float() if values.dtype in HALVES else values


def _clamped(gradients: Tensor) -> Tensor:
    return gradients.sign() * gradients.abs().clamp(*CLAMP)


def _logarithm(products: Tensor, kind: str) -> Tensor:
    if kind == "released_log":
        return torch.where(products > 0, products, 1.0).log()
    tiny = torch.finfo(products.dtype).tiny
    return products.sign() * products.abs().clamp_min(tiny).log()


def _norms(gradients: Tensor) -> Tensor:
    return gradients.norm(dim=1).clamp_min(torch.finfo(gradients.dtype).tiny)
