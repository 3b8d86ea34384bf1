"""How well scores predict retraining: LDS, leave-one-out correlation, and the ceiling of both.

Conventions. scores: (n_query, n_train), positive = proponent. outcomes: what a retrained model makes
of each query, HIGHER = BETTER (minus the loss, or the margin). masks: (n_subsets, n_train) bool.
All take numpy arrays or torch tensors and compute in float64. The linear datamodelling score (LDS)
is Park et al. 2023, https://arxiv.org/abs/2303.14186.

A rank correlation with a constant side is undefined. Here it counts as 0: a method that cannot rank
the subsets of a query explains nothing about it, and leaving such queries out would reward silence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tda_core.estimates import Array, Estimate, as_array, mean_estimate, percentile_interval
from tda_core.ranks import check_positive, resample_counts, resampled_spearman, spearman_columns


class SignError(ValueError):
    """Scores whose sign is reversed: their proponents raise the loss."""


@dataclass(frozen=True)
class Ceiling:
    """How far noise in the ground truth limits any method (see `lds_ceiling`)."""

    reliability: Estimate  # of the mean over all seeds
    ceiling: Estimate  # the largest expected correlation: sqrt(reliability)
    single_run: Estimate  # mean correlation between the runs of two seeds


def lds_per_query(scores: Array, masks: Array, outcomes: Array) -> np.ndarray:
    """Spearman correlation, over subsets, between summed scores and outcomes; one value a query.

    outcomes: (n_subsets, n_query), or (n_subsets, n_seeds, n_query), averaged over seeds. Ties get
    average ranks. Returns (n_query,). Raises ValueError for wrong shapes, fewer than 3 subsets,
    masks that are not boolean or all alike, and NaN or infinity.
    """
    return spearman_columns(*_predictions_and_outcomes(scores, masks, outcomes))


def lds(scores: Array, masks: Array, outcomes: Array, *, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """Mean of `lds_per_query`, with the 95% interval of a two-way bootstrap over queries and subsets."""
    predicted, true = _predictions_and_outcomes(scores, masks, outcomes)
    return _mean_correlation([predicted], true, n_bootstrap, seed)


def lds_over_models(scores: Sequence[Array], masks: Array, outcomes: Array, *, seed: int = 0) -> Estimate:
    """Mean over several models' scores of their `lds`: what a method is worth for a model of any one seed.

    All models meet the same resampled queries and subsets. This is not the LDS of the mean scores, which is higher
    where models err independently. Raises ValueError for no scores, and as `lds` does.
    """
    if not len(scores):
        raise ValueError("give the scores of at least one model, got none")
    pairs = [_predictions_and_outcomes(one, masks, outcomes) for one in scores]
    return _mean_correlation([predicted for predicted, _ in pairs], pairs[0][1], 1000, seed, averaged=True)


def lds_difference(scores_a: Array, scores_b: Array, masks: Array, outcomes: Array, *, seed: int = 0) -> Estimate:
    """LDS of scores_a minus LDS of scores_b, with the 95% interval of a paired two-way bootstrap.

    Both meet the same resampled queries and subsets, so the noise they share cancels: the interval is
    narrower than two separate intervals suggest.
    """
    first, true = _predictions_and_outcomes(scores_a, masks, outcomes)
    second, _ = _predictions_and_outcomes(scores_b, masks, outcomes)
    return _mean_correlation([first, second], true, 1000, seed)


def lds_of_predictions(predictions: Array, outcomes: Array, *, n_bootstrap: int = 1000, seed: int = 0) -> Estimate:
    """`lds` of a method that predicts outcomes of subsets without being additive in examples.

    predictions: (n_subsets, n_query), higher = better. Raises ValueError as `lds` does.
    """
    predicted, true = _fitting_predictions(predictions, outcomes)
    return _mean_correlation([predicted], true, n_bootstrap, seed)


def lds_of_predictions_difference(first: Array, second: Array, outcomes: Array, *, seed: int = 0) -> Estimate:
    """LDS of the first predictions minus that of the second, paired as in `lds_difference`.

    Those of scores are `predictions_of(scores, masks)`.
    """
    (predicted, true), (other, _) = (_fitting_predictions(values, outcomes) for values in (first, second))
    return _mean_correlation([predicted, other], true, 1000, seed)


def predictions_of(scores: Array, masks: Array) -> np.ndarray:
    """What scores predict of each subset, the sum over its examples: (n_subsets, n_query).

    Raises ValueError for masks that are not boolean, do not fit, or are all alike.
    """
    scores = as_array(scores, "scores", 2)
    masks = np.asarray(masks.detach().cpu() if hasattr(masks, "detach") else masks)
    if masks.dtype != np.bool_:
        raise ValueError(f"masks must be boolean, got {masks.dtype}")
    if masks.ndim != 2 or masks.shape[1] != scores.shape[1]:
        raise ValueError(f"masks must be (n_subsets, {scores.shape[1]}) to fit scores, got {masks.shape}")
    if (masks == masks[0]).all():
        raise ValueError("all masks are the same subset: there is nothing to rank")
    # Sums equal on paper can differ in the last bit with the order of addition: rounding keeps them tied.
    scale = np.abs(scores).sum(1)
    scale = np.where(scale > 0, scale, 1)
    return np.round(masks.astype(np.float64) @ (scores / scale[:, None]).T, 12) * scale


def centred(values: Array, axis: int = -1) -> Array:
    """Values less their mean over queries: of outcomes and predictions (..., n_query); of scores with axis=0.

    What all queries of a run share (it trained well, or badly) is gone, which for language models, where a query is
    many tokens, hides what a method is asked: which query a subset helps. Raises ValueError for fewer than 2 queries.
    """
    if values.shape[axis] < 2:
        raise ValueError(f"a mean over queries needs at least 2 of them to leave anything, got {values.shape[axis]}")
    return values - values.mean(axis, keepdims=True)


def check_sign(scores: Array, masks: Array, outcomes: Array) -> None:
    """Refuse a reversed score matrix: SignError where the LDS is significantly negative (interval below 0)."""
    found = lds(scores, masks, outcomes)
    if found.high < 0:
        raise SignError(
            "the scores are reversed: a positive score means that training on the example lowers the query's loss "
            f"(outcomes: higher is better), but LDS is {found.value:.3f} [{found.low:.3f}, {found.high:.3f}], below 0"
        )


def loo_correlation(
    scores: Array, effects: Array, indices: Array, *, n_bootstrap: int = 1000, seed: int = 0
) -> Estimate:
    """Mean over queries of the Spearman correlation, over removed examples, of scores and true effects.

    effects: (n_removed, n_query), or (n_removed, n_seeds, n_query), averaged over seeds: outcome with
    the example minus outcome without it, so positive for proponents. indices: (n_removed,), which
    example each row removed. The interval is a two-way bootstrap over queries and removed examples.
    """
    predicted, true = _removed_scores_and_effects(scores, effects, indices)
    return _mean_correlation([predicted], true, n_bootstrap, seed)


def loo_difference(scores_a: Array, scores_b: Array, effects: Array, indices: Array, *, seed: int = 0) -> Estimate:
    """Leave-one-out correlation of scores_a minus that of scores_b, paired as in `lds_difference`."""
    first, true = _removed_scores_and_effects(scores_a, effects, indices)
    second, _ = _removed_scores_and_effects(scores_b, effects, indices)
    return _mean_correlation([first, second], true, 1000, seed)


def lds_ceiling(outcomes: Array, *, n_splits: int = 100, n_bootstrap: int = 1000, seed: int = 0) -> Ceiling:
    """Reliability of the ground truth and the correlation that a perfect prediction would reach.

    outcomes: (n_subsets, n_seeds, n_query); leave-one-out effects (n_removed, n_seeds, n_query) work
    the same way. Seeds are split into random halves; r is the Spearman correlation over subsets of
    the two half means, averaged over splits and then over queries. Spearman-Brown steps it up from
    half of the seeds to all of them (with an odd number one seed sits out of each split and the step
    is s/h, not 2): k r / (1 + (k - 1) r). The ceiling is the square root: a prediction equal to the
    noise-free outcome correlates that much with the measured one.

    Both steps are applied to the mean r, not to each query's, where a negative r of an unlearnable
    query would be unstable. Both are concave, so with unequal queries the ceiling errs upwards and a
    method's per cent of it downwards. A negative mean r counts as reliability 0. Intervals: bootstrap
    over queries. Raises ValueError for fewer than 2 seeds or 3 subsets, and NaN or infinity.
    """
    outcomes = as_array(outcomes, "outcomes", 3)
    n_subsets, n_seeds, n_query = outcomes.shape
    if n_seeds < 2:
        raise ValueError(f"a ceiling needs at least 2 seeds a subset, got {n_seeds}")
    _expect_rows(n_subsets, "outcomes")
    check_positive("n_splits", n_splits)
    rng = np.random.default_rng(seed)
    half = n_seeds // 2
    split = np.zeros(n_query)
    for _ in range(n_splits):
        order = rng.permutation(n_seeds)
        first, second = outcomes[:, order[:half]].mean(1), outcomes[:, order[half : 2 * half]].mean(1)
        split += spearman_columns(first, second) / n_splits
    step = n_seeds / half

    def reliability(r):
        r = np.maximum(r, 0)
        return step * r / (1 + (step - 1) * r)

    pairs = [(i, j) for i in range(n_seeds) for j in range(i)]
    single = sum(spearman_columns(outcomes[:, i], outcomes[:, j]) for i, j in pairs) / len(pairs)
    options = {"n_bootstrap": n_bootstrap, "seed": seed}
    return Ceiling(
        reliability=mean_estimate(split, transform=reliability, **options),
        ceiling=mean_estimate(split, transform=lambda r: np.sqrt(reliability(r)), **options),
        single_run=mean_estimate(single, **options),
    )


def percent_of_ceiling(estimate: Estimate, ceiling: Ceiling) -> Estimate:
    """An LDS or LOO correlation as per cent of its ceiling, which is taken as known (its own error is not added)."""
    top = ceiling.ceiling.value
    if not top > 0:
        raise ValueError(f"the ceiling must be positive, got {top}: the ground truth holds noise only")
    scaled = [None if value is None else 100 * value / top for value in (estimate.value, estimate.low, estimate.high)]
    return Estimate(*scaled, n=estimate.n)


def _predictions_and_outcomes(scores: Array, masks: Array, outcomes: Array) -> tuple[np.ndarray, np.ndarray]:
    """Checked (n_subsets, n_query) matrices: summed scores of each subset, and mean outcomes."""
    scores, outcomes = as_array(scores, "scores", 2), _mean_over_seeds(outcomes, "outcomes")
    expected = (len(outcomes), scores.shape[1])
    if np.shape(masks) != expected:
        raise ValueError(
            f"masks must be (n_subsets, n_train) = {expected} to fit outcomes and scores, got {np.shape(masks)}"
        )
    _expect_columns(outcomes, len(scores), "outcomes")
    return predictions_of(scores, masks), outcomes


def _fitting_predictions(predictions: Array, outcomes: Array) -> tuple[np.ndarray, np.ndarray]:
    predicted, outcomes = as_array(predictions, "predictions", 2), _mean_over_seeds(outcomes, "outcomes")
    if predicted.shape != outcomes.shape:
        raise ValueError(f"predictions must be (n_subsets, n_query) = {outcomes.shape} to fit, got {predicted.shape}")
    return predicted, outcomes


def _removed_scores_and_effects(scores: Array, effects: Array, indices: Array) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the removed examples and their effects, both (n_removed, n_query), checked."""
    scores, true = as_array(scores, "scores", 2), _mean_over_seeds(effects, "effects")
    n_query, n_train = scores.shape
    indices = np.asarray(indices)
    if indices.shape != (len(true),) or indices.dtype.kind not in "iu":
        raise ValueError(
            f"indices must be {len(true)} integers, one a row of effects, got {indices.dtype} {indices.shape}"
        )
    if indices.min() < 0 or indices.max() >= n_train:
        bad = indices[(indices < 0) | (indices >= n_train)][0]
        raise ValueError(f"indices must lie in 0..{n_train - 1}, got {bad}")
    if len(np.unique(indices)) != len(indices):
        raise ValueError("indices must not repeat: each removed example counts once")
    _expect_columns(true, n_query, "effects")
    return scores[:, indices].T, true


