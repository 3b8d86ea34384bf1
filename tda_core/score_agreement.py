"""How two scores of one pool of examples agree: the bins they would select, and by how many task examples.

scores: (n,), one a pool example. table: (m, n), task example by pool example; its mean over rows is the score.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tda_core.estimates import Estimate, as_array, percentile_interval
from tda_core.partial import bootstrap, spearman
from tda_core.ranks import check_positive, resample_counts


@dataclass(frozen=True)
class Overlap:
    """count: examples in the bin. overlap: the share of them in the other score's bin of that size.

    chance: count / n, the overlap of scores that have nothing to do with each other.
    """

    count: int
    overlap: Estimate
    chance: float


def bin_overlap(
    scores: np.ndarray, other: np.ndarray, threshold: float, *, above: bool, n_bootstrap: int = 200, seed: int = 0
) -> Overlap:
    """Overlap of the bin `scores > threshold` (above) or `scores <= threshold` with as many examples of `other`.

    Those are the largest (above) or smallest of `other`; where the cut falls among equal values they count by the
    share of them that fits, the mean over ways to break the tie. Interval: bootstrap over examples. Raises
    ValueError for wrong shapes, NaN, and a threshold that puts no example, or every one, in the bin.
    """
    scores, other = as_array(scores, "scores", 1), as_array(other, "other", 1)
    if len(scores) != len(other):
        raise ValueError(f"other must have one value for each of the {len(scores)} scores, got {len(other)}")
    inside = scores > threshold if above else scores <= threshold
    count = int(inside.sum())
    if not 0 < count < len(scores):
        raise ValueError(
            f"the bin at threshold {threshold} holds {count} of {len(scores)} examples: nothing to compare"
        )
    order = np.argsort(-other if above else other, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(other[order])), len(order) - 1)  # the last place of each run of ties
    inside = inside[order].astype(np.float64)

    def replicates(counts: np.ndarray) -> np.ndarray:
        total, shared = (np.cumsum(side, axis=0)[ends] for side in (counts[order], counts[order] * inside[:, None]))
        cuts = zip(shared[-1], total.T, shared.T, strict=True)
        return np.array([np.interp(k, np.append(0, t), np.append(0, s)) / max(k, 1) for k, t, s in cuts])

    value = float(replicates(np.ones((len(scores), 1)))[0])
    estimate = bootstrap(value, replicates, len(scores), n_bootstrap=n_bootstrap, seed=seed)
    return Overlap(count, estimate, count / len(scores))


def agreement_over_tasks(scores: np.ndarray, table: np.ndarray, *, n_bootstrap: int = 200, seed: int = 0) -> Estimate:
    """Spearman correlation of scores with the table's mean, and its 95% interval over the table's task examples.

    Each replicate averages m rows drawn with repetition. `scores` stay as they are, so that this says how far the
    correlation depends on which task examples the table has, and no more.
    """
    scores, table = _checked(scores, table)
    counts = resample_counts(len(table), n_bootstrap, np.random.default_rng(seed))
    value = spearman(scores, table.mean(0))
    drawn = [spearman(scores, column @ table / len(table)) for column in counts.T]
    low, high = percentile_interval(np.array(drawn))
    return Estimate(value, min(low, value), max(high, value), len(table))


def spearman_per_task(scores: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Spearman correlation of scores with each row of the table: (m,)."""
    scores, table = _checked(scores, table)
    return np.array([spearman(scores, row) for row in table])


def agreement_by_task_size(
    scores: np.ndarray, table: np.ndarray, sizes: Sequence[int], *, n_draws: int = 50, seed: int = 0
) -> dict[int, Estimate]:
    """By size: Spearman correlation of scores with the mean over that many random rows of the table.

    The mean over draws, and the central 95% of them, which is the spread between tasks of that size. One row: all
    m of them, each once. Raises ValueError for a size outside 1..m.
    """
    scores, table = _checked(scores, table)
    check_positive("n_draws", n_draws)
    rng = np.random.default_rng(seed)
    found = {}
    for size in sizes:
        if not 1 <= size <= len(table):
            raise ValueError(f"sizes must lie in 1..{len(table)}, the rows of the table, got {size}")
        if size == len(table):
            rows = [np.arange(size)]
        elif size == 1:
            rows = [np.array([j]) for j in range(len(table))]
        else:
            rows = [rng.choice(len(table), size, replace=False) for _ in range(n_draws)]
        drawn = np.array([spearman(scores, table[some].mean(0)) for some in rows])
        found[size] = Estimate(float(drawn.mean()), *percentile_interval(drawn), n=len(drawn))
    return found


