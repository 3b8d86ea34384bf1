"""Linear systems of a linear head on fixed features, solved for many right-hand sides.

A head o = W phi, W (C, f), under a loss with output curvatures S_j (C, C) has the Gauss-Newton matrix

    H = 1/n sum_j S_j (x) phi_j phi_j',      S_j = diag p_j - p_j p_j' for softmax cross-entropy, 1 for squared error.

Every softmax curvature and residual is orthogonal to the vector of ones, so both are kept in C - 1 contrasts between
the classes: the solutions are the same, and the systems smaller (half the size with two classes). Vectors are rows
(k, c f) that run over contrasts first: row.view(c, f).
"""

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tda_core.models import LOSSES
from tda_core.solvers import NotPositiveDefinite, conjugate_gradients, factor_dense, sound_factor

# Unknowns up to which the matrix is held and factored: 64 MB and .6 s at 4,000
DENSE_LIMIT = 4000
BLOCK = 8192
MAX_STEPS = 2000


@dataclass(frozen=True, eq=False)
class Head:
    """What the training set makes of a head. phi: (n, f) features. p: (n, C) probabilities, (n, 1) ones for regression.

    residuals: (n, c) derivatives of the losses in the contrasts of the outputs. classifies: False for squared error.
    """

    phi: Tensor
    p: Tensor
    residuals: Tensor
    classifies: bool

    @classmethod
    def of(cls, phi: Tensor, outputs: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> "Head":
        """From features (n, f), outputs (n, C) and targets (n,); ValueError for other losses than `models.LOSSES`."""
        if loss not in LOSSES.values():
            found = getattr(loss, "__qualname__", "a function")
            raise ValueError(f"a head's curvature is known for the losses {sorted(LOSSES)}, not for {found}")
        classifies = not targets.is_floating_point()
        return cls(
            phi,
            outputs.softmax(1) if classifies else torch.ones_like(outputs),
            residuals_of(outputs, targets),
            classifies,
        )

    @property
    def n_unknowns(self) -> int:
        return self.residuals.shape[1] * self.phi.shape[1]

    @property
    def contrasts(self) -> Tensor:
        return contrasts(self.p.shape[1], self.p.dtype) if self.classifies else torch.ones(1, 1, dtype=self.p.dtype)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (b, f) and output curvatures in contrasts (b, c, c), block by block."""
        basis = self.contrasts
        for phi, p in zip(self.phi.split(BLOCK), self.p.split(BLOCK), strict=True):
            if not self.classifies:
                yield phi, p[:, :, None]
                continue
            low = p @ basis
            yield phi, (basis.T * p[:, None]) @ basis - low[:, :, None] * low[:, None]

    def product(self, rows: Tensor) -> Tensor:
        """H times each row: (k, c f) -> (k, c f), without the matrix, and without (c, c) for each example."""
        total = torch.zeros_like(rows)
        basis, f = self.contrasts, self.phi.shape[1]
        for phi, p in zip(self.phi.split(BLOCK), self.p.split(BLOCK), strict=True):
            moved = (rows.view(-1, f) @ phi.T).view(len(rows), -1, len(phi))  # (k, c, b)
            if self.classifies:
                logits = basis @ moved
                weighted = p.T * logits
                moved = basis.T @ (weighted - p.T * weighted.sum(1, keepdim=True))
            total += (moved.reshape(-1, len(phi)) @ phi).view_as(rows) / len(self.phi)
        return total


def contrasts(n_classes: int, dtype: torch.dtype) -> Tensor:
    """An orthonormal basis (C, C - 1) of the vectors that sum to 0 (Helmert's)."""
    rows = torch.arange(1, n_classes, dtype=torch.float64)
    basis = torch.triu(torch.ones(n_classes, n_classes - 1, dtype=torch.float64))
    basis[torch.arange(1, n_classes), torch.arange(n_classes - 1)] = -rows
    return (basis / (rows * (rows + 1)).sqrt()).to(dtype)


def residuals_of(outputs: Tensor, targets: Tensor, target: str = "loss") -> Tensor:
    """Derivatives of each example's loss, or of minus its margin, in the contrasts of the outputs: (n, c).

    The margin is log p_y / (1 - p_y), so the loss' derivatives are the margin's times -(1 - p_y).
    """
    if targets.is_floating_point():
        return outputs - targets[:, None].to(outputs.dtype)
    own = targets[:, None]
    pushed = outputs.softmax(1) if target == "loss" else outputs.scatter(1, own, -torch.inf).softmax(1)
    return pushed.scatter_add(1, own, -torch.ones_like(pushed[:, :1])) @ contrasts(outputs.shape[1], outputs.dtype)


class System(abc.ABC):
    """(H + damping I) x = goal, exactly or not; made once by `of(head)`."""

    @classmethod
    @abc.abstractmethod
    def of(cls, head: Head) -> "System":
        """The system of a head."""

    @abc.abstractmethod
    def solve(self, goals: Tensor, damping: float) -> Tensor:
        """Rows x with (H + damping I) x = goal: (k, c f) -> (k, c f). NotPositiveDefinite where there is none."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it was made of, beside the head: `system_of(head, kind, tensors)` gives it again."""


@dataclass(frozen=True, eq=False)
class Dense(System):
    """The matrix (c f, c f) itself, by Cholesky. factors: those found so far, by damping."""

    matrix: Tensor
    factors: dict[float, Tensor] = field(default_factory=dict, init=False, repr=False)
    kind = "dense"

    @classmethod
    def of(cls, head: Head) -> "Dense":
        c, f = head.residuals.shape[1], head.phi.shape[1]
        matrix = head.phi.new_zeros(c, f, c, f)
        for phi, curvatures in head.blocks():
            for a in range(c):
                for b in range(a + 1):  # c (c + 1) / 2 weighted Gram matrices
                    matrix[a, :, b] += phi.T @ (phi * curvatures[:, a, b, None])
        for a in range(c):
            for b in range(a):
                matrix[b, :, a] = matrix[a, :, b].T
        return cls(matrix.view(c * f, c * f) / len(head.phi))

    def solve(self, goals: Tensor, damping: float) -> Tensor:
        factor = self.factor(damping)
        return torch.cholesky_solve(goals.T.to(factor.dtype), factor).T.to(goals.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"matrix": self.matrix}

    def factor(self, damping: float) -> Tensor:
        """Cholesky factor, in float64 where float32 does not carry it."""
        if damping not in self.factors:
            factor = sound_factor(self.matrix, damping)
            self.factors[damping] = factor_dense(self.matrix.double(), damping) if factor is None else factor
        return self.factors[damping]


@dataclass(frozen=True, eq=False)
class Iterative(System):
    """Conjugate gradients on products with H: exact to `tolerance`, for systems too large to hold."""

    head: Head
    kind = "iterative"
    tolerance = 1e-5

    @classmethod
    def of(cls, head: Head) -> "Iterative":
        return cls(head)

    def solve(self, goals: Tensor, damping: float) -> Tensor:
        steps = conjugate_gradients(lambda rows: self.head.product(rows) + damping * rows, goals)
        for _, (x, residuals) in zip(range(MAX_STEPS), steps, strict=False):
            if float(residuals.max()) <= self.tolerance:
                return x
        raise RuntimeError(
            f"relative residual {float(residuals.max()):.2g} after {MAX_STEPS} steps of conjugate gradients, not "
            f"{self.tolerance}: use a larger damping than {damping:g}"
        )

    def tensors(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, eq=False)
class Kronecker(System):
    """An approximation: H is taken to be diagonal in the eigenbasis of (mean S) (x) (mean phi phi', weighted by tr S).

    Its diagonal there is exact, as in EKFAC (George et al. 2018, arXiv 1806.03884). outputs: (c, c) and inputs: (f, f)
    eigenvectors; diagonal: (c, f). Costs f^3 + c^3 + n f (f + c) instead of (c f)^3.
    """

    outputs: Tensor
    inputs: Tensor
    diagonal: Tensor
    kind = "kronecker"

    @classmethod
    def of(cls, head: Head) -> "Kronecker":
        second, mean = 0, 0
        for phi, curvatures in head.blocks():
            second = second + phi.T @ (phi * curvatures.diagonal(dim1=1, dim2=2).sum(1, keepdim=True))
            mean = mean + curvatures.sum(0)
        inputs, outputs = torch.linalg.eigh(second)[1], torch.linalg.eigh(mean)[1]
        diagonal = 0
        for phi, curvatures in head.blocks():
            seen = ((curvatures @ outputs) * outputs).sum(1)  # (b, c): v' S v for each eigenvector v
            diagonal = diagonal + seen.T @ (phi @ inputs) ** 2
        return cls(outputs, inputs, diagonal / len(head.phi))

    def solve(self, goals: Tensor, damping: float) -> Tensor:
        damped = self.diagonal + damping
        if float(damped.min()) <= 0:
            raise NotPositiveDefinite(
                f"the factored curvature + damping {damping} is singular: use a damping above 0", 0
            )
        rotated = self.outputs.T @ goals.view(len(goals), *damped.shape) @ self.inputs / damped
        return (self.outputs @ rotated @ self.inputs.T).reshape(goals.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"outputs": self.outputs, "inputs": self.inputs, "diagonal": self.diagonal}


SYSTEMS: Mapping[str, type[System]] = {system.kind: system for system in (Dense, Iterative, Kronecker)}


def system_of(head: Head, kind: str = "auto", tensors: Mapping[str, Tensor] | None = None) -> System:
    """kind: one of `SYSTEMS`, or "auto": dense up to `DENSE_LIMIT` unknowns, iterative beyond (both exact).

    tensors: those that a system of this head gave, instead of making it anew.
    """
    if kind == "auto":
        kind = "dense" if head.n_unknowns <= DENSE_LIMIT else "iterative"
    if kind not in SYSTEMS:
        raise ValueError(f"unknown system {kind!r}, expected auto or one of {sorted(SYSTEMS)}")
    if tensors:
        return SYSTEMS[kind](**tensors)
    return SYSTEMS[kind].of(head)
