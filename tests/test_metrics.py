"""LDS, ceilings and leave-one-out correlation against scipy, closed forms and their own symmetries."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from tda_core import metrics
from tda_core.estimates import grouped_estimate
from tda_core.metrics import (
    Ceiling,
    Estimate,
    SignError,
    centred,
    check_sign,
    lds,
    lds_ceiling,
    lds_difference,
    lds_of_predictions,
    lds_of_predictions_difference,
    lds_per_query,
    loo_correlation,
    mean_estimate,
    percent_of_ceiling,
    predictions_of,
    resample_counts,
    resampled_spearman,
    spearman_columns,
)


def problem(seed=0, n_query=6, n_train=30, n_subsets=25, noise=1.0):
    """Scores, half subsets and outcomes that are the scores' sums plus noise."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n_query, n_train))
    masks = rng.permuted(np.tile(np.arange(n_train) % 2 == 0, (n_subsets, 1)), axis=1)
    return scores, masks, masks @ scores.T + noise * rng.normal(size=(n_subsets, n_query))


def test_per_query_equals_scipy():
    scores, masks, outcomes = problem()
    expected = [spearmanr(masks @ scores[q], outcomes[:, q]).statistic for q in range(len(scores))]
    np.testing.assert_allclose(lds_per_query(scores, masks, outcomes), expected, atol=1e-12)
    assert lds(scores, masks, outcomes).value == pytest.approx(np.mean(expected), abs=1e-12)
    assert lds(scores, masks, outcomes).n == len(scores)


def test_ties_get_average_ranks():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 3, size=(40, 5)), rng.integers(0, 4, size=(40, 5))
    expected = [spearmanr(x[:, q], y[:, q]).statistic for q in range(5)]
    np.testing.assert_allclose(spearman_columns(x, y), expected, atol=1e-12)


def test_perfect_scores_reach_one_and_torch_equals_numpy():
    scores, masks, outcomes = problem(noise=0.0)
    np.testing.assert_allclose(lds_per_query(scores, masks, outcomes), 1.0)
    as_torch = [torch.from_numpy(a) for a in (scores, masks, outcomes)]
    np.testing.assert_array_equal(lds_per_query(*as_torch), lds_per_query(scores, masks, outcomes))
    needs_grad = as_torch[0].clone().requires_grad_()
    np.testing.assert_array_equal(lds_per_query(needs_grad, *as_torch[1:]), 1.0)


def test_seeds_are_averaged():
    scores, masks, outcomes = problem()
    noise = np.random.default_rng(1).normal(size=outcomes.shape)
    runs = np.stack([outcomes + noise, outcomes - noise, outcomes], axis=1)
    np.testing.assert_allclose(lds_per_query(scores, masks, runs), lds_per_query(scores, masks, outcomes))


def test_a_method_that_cannot_rank_counts_as_zero():
    scores, masks, outcomes = problem(noise=0.0)
    scores[0], outcomes[:, 1] = 0.1, 7.0  # equal scores give equal sums on paper, not in floating point
    values = lds_per_query(scores, masks, outcomes)
    assert values[0] == 0 and values[1] == 0
    np.testing.assert_allclose(values[2:], 1.0)


def test_sums_that_are_equal_on_paper_stay_tied():
    rng = np.random.default_rng(0)
    scores = np.zeros((1, 200))
    scores[0, rng.permutation(200)[:9]] = [0.1, 0.2, 0.3] * 3
    masks = rng.permuted(np.tile(np.arange(200) % 2 == 0, (60, 1)), axis=1)
    outcomes = rng.normal(size=(60, 1))
    exact = (masks * np.round(10 * scores[0]).astype(int)).sum(1)  # the same sums in whole numbers
    assert len(np.unique(exact)) < 20
    assert lds_per_query(scores, masks, outcomes)[0] == pytest.approx(
        spearmanr(exact, outcomes[:, 0]).statistic, abs=1e-12
    )


