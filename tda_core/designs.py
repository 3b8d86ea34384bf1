"""Subset designs: which training examples join which subsets, as sparse membership matrices M (K, n).

M is a `scipy.sparse.csc_array` of float32 ones with int32 indices, sorted within each column: column i lists the
subsets that example i joins, d of them. Nothing here is dense, so n may be 10^7; designs of half the examples a
subset, with all their entries in memory, are `subsets.random_subsets`.
"""

from collections.abc import Iterator
from math import gcd
from typing import Any

import numpy as np
from scipy import sparse

from tda_core.subsets import subset_size

CHUNK = 2**15  # columns drawn, or entries checked, at a time: their temporary arrays fit the processor's cache
TRADE_ROUNDS = 8  # of `balanced`, after which a membership is where it was dealt with a probability of 2^-8
LARGEST = 2**31 - 1  # what int32 indices can count


def left_regular(n: int, n_subsets: int, degree: int, *, seed: int) -> sparse.csc_array:
    """Each of n examples joins exactly `degree` distinct subsets, all such choices equally likely: (n_subsets, n).

    The adjacency matrix of a random left-regular bipartite graph, with high probability an expander (STRIDE,
    arXiv 2606.05165). Drawn by Floyd's algorithm for all columns of a chunk at once. Raises ValueError for n < 1,
    fewer than 2 subsets, a degree outside 1..n_subsets, and where a subset came out empty.
    """
    _check_design(n, n_subsets, degree)
    rng = np.random.default_rng(seed)
    chosen = np.empty((n, degree), dtype=np.int32)
    for part in _chunks(n):
        chosen[part] = distinct(len(chosen[part]), n_subsets, degree, rng)
    return _from_columns(chosen, n_subsets)


