"""Measured values with their 95% intervals, and the one way in which arrays are taken and checked."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tda_core.ranks import resample_counts

Array = np.ndarray  # or a torch.Tensor: every function converts by `as_array`


@dataclass(frozen=True)
class Estimate:
    """A measured value, its 95% interval (None where none applies) and the number of units behind it."""

    value: float
    low: float | None
    high: float | None
    n: int


def mean_estimate(
    values: Array, *, transform: Callable | None = None, n_bootstrap: int = 1000, seed: int = 0
) -> Estimate:
    """Mean of one value a query, with a 95% bootstrap interval over queries; `transform` acts on the means."""
    values = as_array(values, "values", 1)
    counts = resample_counts(len(values), n_bootstrap, np.random.default_rng(seed))
    means, value = values @ counts / len(values), values.mean()
    if transform is not None:
        means, value = transform(means), transform(value)
    return Estimate(float(value), *percentile_interval(means), n=len(values))


def percentile_interval(replicates: np.ndarray) -> tuple[float, float]:
    """The central 95% of bootstrap replicates."""
    low, high = np.percentile(replicates, [2.5, 97.5])
    return float(low), float(high)


def as_array(value: Array, name: str, ndim: int) -> np.ndarray:
    """A finite, non-empty float64 array with `ndim` dimensions, or ValueError naming what is wrong and where."""
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value).astype(np.float64)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name} must be a non-empty array with {ndim} dimensions, got shape {array.shape}")
    if not np.isfinite(array).all():
        bad = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, but {name}[{', '.join(map(str, bad))}] is {array[bad]}")
    return array