@pytest.mark.parametrize("ties", [False, True])
def test_resampled_correlations_equal_scipy_on_built_resamples(ties):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    if ties:
        x, y = np.round(x), np.round(2 * y)
    counts = resample_counts(30, 12, rng)
    assert counts.shape == (30, 12) and (counts.sum(0) == 30).all() and counts.max() > 1
    found = resampled_spearman(x, y, counts)
    for b in range(12):
        rows = np.repeat(np.arange(30), counts[:, b].astype(int))
        for q in range(4):
            assert found[q, b] == pytest.approx(spearmanr(x[rows, q], y[rows, q]).statistic, abs=1e-12)


def test_unweighted_resample_is_the_plain_correlation_and_constants_are_zero():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(20, 3))
    x[:, 2] = 5.0
    found = resampled_spearman(x, y, np.ones((20, 1)))[:, 0]
    np.testing.assert_allclose(found, spearman_columns(x, y), atol=1e-12)
    assert found[2] == 0


def test_two_way_interval_equals_a_plain_bootstrap():
    """The same draws, resample by resample, with scipy's ranks."""
    scores, masks, outcomes = problem(n_query=5, n_subsets=12)
    estimate = lds(scores, masks, outcomes, n_bootstrap=40, seed=9)
    rng = np.random.default_rng(9)
    subset_counts, query_counts = resample_counts(12, 40, rng), resample_counts(5, 40, rng)
    replicates = []
    for b in range(40):
        rows = np.repeat(np.arange(12), subset_counts[:, b].astype(int))
        queries = np.repeat(np.arange(5), query_counts[:, b].astype(int))
        predicted, true = (masks @ scores.T)[np.ix_(rows, queries)], outcomes[np.ix_(rows, queries)]
        replicates.append(np.mean([spearmanr(predicted[:, q], true[:, q]).statistic for q in range(5)]))
    expected = np.percentile(replicates, [2.5, 97.5]) + estimate.value - np.mean(replicates)  # the bias taken out
    np.testing.assert_allclose((estimate.low, estimate.high), expected, atol=1e-12)
    assert estimate == lds(scores, masks, outcomes, n_bootstrap=40, seed=9)
    assert estimate != lds(scores, masks, outcomes, n_bootstrap=40, seed=10)


def test_interval_covers_the_truth_and_narrows_with_subsets():
    """Normal noise as large as the signal: Pearson 1/sqrt(2) a query, so Spearman 6/pi asin(r/2)."""
    truth = 6 / np.pi * np.arcsin(np.sqrt(0.5) / 2)
    covered, widths = 0, {}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scores = rng.normal(size=(20, 1000))
        masks = rng.permuted(np.tile(np.arange(1000) < 500, (40, 1)), axis=1)
        signal = masks @ scores.T
        outcomes = signal + np.sqrt(1000 / 4) * rng.normal(size=signal.shape)  # the variance of a half subset's sum
        estimate = lds(scores, masks, outcomes, n_bootstrap=200)
        covered += estimate.low <= truth <= estimate.high
        if seed == 0:
            few = lds(scores, masks[:10], outcomes[:10], n_bootstrap=200)
            widths = {40: estimate.high - estimate.low, 10: few.high - few.low}
    assert covered >= 35, f"a 95% interval covered the truth {covered} times of 40"
    assert widths[40] < 0.7 * widths[10]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.01, 100), shift=st.floats(-50, 50))
def test_symmetries(seed, scale, shift):
    scores, masks, outcomes = problem(seed)
    rng = np.random.default_rng(seed)
    value = lds_per_query(scores, masks, outcomes)
    per_query = scale * rng.uniform(0.5, 2, size=outcomes.shape[1])
    np.testing.assert_allclose(lds_per_query(scores, masks, per_query * outcomes + shift), value, atol=1e-12)
    np.testing.assert_allclose(lds_per_query(scale * scores, masks, outcomes), value, atol=1e-12)
    order = rng.permutation(len(masks))
    np.testing.assert_allclose(lds_per_query(scores, masks[order], outcomes[order]), value, atol=1e-12)
    np.testing.assert_allclose(lds_per_query(-scores, masks, outcomes), -value, atol=1e-12)
    np.testing.assert_allclose(lds_per_query(scores, masks, -outcomes), -value, atol=1e-12)
    train = rng.permutation(scores.shape[1])
    np.testing.assert_allclose(lds_per_query(scores[:, train], masks[:, train], outcomes), value, atol=1e-12)


