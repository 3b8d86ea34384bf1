"""Expansion and coherence of designs against brute force and closed forms; the rule of thumb with its rounding."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from tda_core import design_quality
from tda_core.design_quality import coherence, expansion, rule_of_thumb
from tda_core.designs import balanced, left_regular, random_fraction


def ratio(dense, members):
    """|N(S)| / sum_i d_i as it is written."""
    chosen = dense[:, list(members)]
    return (chosen.sum(1) > 0).sum() / chosen.sum()


def test_the_rule_rounds_up():
    assert rule_of_thumb(11_400_000, 50) == 617  # STRIDE's largest run
    assert rule_of_thumb(1000, 10) == math.ceil(10 * math.log(100)) == 47
    assert rule_of_thumb(1000, 10, factor=2) == 93  # not twice 47: the product is rounded
    with pytest.raises(ValueError, match=r"1\.\.n/e = 36 for n = 100 .* got 37"):
        rule_of_thumb(100, 37)
    with pytest.raises(ValueError, match="got 0"):
        rule_of_thumb(100, 0)
    for factor in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"factor must be finite and > 0, got {factor}"):
            rule_of_thumb(100, 3, factor=factor)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(1, 4))
def test_expansion_brackets_the_worst_of_all_sets(seed, size):
    M = left_regular(12, 6, 2, seed=1)
    dense = M.toarray()
    worst = min(ratio(dense, members) for members in itertools.combinations(range(12), size))
    found = expansion(M, size, n_samples=20, seed=seed)
    assert worst - 1e-12 <= found.adversarial <= found.minimum <= found.mean <= 1
    if size == 1:
        assert found.mean == found.adversarial == 1


def test_the_greedy_set_is_the_worst_one_that_was_planted():
    # examples 0..4 share their three subsets; all others have subsets of their own
    dense = np.zeros((3 + 3 * 20, 25), dtype=np.float32)
    dense[:3, :5] = 1
    for i in range(20):
        dense[3 + 3 * i : 6 + 3 * i, 5 + i] = 1
    # of all sets that eight random starts of 25 grow, one starts among the five with 84% probability: seed 0 does
    found = expansion(sparse.csc_array(dense), 5, n_samples=5, seed=0)
    assert found.adversarial == pytest.approx(3 / 15) and found.mean > 0.8


def test_mean_expansion_is_that_of_balls_in_bins():
    K, d, size = 50, 5, 8
    found = expansion(left_regular(5000, K, d, seed=0), size, n_samples=2000, seed=0)
    assert found.mean == pytest.approx(K * (1 - (1 - d / K) ** size) / (d * size), abs=0.005)


def brute_coherence(dense):
    unit = dense / np.linalg.norm(dense, axis=0)
    cosines = unit.T @ unit
    np.fill_diagonal(cosines, 0)
    return cosines.max()


@pytest.mark.parametrize(
    "M",
    [left_regular(600, 40, 6, seed=0), balanced(300, 30, 4, seed=0), random_fraction(200, 20, 0.5, seed=0)],
    ids=["left_regular", "balanced", "random_fraction"],
)
def test_coherence_is_the_largest_cosine(M):
    found = coherence(M, seed=0)
    n = M.shape[1]
    assert found.exact and found.n_pairs == n * (n - 1) // 2
    assert found.value == pytest.approx(brute_coherence(M.toarray().astype(np.float64)), abs=1e-12)


def test_sampled_coherence_is_a_lower_bound_that_many_pairs_reach(monkeypatch):
    M = left_regular(300, 40, 4, seed=0)
    exact = coherence(M, seed=0)
    monkeypatch.setattr(design_quality, "EXACT_WORK", 10)
    few, many = (coherence(M, n_pairs=n_pairs, seed=0) for n_pairs in (20, 50_000))
    assert not few.exact and few.n_pairs <= 20
    assert 0 < few.value <= many.value == pytest.approx(exact.value)
    assert coherence(M, n_pairs=20, seed=0) == few


def test_disjoint_and_equal_examples_are_the_ends():
    assert coherence(sparse.csc_array(np.eye(5)), seed=0).value == 0
    assert coherence(sparse.csc_array(np.array([[1.0, 1, 0], [0, 0, 1]])), seed=0).value == 1
    assert expansion(sparse.csc_array(np.eye(5)), 3, seed=0).adversarial == 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999))
def test_the_order_of_subsets_does_not_matter(seed):
    M = left_regular(40, 10, 3, seed=seed % 7)
    shuffled = sparse.csc_array(M[np.random.default_rng(seed).permutation(10)])
    assert expansion(shuffled, 5, seed=1) == expansion(M, 5, seed=1)
    assert coherence(shuffled, seed=1) == coherence(M, seed=1)


def test_stored_zeros_count_for_nothing():
    M = left_regular(30, 8, 3, seed=0)
    coo = M.tocoo()
    absent = np.argwhere(M.toarray() == 0)[:10]
    rows, columns = (np.append(found, absent[:, i]) for i, found in enumerate((coo.row, coo.col)))
    order = np.lexsort((rows, columns))
    ends = np.searchsorted(columns[order], np.arange(31))
    padded = sparse.csc_array((np.append(coo.data, np.zeros(10))[order], rows[order], ends), shape=M.shape)
    assert padded.nnz == M.nnz + 10
    assert expansion(padded, 4, seed=0) == expansion(M, 4, seed=0)
    assert coherence(padded, seed=0) == coherence(M, seed=0)


def test_bad_input_is_named():
    M = left_regular(20, 6, 3, seed=0)
    for size in (0, 21):
        with pytest.raises(ValueError, match=rf"size must lie in 1\.\.20, the number of examples, got {size}"):
            expansion(M, size, seed=0)
    with pytest.raises(ValueError, match="n_samples must be at least 1, got 0"):
        expansion(M, 2, n_samples=0, seed=0)
    with pytest.raises(ValueError, match="n_pairs must be at least 1, got 0"):
        coherence(M, n_pairs=0, seed=0)
    with pytest.raises(ValueError, match="pairs of examples, got n = 1"):
        coherence(sparse.csc_array(np.ones((2, 1))), seed=0)
    for function in (lambda M: expansion(M, 2, seed=0), lambda M: coherence(M, seed=0)):
        with pytest.raises(ValueError, match=r"scipy.sparse membership matrix \(K, n\), got ndarray"):
            function(M.toarray())
        with pytest.raises(ValueError, match="example 0 of 20 is in none"):
            function(sparse.csc_array(M.multiply(np.arange(20) > 0)))
        with pytest.raises(ValueError, match="0 and 1 only"):
            function(2 * M)
