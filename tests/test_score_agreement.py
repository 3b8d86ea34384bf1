"""Partial rank correlations and the agreement of two scores, against closed forms, scipy and plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal, pearsonr, rankdata, spearmanr

from tda_core.agreement_plots import estimate_bars, rank_density
from tda_core.partial import pearson_estimate, spearman, spearman_estimate
from tda_core.plots import Labels
from tda_core.score_agreement import (
    agreement_by_task_size,
    agreement_over_tasks,
    bin_overlap,
    crossed_difference,
    crossed_estimate,
    kuder_richardson,
    spearman_per_task,
    task_reliability,
    variance_shares,
)

RNG = np.random.default_rng(0)
X, Z = RNG.normal(size=(2, 200)).round(1)
Y = (X + 2 * Z + RNG.normal(size=200)).round(1)


def test_spearman_is_scipys():
    assert spearman(X, Y) == pytest.approx(spearmanr(X, Y).statistic, abs=1e-12)


def test_one_confounder_is_the_closed_form():
    xy, xz, yz = (spearmanr(*pair).statistic for pair in ((X, Y), (X, Z), (Y, Z)))
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert spearman(X, Y, given=Z) == pytest.approx(expected, abs=1e-12)


def test_more_confounders_are_the_inverse_of_the_correlation_matrix():
    table = np.column_stack([X, Y, Z, X * Z])
    inverse = np.linalg.inv(spearmanr(table).statistic)
    expected = -inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1])
    assert spearman(X, Y, given=table[:, 2:]) == pytest.approx(expected, abs=1e-12)


def test_a_common_cause_is_removed_and_nothing_else():
    rng = np.random.default_rng(1)
    cause, *noise = rng.normal(size=(3, 20_000))
    x, y = cause + noise[0], cause + noise[1]
    assert spearman(x, y) > 0.45 and abs(spearman(x, y, given=cause)) < 0.03
    assert spearman(x, y, given=rng.normal(size=20_000)) == pytest.approx(spearman(x, y), abs=0.01)
    assert spearman(x, x + 0, given=cause) == pytest.approx(1)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([np.exp, np.cbrt, lambda v: 3 * v - 7]))
def test_only_ranks_count_and_swapping_changes_nothing(seed, increasing):
    x, y, z = np.random.default_rng(seed).integers(0, 9, size=(3, 30)).astype(float)
    found = spearman(x, y, given=z)
    assert found == pytest.approx(spearman(y, increasing(x), given=increasing(z)), abs=1e-9)
    assert found == pytest.approx(-spearman(-x, y, given=z), abs=1e-9) and -1 <= found <= 1


def test_undefined_correlations_are_0():
    assert spearman(np.ones(9), np.arange(9)) == 0
    assert spearman(Z, Y, given=Z) == 0, "nothing of x is left"


def test_the_bootstrap_is_that_of_built_resamples():
    estimate = spearman_estimate(X, Y, given=Z, n_bootstrap=400, seed=0)
    rng = np.random.default_rng(5)
    rows = rng.integers(0, len(X), size=(400, len(X)))
    plain = np.array([spearman(X[r], Y[r], given=Z[r]) for r in rows])
    low, high = np.percentile(plain + estimate.value - plain.mean(), [2.5, 97.5])
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.03)
    assert estimate.value == spearman(X, Y, given=Z) and estimate.n == 200
    assert spearman_estimate(X, Y, given=Z, n_bootstrap=400, seed=0) == estimate


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covariance = np.array([[1, 0.6, 0.5], [0.6, 1, 0.5], [0.5, 0.5, 1]])
    s = 6 / np.pi * np.arcsin(covariance / 2)  # Spearman's of a Gaussian
    truth = (s[0, 1] - s[0, 2] * s[1, 2]) / np.sqrt((1 - s[0, 2] ** 2) * (1 - s[1, 2] ** 2))
    draws = multivariate_normal([0] * 3, covariance, seed=1).rvs(size=(100, 80))
    found = [spearman_estimate(*draw.T[:2], given=draw.T[2], n_bootstrap=100) for draw in draws]
    assert 86 <= sum(one.low <= truth <= one.high for one in found) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2, 3], [1, 2]), "y must have one value for each of the 3 of x, got 2"),
        (([1, 2, 3, 4], [1, 2, 3, 4], [1, 2]), "given must have one value for each of the 4 of x, got 2"),
        (([1, 2, 3], [1, 2, 3], [1, 2, 3]), "given 1 confounders needs 4 examples, got 3"),
        (([1, 2, np.nan], [1, 2, 3]), r"x must be finite, but x\[2\] is nan"),
        (([], []), "x must be a non-empty array"),
    ],
)
def test_bad_input_is_named(arguments, message):
    x, y, *confounder = (np.array(side, dtype=float) for side in arguments)
    for function in (spearman, spearman_estimate):
        with pytest.raises(ValueError, match=message):
            function(x, y, given=confounder[0] if confounder else None)


def test_an_interval_takes_one_confounder():
    with pytest.raises(ValueError, match="one confounder"):
        spearman_estimate(X, Y, given=np.column_stack([X, Z]))
    with pytest.raises(ValueError, match="n_bootstrap must be at least 1, got 0"):
        spearman_estimate(X, Y, n_bootstrap=0)


def test_pearson_is_scipys_with_an_interval_like_fishers():
    found = pearson_estimate(X, Y, n_bootstrap=1000)
    r = pearsonr(X, Y)
    low, high = r.confidence_interval(0.95)
    assert found.value == pytest.approx(r.statistic, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)
    with pytest.raises(ValueError, match="a side is constant"):
        pearson_estimate(np.ones(5), np.arange(5))


# Bins


@pytest.mark.parametrize(("threshold", "above"), [(0.5, True), (-0.5, False)])
def test_overlap_is_that_of_sets(threshold, above):
    other = RNG.permutation(200) + 0.5 * X  # no ties
    found = bin_overlap(X, other, threshold, above=above, n_bootstrap=50)
    inside = set(np.flatnonzero(X > threshold if above else X <= threshold))
    order = np.argsort(other)
    chosen = set(order[-len(inside) :] if above else order[: len(inside)])
    assert found.count == len(inside) and found.chance == len(inside) / 200
    assert found.overlap.value == pytest.approx(len(inside & chosen) / len(inside))
    assert found.overlap.low < found.overlap.value < found.overlap.high


def test_ties_at_the_cut_count_by_the_mean_over_ways_to_break_them():
    other = np.round(Y)
    found = bin_overlap(X, other, 0.7, above=True, n_bootstrap=1)
    rng, inside = np.random.default_rng(0), X > 0.7
    ways = []
    for _ in range(4000):
        order = np.lexsort((rng.random(200), -other))[: inside.sum()]
        ways.append(inside[order].mean())
    assert found.overlap.value == pytest.approx(np.mean(ways), abs=0.005)
    assert bin_overlap(X, np.ones(200), 0.7, above=True, n_bootstrap=1).overlap.value == pytest.approx(inside.mean())


def test_equal_scores_overlap_wholly_and_reversed_ones_not_at_all():
    distinct = RNG.permutation(100).astype(float)
    assert bin_overlap(distinct, distinct, 79, above=True, n_bootstrap=1).overlap.value == 1
    assert bin_overlap(distinct, -distinct, 79, above=True, n_bootstrap=1).overlap.value == 0


def test_bins_must_hold_something():
    with pytest.raises(ValueError, match="the bin at threshold 99 holds 0 of 200 examples"):
        bin_overlap(X, Y, 99, above=True)
    with pytest.raises(ValueError, match="one value for each of the 200 scores"):
        bin_overlap(X, Y[1:], 0, above=True)


# Task examples


def table_of(noise, m=10, n=400, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    return truth, truth + noise * rng.normal(size=(m, n))


def test_agreement_by_task_size():
    truth, table = table_of(3)
    found = agreement_by_task_size(truth, table, [1, 4, 10], n_draws=20)
    each = [spearmanr(truth, row).statistic for row in table]
    assert spearman_per_task(truth, table) == pytest.approx(each)
    assert found[1].value == pytest.approx(np.mean(each)) and found[1].n == 10
    assert (
        found[10].value == found[10].low == found[10].high == pytest.approx(spearmanr(truth, table.mean(0)).statistic)
    )
    assert found[1].value < found[4].value < found[10].value
    over = agreement_over_tasks(truth, table, n_bootstrap=50)
    assert over.value == found[10].value and over.low < over.high and over.n == 10


def test_reliability_is_what_the_noise_says():
    truth, table = table_of(3, m=20, n=4000)
    found = task_reliability(table, n_splits=10)
    assert found.value == pytest.approx(1 / (1 + 9 / 20), abs=0.03) and found.n == 20
    assert pearsonr(rankdata(truth), rankdata(table.mean(0))).statistic == pytest.approx(found.value**0.5, abs=0.03)
    assert task_reliability(np.random.default_rng(0).normal(size=(10, 2000))).value < 0.05
    assert task_reliability(np.tile(truth, (4, 1))).value == pytest.approx(1)


def test_kuder_richardson_is_cronbachs_alpha_of_equal_items_and_lower_for_unequal():
    rng = np.random.default_rng(0)
    ability, k = rng.normal(size=(20_000, 1)), 50

    def alpha(items):
        return k / (k - 1) * (1 - items.var(0).sum() / items.sum(1).var())

    equal = (ability + rng.normal(size=(20_000, k)) > 0).astype(float)
    assert kuder_richardson(equal.mean(1), k) == pytest.approx(alpha(equal), abs=0.002)
    unequal = (ability + rng.normal(size=(20_000, k)) > rng.normal(size=k)).astype(float)
    assert kuder_richardson(unequal.mean(1), k) < alpha(unequal)
    assert kuder_richardson(rng.binomial(k, 0.5, size=20_000) / k, k) < 0.05, "no more than chance"


def test_variance_shares_of_a_known_table():
    a, b = RNG.normal(size=8), RNG.normal(size=(5, 1))
    shares = variance_shares(a + b)
    assert shares["pool"] == pytest.approx(a.var() / (a.var() + b.var()))
    assert shares["interaction"] == pytest.approx(0, abs=1e-12) and sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: agreement_over_tasks(X, np.ones((3, 9))), "a column for each of the 200 scores"),
        (lambda: agreement_by_task_size(X, np.ones((3, 200)), [4]), r"sizes must lie in 1\.\.3.*, got 4"),
        (lambda: task_reliability(X[None]), "at least 2 task examples, got 1"),
        (lambda: kuder_richardson(np.array([0.2, 1.2]), 5), r"shares must lie in 0\.\.1"),
        (lambda: kuder_richardson(np.array([0.2, 0.2]), 5), "all shares are 0.2"),
        (lambda: kuder_richardson(np.array([0.2, 0.3]), 1), "n_items must be at least 2, got 1"),
        (lambda: variance_shares(np.ones((2, 2))), "constant"),
    ],
)
def test_bad_tables_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Figures


def test_independent_ranks_have_density_1():
    rng = np.random.default_rng(0)
    figure = rank_density(rng.integers(0, 50, 200_000), rng.random(200_000), Labels("a", "b"))
    density = np.asarray(figure.axes[0].collections[0].get_array())
    assert density.shape == (40, 40) and density == pytest.approx(1, abs=0.5) and density.mean() == pytest.approx(1)
    with pytest.raises(ValueError, match="got 2 and 3"):
        rank_density(np.ones(2), np.ones(3), Labels("a"))


def test_bars_show_values_and_whiskers():
    overlap = bin_overlap(X, Y, 0.5, above=True, n_bootstrap=20)
    figure = estimate_bars(
        {"overlap": [overlap.overlap], "chance": [overlap.chance]}, ["> 0.5"], Labels("bin", "share")
    )
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    line = figure.axes[0].lines[0].get_ydata()
    assert tuple(line) == (overlap.overlap.low, overlap.overlap.high)
    assert heights == [overlap.overlap.value, overlap.chance]
    with pytest.raises(ValueError, match="overlap has 1 values for 2 groups"):
        estimate_bars({"overlap": [1]}, ["a", "b"], Labels("bin"))
    shares = estimate_bars({"share": [0.0, 0.05, 0.5, -0.02]}, list("wxyz"), Labels("bin"), percent=True)
    assert [text.get_text() for text in shares.axes[0].texts] == ["0%", "5.0%", "50%", "-2.0%"]


def test_intervals_of_models_and_tasks_resample_both():
    rng = np.random.default_rng(3)
    table = rng.normal(size=(4, 6))
    found = crossed_estimate(table, n_bootstrap=4000, seed=1)
    drawn = []
    for _ in range(4000):  # deviations of the counts of models and of tasks, widened
        rows, columns = (np.bincount(rng.integers(k, size=k), minlength=k) for k in (4, 6))
        weights = np.outer(1 + (rows - 1) * (4 / 3) ** 0.5, 1 + (columns - 1) * (6 / 5) ** 0.5)
        drawn.append((weights * table).mean())
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found.value == pytest.approx(table.mean()) and found.n == 24
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.08)
    by_model = np.repeat(np.arange(4.0)[:, None], 6, 1)  # six tasks tell nothing more than one
    wide, narrow = crossed_estimate(by_model), crossed_estimate(by_model.reshape(24, 1))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    with pytest.raises(ValueError, match="table must be a non-empty array with 2 dimensions"):
        crossed_estimate(np.ones(3))


def test_one_value_has_no_interval():
    found = crossed_estimate(np.full((1, 1), 0.4))
    assert (found.value, found.low, found.high, found.n) == (0.4, None, None, 1)


@pytest.mark.parametrize("spread", [(1.0, 1.0), (0.3, 1.0)])  # of models, of tasks
def test_the_interval_covers_the_truth_about_as_often_as_its_docstring_says(spread):
    rng, n, covered = np.random.default_rng(5), 300, 0
    for draw in range(n):
        models, tasks = spread[0] * rng.normal(size=(3, 1)), spread[1] * rng.normal(size=(1, 8))
        found = crossed_estimate(models + tasks + 0.5 * rng.normal(size=(3, 8)), n_bootstrap=200, seed=draw)
        covered += found.low <= 0 <= found.high
    assert 0.84 <= covered / n <= 0.97


def test_differences_of_two_kinds_of_tasks_pair_the_models():
    rng = np.random.default_rng(4)
    shift = 10 * rng.normal(size=(3, 1))  # what a model does to all of its tasks cancels
    one, other = shift + rng.normal(1, 0.1, (3, 5)), shift + rng.normal(0, 0.1, (3, 7))
    found = crossed_difference(one, other)
    assert found.value == pytest.approx(one.mean() - other.mean()) and found.n == 36
    assert found.low > 0.7 and found.high < 1.3
    again = crossed_difference(other, one)
    assert again.value == pytest.approx(-found.value)
    with pytest.raises(ValueError, match="a row for each model, got 3 and 2"):
        crossed_difference(one, other[:2])