def balanced(n: int, n_subsets: int, degree: int, *, seed: int) -> sparse.csc_array:
    """Each example joins exactly `degree` distinct subsets, and subset sizes differ by one at most: (n_subsets, n).

    Shuffled decks of subsets are dealt to the examples, so that all sizes are right from the start; then pairs of
    examples trade random ones of the subsets that only one of them has ("global curveball": Carstens, Hamann, Meyer,
    Penschuck, Tran and Wagner 2018), which keeps sizes and degrees and forgets the deal. No divisibility is asked for.
    Gallager's construction would need it, and the partitions it is made of repeat one another: `degree` of them hold
    only n_subsets - degree + 1 independent measurements. Raises ValueError as `left_regular` does.
    """
    _check_design(n, n_subsets, degree)
    rng = np.random.default_rng(seed)
    # n * degree cards in rows of consecutive ones: a row is distinct, and full decks use each subset equally often.
    per_deck = n_subsets // gcd(n_subsets, degree)
    decks = -(-n // per_deck)
    chosen = np.empty((decks * per_deck, degree), dtype=np.int32)
    dealt = np.arange(per_deck * degree).reshape(per_deck, degree) % n_subsets
    for deck in range(decks):
        chosen[deck * per_deck : (deck + 1) * per_deck] = rng.permutation(n_subsets)[dealt]
    chosen = chosen[:n]
    for _ in range(TRADE_ROUNDS):
        order = rng.permutation(n)
        first, second = order[: n // 2], order[n // 2 : 2 * (n // 2)]
        for part in _chunks(n // 2):
            chosen[first[part]], chosen[second[part]] = _trade(chosen[first[part]], chosen[second[part]], rng)
    chosen.sort(axis=1)
    return _from_columns(chosen[rng.permutation(n)], n_subsets)


def random_fraction(n: int, n_subsets: int, fraction: float, *, seed: int) -> sparse.csc_array:
    """Independent random subsets of exactly round(fraction * n) examples each, sparse: (n_subsets, n).

    The design of `subsets.random_subsets`, for fractions and n at which its n_subsets * n entries are too many (a
    sparse entry takes eight bytes, a dense one takes one: sparse is smaller below a fraction of 1/8). Examples
    join different numbers of subsets, some maybe none. Raises ValueError for n < 1, fewer than 2 subsets, a fraction
    outside (0, 1), and subsets of 0 or all n.
    """
    _check_design(n, n_subsets, 1)
    size = subset_size(n, fraction)
    _check_count(n_subsets * size)
    rng = np.random.default_rng(seed)
    members = np.empty((n_subsets, size), dtype=np.int32)
    for subset in range(n_subsets):
        members[subset] = rng.choice(n, size, replace=False, shuffle=False)
    by_subset = np.arange(0, n_subsets * size + 1, size, dtype=np.int32)
    entries = np.ones(n_subsets * size, dtype=np.float32)
    return sparse.csr_array((entries, members.reshape(-1), by_subset), shape=(n_subsets, n)).tocsc()


def check_membership(M: Any) -> None:
    """Raise ValueError where M is no membership matrix (K, n) that measurements could be recovered from.

    M: scipy.sparse, numpy array or torch tensor. Named are: another number of dimensions, K < 2, n < 1, the first
    entry that is neither 0 nor 1, the first empty subset, and the first example in no subset.
    """
    shape = tuple(M.shape)
    if len(shape) != 2:
        raise ValueError(f"membership must be a (K, n) matrix, got shape {shape}")
    if shape[0] < 2 or shape[1] < 1:
        raise ValueError(f"membership must be of K >= 2 subsets and n >= 1 examples, got (K, n) = {shape}")
    if not sparse.issparse(M):
        M = sparse.csc_array(np.asarray(M.detach().cpu() if hasattr(M, "detach") else M))
    columns = M.tocsc()  # itself where it is one
    if not columns.has_canonical_format:
        columns = columns.copy()
        columns.sum_duplicates()
    zeros = False
    for part in _chunks(columns.nnz):
        entries = columns.data[part]
        wrong = (entries != 1) & (entries != 0)
        if wrong.any():
            at = part.start + int(np.argmax(wrong))
            place = f"[{columns.indices[at]}, {np.searchsorted(columns.indptr, at, side='right') - 1}]"
            raise ValueError(f"membership must hold 0 and 1 only, but {place} is {columns.data[at]}")
        zeros = zeros or not entries.all()
    if zeros:  # stored ones
        columns = columns.copy()
        columns.eliminate_zeros()
    _check_sizes(columns.indices, shape[0])
    degrees = np.diff(columns.indptr)
    if not degrees.all():
        raise ValueError(
            f"every example must join a subset, but example {int(np.argmin(degrees))} of {shape[1]} is in none: "
            "nothing would be measured of it"
        )


# -- how they are drawn -----------------------------------------------------------------------------


def distinct(n: int, n_subsets: int, degree: int, rng: np.random.Generator) -> np.ndarray:
    """n uniform draws of `degree` out of n_subsets without repetition, each sorted: (n, degree) int32.

    Floyd's algorithm: step j draws from 0..j, and takes j itself where that is taken already.
    """
    chosen = np.empty((degree, n), dtype=np.int32)
    for step in range(degree):
        last = n_subsets - degree + step
        drawn = rng.integers(0, last, n, dtype=np.int32, endpoint=True)
        taken = np.zeros(n, dtype=bool)
        for earlier in chosen[:step]:
            taken |= earlier == drawn
        drawn[taken] = last
        chosen[step] = drawn
    return np.sort(chosen.T, axis=1)


def _trade(a: np.ndarray, b: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows (m, degree) deal what only one of the two has afresh; what both have stays with both."""
    pool = np.sort(np.concatenate([a, b], axis=1), axis=1)
    keys = rng.random(pool.shape, dtype=np.float32)
    twice = pool[:, 1:] == pool[:, :-1]
    keys[:, :-1][twice] = -1  # the first copy goes to a, the second to b
    keys[:, 1:][twice] = 2
    dealt = np.take_along_axis(pool, np.argsort(keys, axis=1), axis=1)
    return dealt[:, : a.shape[1]], dealt[:, a.shape[1] :]


def _from_columns(chosen: np.ndarray, n_subsets: int) -> sparse.csc_array:
    """The membership matrix of the subsets, sorted, that each example joins: (n, degree) -> (n_subsets, n)."""
    n, degree = chosen.shape
    _check_sizes(chosen.reshape(-1), n_subsets)
    starts = np.arange(0, n * degree + 1, degree, dtype=np.int32)
    entries = np.ones(n * degree, dtype=np.float32)
    return sparse.csc_array((entries, chosen.reshape(-1), starts), shape=(n_subsets, n))


def _check_sizes(members: np.ndarray, n_subsets: int) -> None:
    """members: the subset of every entry, in chunks, because counting copies them to 64 bits."""
    sizes = sum((np.bincount(members[part], minlength=n_subsets) for part in _chunks(len(members))), start=0)
    if not np.all(sizes):
        empty = int(np.argmin(sizes)) if np.ndim(sizes) else 0
        raise ValueError(
            f"every subset must have a member, but subset {empty} of {n_subsets} is empty "
            "(with few memberships for each subset, draw `balanced` designs, or fewer subsets)"
        )


def _chunks(n: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, n, CHUNK))


def _check_design(n: int, n_subsets: int, degree: int) -> None:
    if n < 1:
        raise ValueError(f"n (the number of training examples) must be at least 1, got {n}")
    if n_subsets < 2:
        raise ValueError(f"n_subsets must be at least 2, got {n_subsets}")
    if not 1 <= degree <= n_subsets:
        raise ValueError(f"degree must lie in 1..{n_subsets}, the number of subsets, got {degree}")
    _check_count(n * degree)


def _check_count(entries: int) -> None:
    if entries > LARGEST:
        raise ValueError(f"a design has at most {LARGEST} memberships (int32 indices), got {entries}")
