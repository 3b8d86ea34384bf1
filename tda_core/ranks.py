"""Rank correlations column by column, and their bootstrap over rows without building the resamples.

A rank correlation with a constant side is undefined, and is 0 here.
"""

import numpy as np
import torch
from scipy.stats import rankdata

from tda_core.threads import one_thread

# Floats of one array of resampled ranks: five of them lie in the cache at a time.
BLOCK_FLOATS = 2**17


def spearman_columns(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman correlation of each column of x with the same column of y, average ranks; 0 where undefined."""
    x, y = (rankdata(values, axis=0) - (len(x) + 1) / 2 for values in (x, y))
    return _ratio((x * y).sum(0), (x * x).sum(0), (y * y).sum(0))


def resampled_spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`spearman_columns` on resampled rows, without building the resamples.

    x, y: (n, q). counts: (n, b), how often each replicate drew each row; columns sum to n. A value's
    average rank in a replicate is (weight below it) + (weight of its ties + 1) / 2, which cumulative
    counts in sorted order give at once for all replicates. Returns (q, b).
    """
    n, n_bootstrap = counts.shape
    size = max(1, BLOCK_FLOATS // n)
    with one_thread():  # each product is small
        blocks = [_resampled_block(x, y, counts[:, start : start + size]) for start in range(0, n_bootstrap, size)]
    return np.concatenate(blocks, axis=1)


def resample_counts(n: int, n_bootstrap: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of n units is drawn in each bootstrap replicate: (n, n_bootstrap), columns sum to n."""
    check_positive("n_bootstrap", n_bootstrap)
    return rng.multinomial(n, np.full(n, 1 / n), size=n_bootstrap).T.astype(np.float64)


def check_positive(name: str, value: int) -> None:
    """Raise ValueError where a number of repetitions is below 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _resampled_block(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    counts = np.ascontiguousarray(counts, dtype=np.float64)  # its rows are gathered
    result = np.empty((x.shape[1], counts.shape[1]))
    rx, ry, spare = (np.empty_like(counts) for _ in range(3))  # made once: fresh memory costs more than the sums
    below = np.zeros((len(counts) + 1, counts.shape[1]))
    for column in range(x.shape[1]):
        _resampled_ranks(x[:, column], counts, below, spare, out=rx)
        _resampled_ranks(y[:, column], counts, below, spare, out=ry)
        np.multiply(counts, rx, out=spare)
        xx, xy = _column_products(spare, rx), _column_products(spare, ry)
        np.multiply(counts, ry, out=spare)
        result[column] = _ratio(xy, xx, _column_products(spare, ry))
    return result


def _resampled_ranks(values: np.ndarray, counts: np.ndarray, below: np.ndarray, spare: np.ndarray, *, out) -> None:
    """Twice the centred average ranks (n, b) of values (n,) in each replicate of counts (n, b), into `out`.

    below: (n + 1, b), its first row zero, and spare: (n, b), both overwritten.
    """
    order = np.argsort(values, kind="stable")
    first, last = (np.searchsorted(values[order], values, side=side) for side in ("left", "right"))
    np.take(counts, order, axis=0, out=spare, mode="clip")  # "clip" writes straight to `out`
    # numpy's cumsum along the first axis takes 4 times as long
    torch.cumsum(torch.from_numpy(spare), 0, out=torch.from_numpy(below)[1:])
    np.take(below, first, axis=0, out=out, mode="clip")
    out += np.take(below, last, axis=0, out=spare, mode="clip")
    out -= len(values)  # the mean rank is (n + 1) / 2 in every replicate


def _column_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("nb,nb->b", a, b)


def _ratio(xy: np.ndarray, xx: np.ndarray, yy: np.ndarray) -> np.ndarray:
    """xy / sqrt(xx yy), and 0 where a side is constant (ranks are halves, so such sums are exactly 0)."""
    scale = np.sqrt(xx * yy)
    return np.divide(xy, scale, out=np.zeros_like(scale), where=scale > 0)
