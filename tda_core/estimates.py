"""Measured values with their 95% intervals, and the one way in which arrays are taken and checked."""

from collections.abc import Callable, Sequence
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


def grouped_estimate(groups: Sequence[Array], *, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """Mean of all values, with a 95% interval over groups and the values in them, for values that share a model.

    groups: one array of values each, such as the leaks of a training set. Each replicate draws groups, and values
    within each. With few groups such an interval is too narrow, though less so than one over values alone. Raises
    ValueError for no group, and an empty one.
    """
    groups = [as_array(values, f"groups[{i}]", 1) for i, values in enumerate(groups)]
    if not groups:
        raise ValueError("groups must be at least one, got none")
    rng = np.random.default_rng(seed)
    means = np.stack([v[rng.integers(len(v), size=(n_bootstrap, len(groups), len(v)))].mean(2) for v in groups])
    sizes = np.array([len(values) for values in groups])
    drawn = rng.integers(len(groups), size=(n_bootstrap, len(groups)))
    places = np.arange(n_bootstrap)[:, None], np.arange(len(groups))[None]
    of_drawn = means[drawn, places[0], places[1]]  # a group that is drawn twice has its values drawn twice
    replicates = (of_drawn * sizes[drawn]).sum(1) / sizes[drawn].sum(1)
    value = float(np.concatenate(groups).mean())
    low, high = percentile_interval(replicates)
    return Estimate(value, min(low, value), max(high, value), n=int(sizes.sum()))


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
