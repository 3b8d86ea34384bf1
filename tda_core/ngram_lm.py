"""N-gram language models of any subset of the documents: the control that knows words and their neighbours alone.

What the n-gram model of a subset makes of a query predicts what a network trained on that subset makes of it: minus
`NgramLM.losses` are predictions (m, q) for `metrics.lds_of_predictions`, called `unigram_lm`, `bigram_lm` and
`trigram_lm` in tables. They are not additive in documents; `NgramLM.scores` is their first-order effect, which is.

Smoothing is interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999, section 2.7) over a uniform model of
the vocabulary. Its discounts follow from the counts of the subset itself, n1/(n1 + 2 n2) at each order (Ney, Essen and
Kneser 1994), so that nothing is fitted to held-out text and a subset's model is had from its counts in milliseconds;
weights of an interpolation would need a part of each subset, which the network is trained on.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from tda_core.examples import IGNORED, Examples
from tda_core.store import load_tensors, save_tensors
from tda_core.subsets import random_subsets

NAMES = {"unigram_lm": 1, "bigram_lm": 2, "trigram_lm": 3}  # what the orders are called in tables
# Where no n-gram occurs once the estimate is 0, and a word unseen after a known context would be impossible.
DISCOUNTS = (0.1, 0.95)
# Floats of one array of counts, n-grams times subsets: what is worked on together.
BLOCK_FLOATS = 2**21
N_DRAWN = 8  # subsets that discounts are averaged over where no subset is given


@dataclass(frozen=True, eq=False)
class NgramLM:
    """The n-gram models of all subsets of `train`, sequences whose labelled positions are counted.

    order: tokens of an n-gram, its last one predicted. n_tokens: V, of the vocabulary. fraction: of the documents in a
    subset, which `scores` supposes. A position before the text begins counts as a token of its own in contexts.
    Raises ValueError for other examples, tokens outside the vocabulary, order < 1, n-grams too many to number and a
    fraction outside (0, 1).
    """

    train: Examples
    order: int
    n_tokens: int
    fraction: float = 0.3

    def __post_init__(self) -> None:
        if self.order < 1 or self.n_tokens < 1:
            raise ValueError(f"order and n_tokens must be at least 1, got {self.order} and {self.n_tokens}")
        if (self.n_tokens + 1) ** self.order >= 2**63:
            raise ValueError(f"{self.n_tokens} tokens have more than 2^63 n-grams of order {self.order}")
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction must lie strictly between 0 and 1, got {self.fraction}")
        self._expect(self.train, "train")

    def losses(self, masks: Tensor, queries: Examples) -> Tensor:
        """Loss in nats of each query under the model of each subset, summed over its labelled positions: (m, q).

        masks: (m, n) bool. Raises ValueError for masks of another type or shape, an empty subset, and queries that are
        no sequences of this vocabulary.
        """
        self._expect(queries, "queries")
        if masks.dtype != torch.bool or masks.ndim != 2 or masks.shape[1] != len(self.train) or not len(masks):
            raise ValueError(f"masks must be (m, {len(self.train)}) bool, got {masks.dtype} {tuple(masks.shape)}")
        if not bool(masks.any(1).all()):
            raise ValueError(f"subset {int((~masks.any(1)).nonzero()[0])} is empty: it has no n-gram model")
        places = [level.places(queries, self.n_tokens) for level in self._levels]
        size = max(1, BLOCK_FLOATS // max(len(self._levels[-1].keys), len(places[0][0])))
        blocks = [self._losses(self._models(part), places, queries) for part in masks.split(size)]
        return torch.cat(blocks).float()

    def loss_per_token(self, masks: Tensor, queries: Examples) -> tuple[Tensor, Tensor]:
        """Mean loss a token, in nats, of each subset's model on its own documents and on the queries: two (m,)."""
        own = _labelled(self.train).sum(1)
        own_loss = (self.losses(masks, self.train) * masks).sum(1) / (masks * own).sum(1)
        return own_loss, self.losses(masks, queries).sum(1) / _labelled(queries).sum()

    def scores(self, queries: Examples) -> Tensor:
        """How fast each document's presence lowers a query's loss, at the average subset: (q, n), in nats.

        A document is in a subset with probability p = `fraction`. What discounted counts are expected then is exact,
        E max(c - D, 0) = E c - D P(c > 0), where a count's probability to be above 0 is 1 - (1 - p)^(documents that
        have it); the score is minus the derivative, in the document's own p, of the loss under the model of expected
        counts (expected counts in place of counts: Zhang and Chiang 2014). Raises ValueError as `losses` does.
        """
        self._expect(queries, "queries")
        places = [level.places(queries, self.n_tokens) for level in self._levels]
        p = torch.full((len(self.train),), self.fraction, dtype=torch.float64)
        counts, present = self._expected(p)
        wanted = [counts.requires_grad_(), *(values.requires_grad_() for values in present)]
        drawn = self._models(random_subsets(len(self.train), N_DRAWN, self.fraction, seed=0))
        losses = self._losses(self._smoothed(counts, present, [d.mean() for *_, d in drawn]), places, queries)[0]
        found = torch.empty(len(queries), len(self.train))
        for i, loss in enumerate(losses):
            of_counts, *of_present = torch.autograd.grad(loss, wanted, retain_graph=True)
            effect = self._levels[-1].counts @ of_counts[:, 0].numpy()
            for level, values, gradient in zip(self._levels, present, of_present, strict=True):
                # absent from all the other documents that have it
                alone = ((1 - values.detach()) / (1 - self.fraction) * gradient)[:, 0]
                effect += level.holds @ alone.numpy()
            found[i] = torch.from_numpy(-effect)
        return found

    def save(self, path: str | Path) -> None:
        metadata = {"kind": "NgramLM", "order": self.order, "n_tokens": self.n_tokens, "fraction": self.fraction}
        save_tensors(path, {"inputs": self.train.inputs, "targets": self.train.targets}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "NgramLM":
        """Raises ValueError for a file of something else, and as `load_tensors` does."""
        tensors, metadata = load_tensors(path)
        if metadata.pop("kind", None) != "NgramLM":
            raise ValueError(f"{path} does not hold an NgramLM")
        return cls(Examples(tensors["inputs"], tensors["targets"]), **metadata)

    @cached_property
    def _levels(self) -> list["_Level"]:
        """Counts of the n-grams of each order, shortest first."""
        return [_level(self.train, order, self.n_tokens) for order in range(1, self.order + 1)]

    def _models(self, masks: Tensor) -> list[tuple[Tensor, ...]]:
        """The models of m subsets."""
        members = masks.T.double().contiguous().numpy()
        return self._smoothed(torch.from_numpy(self._levels[-1].counts.T @ members))

    def _expected(self, p: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Expected counts of the longest n-grams, and probabilities to occur of those of each order, each (N, 1), where
        document i is in a subset with probability p[i] < 1."""
        counts = torch.from_numpy(self._levels[-1].counts.T @ p.numpy())[:, None]
        absent = torch.log1p(-p).numpy()
        return counts, [1 - torch.from_numpy(level.holds.T @ absent).exp()[:, None] for level in self._levels]

    def _smoothed(
        self, counts: Tensor, present: list[Tensor] | None = None, discounts: list[Tensor] | None = None
    ) -> list[tuple[Tensor, ...]]:
        """Of each order, shortest first: discounted counts (N, m), their contexts' totals and what is left for shorter
        contexts (H, m), and discounts (m,).

        counts: (N, m) of the longest n-grams; shorter ones count the n-grams that they end, as Kneser and Ney have it.
        present: (N, m) of each order, whether it occurs, by default where its count is above 0.
        """
        found = []
        for i in reversed(range(self.order)):
            level = self._levels[i]
            here = (counts > 0).double() if present is None else present[i]
            discount = _discounts(counts) if discounts is None else discounts[i]
            total, kinds = (_summed(values, level.contexts, level.n_contexts) for values in (counts, here))
            found.append((counts - discount * here, total, discount * kinds, discount))
            if i:
                counts = _summed(here, level.ends, len(self._levels[i - 1].keys))
        return found[::-1]

    def _losses(self, models: list[tuple[Tensor, ...]], places: list[tuple[Tensor, Tensor]], queries: Examples):
        """Summed losses (m, q), in float64."""
        probability: Tensor | float = 1 / self.n_tokens
        for (kept, total, left, _), (grams, contexts) in zip(models, places, strict=True):
            kept, total, left = (
                _rows(values, where) for values, where in ((kept, grams), (total, contexts), (left, contexts))
            )
            known = total > 0
            probability = torch.where(known, (kept + left * probability) / total.where(known, 1.0), probability)
        of_query = torch.arange(len(queries)).repeat_interleave(_labelled(queries).sum(1))
        return -_summed(probability.log(), of_query, len(queries)).T

    def _expect(self, examples: Examples, name: str) -> None:
        if not examples.is_sequence:
            raise ValueError(f"{name} must be sequences of tokens, targets (n, T) int64")
        for tokens in (examples.inputs, examples.targets[_labelled(examples)]):
            if int(tokens.min()) < 0 or int(tokens.max()) >= self.n_tokens:
                bad = tokens[(tokens < 0) | (tokens >= self.n_tokens)][0]
                raise ValueError(f"{name} hold token {int(bad)}, outside of a vocabulary of {self.n_tokens}")


@dataclass(frozen=True, eq=False)
class _Level:
    """The n-grams of one order that occur in training, numbered.

    keys: (N,) rising. counts: (n, N) of each in each document; holds: the same, 1 where it occurs. contexts: (N,) which
    of context_keys, (H,) rising, each has before its last token. ends: (N,) which n-gram one shorter it ends with.
    """

    order: int
    keys: np.ndarray
    counts: csr_matrix
    holds: csr_matrix
    contexts: Tensor
    context_keys: np.ndarray
    ends: Tensor

    @property
    def n_contexts(self) -> int:
        return len(self.context_keys)

    def places(self, queries: Examples, n_tokens: int) -> tuple[Tensor, Tensor]:
        """For each labelled position of queries, its n-gram and its context, -1 where training has none."""
        keys = _keys(queries, self.order, n_tokens)
        return _find(self.keys, keys), _find(self.context_keys, keys // (n_tokens + 1))


def _level(train: Examples, order: int, n_tokens: int) -> _Level:
    keys, grams = np.unique(_keys(train, order, n_tokens), return_inverse=True)
    documents = np.repeat(np.arange(len(train)), _labelled(train).sum(1).numpy())
    shape = (len(train), len(keys))
    counts = csr_matrix((np.ones(len(grams)), (documents, grams)), shape=shape)  # repeated entries add up
    holds = csr_matrix((np.ones_like(counts.data), counts.indices, counts.indptr), shape=shape)
    context_keys, contexts = np.unique(keys // (n_tokens + 1), return_inverse=True)
    _, ends = np.unique(keys % (n_tokens + 1) ** (order - 1), return_inverse=True)
    return _Level(order, keys, counts, holds, torch.from_numpy(contexts), context_keys, torch.from_numpy(ends))


def _keys(examples: Examples, order: int, n_tokens: int) -> np.ndarray:
    """A number for the n-gram that ends at each labelled position, its first token worth most: (positions,) int64."""
    labelled = _labelled(examples).numpy()
    keys = examples.targets.cpu().numpy()[labelled]
    inputs = examples.inputs.cpu().numpy()
    for back in range(order - 1):
        before = np.pad(inputs, ((0, 0), (back, 0)), constant_values=n_tokens)[:, : inputs.shape[1]]
        keys = keys + before[labelled] * (n_tokens + 1) ** (back + 1)
    return keys


def _labelled(examples: Examples) -> Tensor:
    return (examples.targets != IGNORED).cpu()


def _find(known: np.ndarray, keys: np.ndarray) -> Tensor:
    """Where each key is in the rising `known`, -1 where it is not."""
    places = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return torch.from_numpy(np.where(known[places] == keys, places, -1))


def _summed(values: Tensor, into: Tensor, n: int) -> Tensor:
    """Sums (n, m) of the rows of values (N, m) that go into each place."""
    return values.new_zeros(n, values.shape[1]).index_add(0, into, values)


def _rows(values: Tensor, where: Tensor) -> Tensor:
    """Rows of values (N, m), zeros where `where` is -1."""
    return torch.where((where >= 0)[:, None], values[where], 0.0)


def _discounts(counts: Tensor) -> Tensor:
    """n1/(n1 + 2 n2) of each column of counts (N, m), kept within `DISCOUNTS`: (m,)."""
    once, twice = ((counts == times).sum(0).double() for times in (1, 2))
    return (once / (once + 2 * twice).clamp_min(1)).clamp(*DISCOUNTS)
