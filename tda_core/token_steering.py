"""Steering operators of a causal language model: K low-rank shifts of its logits, on states that stay frozen.

Dagli et al. 2026 (arXiv 2606.05165): steered logits of a position o~_k = o + B(h) a_k, h the states of a layer, B(h)
(r) a basis that all operators share, a_k (r, V) the steering matrix of subset k. The basis is linear here, B(h) = h P,
so that an operator is a shift E_k = P a_k (d, V) of a head on h, and all that it is trained and asked by are products
of states with (d, V) matrices, operator by operator: nothing of K x positions x V numbers is ever held.

For a large vocabulary the log-softmax can be restricted to the targets at hand and the tokens that the frozen model
finds most probable on average. What it gives all others stays as it is, as one outcome that no operator shifts: exact
where an operator is zero, and for any operator once all tokens are among the restricted ones.
"""

import math
from dataclasses import dataclass, replace

import torch
from scipy import sparse
from torch import Tensor

from tda_core.examples import Examples
from tda_core.language import LanguageModel
from tda_core.memory import cached_logits
from tda_core.token_blocks import Head, Source
from tda_core.token_table import TokenTable, token_table

BASES = ("linear", "random", "whitened", "identity")
SECOND_MOMENTS = ("own", "shared")
# Share of the largest eigenvalue below which a direction of the states is rounding
FLAT = 1e-6


