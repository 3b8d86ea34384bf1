"""Removal, noisy labels and overlap against scikit-learn and counting by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tda_core.diagnostics import counterfactual_drop, noisy_label_auc, top_k_overlap


def test_drop_is_the_mean_of_reference_minus_removed():
    rng = np.random.default_rng(0)
    full = rng.normal(size=50)
    removed = full - 0.5 - 0.1 * rng.normal(size=50)
    found = counterfactual_drop(full, removed)
    assert found.value == pytest.approx((full - removed).mean(), abs=1e-12) and found.n == 50
    assert 0.4 < found.low < found.value < found.high < 0.6, "the interval is of paired differences"
    assert counterfactual_drop(removed, full).value == pytest.approx(-found.value)
    runs = torch.from_numpy(np.stack([removed - 1, removed + 1]))
    assert counterfactual_drop(full, runs).value == pytest.approx(found.value, abs=1e-12)


def test_drop_in_excess_of_random_removal_is_the_difference_of_drops():
    full, removed, at_random = np.random.default_rng(1).normal(size=(3, 20))
    excess = counterfactual_drop(at_random, removed).value
    expected = counterfactual_drop(full, removed).value - counterfactual_drop(full, at_random).value
    assert excess == pytest.approx(expected, abs=1e-12)


def test_drop_refuses_other_queries_and_infinite_losses():
    with pytest.raises(ValueError, match="reference is of 3 queries, but removed of 4"):
        counterfactual_drop(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match=r"removed\[1\] is inf"):
        counterfactual_drop(np.zeros(2), np.array([0, np.inf]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_auc_equals_sklearn(seed, ties):
    rng = np.random.default_rng(seed)
    influence, noisy = rng.normal(size=60), rng.random(60) < 0.3
    noisy[:2] = [True, False]
    influence = np.round(influence + noisy) if ties else influence + noisy
    found = noisy_label_auc(influence, noisy, n_bootstrap=5)
    assert found.value == pytest.approx(roc_auc_score(noisy, influence), abs=1e-12)
    assert found.n == noisy.sum()
    assert noisy_label_auc(-influence, noisy, n_bootstrap=5).value == pytest.approx(1 - found.value, abs=1e-12)


def test_auc_interval_equals_a_plain_stratified_bootstrap():
    rng = np.random.default_rng(0)
    noisy = np.arange(200) < 40
    influence = np.round(rng.normal(size=200) + noisy, 1)
    found = noisy_label_auc(influence, noisy, n_bootstrap=600)
    plain = []
    for _ in range(600):
        rows = np.concatenate([rng.choice(40, 40), 40 + rng.choice(160, 160)])
        plain.append(roc_auc_score(noisy[rows], influence[rows]))
    np.testing.assert_allclose((found.low, found.high), np.percentile(plain, [2.5, 97.5]), atol=0.015)


def test_auc_takes_tensors():
    perfect = noisy_label_auc(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False]))
    assert (perfect.value, perfect.low, perfect.high) == (1, 1, 1)


@pytest.mark.parametrize(
    ("noisy", "message"),
    [
        (np.zeros(3, bool), "got 0 noisy and 3 clean"),
        (np.ones(3, bool), "got 3 noisy and 0 clean"),
        (np.array([1, 0, 0]), "3 booleans, got int64"),
        (np.array([True, False]), r"3 booleans, got bool of shape \(2,\)"),
    ],
)
def test_auc_refuses_what_has_no_auc(noisy, message):
    with pytest.raises(ValueError, match=message):
        noisy_label_auc(np.arange(3.0), noisy)


def test_overlap_by_hand():
    a = np.array([[5.0, 4, 3, 2, 1], [1, 2, 3, 4, 5]])
    b = np.array([[5.0, 1, 4, 2, 3], [1, 2, 3, 4, 5]])
    assert top_k_overlap(a, b, 2).value == pytest.approx((1 / 2 + 1) / 2)
    assert top_k_overlap(a, b, 3).value == pytest.approx((2 / 3 + 1) / 2)
    assert top_k_overlap(a, torch.from_numpy(b), 5).value == 1
    assert top_k_overlap(a, -a, 2).value == 0
    ties = np.zeros((1, 5))
    assert top_k_overlap(ties, np.array([[9.0, 8, 0, 0, 0]]), 2).value == 1, "equal scores go by the lower index"


def test_unrelated_methods_share_k_out_of_n():
    rng = np.random.default_rng(0)
    found = top_k_overlap(rng.normal(size=(500, 100)), rng.normal(size=(500, 100)), 20)
    assert found.low < 0.2 < found.high and found.n == 500


@pytest.mark.parametrize("k", [0, 6])
def test_overlap_refuses_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"1\.\.5, got {k}"):
        top_k_overlap(np.zeros((2, 5)), np.zeros((2, 5)), k)


def test_overlap_refuses_unequal_shapes():
    with pytest.raises(ValueError, match=r"\(2, 5\), but scores_b \(2, 4\)"):
        top_k_overlap(np.zeros((2, 5)), np.zeros((2, 4)), 1)
