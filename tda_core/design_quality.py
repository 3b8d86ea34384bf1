"""What a subset design is worth before anything is measured: its size, its expansion and its coherence.

M (K, n) is a sparse membership matrix; see `tda_core.designs`. A set S of examples has d_i memberships each, and the
subsets N(S) that some member joins are its neighbours. Where the examples of every small set share few subsets, each
leaves measurements that are its own: |N(S)| / sum_i d_i is near 1, the graph expands, and the l1 norm finds sparse
influences (Berinde, Gilbert, Indyk, Karloff and Strauss 2008).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from scipy import sparse

from tda_core.designs import check_membership

GREEDY_STARTS = 8
EXACT_WORK = 3 * 10**8  # multiplications that an exact coherence may take
COLUMNS_AT_ONCE = 256


@dataclass(frozen=True)
class Expansion:
    """|N(S)| / sum_i d_i over sets S of `size` examples: 1 where no two share a subset.

    mean, minimum: over random sets. adversarial: of the worst set found, an upper bound on the worst there is.
    """

    size: int
    mean: float
    minimum: float
    adversarial: float


@dataclass(frozen=True)
class Coherence:
    """The largest cosine between the columns of two examples, in [0, 1]: 1 where two examples are always together.

    exact: over all pairs; otherwise over n_pairs sampled ones, and so a lower bound.
    """

    value: float
    exact: bool
    n_pairs: int


def rule_of_thumb(n: int, k: int, *, factor: float = 1.0) -> int:
    """factor * k * log(n / k) subsets, rounded up: what the l1 recovery of k influences among n needs, to a constant.

    The natural logarithm, as in STRIDE (k = 50, n = 11.4 million: 617). Raises ValueError for k outside 1..n/e,
    beyond which the rule would ask for fewer subsets than there are influences, and a factor that is not positive.
    """
    if not 1 <= k <= n / math.e:
        raise ValueError(f"k must lie in 1..n/e = {int(n / math.e)} for n = {n} (sparse influences), got {k}")
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"factor must be finite and > 0, got {factor}")
    return math.ceil(factor * k * math.log(n / k))


def expansion(M: Any, size: int, *, n_samples: int = 200, seed: int) -> Expansion:
    """How far sets of `size` examples expand: random ones, and ones grown greedily to share as much as they can.

    M: (K, n), scipy.sparse. A greedy set starts at a random example and takes, again and again, the example with the
    smallest share of new subsets. Raises ValueError for what `check_membership` refuses, a size outside 1..n, and
    n_samples < 1.
    """
    M = _checked(M)
    n = M.shape[1]
    if not 1 <= size <= n:
        raise ValueError(f"size must lie in 1..{n}, the number of examples, got {size}")
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")
    rng = np.random.default_rng(seed)
    sampled = [_ratio(M, rng.choice(n, size, replace=False, shuffle=False)) for _ in range(n_samples)]
    by_subset = M.tocsr()
    starts = rng.choice(n, min(GREEDY_STARTS, n), replace=False)
    worst = min(_ratio(M, _greedy(M, by_subset, size, start)) for start in starts)
    return Expansion(size, float(np.mean(sampled)), min(sampled), min(worst, *sampled))


def coherence(M: Any, *, n_pairs: int = 100_000, seed: int) -> Coherence:
    """The largest cosine between two columns of M (K, n), scipy.sparse.

    Exact by a sparse product while that takes few multiplications; beyond, of n_pairs pairs of members of one random
    subset (pairs that share none have a cosine of 0). Raises ValueError for what `check_membership` refuses, a single
    example, and n_pairs < 1.
    """
    M = _checked(M)
    n = M.shape[1]
    if n < 2:
        raise ValueError(f"coherence is of pairs of examples, got n = {n}")
    if n_pairs < 1:
        raise ValueError(f"n_pairs must be at least 1, got {n_pairs}")
    degrees = np.diff(M.indptr).astype(np.float64)
    sizes = np.bincount(M.indices, minlength=M.shape[0]).astype(np.float64)
    if (sizes**2).sum() <= EXACT_WORK:
        return Coherence(_largest_cosine(M, degrees), True, n * (n - 1) // 2)
    rng = np.random.default_rng(seed)
    # A membership drawn evenly lies in a subset with probability by its size; its partner is another of its members.
    first = rng.integers(0, M.nnz, n_pairs)
    subsets = M.indices[first]
    i = np.searchsorted(M.indptr, first, side="right") - 1
    by_subset = M.tocsr()
    place = by_subset.indptr[subsets] + (rng.random(n_pairs) * sizes[subsets]).astype(np.int64)
    j = by_subset.indices[place]
    i, j = i[i != j], j[i != j]
    largest = 0.0
    for start in range(0, len(i), 2**14):
        left, right = i[start : start + 2**14], j[start : start + 2**14]
        shared = np.asarray(M[:, left].multiply(M[:, right]).sum(axis=0))
        largest = max(largest, float((shared / np.sqrt(degrees[left] * degrees[right])).max()))
    return Coherence(largest, False, len(i))


def _checked(M: Any) -> sparse.csc_array:
    if not sparse.issparse(M):
        raise ValueError(f"expected a scipy.sparse membership matrix (K, n), got {type(M).__name__}")
    check_membership(M)
    columns = sparse.csc_array(M, dtype=np.float32, copy=True)
    columns.sum_duplicates()
    columns.eliminate_zeros()
    return columns


def _ratio(M: sparse.csc_array, members: np.ndarray) -> float:
    """|N(S)| / sum_i d_i of a set of examples."""
    subsets = np.concatenate([M.indices[M.indptr[i] : M.indptr[i + 1]] for i in members])
    return len(np.unique(subsets)) / len(subsets)


def _greedy(M: sparse.csc_array, by_subset: sparse.csr_array, size: int, start: int) -> np.ndarray:
    """A set of `size` examples that shares much: the next is always the one with the smallest share of new subsets."""
    degrees = np.diff(M.indptr)
    covered = np.zeros(M.shape[0], dtype=bool)
    shared = np.zeros(M.shape[1])  # memberships in covered subsets, by example
    members = [int(start)]
    while True:
        last = members[-1]
        joined = M.indices[M.indptr[last] : M.indptr[last + 1]]
        for subset in joined[~covered[joined]]:
            shared[by_subset.indices[by_subset.indptr[subset] : by_subset.indptr[subset + 1]]] += 1
        covered[joined] = True
        if len(members) == size:
            return np.array(members)
        share = shared / degrees
        share[members] = -1
        members.append(int(np.argmax(share)))


def _largest_cosine(M: sparse.csc_array, degrees: np.ndarray) -> float:
    n, largest = M.shape[1], 0.0
    rows = M.T.tocsr()
    ends = [*range(0, n, COLUMNS_AT_ONCE), n]
    for start, end in pairwise(ends):
        shared = (rows @ M[:, start:end]).tocoo()
        cosines = shared.data / np.sqrt(degrees[shared.row] * degrees[shared.col + start])
        cosines[shared.row == shared.col + start] = 0  # an example with itself
        largest = max(largest, float(cosines.max(initial=0)))
    return largest