@dataclass(frozen=True)
class TokenSteering:
    """How operators of a language model are trained. The defaults did best on validation queries of help_topics, where
    further steps on drawn documents cost much and took from what the first, of all documents, had found.

    layer: whose states they stand on, as in `token_table` (a number, a share of the depth, None: the last states).
    basis: "linear", learned with the operators, from a random start; "random", fixed; "whitened", the `rank` principal
    directions of the states, scaled to mean square 1; "identity", all of the states (rank is not used). fidelity,
    stability, linearity: weights of the losses, all per token; sketch and gamma belong to the last.
    steps, rate: of Adam. full_start: the first step, from zero, takes all documents of all subsets (one pass over the
    documents, whose residuals all operators share there), not those drawn. second_moment: "own" scales every
    operator's steps by its own gradients as Adam does; "shared" by the mean square over operators, so that a step
    stays linear in the gradient. members: a subset's own documents in a step, visited in turn; outside: documents for
    the stability of all (None: all). restricted: most probable tokens that log-softmaxes keep besides the targets
    (None: the full vocabulary). budget: bytes that the blocks worked on may take, beside matrices, moments and the
    table. save_every: steps between checkpoints.
    """

    layer: int | float | None = None
    basis: str = "whitened"
    rank: int = 64
    fidelity: float = 1.0
    stability: float = 1.0
    linearity: float = 0.0
    sketch: int = 64
    gamma: float = 1.0
    steps: int = 1
    rate: float = 0.002
    full_start: bool = True
    second_moment: str = "shared"
    members: int | None = 8
    outside: int | None = 4
    restricted: int | None = None
    budget: int = 2**24
    save_every: int = 10

    def __post_init__(self) -> None:
        for name, known in (("basis", BASES), ("second_moment", SECOND_MOMENTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, expected one of {known}")
        for name in ("fidelity", "stability", "linearity"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if not self.fidelity > 0:
            raise ValueError("fidelity must be > 0: operators start at zero, and nothing else moves them")
        for name in ("rate", "gamma"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        for name in ("rank", "steps", "sketch", "budget", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("members", "outside", "restricted"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be None (all) or >= 1, got {getattr(self, name)}")

    def but(self, **changes: object) -> "TokenSteering":
        """The same settings with some changed."""
        return replace(self, **changes)


# What the paper says of its operators; it does not say how they are optimised.
PUBLISHED = TokenSteering(layer=0.6, basis="linear", rank=16, linearity=1.0, second_moment="own", steps=25)


@dataclass(frozen=True, eq=False)
class SteeredDocuments:
    """What operators are trained on: the model, its table of the training documents, and subsets of them.

    membership: (K, n). weights: (N,) in [0, 1], each position's weight in the fidelity, None: 1. The table's states may
    be of half precision and mapped from files. identity: of the training documents. Raises ValueError for a membership
    of other documents and weights of another shape or outside [0, 1].
    """

    model: LanguageModel
    table: TokenTable
    membership: sparse.csc_array
    weights: Tensor | None
    identity: str

    def __post_init__(self) -> None:
        n, given = self.table.n_documents, self.weights
        if self.membership.shape[1] != n:
            raise ValueError(f"membership must have a column for each of {n} documents, got {self.membership.shape}")
        if given is not None:
            if given.shape != (len(self.table),):
                raise ValueError(f"weights must be ({len(self.table)},), got {tuple(given.shape)}")
            if not bool(((given >= 0) & (given <= 1)).all()):
                raise ValueError(f"weights must lie in [0, 1], got {float(given.min())} to {float(given.max())}")


@dataclass(frozen=True, eq=False)
class TokenOperators:
    """K trained operators. projection: P (d, r). matrices: (K, r, V), the a_k. common: see `Source`."""

    model: LanguageModel
    settings: TokenSteering
    projection: Tensor
    matrices: Tensor
    common: Tensor | None

    @property
    def n_subsets(self) -> int:
        return len(self.matrices)

    def table(self, queries: Examples) -> TokenTable:
        return token_table(self.model, queries, layer=self.settings.layer)

    def measurements(self, queries: Examples | TokenTable, *, first_order: bool = False) -> Tensor:
        """y_{x,k} = Loss(o_x) - Loss(o~_k(x)), summed over a query's labelled tokens, in nats: (q, K) on the CPU.

        Positive where an operator helps. A query is measured by itself, so restricted log-softmaxes do not depend on
        the others. first_order: what a small share of each operator does, over that share, <P' sum_t h_t (e_y - p_t)',
        a_k>: one product of matrices for all operators instead of a softmax over the vocabulary for each.
        """
        table = queries if isinstance(queries, TokenTable) else self.table(queries)
        measured = self._first_order if first_order else self._measured
        # as many positions as the cache holds the logits of, and enough for reading an operator to pay
        logits = max(cached_logits(self.matrices.device), self.matrices[0].numel())
        budget = min(self.settings.budget, 16 * logits)
        source = Source(table, Head.of(self.model), self.settings.layer is None, self.common, budget)
        return measured(source).T.contiguous().cpu()

    def _measured(self, source: Source) -> Tensor:
        """Differences of losses: (K, q)."""
        table = source.table
        found = torch.zeros(self.n_subsets, table.n_documents)
        every = torch.arange(len(table))
        for part in [every] if self.common is None else every.split(table.lengths.tolist()):
            columns = source.columns(table.targets[part])
            for rows, block in source.blocks(part, columns):
                gains = block.gains(block.hidden @ self.projection, self.matrices, columns)
                found.index_add_(1, table.documents[rows], gains.cpu())
        return found

    def _first_order(self, source: Source) -> Tensor:
        """Slopes of the losses: (K, q). Operators are read once for as many queries as the budget holds slopes of."""
        queries, form = torch.arange(len(source.table)).split(source.table.lengths.tolist()), self.matrices[0].shape
        together = max(1, self.settings.budget // (4 * form.numel()))
        found = []
        for start in range(0, len(queries), together):
            some = queries[start : start + together]
            slopes = self.matrices.new_zeros(len(some), *form)
            for slope, rows in zip(slopes, some, strict=True):
                self._add_slope(slope, source, rows)
            found.append(self.matrices.flatten(1) @ slopes.flatten(1).T)
        return torch.cat(found, 1)

    def _add_slope(self, slope: Tensor, source: Source, rows: Tensor) -> None:
        """P' sum_t h_t (e_y - p_t)' of one query (r, V), 0 for tokens that its log-softmax leaves out."""
        columns = source.columns(source.table.targets[rows])
        for _, block in source.blocks(rows, columns):
            slope[:, slice(None) if columns is None else columns] += (block.hidden @ self.projection).T @ block.pushes()


def fixed_basis(settings: TokenSteering, moment: Tensor, *, seed: int) -> Tensor:
    """P (d, r) to begin with, of states whose second moment mean h'h is `moment` (d, d).

    What it makes of the states has a mean square of 1 a direction (for "identity" and random ones: on average).
    Raises ValueError for a whitened rank above the number of directions that the states have.
    """
    d = len(moment)
    scale = float(moment.diagonal().mean()) ** 0.5
    if not scale > 0:
        raise ValueError("the states of this layer are all zero: operators have nothing to stand on")
    if settings.basis == "identity":
        return torch.eye(d) / scale
    if settings.basis == "whitened":
        values, vectors = torch.linalg.eigh(moment.double())
        n_directions = int((values > FLAT * values[-1]).sum())
        if settings.rank > n_directions:
            raise ValueError(f"rank must be at most {n_directions}, the directions of the states, got {settings.rank}")
        values, vectors = values[-settings.rank :], vectors[:, -settings.rank :]
        largest = vectors.abs().argmax(0)  # which sign a direction has is arbitrary: fixed here
        signs = vectors[largest, torch.arange(settings.rank)].sign()
        return (vectors * signs / values.sqrt()).float().contiguous()  # as a file gives it back: products are alike
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(d, settings.rank, generator=generator, dtype=torch.float64)
    return (drawn / (scale * d**0.5)).float()
