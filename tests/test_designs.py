"""Sparse subset designs: exact degrees and sizes, uniform draws, seeds, memory, and named errors."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import sparse

from tda_core.designs import CHUNK, balanced, check_membership, left_regular, random_fraction

DESIGNS = {"left_regular": left_regular, "balanced": balanced}
each_design = pytest.mark.parametrize("design", DESIGNS.values(), ids=DESIGNS)
shapes = st.integers(2, 12).flatmap(lambda K: st.tuples(st.integers(1, 60), st.just(K), st.integers(1, K)))


def drawn(design, n, n_subsets, degree, seed):
    """The design, unless chance (or too few memberships) left a subset empty."""
    try:
        return design(n, n_subsets, degree, seed=seed)
    except ValueError as error:
        assert "is empty" in str(error)
        assume(False)


def expect_form(M, shape):
    assert isinstance(M, sparse.csc_array) and M.shape == shape
    assert M.dtype == np.float32 and M.indices.dtype == np.int32 and M.indptr.dtype == np.int32
    assert (M.data == 1).all() and M.has_canonical_format  # sorted, nothing twice
    assert all((np.diff(M.indices[M.indptr[i] : M.indptr[i + 1]]) > 0).all() for i in range(min(shape[1], 100)))


@each_design
@given(shape=shapes, seed=st.integers(0, 99))
def test_every_example_joins_exactly_degree_subsets(design, shape, seed):
    n, n_subsets, degree = shape
    M = drawn(design, n, n_subsets, degree, seed)
    expect_form(M, (n_subsets, n))
    assert (M.sum(axis=0) == degree).all()
    check_membership(M)


@given(shape=shapes, seed=st.integers(0, 99))
def test_balanced_sizes_differ_by_one_at_most(shape, seed):
    n, n_subsets, degree = shape
    if n * degree < n_subsets:
        with pytest.raises(ValueError, match="is empty"):
            balanced(n, n_subsets, degree, seed=seed)
        return
    sizes = balanced(n, n_subsets, degree, seed=seed).sum(axis=1)
    assert sizes.max() - sizes.min() <= 1


@given(n=st.integers(2, 60), n_subsets=st.integers(2, 8), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_random_fractions_have_the_rounded_size(n, n_subsets, fraction, seed):
    size = round(fraction * n)
    if size in (0, n):
        with pytest.raises(ValueError, match=f"is a subset of {size}; expected at least 1 and at most {n - 1}"):
            random_fraction(n, n_subsets, fraction, seed=seed)
        return
    M = random_fraction(n, n_subsets, fraction, seed=seed)
    expect_form(M, (n_subsets, n))
    assert (M.sum(axis=1) == size).all()


@pytest.mark.parametrize(
    "design", [*DESIGNS.values(), lambda n, K, d, *, seed: random_fraction(n, K, d / K, seed=seed)]
)
def test_seed_decides_everything(design):
    first, second, other = (design(CHUNK + 50, 40, 4, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.indices, second.indices) and np.array_equal(first.indptr, second.indptr)
    assert not np.array_equal(first.indices, other.indices)
    # chunks are drawn afresh: the second does not repeat the first
    assert not np.array_equal(first[:, :50].toarray(), first[:, CHUNK : CHUNK + 50].toarray())


def within(counts, expected, deviations=4.5):
    """Whether counts of independent draws lie within so many standard deviations of what is expected."""
    return (np.abs(np.asarray(counts) - expected) < deviations * np.sqrt(expected)).all()


def test_all_choices_of_subsets_are_equally_likely():
    M = left_regular(60_000, 6, 3, seed=0)
    counts = Counter(map(tuple, M.indices.reshape(-1, 3).tolist()))
    assert set(counts) == set(itertools.combinations(range(6), 3))
    assert within(list(counts.values()), 60_000 / 20)


def test_all_balanced_designs_are_equally_likely():
    # 4 examples in 2 of 4 subsets of 2 examples each: the 90 binary 4 x 4 matrices with all sums 2
    counts = Counter(balanced(4, 4, 2, seed=seed).indices.tobytes() for seed in range(4500))
    assert len(counts) == 90 and within(list(counts.values()), 50)


@pytest.mark.parametrize(("n", "n_subsets", "degree"), [(600, 20, 5), (600, 21, 5), (601, 12, 6)])
def test_balanced_pairs_meet_as_often_as_independent_ones(n, n_subsets, degree):
    """Shared subsets of two examples follow the hypergeometric law: no trace is left of the deal."""
    M = balanced(n, n_subsets, degree, seed=0)
    shared = (M.T @ M).toarray()[np.triu_indices(n, 1)]
    mean = degree**2 / n_subsets
    variance = mean * (1 - degree / n_subsets) * (n_subsets - degree) / (n_subsets - 1)
    assert shared.mean() == pytest.approx(mean, rel=0.01) and shared.var() == pytest.approx(variance, rel=0.02)
    # complements, which a deal of half the subsets is full of, would make sums of two columns repeat
    assert np.linalg.matrix_rank(M.toarray()) == n_subsets


def test_ten_million_memberships_are_never_dense():
    tracemalloc.start()
    M = left_regular(200_000, 1000, 10, seed=0)
    check_membership(M)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kept = M.data.nbytes + M.indices.nbytes + M.indptr.nbytes
    assert kept == 8 * M.nnz + 4 * (M.shape[1] + 1)
    assert peak < kept + 16e6 < M.shape[0] * M.shape[1] / 4  # a dense matrix of bytes takes four times as much


@each_design
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 2), "n .* at least 1, got 0"),
        ((10, 1, 1), "n_subsets must be at least 2, got 1"),
        ((10, 5, 6), r"degree must lie in 1\.\.5, the number of subsets, got 6"),
        ((10, 5, 0), r"degree must lie in 1\.\.5, the number of subsets, got 0"),
        ((3, 10, 2), r"subset \d of 10 is empty"),
        ((10**9, 10, 3), "at most 2147483647 memberships .* got 3000000000"),
    ],
)
def test_impossible_designs_are_named(design, arguments, message):
    with pytest.raises(ValueError, match=message):
        design(*arguments, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 0.5), "n .* at least 1, got 0"),
        ((10, 1, 0.5), "n_subsets must be at least 2, got 1"),
        ((10, 5, 0.0), "strictly between 0 and 1, got 0.0"),
        ((10, 5, 1.0), "strictly between 0 and 1, got 1.0"),
        ((10, 5, float("nan")), "got nan"),
        ((10, 5, 0.04), "0.04 of 10 examples is a subset of 0"),
        ((10, 5, 0.96), "0.96 of 10 examples is a subset of 10"),
        ((10**8, 100, 0.5), "at most 2147483647 memberships"),
    ],
)
def test_impossible_fractions_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_fraction(*arguments, seed=0)


GOOD = np.array([[1.0, 0, 1], [0, 1, 1]])


@pytest.mark.parametrize("form", [np.asarray, torch.tensor, sparse.csc_array, sparse.csr_array, sparse.coo_array])
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[1.0, 0, 1], [0, 0.5, 1]], r"0 and 1 only, but \[1, 1\] is 0.5"),
        ([[1.0, 0, 1], [0, np.nan, 1]], r"0 and 1 only, but \[1, 1\] is nan"),
        ([[1.0, 1, 1], [0, 0, 0]], "subset 1 of 2 is empty"),
        ([[0.0, 0, 0], [0, 0, 0]], "subset 0 of 2 is empty"),
        ([[1.0, 0, 1], [1, 0, 1]], "example 1 of 3 is in none"),
        ([[1.0, 1, 1]], r"K >= 2 subsets and n >= 1 examples, got \(K, n\) = \(1, 3\)"),
    ],
)
def test_bad_memberships_are_named(form, matrix, message):
    with pytest.raises(ValueError, match=message):
        check_membership(form(matrix))
    check_membership(form(GOOD))
    check_membership(form(GOOD == 1))


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(K, n\) matrix, got shape \(3,\)"):
        check_membership(np.ones(3))
    with pytest.raises(ValueError, match=r"got \(K, n\) = \(4, 0\)"):
        check_membership(torch.zeros(4, 0))


def stored(data, rows, ends):
    """A (2, 3) matrix with these entries as they are, zeros and repetitions included."""
    return sparse.csc_array((np.array(data, dtype=float), rows, ends), shape=(2, 3))


def test_stored_zeros_and_repeated_entries_are_what_they_sum_to():
    with pytest.raises(ValueError, match=r"\[1, 2\] is 2.0"):
        check_membership(stored([1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [0, 1, 2, 5]))
    with pytest.raises(ValueError, match="example 1 of 3 is in none"):
        check_membership(stored([1, 0, 1], [0, 1, 1], [0, 1, 2, 3]))
    good = stored([1, 1, 0, 0.5, 0.5], [0, 1, 0, 1, 1], [0, 1, 2, 5])
    check_membership(good)
    assert good.nnz == 5, "the matrix that is checked stays as it is"