def task_reliability(table: np.ndarray, *, n_splits: int = 50, seed: int = 0) -> Estimate:
    """Split-half reliability of the table's mean over its task examples, and the central 95% over random splits.

    r is the Spearman correlation of the means of two random halves of the rows (with an odd number one row sits
    out); Spearman-Brown steps it up to all m rows: k r / (1 + (k - 1) r), k = m / half. A negative r counts as 0.
    The square root of the product of two scores' reliabilities bounds their expected correlation if each has noise
    of its own. Raises ValueError for fewer than 2 rows.
    """
    table = as_array(table, "table", 2)
    if len(table) < 2:
        raise ValueError(f"split halves need at least 2 task examples, got {len(table)}")
    check_positive("n_splits", n_splits)
    rng, half = np.random.default_rng(seed), len(table) // 2
    orders = [rng.permutation(len(table)) for _ in range(n_splits)]
    r = np.array([spearman(table[o[:half]].mean(0), table[o[half : 2 * half]].mean(0)) for o in orders]).clip(0)
    step = len(table) / half
    stepped = step * r / (1 + (step - 1) * r)
    return Estimate(float(stepped.mean()), *percentile_interval(stepped), n=len(table))


def kuder_richardson(shares: np.ndarray, n_items: int) -> float:
    """Lower bound of the reliability of shares (n,) of n_items yes-no items, from the shares alone.

    Kuder and Richardson 1937, formula 21: k / (k - 1) (1 - M (k - M) / (k s^2)), with M and s^2 mean and variance
    of the k-item sums. Items of unequal difficulty make it too low. At least 0. Raises ValueError for fewer than 2
    items, shares outside 0..1, or constant ones.
    """
    shares = as_array(shares, "shares", 1)
    if n_items < 2:
        raise ValueError(f"n_items must be at least 2, got {n_items}")
    if shares.min() < 0 or shares.max() > 1:
        raise ValueError(f"shares must lie in 0..1, got {shares.min()}..{shares.max()}")
    mean, variance = n_items * shares.mean(), n_items**2 * shares.var()
    if not variance > 0:
        raise ValueError(f"all shares are {shares[0]}: nothing varies")
    return max(0.0, n_items / (n_items - 1) * (1 - mean * (n_items - mean) / (n_items * variance)))


def variance_shares(table: np.ndarray) -> dict[str, float]:
    """Shares of the table's variance due to pool examples, task examples, and both together (they sum to 1).

    Two-way analysis of variance with one value a cell. Raises ValueError for a constant table.
    """
    table = as_array(table, "table", 2)
    total = table.var()
    if not total > 0:
        raise ValueError(f"the table is constant ({table.flat[0]}): nothing varies")
    pool, task = table.mean(0).var() / total, table.mean(1).var() / total
    return {"pool": float(pool), "task": float(task), "interaction": float(max(0.0, 1 - pool - task))}


def crossed_estimate(table: np.ndarray, *, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """Mean of one value a model and a task (m, t); the 95% interval resamples models and tasks, each by itself.

    Both are draws of larger populations, and values of one model or of one task go together: to resample the m t
    values alone would make the interval too narrow. Resampling k of k draws shows only (k - 1) / k of their variance,
    so deviations are scaled by sqrt(k / (k - 1)), models and tasks apart. With so few draws it stays too narrow: with
    three models and eight tasks it covered 83% where models vary most and 94% where tasks do (simulated). One model or
    one task counts as a fixed one, and one value has no interval.
    """
    table = as_array(table, "table", 2)
    return _estimate(float(table.mean()), _crossed_deviations([table], n_bootstrap, seed)[0], table)


def crossed_difference(one: np.ndarray, other: np.ndarray, *, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """Mean of `one` (m, t) minus mean of `other` (m, s): the same models, but tasks of two kinds, resampled apart.

    Raises ValueError where the tables have not the same models.
    """
    one, other = as_array(one, "one", 2), as_array(other, "other", 2)
    if len(one) != len(other):
        raise ValueError(f"both tables must have a row for each model, got {len(one)} and {len(other)}")
    first, second = _crossed_deviations([one, other], n_bootstrap, seed)
    return _estimate(float(one.mean() - other.mean()), first - second, np.concatenate([one, other], 1))


def _crossed_deviations(tables: Sequence[np.ndarray], n_bootstrap: int, seed: int) -> list[np.ndarray]:
    """Replicates of each table's mean less that mean, models drawn once for all tables and tasks for each."""
    check_positive("n_bootstrap", n_bootstrap)
    rng = np.random.default_rng(seed)
    models = _scaled_counts(len(tables[0]), n_bootstrap, rng)
    drawn = [(table, _scaled_counts(table.shape[1], n_bootstrap, rng)) for table in tables]
    return [np.einsum("ib,ij,jb->b", models, t, tasks) / t.size - t.mean() for t, tasks in drawn]


def _scaled_counts(k: int, n_bootstrap: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of k draws counts in each replicate, deviations from once widened by sqrt(k / (k - 1))."""
    return 1 + (resample_counts(k, n_bootstrap, rng) - 1) * (k / (k - 1)) ** 0.5 if k > 1 else np.ones((1, n_bootstrap))


def _estimate(value: float, deviations: np.ndarray, table: np.ndarray) -> Estimate:
    if table.size == 1:
        return Estimate(value, None, None, 1)
    low, high = percentile_interval(deviations)
    return Estimate(value, value + min(low, 0.0), value + max(high, 0.0), table.size)


def _checked(scores: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, table = as_array(scores, "scores", 1), as_array(table, "table", 2)
    if table.shape[1] != len(scores):
        raise ValueError(f"table must have a column for each of the {len(scores)} scores, got {table.shape}")
    return scores, table
