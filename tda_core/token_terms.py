"""Closed-form influence between positions of text, by what two contexts and their next tokens have in common.

A head with a row of logits for every context c, trained on counts, stands at p_c, the frequencies of what follows c.
One Newton step on a position (c, y) changes the loss of another one (c, y') by -r' S^-1 r / n_c with r = p_c - y and
S = diag p_c - p_c p_c', which is 1 / n(c, y) - 1 / n_c for y = y' and -1 / n_c else. The terms here are what is left of
it with some smoothing, and what it becomes where contexts, or next tokens, need only be similar:

    Match     1[c = c', y = y'] E log [(k + 1 + s) / (k + s)], contexts being the last tokens, or the last but one: what
              one occurrence more adds to log n(c, y) of a model trained on a share f of the documents, k of the
              n(c, y) - 1 others among them (binomial). s = f (prior p(y) + smoothing), as if every context had been
              followed, `prior` times, by what the whole text holds (the Dirichlet prior of MacKay & Peto 1995, A
              Hierarchical Dirichlet Language Model). Of many occurrences it is 1 / (f n(c, y) + s)
    Related   1[c = c'] r' E (E' S_c E + damping I)^-1 E' r / (n_c + smoothing): logits may move by the network's output
              embedding E alone, so that a token teaches related ones; S_c and p_c are mixed with the whole text's alike
    State     1[y = y'] k / (sum of k over training positions that y follows + smoothing), k = cos(h, h')^power of
              whitened hidden states: contexts that the network holds to be similar

Only State and Related look at the network; none takes a gradient. With the network's own residuals, Match and State
keep the product of the next token's entries, 1 - p(y) on either side, and Related takes E'(p - y).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.nn import functional as F

from tda_core.token_table import TokenTable

# Tokens that make up a context, by their place in `TokenTable.context`.
CONTEXTS = {"unigram": (), "bigram": (0,), "trigram": (0, 1), "fourgram": (0, 1, 2), "skip": (1,)}
# Occurrences up to which an expectation is summed one by one.
COUNTED = 80
# Pairs of positions that are held at a time (16 MB).
PAIRS = 2**22


@dataclass(frozen=True, eq=False)
class Positions:
    """Positions of documents, for terms.

    weights: (N,) in their document's loss. states: (N, d). residuals: (N, d), E'(p - y) of the network, and expected:
    (N,), its probability of the token; None where residuals are those of counts.
    """

    table: TokenTable
    weights: Tensor
    states: Tensor | None = None
    residuals: Tensor | None = None
    expected: Tensor | None = None

    @property
    def own_weights(self) -> Tensor:
        """Weights (N,) times what is left to learn of a position's own token."""
        return self.weights if self.expected is None else self.weights * (1 - self.expected)


@dataclass(frozen=True)
class Smoothing:
    """share: of the documents, that a model is trained on. occurrences: added to counts. Occurrences of the whole
    text's tokens that are added to each context's: prior in matches, mixing where tokens are related. damping: in units
    of the mean variance of the embedding over the text."""

    share: float
    occurrences: float
    prior: float
    mixing: float
    damping: float


@dataclass(frozen=True, eq=False)
class Keys:
    """Numbers for tuples of tokens, those that the training text holds: levels[k] are the sorted pairs of the number
    of the first k tokens and the next token, as n_tokens number + token."""

    levels: tuple[Tensor, ...]
    n_tokens: int

    @classmethod
    def of(cls, columns: list[Tensor], n_tokens: int) -> tuple["Keys", Tensor]:
        """The keys of a training text, and each position's: columns of (N,) tokens, -1 before the text begins."""
        made, found = cls((), n_tokens + 1), torch.zeros_like(columns[0])
        for column in columns:
            level, found = (found * made.n_tokens + column + 1).unique(return_inverse=True)
            made = cls((*made.levels, level), made.n_tokens)
        return made, found

    def __len__(self) -> int:
        return len(self.levels[-1])

    def find(self, columns: list[Tensor]) -> Tensor:
        """The number of each position's tuple (N,), -1 where the training text has none such."""
        found = torch.zeros_like(columns[0])
        for level, column in zip(self.levels, columns, strict=True):
            pair = found * self.n_tokens + column + 1
            place = torch.searchsorted(level, pair).clamp_max(len(level) - 1)
            found = torch.where((found >= 0) & (level[place] == pair), place, -1)
        return found