def _mean_over_seeds(value: Array, name: str) -> np.ndarray:
    array = as_array(value, name, 3 if getattr(value, "ndim", 0) == 3 else 2)
    _expect_rows(len(array), name)
    return array.mean(1) if array.ndim == 3 else array


def _mean_correlation(
    predicted: list[np.ndarray], true: np.ndarray, n_bootstrap: int, seed: int, *, averaged: bool = False
) -> Estimate:
    """Mean correlation of predicted[0] with true (minus that of predicted[1]), two-way bootstrap.

    averaged: the mean of those of all `predicted` instead.
    """
    rng = np.random.default_rng(seed)
    rows, n_query = true.shape
    row_counts, query_counts = resample_counts(rows, n_bootstrap, rng), resample_counts(n_query, n_bootstrap, rng)
    value, replicates = 0.0, np.zeros(n_bootstrap)
    factors = [1 / len(predicted)] * len(predicted) if averaged else [1, -1]
    for factor, values in zip(factors, predicted, strict=False):
        value += factor * spearman_columns(values, true).mean()
        replicates += factor * (resampled_spearman(values, true, row_counts) * query_counts).sum(0) / n_query
    # Rows drawn twice tie, which pulls rank correlations towards 0 (by .005 with 100 rows, .015 with 30). Shifting
    # the replicates back to the value raises the coverage of the 95% interval from .83 to .98 (30 rows, true LDS .8).
    bound = 1.0 if averaged else float(len(predicted))
    shifted = np.clip(replicates + (value - replicates.mean()), -bound, bound)
    return Estimate(float(value), *percentile_interval(shifted), n=n_query)


def _expect_rows(rows: int, name: str) -> None:
    if rows < 3:
        raise ValueError(f"{name} must have at least 3 rows (subsets or removed examples) to rank, got {rows}")


def _expect_columns(array: np.ndarray, n_query: int, name: str) -> None:
    if array.shape[1] != n_query:
        raise ValueError(f"{name} are of {array.shape[1]} queries, but scores of {n_query}")
