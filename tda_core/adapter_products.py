"""What a linear map before the output embedding would learn from each document: one forward pass, nothing backwards.

A steering operator on the last states, h + A h, begins at A = 0, where logits W (h + A h) have the gradient

    G_i = sum_t W' (p_t - y_t) h_t'        (d, d), over a document's labelled positions,

and to first order a query's loss falls by <G_q, G_i> when such an operator is fitted to a document (Dagli et al. 2026,
arXiv 2606.05165, the variant that steers activations; to fit it from the frozen model and read it to first order are
ours). Unlike the output embedding's own gradients (`token_products`), which have a row for each token, they meet where
two tokens have like embeddings: a document counts for a query that says the same in other words.

p_t are token frequencies of the training set (start "frequency": what a network does not know before training, so that
a document counts which it has learned by heart) or the model's own ("model").
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tda_core.examples import Examples
from tda_core.language import LanguageModel
from tda_core.token_gradients import head_of, position_weights
from tda_core.token_simulation import token_shares
from tda_core.token_table import token_table

STARTS, KINDS = ("frequency", "model"), ("dot", "cosine")
# Floats of the gradients that are held together (256 MB), and of probabilities
HELD, PROBABILITIES = 2**26, 2**23


@dataclass(frozen=True, eq=False)
class Pushes:
    """Positions of n documents: how each would move its state, (N, d), from which state, (N, d), and its document."""

    moves: Tensor
    states: Tensor
    documents: Tensor
    n: int

    def gradients(self, rows: slice) -> Tensor:
        """Rows of -G of each document, flat: (n, r d)."""
        moves = self.moves[:, rows]
        found = self.states.new_zeros(self.n, moves.shape[1], self.states.shape[1])
        size = max(1, PROBABILITIES // (moves.shape[1] * self.states.shape[1]))
        for part in torch.arange(len(moves)).split(size):
            products = moves[part, :, None] * self.states[part, None]
            found.index_add_(0, self.documents[part], products)
        return found.flatten(1)


@dataclass(frozen=True, eq=False)
class AdapterProducts:
    """Products of these gradients of queries and training documents.

    start: whose probabilities, "frequency" or "model". kind: "dot", with a query's mean loss over its tokens and a
    document's sum, or "cosine", their angle. Raises ValueError for others.
    """

    model: LanguageModel
    train: Examples
    start: str = "frequency"
    kind: str = "dot"

    def __post_init__(self) -> None:
        for name, known in (("start", STARTS), ("kind", KINDS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, expected one of {', '.join(known)}")

    def scores(self, queries: Examples) -> Tensor:
        """Scores (n_query, n_train), positive for proponents."""
        asked = self._pushes(queries, "mean")
        found = torch.zeros(len(queries), len(self.train), dtype=torch.float64)
        squares = [torch.zeros(len(part), dtype=torch.float64) for part in (queries, self.train)]
        for rows in self._slices():
            goals, own = asked.gradients(rows).double(), self.own.gradients(rows).double()
            found += goals @ own.T
            for total, part in zip(squares, (goals, own), strict=True):
                total += part.square().sum(1)
        if self.kind == "cosine":
            lengths = [total.sqrt().clamp_min(torch.finfo(total.dtype).tiny) for total in squares]
            found /= lengths[0][:, None] * lengths[1]
        return found.float()

    @cached_property
    def own(self) -> Pushes:
        """The training documents'."""
        return self._pushes(self.train, "sum")

    @cached_property
    def expected(self) -> Tensor:
        """The mean output embedding under token frequencies of the training set: (d,)."""
        weight, _ = self._head
        targets = self.train.targets[self.train.targets >= 0].cpu()
        return token_shares(targets, len(weight)) @ weight

    @cached_property
    def _head(self) -> tuple[Tensor, Tensor | None]:
        return tuple(None if part is None else part.float().cpu() for part in head_of(self.model))

    def _pushes(self, examples: Examples, reduction: str) -> Pushes:
        table, (weight, bias) = token_table(self.model, examples), self._head
        moves = weight[table.targets]
        if self.start == "frequency":
            moves = moves - self.expected
        else:
            size = max(1, PROBABILITIES // len(weight))
            for rows in torch.arange(len(table)).split(size):
                logits = table.last[rows] @ weight.T
                moves[rows] -= (logits if bias is None else logits + bias).softmax(1) @ weight
        weighted = moves * position_weights(table, reduction)[:, None]
        return Pushes(weighted, table.last, table.documents, len(examples))

    def _slices(self) -> Iterator[slice]:
        width = self._head[0].shape[1]
        size = max(1, math.floor(HELD / (width * len(self.train))))
        for start in range(0, width, size):
            yield slice(start, min(start + size, width))
