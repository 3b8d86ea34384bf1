"""BM25 against its formula, written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core.bm25 import bm25, words_of
from tda_core.text_pairs import TextPairs

TRAIN = TextPairs(["the cat sat on the mat", "the dog", "", "a bird ?"], [" down", " ran the ran", "The cat", " flew"])
QUERIES = TextPairs(["the cat the", "a fish", "zebra"], [" down", " ?", " stripes"])


def plain(train: TextPairs, queries: TextPairs, k1: float, b: float) -> torch.Tensor:
    documents = words_of(train)
    n, mean = len(documents), sum(map(len, documents)) / len(documents)
    found = torch.zeros(len(queries), n, dtype=torch.float64)
    for q, words in enumerate(words_of(queries)):
        for word in words:
            holds = sum(word in document for document in documents)
            for i, document in enumerate(documents):
                count = document.count(word)
                weight = math.log(1 + (n - holds + 0.5) / (holds + 0.5))
                found[q, i] += weight * count / (count + k1 * (1 - b + b * len(document) / mean))
    return found


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.0), (3.0, 1.0)])
def test_it_is_the_formula(k1, b):
    found = bm25(TRAIN, k1=k1, b=b).scores(QUERIES)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain(TRAIN, QUERIES, k1, b), rtol=1e-5, atol=1e-6)
    assert found[1, 3] > 0 and not found[2].any()  # "?" is a word; words that no training pair has score nothing


texts = st.lists(st.text("abc ", min_size=1).filter(str.strip), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(train=texts, queries=texts)
def test_it_is_the_formula_for_any_texts(train, queries):
    train, queries = (TextPairs([""] * len(some), some) for some in (train, queries))
    found = bm25(train).scores(queries)
    torch.testing.assert_close(found.double(), plain(train, queries, 1.5, 0.75), rtol=1e-5, atol=1e-6)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="k1 must be finite and >= 0, got -1"):
        bm25(TRAIN, k1=-1)
    with pytest.raises(ValueError, match="k1 must be finite and >= 0, got nan"):
        bm25(TRAIN, k1=float("nan"))
    with pytest.raises(ValueError, match=r"b must lie in \[0, 1\], got 1.5"):
        bm25(TRAIN, b=1.5)
