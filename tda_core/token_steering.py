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
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from scipy import sparse
from torch import Tensor

from tda_core.examples import Examples
from tda_core.language import LanguageModel
from tda_core.token_gradients import head_of
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
class Head:
    """The frozen output embedding. weight: (D, V). bias: (V,) or None. Logits are last @ weight + bias."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, model: LanguageModel) -> "Head":
        weight, bias = head_of(model)
        return cls(weight.float().T.contiguous(), None if bias is None else bias.float())

    @property
    def n_tokens(self) -> int:
        return self.weight.shape[1]

    def narrowed(self, columns: Tensor | None) -> "Head":
        """The head of some tokens alone (None: all)."""
        if columns is None:
            return self
        return Head(self.weight[:, columns], None if self.bias is None else self.bias[columns])

    def logits(self, last: Tensor) -> Tensor:
        """Frozen logits (b, V)."""
        product = last @ self.weight
        return product if self.bias is None else product.add_(self.bias)


@dataclass(frozen=True, eq=False)
class Block:
    """Positions that an operator is applied to. last: (b, D). hidden: (b, d), the same tensor where operators stand on
    the last states. targets: (b,) numbers among the head's tokens. rest: (b, 1) log of the mass of all other tokens,
    None where the head has them all."""

    head: Head
    last: Tensor
    hidden: Tensor
    targets: Tensor
    rest: Tensor | None = None

    def steered(self, shift: Tensor | None) -> Tensor:
        """Logits under a shift (d, c) of the head on `hidden` (None: none), and `rest` behind them: (b, c or c + 1)."""
        if shift is None:
            found = self.head.logits(self.last)
        elif self.hidden is self.last:
            found = Head(self.head.weight + shift, self.head.bias).logits(self.last)
        else:
            found = self.head.logits(self.last).addmm_(self.hidden, shift)
        return found if self.rest is None else torch.cat([found, self.rest], 1)

    def log_likelihoods(self, shift: Tensor | None) -> Tensor:
        """log p of the targets: (b,)."""
        logits = self.steered(shift)
        return logits.gather(1, self.targets[:, None])[:, 0] - logits.logsumexp(1)


@dataclass(frozen=True, eq=False)
class Source:
    """Where blocks come from: a table, the frozen head, and which log-softmax is asked for.

    on_last: operators stand on the last states. common: (m,) tokens that restricted log-softmaxes keep besides the
    targets, None for full ones. budget: bytes of a block. masses: (N, 1) log of the whole mass of the frozen logits,
    where it is known already.
    """

    table: TokenTable
    head: Head
    on_last: bool
    common: Tensor | None
    budget: int
    masses: Tensor | None = None

    def columns(self, targets: Tensor) -> Tensor | None:
        """The tokens that stand in a log-softmax over these targets, rising; None for all."""
        return None if self.common is None else torch.cat([self.common, targets.to(self.common)]).unique()

    def size(self, n_columns: int) -> int:
        """Most positions of a block, whose logits are held about four times at once."""
        return max(1, self.budget // (16 * n_columns))

    def blocks(self, rows: Tensor, columns: Tensor | None) -> Iterator[tuple[Tensor, Block]]:
        """The positions (b,) and what stands there, a block at a time."""
        head = self.head.narrowed(columns)
        for part in rows.split(self.size(head.n_tokens)):
            yield part, self.block(part, columns, head)

    def block(self, rows: Tensor, columns: Tensor | None, head: Head) -> Block:
        weight = self.head.weight
        last = self.table.last[rows].to(weight)
        hidden = last if self.on_last else self.table.hidden[rows].to(weight)
        targets = self.table.targets[rows].to(weight.device)
        if columns is None or len(columns) == self.head.n_tokens:
            return Block(head, last, hidden, targets)
        own = head.logits(last).logsumexp(1, keepdim=True)
        total = self.log_masses(last) if self.masses is None else self.masses[rows].to(weight)
        # what the others have, never below what rounding leaves of nothing
        rest = total + torch.log1p(-(own - total).exp().clamp_max(1 - 1e-6))
        return Block(head, last, hidden, torch.searchsorted(columns, targets), rest)

    def log_masses(self, last: Tensor) -> Tensor:
        """logsumexp of all V frozen logits, (b, 1), in blocks of positions."""
        parts = last.split(self.size(self.head.n_tokens))
        return torch.cat([self.head.logits(part).logsumexp(1, keepdim=True) for part in parts])


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

    def shift(self, k: int, columns: Tensor | None = None) -> Tensor:
        """E_k = P a_k (d, V), or of some tokens alone."""
        matrix = self.matrices[k]
        return self.projection @ (matrix if columns is None else matrix[:, columns])

    def table(self, queries: Examples) -> TokenTable:
        return token_table(self.model, queries, layer=self.settings.layer)

    def measurements(self, queries: Examples | TokenTable) -> Tensor:
        """y_{x,k} = Loss(o_x) - Loss(o~_k(x)), summed over a query's labelled tokens, in nats: (q, K) on the CPU.

        Positive where an operator helps. A query is measured by itself, so restricted log-softmaxes do not depend on
        the others.
        """
        table = queries if isinstance(queries, TokenTable) else self.table(queries)
        settings = self.settings
        source = Source(table, Head.of(self.model), settings.layer is None, self.common, settings.budget)
        found = torch.zeros(self.n_subsets, table.n_documents)
        every = torch.arange(len(table))
        parts = [every] if self.common is None else list(every.split(table.lengths.tolist()))
        for part in parts:
            columns = source.columns(table.targets[part])
            for rows, block in source.blocks(part, columns):
                before, documents = block.log_likelihoods(None), table.documents[rows]
                for k in range(self.n_subsets):
                    gains = block.log_likelihoods(self.shift(k, columns)) - before
                    found[k].index_add_(0, documents, gains.cpu())
        return found.T.contiguous()


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
        return (vectors * vectors[largest, torch.arange(settings.rank)].sign() / values.sqrt()).float()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(d, settings.rank, generator=generator, dtype=torch.float64)
    return (drawn / (scale * d**0.5)).float()
