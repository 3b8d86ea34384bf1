"""BM25: the ranking of text search, as a control for attribution (`bm25` in tables).

A training pair's score for a query is a sum over the query's words w, each as often as it stands there,

    ln(1 + (n - n_w + .5) / (n_w + .5))  f / (f + k1 (1 - b + b length / mean length)),

with f how often w is in the training pair and n_w in how many of the n pairs it is (Robertson & Zaragoza 2009, The
Probabilistic Relevance Framework, in the variant of Lucene). Computed by `bm25s` (Lù 2024, arXiv 2407.03618).
"""

import math
import re
from dataclasses import dataclass

import bm25s
import torch
from torch import Tensor

from tda_core.text_pairs import TextPairs
from tda_core.text_similarity import WORDS


@dataclass(frozen=True, eq=False)
class BM25:
    """An index over the words of prompt and response together."""

    index: bm25s.BM25
    n_train: int

    def scores(self, queries: TextPairs) -> Tensor:
        """Scores (n_query, n_train), 0 where no word is shared; they grow with the query's length."""
        found = torch.zeros(len(queries), self.n_train)
        for row, words in zip(found, words_of(queries), strict=True):
            if known := self.index.get_tokens_ids(words):
                row += torch.from_numpy(self.index.get_scores_from_ids(known))
        return found


def bm25(train: TextPairs, *, k1: float = 1.5, b: float = 0.75) -> BM25:
    """k1: how soon repetitions of a word stop to count. b: from 0 to 1, how much long pairs are held against them.

    Raises ValueError for a k1 that is not finite and >= 0, and b outside [0, 1].
    """
    if not (math.isfinite(k1) and k1 >= 0):
        raise ValueError(f"k1 must be finite and >= 0, got {k1}")
    if not 0 <= b <= 1:
        raise ValueError(f"b must lie in [0, 1], got {b}")
    index = bm25s.BM25(k1=k1, b=b, method="lucene")
    index.index(words_of(train), show_progress=False)
    return BM25(index, len(train))


def words_of(pairs: TextPairs) -> list[list[str]]:
    """The words of each pair in small letters, split as for TF-IDF."""
    return [re.findall(WORDS, f"{prompt} {response}".lower()) for prompt, response in pairs.pairs]