@dataclass(frozen=True, eq=False)
class Match:
    """Equal contexts and next tokens. by_document: (n, keys), what a document gives to each."""

    columns: tuple[int, ...]
    keys: Keys
    by_document: csr_matrix

    @classmethod
    def of(cls, train: Positions, columns: tuple[int, ...], n_tokens: int, smoothing: Smoothing) -> "Match":
        keys, found = Keys.of(_columns(train.table, columns, targets=True), n_tokens)
        counts = torch.bincount(found, minlength=len(keys))[found]
        tokens = torch.bincount(train.table.targets, minlength=n_tokens)[train.table.targets] / len(train.table)
        gains = expected_gain(counts, smoothing.share, smoothing.occurrences + smoothing.prior * tokens)
        return cls(columns, keys, _sums(train, found, train.own_weights * gains, len(keys)))

    def scores(self, queries: Positions) -> Tensor:
        """(n_query, n_train)."""
        found = self.keys.find(_columns(queries.table, self.columns, targets=True))
        asked = _sums(queries, found, queries.own_weights, len(self.keys))
        return torch.from_numpy((asked @ self.by_document.T).toarray()).float()


@dataclass(frozen=True, eq=False)
class Related:
    """Equal contexts, next tokens compared in the output embedding, centred at the text's mean: (V, d).

    groups: of the training positions by context. spread: (d, d), the covariance of the embedding over the text. Raises
    ValueError where that is zero.
    """

    columns: tuple[int, ...]
    keys: Keys
    groups: "Groups"
    train: Positions
    embedding: Tensor
    spread: Tensor
    smoothing: Smoothing

    @classmethod
    def of(cls, train: Positions, columns: tuple[int, ...], embedding: Tensor, smoothing: Smoothing) -> "Related":
        keys, found = Keys.of(_columns(train.table, columns), len(embedding))
        own = embedding[train.table.targets]
        mean, spread = own.mean(0), torch.cov(own.T, correction=0)
        if not float(spread.diagonal().mean()) > 0:
            raise ValueError("related terms compare rows of the output embedding, which are all equal: untrained?")
        return cls(columns, keys, Groups.of(found), train, embedding - mean, spread, smoothing)

    def scores(self, queries: Positions) -> Tensor:
        """(n_query, n_train)."""
        asked = Groups.of(self.keys.find(_columns(queries.table, self.columns)))
        total = torch.zeros(queries.table.n_documents, self.train.table.n_documents)
        for key in asked.values:
            if key < 0:
                continue
            theirs, own = asked.rows(key), self.groups.rows(key)
            mean, factor = self._newton(own)
            sides = []
            for positions, rows in ((queries, theirs), (self.train, own)):
                residuals = self._residuals(positions, rows, mean) * positions.weights[rows, None]
                documents, which = positions.table.documents[rows].unique_consecutive(return_inverse=True)
                summed = residuals.new_zeros(len(documents), residuals.shape[1]).index_add_(0, which, residuals)
                sides.append((documents, torch.linalg.solve_triangular(factor, summed.T, upper=False).T))
            products = sides[0][1] @ sides[1][1].T / (len(own) + self.smoothing.occurrences)
            total[sides[0][0][:, None], sides[1][0]] += products
        return total

    def _newton(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean embedding (d,) of what follows a context, and a Cholesky factor of E' S E + damping I."""
        own, mixing = self.embedding[self.train.table.targets[rows]], self.smoothing.mixing
        mean = own.sum(0) / (len(rows) + mixing)
        second = (own.T @ own + mixing * self.spread) / (len(rows) + mixing) - mean[:, None] * mean
        damping = self.smoothing.damping * self.spread.diagonal().mean()
        return mean, torch.linalg.cholesky(second + damping * torch.eye(len(mean)))

    def _residuals(self, positions: Positions, rows: Tensor, mean: Tensor) -> Tensor:
        if positions.residuals is not None:
            return positions.residuals[rows]
        return mean - self.embedding[positions.table.targets[rows]]


@dataclass(frozen=True, eq=False)
class State:
    """Equal next tokens after similar hidden states. mean (d,), whitening (d, d). states: (N, d), of length 1."""

    groups: "Groups"
    train: Positions
    mean: Tensor
    whitening: Tensor
    states: Tensor
    power: float
    smoothing: Smoothing

    @classmethod
    def of(cls, train: Positions, power: float, smoothing: Smoothing) -> "State":
        values, vectors = torch.linalg.eigh(torch.cov(train.states.T, correction=0))
        # a tenth of the mean variance keeps directions that hardly vary from counting as much as all others
        whitening, mean = vectors / (values.clamp_min(0) + 0.1 * values.mean()).sqrt(), train.states.mean(0)
        states = F.normalize((train.states - mean) @ whitening, dim=1)
        return cls(Groups.of(train.table.targets), train, mean, whitening, states, power, smoothing)

    def scores(self, queries: Positions) -> Tensor:
        """(n_query, n_train)."""
        asked, n = Groups.of(queries.table.targets), self.train.table.n_documents
        states = F.normalize((queries.states - self.mean) @ self.whitening, dim=1)
        asked_weights, own_weights = queries.own_weights, self.train.own_weights
        total = torch.zeros(queries.table.n_documents * n)
        for token in asked.values:
            own = self.groups.rows(token)
            for theirs in asked.rows(token).split(max(1, PAIRS // max(1, len(own)))):
                kernel = (states[theirs] @ self.states[own].T).clamp_min(0) ** self.power
                kernel /= kernel.sum(1, keepdim=True) + self.smoothing.occurrences
                kernel *= asked_weights[theirs, None] * own_weights[own]
                places = queries.table.documents[theirs, None] * n + self.train.table.documents[own]
                total.index_add_(0, places.flatten(), kernel.flatten())
        return total.view(-1, n)


@dataclass(frozen=True, eq=False)
class Groups:
    """Positions by a number that they share, in their order: `order` holds them group by group."""

    order: Tensor
    bounds: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, numbers: Tensor) -> "Groups":
        values, counts = numbers.unique(return_counts=True)
        ends = counts.cumsum(0)
        bounds = zip((ends - counts).tolist(), ends.tolist(), strict=True)
        return cls(numbers.argsort(stable=True), dict(zip(values.tolist(), bounds, strict=True)))

    @property
    def values(self) -> list[int]:
        return list(self.bounds)

    def rows(self, number: int) -> Tensor:
        """The positions of one group, none where there is no such group."""
        return self.order[slice(*self.bounds.get(number, (0, 0)))]


def expected_gain(counts: Tensor, share: float, smoothing: Tensor) -> Tensor:
    """E log [(k + 1 + s) / (k + s)], k ~ Binomial(count - 1, share), s = share * smoothing: (N,), (N,) -> (N,).

    Beyond `COUNTED` occurrences, 1 over the mean of the denominator, half an occurrence on.
    """
    pairs, inverse = torch.stack([counts.double(), share * smoothing.double()]).unique(dim=1, return_inverse=True)
    others, s = pairs[0] - 1, pairs[1]
    found = 1 / (share * others + s + 0.5)
    few = others < COUNTED
    others, s, total = others[few], s[few], torch.zeros(int(few.sum()), dtype=torch.float64)
    for k in range(int(others.max()) + 1 if len(others) else 0):
        ways = torch.lgamma(others + 1) - math.lgamma(k + 1) - torch.lgamma((others - k).clamp_min(0) + 1)
        chance = (ways + k * math.log(share) + (others - k) * math.log1p(-share)).exp()
        total += torch.where(k <= others, chance, 0.0) * torch.log((k + 1 + s) / (k + s))
    found[few] = total
    return found[inverse].float()


def _columns(table: TokenTable, columns: tuple[int, ...], *, targets: bool = False) -> list[Tensor]:
    """Tokens at those places of the context, and the next tokens behind them; a constant where there is no column."""
    found = [table.context[:, place] for place in columns] + ([table.targets] if targets else [])
    return found or [torch.zeros_like(table.targets)]


def _sums(positions: Positions, keys: Tensor, values: Tensor, n_keys: int) -> csr_matrix:
    """Values (N,) summed by document and key, those of keys below 0 left out: (n, n_keys)."""
    known = keys >= 0
    places = positions.table.documents[known].numpy(), keys[known].numpy()
    shape = (positions.table.n_documents, n_keys)
    return csr_matrix((values[known].numpy().astype(np.float64), places), shape=shape)