def test_difference_is_paired():
    scores, masks, outcomes = problem(n_query=30, n_subsets=60, noise=2.0)
    close = scores + 0.3 * np.random.default_rng(5).normal(size=scores.shape)
    difference = lds_difference(scores, close, masks, outcomes)
    first, second = lds(scores, masks, outcomes), lds(close, masks, outcomes)
    assert difference.value == pytest.approx(first.value - second.value, abs=1e-12)
    assert difference.low > 0, "the better method wins on the same subsets and queries"
    assert difference.high - difference.low < 0.7 * (first.high - first.low)
    same = lds_difference(scores, scores, masks, outcomes)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    mirrored = lds_difference(close, scores, masks, outcomes)
    assert mirrored.low == pytest.approx(-difference.high, abs=1e-12)


# Ceilings


@pytest.mark.parametrize(("n_seeds", "noise"), [(10, 1.0), (10, 3.0), (5, 1.5), (2, 0.7)])
def test_ceiling_of_known_noise(n_seeds, noise):
    """Signal variance 1, noise variance noise^2 a run: all correlations have closed forms."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(300, 150))
    outcomes = signal[:, None] + noise * rng.normal(size=(300, n_seeds, 150))
    found = lds_ceiling(outcomes, n_splits=40)

    def spearman(pearson):
        return 6 / np.pi * np.arcsin(pearson / 2)

    half = n_seeds // 2
    r, step = spearman(1 / (1 + noise**2 / half)), n_seeds / half
    reliability = step * r / (1 + (step - 1) * r)
    assert found.reliability.value == pytest.approx(reliability, abs=0.01)
    assert found.reliability.value == pytest.approx(1 / (1 + noise**2 / n_seeds), abs=0.03)
    assert found.single_run.value == pytest.approx(spearman(1 / (1 + noise**2)), abs=0.01)
    assert found.ceiling.value == pytest.approx(np.sqrt(found.reliability.value), abs=1e-12)
    perfect = spearman_columns(signal, outcomes.mean(1)).mean()
    assert found.ceiling.value == pytest.approx(perfect, abs=0.015)
    for estimate in (found.reliability, found.ceiling, found.single_run):
        assert estimate.low < estimate.value < estimate.high and estimate.n == 150


def test_spearman_brown_of_two_seeds_by_hand():
    rng = np.random.default_rng(1)
    outcomes = rng.normal(size=(20, 1, 3)) + rng.normal(size=(20, 2, 3))
    r = np.mean([spearmanr(outcomes[:, 0, q], outcomes[:, 1, q]).statistic for q in range(3)])
    found = lds_ceiling(outcomes, n_splits=3)
    assert found.single_run.value == pytest.approx(r, abs=1e-12)
    assert found.reliability.value == pytest.approx(2 * r / (1 + r), abs=1e-12)
    assert found.ceiling.value == pytest.approx(np.sqrt(2 * r / (1 + r)), abs=1e-12)


def test_splits_are_disjoint_halves():
    """Seeds 0 and 1 agree and so do 2 and 3, but the pairs oppose each other: no split of halves may share a seed."""
    base = np.random.default_rng(0).normal(size=(30, 1, 2))
    outcomes = base * np.array([1, 1, -1, -1])[None, :, None]
    # Halves {0,1}|{2,3} correlate at -1 and the mixed ones are constant (0), so the mean r lies in [-1, 0].
    found = lds_ceiling(outcomes, n_splits=60)
    assert found.reliability.value == 0 and found.ceiling.value == 0
    assert found.single_run.value == pytest.approx(-1 / 3)


def test_noise_only_has_no_ceiling_to_divide_by():
    outcomes = np.tile(np.array([1.0, -1.0])[None, :, None], (5, 1, 2)) * np.arange(5.0)[:, None, None]
    ceiling = lds_ceiling(outcomes, n_splits=2)
    with pytest.raises(ValueError, match=r"ceiling must be positive, got 0\.0"):
        percent_of_ceiling(Estimate(0.5, 0.4, 0.6, 9), ceiling)


def test_percent_of_ceiling():
    top = Ceiling(Estimate(0.64, 0.6, 0.7, 5), Estimate(0.8, 0.7, 0.9, 5), Estimate(0.4, 0.3, 0.5, 5))
    assert percent_of_ceiling(Estimate(0.6, 0.4, 0.7, 9), top) == Estimate(75.0, 50.0, pytest.approx(87.5), 9)
    assert percent_of_ceiling(Estimate(0.6, None, None, 9), top) == Estimate(75.0, None, None, 9)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 1, 2), "at least 2 seeds a subset, got 1"),
        ((2, 4, 2), "at least 3 rows .* got 2"),
        ((5, 4), "3 dimensions"),
    ],
)
def test_bad_outcomes_for_a_ceiling(shape, message):
    with pytest.raises(ValueError, match=message):
        lds_ceiling(np.random.default_rng(0).normal(size=shape))


# Leave-one-out


def test_loo_equals_scipy_on_the_removed_examples():
    rng = np.random.default_rng(0)
    scores, indices = rng.normal(size=(7, 40)), np.array([3, 39, 0, 17, 22, 8])
    effects = scores[:, indices].T + rng.normal(size=(6, 7))
    found = loo_correlation(scores, effects, indices, n_bootstrap=50)
    expected = np.mean([spearmanr(scores[q, indices], effects[:, q]).statistic for q in range(7)])
    assert found.value == pytest.approx(expected, abs=1e-12) and found.n == 7
    assert found.low < found.value < found.high
    with_seeds = effects[:, None] + np.array([1.0, -1.0])[None, :, None] * rng.normal(size=(6, 1, 7))
    assert loo_correlation(scores, with_seeds, torch.from_numpy(indices)).value == pytest.approx(expected, abs=1e-12)
    assert loo_correlation(-scores, effects, indices).value == pytest.approx(-expected, abs=1e-12)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 1, 5], r"0\.\.4, got 5"),
        ([0, 1, -1], r"0\.\.4, got -1"),
        ([0, 1, 1], "must not repeat"),
        ([0, 1], "must be 3 integers"),
        ([0.0, 1.0, 2.0], "integers, one a row of effects, got float64"),
    ],
)
def test_bad_loo_indices(indices, message):
    with pytest.raises(ValueError, match=message):
        loo_correlation(np.ones((2, 5)), np.ones((3, 2)), indices)


def test_loo_needs_matching_queries_and_three_removals():
    with pytest.raises(ValueError, match="effects are of 3 queries, but scores of 2"):
        loo_correlation(np.ones((2, 5)), np.ones((3, 3)), [0, 1, 2])
    with pytest.raises(ValueError, match=r"at least 3 rows .* got 2"):
        loo_correlation(np.ones((2, 5)), np.ones((2, 2)), [0, 1])


# Sign and bad input


def test_reversed_scores_are_refused_by_name():
    scores, masks, outcomes = problem(n_subsets=60)
    check_sign(scores, masks, outcomes)
    with pytest.raises(SignError, match="a positive score means that training on the example lowers the query's loss"):
        check_sign(-scores, masks, outcomes)
    with pytest.raises(SignError):  # losses given as outcomes
        check_sign(scores, masks, -outcomes)
    assert issubclass(SignError, ValueError)


def test_useless_scores_are_not_called_reversed():
    _, masks, outcomes = problem(n_query=40)
    check_sign(np.zeros((40, 30)), masks, outcomes)
    check_sign(np.random.default_rng(8).normal(size=(40, 30)), masks, outcomes)


def _with(array, index, value):
    array = array.copy()
    array[index] = value
    return array


SCORES, MASKS, OUTCOMES = problem(n_query=4, n_train=10, n_subsets=8)


@pytest.mark.parametrize(
    ("scores", "masks", "outcomes", "message"),
    [
        (_with(SCORES, (2, 3), np.nan), MASKS, OUTCOMES, r"scores\[2, 3\] is nan"),
        (_with(SCORES, (0, 1), -np.inf), MASKS, OUTCOMES, r"scores\[0, 1\] is -inf"),
        (SCORES, MASKS, _with(OUTCOMES, (7, 3), np.inf), r"outcomes\[7, 3\] is inf"),
        (SCORES, MASKS.astype(float), OUTCOMES, "masks must be boolean, got float64"),
        (SCORES, MASKS[:7], OUTCOMES, r"= \(8, 10\) to fit outcomes and scores, got \(7, 10\)"),
        (SCORES, MASKS[:, :9], OUTCOMES, r"= \(8, 10\) to fit outcomes and scores, got \(8, 9\)"),
        (SCORES.T, MASKS, OUTCOMES, r"= \(8, 4\)"),
        (SCORES[:3], MASKS, OUTCOMES, "outcomes are of 4 queries, but scores of 3"),
        (SCORES, MASKS[:2], OUTCOMES[:2], "at least 3 rows .* got 2"),
        (SCORES, np.tile(MASKS[:1], (8, 1)), OUTCOMES, "all masks are the same subset"),
        (SCORES[0], MASKS, OUTCOMES, r"scores must be a non-empty array with 2 dimensions, got shape \(10,\)"),
        (SCORES[:0], MASKS, OUTCOMES, r"got shape \(0, 10\)"),
        (SCORES, MASKS, OUTCOMES[:, 0], r"outcomes must be .* got shape \(8,\)"),
    ],
)
def test_bad_input_is_named(scores, masks, outcomes, message):
    for function in (lds_per_query, lds, check_sign, lambda *a: lds_difference(SCORES, *a)):
        with pytest.raises(ValueError, match=message):
            function(scores, masks, outcomes)


def test_mean_estimate():
    values = np.random.default_rng(0).normal(3, 1, size=400)
    found = mean_estimate(values)
    half_width = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean()) and found.n == 400
    assert found.high - found.low == pytest.approx(2 * half_width, rel=0.1)
    squared = mean_estimate(values, transform=np.square)
    assert (squared.value, squared.low) == (pytest.approx(found.value**2), pytest.approx(found.low**2, rel=1e-3))
    with pytest.raises(ValueError, match="n_bootstrap must be at least 1, got 0"):
        mean_estimate(values, n_bootstrap=0)


def test_resampled_ranks_sum_to_those_of_scipy_on_heavy_ties():
    x = np.array([[1.0], [1.0], [2.0], [0.0]])
    counts = np.array([[2.0], [0.0], [1.0], [1.0]])
    y = np.array([[3.0], [9.0], [1.0], [2.0]])
    expected = np.corrcoef(rankdata([1, 1, 2, 0]), rankdata([3, 3, 1, 2]))[0, 1]
    assert resampled_spearman(x, y, counts)[0, 0] == pytest.approx(expected, abs=1e-12)


def test_lds_over_models_is_the_mean_of_theirs():
    rng = np.random.default_rng(0)
    masks = rng.random((40, 12)) < 0.5
    truth = rng.normal(size=(5, 12))
    outcomes = masks @ truth.T + 0.5 * rng.normal(size=(40, 5))
    scores = [truth + noise * rng.normal(size=truth.shape) for noise in (0.1, 1.0, 3.0)]
    found = metrics.lds_over_models(scores, masks, outcomes)
    each = [metrics.lds(one, masks, outcomes) for one in scores]
    assert found.value == pytest.approx(np.mean([e.value for e in each]), abs=1e-12)
    assert found.low < found.value < found.high and found.n == 5
    assert metrics.lds_over_models(scores[:1], masks, outcomes) == each[0]
    with pytest.raises(ValueError, match="at least one model, got none"):
        metrics.lds_over_models([], masks, outcomes)


def test_predictions_that_are_sums_of_scores_have_the_lds_of_scores():
    scores, masks, outcomes = problem()
    predicted = predictions_of(scores, masks)
    np.testing.assert_allclose(predicted, masks @ scores.T, rtol=1e-9)
    assert lds_of_predictions(predicted, outcomes) == lds(scores, masks, outcomes)
    other = problem(seed=1)[0]
    assert lds_of_predictions_difference(predicted, predictions_of(other, masks), outcomes) == lds_difference(
        scores, other, masks, outcomes
    )


def test_predictions_need_not_be_additive():
    _, _, outcomes = problem()
    seeds = np.stack([outcomes - 1, outcomes + 1], axis=1)  # (m, s, q), of which the mean counts
    assert lds_of_predictions(np.exp(outcomes / 10), seeds).value == pytest.approx(1)
    assert lds_of_predictions(torch.from_numpy(-(outcomes**3)), outcomes).value == pytest.approx(-1)


def test_centring_removes_what_all_queries_share():
    scores, masks, outcomes = problem(noise=0.0)
    shared = 50 * np.random.default_rng(1).normal(size=(len(outcomes), 1))
    assert lds(centred(scores, 0), masks, centred(outcomes + shared)).value == pytest.approx(1)
    assert lds(scores, masks, outcomes + shared).value < 0.5
    seeds = torch.from_numpy(outcomes)[:, None].expand(-1, 3, -1)
    assert torch.allclose(centred(seeds).mean(-1), torch.zeros(len(outcomes), 3, dtype=torch.float64), atol=1e-12)
    # centred sums are sums of centred scores
    np.testing.assert_allclose(centred(masks @ scores.T), masks @ centred(scores, 0).T, atol=1e-9)


def test_bad_predictions():
    _, _, outcomes = problem()
    with pytest.raises(ValueError, match=r"must be \(n_subsets, n_query\) = \(25, 6\) to fit, got \(24, 6\)"):
        lds_of_predictions(outcomes[1:], outcomes)
    with pytest.raises(ValueError, match="predictions must be finite"):
        lds_of_predictions(np.where(outcomes > 0, np.nan, outcomes), outcomes)
    with pytest.raises(ValueError, match="needs at least 2 of them to leave anything, got 1"):
        centred(outcomes[:, :1])
    with pytest.raises(ValueError, match=r"masks must be \(n_subsets, 30\) to fit scores, got \(25, 29\)"):
        predictions_of(np.ones((6, 30)), np.ones((25, 29), dtype=bool))


def test_grouped_intervals_are_wider_where_groups_differ_and_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    groups = [rng.normal(shift, 1.0, size) for shift, size in ((-3, 20), (0, 30), (3, 25))]
    found = grouped_estimate(groups, n_bootstrap=4000)
    everything = np.concatenate(groups)
    assert found.value == pytest.approx(everything.mean()) and found.n == 75
    plain = mean_estimate(everything)
    assert found.high - found.low > 2 * (plain.high - plain.low)
    loop, replicates = np.random.default_rng(1), []
    for _ in range(4000):
        drawn = [groups[i] for i in loop.integers(3, size=3)]
        replicates.append(np.concatenate([loop.choice(values, len(values)) for values in drawn]).mean())
    assert [found.low, found.high] == pytest.approx(np.percentile(replicates, [2.5, 97.5]), abs=0.15)


def test_groups_of_one_value_are_a_bootstrap_over_groups_and_alike_groups_one_over_values():
    values = np.arange(40.0)
    alone, plain = grouped_estimate([[v] for v in values]), mean_estimate(values)
    assert alone.low == pytest.approx(plain.low, abs=1.0) and alone.high == pytest.approx(plain.high, abs=1.0)
    assert grouped_estimate([np.ones(3), np.ones(5)]).low == grouped_estimate([np.ones(2)]).high == 1.0
    assert grouped_estimate([values, values + 1]) == grouped_estimate([values, values + 1])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "at least one, got none"),
        ([[1.0], []], r"groups\[1\] must be a non-empty"),
        ([[1.0, np.nan]], "must be finite"),
    ],
)
def test_groups_that_cannot_be_averaged(groups, message):
    with pytest.raises(ValueError, match=message):
        grouped_estimate(groups)
