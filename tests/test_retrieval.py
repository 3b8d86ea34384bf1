"""Recall and ranks against all orders of tied scores."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import label_ranking_average_precision_score

from tda_core.retrieval import found_shares, recall, reciprocal_rank


def over_orders(row, own, k):
    """Means over all orders of the examples, of which a stable sort by score keeps those of ties."""
    shares, ranks = [], []
    for order in permutations(range(len(row))):
        ranked = sorted(order, key=lambda i: -row[i])
        places = [place for place, i in enumerate(ranked) if own[i]]
        shares.append(sum(place < k for place in places) / len(places))
        ranks.append(1 / (1 + places[0]))
    return sum(shares) / len(shares), sum(ranks) / len(ranks)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_ties_count_as_all_their_orders(data):
    n = data.draw(st.integers(1, 6))
    row = data.draw(st.lists(st.integers(-1, 1), min_size=n, max_size=n))
    own = data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    k = data.draw(st.integers(1, n))
    scores, relevant = torch.tensor([row]).float(), torch.tensor([own])
    expected = over_orders(row, own, k)
    assert recall(scores, relevant, k).value == pytest.approx(expected[0])
    assert reciprocal_rank(scores, relevant).value == pytest.approx(expected[1])


def test_one_relevant_example_each_is_scikit_learns_average_precision():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 30, generator=generator)
    relevant = torch.nn.functional.one_hot(torch.randint(0, 30, (40,), generator=generator), 30).bool()
    found = reciprocal_rank(scores, relevant)
    assert found.value == pytest.approx(label_ranking_average_precision_score(relevant.numpy(), scores.numpy()))
    assert found.low < found.value < found.high and found.n == 40


def test_chance_is_k_over_n():
    relevant = torch.zeros(3, 50, dtype=torch.bool)
    relevant[:, ::9] = True
    assert recall(torch.zeros(3, 50), relevant, 10).value == pytest.approx(0.2)
    assert recall(relevant.float(), relevant, 6).value == 1.0 == reciprocal_rank(relevant.float(), relevant).value


def test_many_tied_examples_do_not_overflow():
    relevant = torch.zeros(1, 100_000, dtype=torch.bool)
    relevant[0, :50_000] = True
    found = reciprocal_rank(torch.zeros(1, 100_000), relevant).value
    assert found == pytest.approx(math.log(2), rel=1e-4)  # a coin for each place: the sum of 1 / (j 2^j)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"k must lie in 1\.\.4, got 0"),
        ({"k": 5}, "got 5"),
        ({"scores": torch.zeros(4)}, r"scores must be \(q, n\) and relevant boolean"),
        ({"relevant": torch.ones(2, 4)}, "got .* and torch.float32"),
        ({"scores": torch.tensor([[0, 0, 0, 0], [0, 0, float("nan"), 0]])}, "query 1 and example 2 is nan"),
        ({"relevant": torch.tensor([[True] * 4, [False] * 4])}, "query 1 has no relevant example"),
    ],
)
def test_bad_input(change, message):
    good = {"scores": torch.zeros(2, 4), "relevant": torch.ones(2, 4, dtype=torch.bool), "k": 2}
    with pytest.raises(ValueError, match=message):
        recall(**good | change)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=6), st.data())
def test_found_shares_are_the_mean_over_all_orders_of_ties(values, data):
    n = len(values)
    k = data.draw(st.integers(1, n))
    relevant = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any)))
    totals, orders = torch.zeros(n), 0
    for order in permutations(range(n)):
        top = sorted(order, key=lambda i: -values[i])[:k]  # stable: ties stay in this order
        totals[top] += 1
        orders += 1
    found = found_shares(torch.tensor(values).float(), relevant, k)
    torch.testing.assert_close(found.float(), (totals / orders)[relevant])


def test_found_shares_bad_input():
    scores, relevant = torch.arange(3.0), torch.tensor([True, False, False])
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.3, got 4"):
        found_shares(scores, relevant, 4)
    with pytest.raises(ValueError, match="no relevant example"):
        found_shares(scores, torch.zeros(3, dtype=torch.bool), 1)
