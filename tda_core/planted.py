"""Planted influences: worlds in which w is known, so that what recovery finds can be held against it.

A world is a membership matrix M (K, n), influences w (q, n), one row a query, and measurements y = M w + noise (q, K).
Nothing is trained, so each subset's effect is exactly the sum of its members' influences. The module also says what
was recovered: the support, the correlation with what was planted, and the linear datamodelling score (LDS).
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from tda_core.metrics import lds_per_query
from tda_core.subsets import random_subsets


def sparse_influences(n: int, k: int, n_queries: int, *, seed: int) -> Tensor:
    """w (n_queries, n), float64: in each row k influences of +1 or -1, evenly drawn, at random places.

    Noise-free recovery by the l1 norm depends on places and signs alone, so that one magnitude stands for all.
    Raises ValueError for n or n_queries < 1 and k outside 1..n.
    """
    _check_counts(n=n, n_queries=n_queries)
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in 1..{n}, the number of examples, got {k}")
    return _placed(np.ones(k), n, n_queries, seed)


def power_law_influences(n: int, exponent: float, n_queries: int, *, seed: int) -> Tensor:
    """w (n_queries, n), float64: the i-th largest influence is i^-exponent in size, with random sign and place.

    Rows have norm 1. Exponent 0 makes all influences equally large; real ones lie in between ("compressible").
    Raises ValueError for n or n_queries < 1, and an exponent that is not finite or negative.
    """
    _check_counts(n=n, n_queries=n_queries)
    if not (math.isfinite(exponent) and exponent >= 0):
        raise ValueError(f"exponent must be finite and >= 0, got {exponent}")
    sizes = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return _placed(sizes / np.linalg.norm(sizes), n, n_queries, seed)


def measure(M: Any, w: Tensor, noise: float = 0.0, *, seed: int) -> Tensor:
    """y = M w plus Gaussian noise of standard deviation `noise`: (q, K) float64.

    M: (K, n), scipy.sparse or a tensor. Raises ValueError for shapes that do not fit, and negative noise.
    """
    if w.ndim != 2 or len(M.shape) != 2 or M.shape[1] != w.shape[1]:
        raise ValueError(f"M must be (K, n) and w (q, n), got {tuple(M.shape)} and {tuple(w.shape)}")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise must be finite and >= 0, got {noise}")
    matrix = M.astype(np.float64) if sparse.issparse(M) else M.double().numpy()
    exact = (matrix @ w.double().numpy().T).T
    return torch.from_numpy(exact + noise * np.random.default_rng(seed).standard_normal(exact.shape))


def support_recovered(w: Tensor, recovered: Tensor) -> Tensor:
    """Whether a query's k largest recovered influences, by size, are the k that were planted: (q,) bool.

    w: (q, n) with k entries other than 0 in each row (k may differ). The k-th must be strictly larger than the next:
    a tie, such as all zeros, recovers nothing. Raises ValueError for unequal shapes, NaN, and a row of zeros in w.
    """
    _check_pair(w, recovered)
    planted = w != 0
    if not planted.any(1).all():
        raise ValueError(f"query {int((~planted.any(1)).nonzero()[0])} has no planted influence")
    size = recovered.abs()
    least = size.masked_fill(~planted, torch.inf).amin(1)
    return least > size.masked_fill(planted, -torch.inf).amax(1)


def correlations(w: Tensor, recovered: Tensor) -> Tensor:
    """Pearson correlation of recovered and planted influences over the examples: (q,); 0 where a side is constant."""
    _check_pair(w, recovered)
    a, b = (value.double() - value.double().mean(1, keepdim=True) for value in (w, recovered))
    norms = a.norm(dim=1) * b.norm(dim=1)
    return (a * b).sum(1) / norms.where(norms > 0, torch.ones_like(norms))


def planted_lds(w: Tensor, recovered: Tensor, *, n_subsets: int = 100, seed: int) -> np.ndarray:
    """LDS of recovered influences on fresh random halves, whose true effect is the sum of planted ones: (q,)."""
    _check_pair(w, recovered)
    masks = random_subsets(w.shape[1], n_subsets, 0.5, seed=seed)
    return lds_per_query(recovered, masks, masks.double() @ w.double().T)


def half_way(sizes: Sequence[int], success: Sequence[float]) -> float:
    """The number of subsets at which half of the draws succeed, interpolated between measured `sizes`.

    sizes: increasing. success: shares in [0, 1]; their running maximum is taken, since more subsets never hurt but by
    chance. Raises ValueError for lists that do not fit, and where one half is not crossed between the ends.
    """
    K, share = np.asarray(sizes, dtype=np.float64), np.asarray(success, dtype=np.float64)
    if K.ndim != 1 or K.shape != share.shape or len(K) < 2 or not (np.diff(K) > 0).all():
        raise ValueError(f"sizes must increase and success be of one length with them, got {sizes} and {success}")
    if not ((share >= 0) & (share <= 1)).all():
        raise ValueError(f"success must be shares in [0, 1], got {success}")
    share = np.maximum.accumulate(share)
    if not share[0] < 0.5 <= share[-1]:
        raise ValueError(f"success must cross 1/2 between K = {sizes[0]} and {sizes[-1]}, got {success}")
    upper = int(np.argmax(share >= 0.5))
    low, high = share[upper - 1], share[upper]
    return float(K[upper - 1] + (0.5 - low) / (high - low) * (K[upper] - K[upper - 1]))


def _placed(sizes: np.ndarray, n: int, n_queries: int, seed: int) -> Tensor:
    """Rows with these sizes at random places, with random signs, and zeros elsewhere: (n_queries, n)."""
    rng = np.random.default_rng(seed)
    w = np.zeros((n_queries, n))
    for row in w:
        row[rng.choice(n, len(sizes), replace=False)] = sizes * rng.choice([-1.0, 1.0], len(sizes))
    return torch.from_numpy(w)


def _check_pair(w: Tensor, recovered: Tensor) -> None:
    if w.ndim != 2 or w.shape != recovered.shape or w.numel() == 0:
        raise ValueError(
            f"planted and recovered must be (q, n) alike, got {tuple(w.shape)} and {tuple(recovered.shape)}"
        )
    for name, value in (("planted", w), ("recovered", recovered)):
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} influences must be finite, but they hold NaN or infinity")


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
