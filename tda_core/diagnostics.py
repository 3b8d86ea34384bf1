"""Metrics beside LDS: removal of top proponents, noisy labels found, agreement between methods."""

import numpy as np

from tda_core.estimates import Array, Estimate, as_array, mean_estimate, percentile_interval
from tda_core.ranks import resample_counts


def counterfactual_drop(reference: Array, removed: Array, *, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """How much worse each query does without its top proponents: mean of reference - removed over queries.

    reference, removed: outcomes (higher = better), (n_query,) or (n_runs, n_query), averaged over runs.
    With the full model's outcomes as reference this is the counterfactual drop; with the outcomes
    after removing as many examples at random, it is the drop in excess of random removal. Positive
    for scores that find proponents. Interval: bootstrap over queries, paired.
    """
    first, second = (_mean_over_runs(value, name) for value, name in ((reference, "reference"), (removed, "removed")))
    if first.shape != second.shape:
        raise ValueError(f"reference is of {len(first)} queries, but removed of {len(second)}")
    return mean_estimate(first - second, n_bootstrap=n_bootstrap, seed=seed)


def noisy_label_auc(self_influence: Array, is_noisy: Array, *, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """Chance that a wrongly labelled example has more self-influence than a correct one (ROC AUC, ties half).

    self_influence: (n,), expected to be HIGH for wrong labels (they are learnt by heart); is_noisy:
    (n,) bool. Interval: bootstrap over examples, noisy and clean resampled apart so that both always
    occur. n counts the noisy examples. Raises ValueError where one of the two kinds is missing.
    """
    self_influence = as_array(self_influence, "self_influence", 1)
    is_noisy = np.asarray(is_noisy)
    if is_noisy.dtype != np.bool_ or is_noisy.shape != self_influence.shape:
        raise ValueError(
            f"is_noisy must be {len(self_influence)} booleans, got {is_noisy.dtype} of shape {is_noisy.shape}"
        )
    noisy, clean = self_influence[is_noisy], np.sort(self_influence[~is_noisy])
    if len(noisy) == 0 or len(clean) == 0:
        raise ValueError(f"an AUC needs noisy and clean examples, got {len(noisy)} noisy and {len(clean)} clean")
    below, up_to = np.searchsorted(clean, noisy, side="left"), np.searchsorted(clean, noisy, side="right")

    def auc(noisy_counts: np.ndarray, clean_counts: np.ndarray) -> float:
        weight = np.concatenate([[0.0], np.cumsum(clean_counts)])
        return noisy_counts @ (weight[below] + weight[up_to]) / (2 * len(noisy) * len(clean))

    rng = np.random.default_rng(seed)
    noisy_counts, clean_counts = (resample_counts(len(part), n_bootstrap, rng) for part in (noisy, clean))
    replicates = [auc(noisy_counts[:, b], clean_counts[:, b]) for b in range(n_bootstrap)]
    value = auc(np.ones(len(noisy)), np.ones(len(clean)))
    return Estimate(float(value), *percentile_interval(replicates), n=len(noisy))


def top_k_overlap(scores_a: Array, scores_b: Array, k: int, *, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """Share of a query's k top proponents by one method that are among the k top by the other, mean over queries.

    scores_a, scores_b: (n_query, n_train); equal scores go by the lower index. Two unrelated methods
    share k / n_train on average. Interval: bootstrap over queries.
    Raises ValueError for unequal shapes and k outside 1..n_train.
    """
    first, second = as_array(scores_a, "scores_a", 2), as_array(scores_b, "scores_b", 2)
    if first.shape != second.shape:
        raise ValueError(f"scores_a is {first.shape}, but scores_b {second.shape}")
    if not 1 <= k <= first.shape[1]:
        raise ValueError(f"k must lie in 1..{first.shape[1]}, got {k}")
    top_a, top_b = (np.argsort(-scores, axis=1, kind="stable")[:, :k] for scores in (first, second))
    shared = [len(np.intersect1d(a, b)) / k for a, b in zip(top_a, top_b, strict=True)]
    return mean_estimate(np.array(shared), n_bootstrap=n_bootstrap, seed=seed)


def _mean_over_runs(value: Array, name: str) -> np.ndarray:
    array = as_array(value, name, 2 if getattr(value, "ndim", 0) == 2 else 1)
    return array.mean(0) if array.ndim == 2 else array
