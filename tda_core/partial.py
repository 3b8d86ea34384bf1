"""Rank correlations of two scores of many examples, with a confounder held fixed, and their bootstrap intervals."""

from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata

from tda_core.estimates import Estimate, as_array, percentile_interval
from tda_core.ranks import check_positive, resample_counts, resampled_spearman

Array = np.ndarray  # or a torch.Tensor


def spearman(x: Array, y: Array, *, given: Array | None = None) -> float:
    """Spearman correlation of x and y (n,), or its partial form given (n,) or (n, c) confounders.

    The partial form is the Pearson correlation of what is left of the ranks (averages for ties) of x and y after a
    least squares fit on the ranks of `given`; with one confounder (Kendall and Stuart, chapter 27)

        (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2)).

    It is 0 where a side is constant or follows from the confounders. Raises ValueError for wrong shapes, fewer
    than c + 3 examples, and NaN.
    """
    x, y, confounders = _checked(x, y, given)
    design = np.column_stack([np.ones(len(x)), *(rankdata(column) for column in confounders)])
    ranks = np.column_stack([rankdata(x), rankdata(y)])
    left = ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]
    spread = np.linalg.norm(left, axis=0)
    total = np.linalg.norm(ranks - ranks.mean(0), axis=0)
    if (spread <= 1e-9 * total).any():
        return 0.0
    return float(np.clip(left[:, 0] @ left[:, 1] / spread.prod(), -1, 1))


def spearman_estimate(
    x: Array, y: Array, *, given: Array | None = None, n_bootstrap: int = 200, seed: int = 0
) -> Estimate:
    """`spearman` with the 95% interval of a bootstrap over examples; `given` is None or one confounder (n,)."""
    x, y, confounders = _checked(x, y, given)
    if len(confounders) > 1:
        raise ValueError(f"an interval takes one confounder (n,), got {len(confounders)}")
    pairs = [(x, y), *((side, confounders[0]) for side in (x, y) if confounders)]
    left, right = (np.column_stack(side) for side in zip(*pairs, strict=True))

    def replicates(counts: np.ndarray) -> np.ndarray:
        r = resampled_spearman(left, right, counts)
        return r[0] if not confounders else _partial(*r)

    return bootstrap(spearman(x, y, given=given), replicates, len(x), n_bootstrap=n_bootstrap, seed=seed)


def pearson_estimate(x: Array, y: Array, *, n_bootstrap: int = 200, seed: int = 0) -> Estimate:
    """Pearson correlation of x and y (n,), with the 95% interval of a bootstrap over examples."""
    x, y, _ = _checked(x, y, None)
    if x.std() == 0 or y.std() == 0:
        raise ValueError("a side is constant: Pearson's correlation is not defined")
    x, y = ((side - side.mean()) / side.std() for side in (x, y))
    products = np.stack([x, y, x * x, y * y, x * y]) / len(x)

    def replicates(counts: np.ndarray) -> np.ndarray:
        mx, my, xx, yy, xy = products @ counts
        return (xy - mx * my) / np.sqrt((xx - mx**2) * (yy - my**2))

    return bootstrap(float(x @ y / len(x)), replicates, len(x), n_bootstrap=n_bootstrap, seed=seed)


def bootstrap(
    value: float, replicates: Callable[[np.ndarray], np.ndarray], n: int, *, n_bootstrap: int, seed: int
) -> Estimate:
    """An Estimate from `replicates(counts (n, b)) -> (b,)`, called on a few replicates at a time.

    Replicates are shifted to have their mean at the value: examples drawn twice tie, which pulls rank statistics
    towards 0 (see `metrics`).
    """
    check_positive("n_bootstrap", n_bootstrap)
    rng = np.random.default_rng(seed)
    size = max(1, 2**22 // n)  # counts of 32 MB at a time
    blocks = [
        replicates(resample_counts(n, min(size, n_bootstrap - start), rng)) for start in range(0, n_bootstrap, size)
    ]
    drawn = np.concatenate(blocks)
    low, high = percentile_interval(np.clip(drawn + value - drawn.mean(), -1, 1))
    return Estimate(value, min(low, value), max(high, value), n)


def _partial(xy: np.ndarray, xz: np.ndarray, yz: np.ndarray) -> np.ndarray:
    """The closed form, elementwise; 0 where a side follows from the confounder."""
    scale = np.sqrt(np.maximum(0, 1 - xz**2) * np.maximum(0, 1 - yz**2))
    return np.divide(xy - xz * yz, scale, out=np.zeros_like(scale), where=scale > 1e-9)


def _checked(x: Array, y: Array, given: Array | None) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    x, y = as_array(x, "x", 1), as_array(y, "y", 1)
    confounders = []
    if given is not None:
        table = as_array(given, "given", 1 if np.ndim(given) == 1 else 2)
        confounders = list(table.reshape(len(table), -1).T)
    for name, side in (("y", y), *(("given", column) for column in confounders)):
        if len(side) != len(x):
            raise ValueError(f"{name} must have one value for each of the {len(x)} of x, got {len(side)}")
    if len(x) < len(confounders) + 3:
        least = len(confounders) + 3
        raise ValueError(f"a correlation given {len(confounders)} confounders needs {least} examples, got {len(x)}")
    return x, y, confounders
