"""Intervals of few runs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tda_core.estimates import mean_estimate
from tda_core.few_runs import share_estimate, signed, t_estimate


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12), st.floats(-5, 5))
def test_equals_scipys_interval_and_moves_with_the_values(values, shift):
    found = t_estimate(values)
    spread = stats.sem(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), spread) if spread else [np.mean(values)] * 2
    assert (found.low, found.value, found.high) == pytest.approx((low, np.mean(values), high), abs=1e-9)
    moved = t_estimate(np.array(values) + shift)
    assert (moved.low, moved.high) == pytest.approx((found.low + shift, found.high + shift), abs=1e-9)
    assert found.n == len(values)


def test_holds_the_true_mean_as_often_as_it_says_where_a_bootstrap_does_not():
    draws = np.random.default_rng(0).normal(size=(2000, 5))
    exact = [t_estimate(values) for values in draws]
    resampled = [mean_estimate(values) for values in draws[:500]]
    covers = [np.mean([one.low <= 0 <= one.high for one in found]) for found in (exact, resampled)]
    assert 0.935 < covers[0] < 0.965 and covers[1] < 0.88


def test_one_run_has_no_interval_and_shares_stay_shares():
    alone = t_estimate(torch.tensor([0.25]))
    assert (alone.value, alone.low, alone.high, alone.n) == (0.25, None, None, 1)
    assert signed(alone) == "+0.250" and signed(t_estimate([-0.5, -0.5])) == "-0.500 [-0.500, -0.500]"
    wide = t_estimate([0.1, 0.9, 1.0])
    cut = share_estimate([0.1, 0.9, 1.0])
    assert wide.low < 0 < 1 < wide.high and (cut.low, cut.value, cut.high) == (0, wide.value, 1)
    same = share_estimate([1.0] * 4)
    assert same.low == same.value == same.high == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "values must be a non-empty array with 1 dimensions"),
        ([[0.1]], r"got shape \(1, 1\)"),
        ([0.1, float("nan")], r"values\[1\] is nan"),
        ([0.1, 1.5], r"values must lie in 0\.0\.\.1\.0, but values\[1\] is 1.5"),
    ],
)
def test_bad_input(values, message):
    with pytest.raises(ValueError, match=message):
        share_estimate(values)
