"""Planted worlds are what they say, and what was recovered is judged as by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.stats import spearmanr

from tda_core.design_quality import rule_of_thumb
from tda_core.designs import left_regular
from tda_core.planted import (
    correlations,
    half_way,
    measure,
    planted_lds,
    power_law_influences,
    sparse_influences,
    support_recovered,
)
from tda_core.recovery import lam_scale, recover
from tda_core.subsets import random_subsets


@given(n=st.integers(1, 40), q=st.integers(1, 5), seed=st.integers(0, 99), data=st.data())
def test_sparse_influences_have_k_signs_a_row(n, q, seed, data):
    k = data.draw(st.integers(1, n))
    w = sparse_influences(n, k, q, seed=seed)
    assert w.shape == (q, n) and w.dtype == torch.float64
    assert ((w != 0).sum(1) == k).all() and set(w.unique().tolist()) <= {-1.0, 0.0, 1.0}


def test_places_and_signs_are_even():
    w = sparse_influences(10, 3, 20_000, seed=0)
    assert ((w != 0).double().mean(0) - 0.3).abs().max() < 4.5 * (0.3 * 0.7 / 20_000) ** 0.5
    assert w.sum(0).abs().max() < 4.5 * (0.3 * 20_000) ** 0.5


@given(n=st.integers(1, 40), exponent=st.floats(0, 3), seed=st.integers(0, 99))
def test_power_laws_decay_as_told(n, exponent, seed):
    w = power_law_influences(n, exponent, 3, seed=seed)
    assert torch.allclose(w.norm(dim=1), torch.ones(3, dtype=torch.float64))
    falling = w.abs().sort(dim=1, descending=True).values
    law = torch.arange(1, n + 1, dtype=torch.float64) ** -exponent
    assert torch.allclose(falling / falling[:, :1], law.expand(3, n))


@pytest.mark.parametrize("draw", [sparse_influences, power_law_influences])
def test_seed_decides_the_influences(draw):
    assert torch.equal(draw(50, 3, 4, seed=1), draw(50, 3, 4, seed=1))
    assert not torch.equal(draw(50, 3, 4, seed=1), draw(50, 3, 4, seed=2))


def test_measurements_are_sums_of_members_plus_noise():
    M, w = left_regular(30, 8, 3, seed=0), power_law_influences(30, 1.0, 500, seed=0)
    exact = measure(M, w, seed=0)
    by_hand = torch.stack([w[:, M.toarray()[subset] > 0].sum(1) for subset in range(8)], dim=1)
    assert torch.allclose(exact, by_hand, atol=1e-12)
    dense = random_subsets(30, 8, 0.5, seed=0)
    assert torch.allclose(measure(dense, w, seed=0), w @ dense.T.double(), atol=1e-12)
    noise = measure(M, w, 0.5, seed=1) - exact
    assert noise.std() == pytest.approx(0.5, rel=0.05) and abs(noise.mean()) < 0.03
    assert torch.equal(measure(M, w, 0.5, seed=1), noise + exact)


def test_support_is_recovered_where_the_largest_are_the_planted():
    w = torch.tensor([[1.0, 0, -1, 0], [1.0, 0, -1, 0], [1.0, 0, -1, 0], [0, 0, 1.0, 0]])
    found = torch.tensor([[0.2, -0.1, -5, 0.1], [0.2, -0.2, -5, 0], [0, 0, 0, 0], [0, -1, -2.0, 1]])
    assert support_recovered(w, found).tolist() == [True, False, False, True]
    everywhere = torch.ones(1, 3)
    assert support_recovered(everywhere, everywhere).tolist() == [True]


@given(seed=st.integers(0, 999), scale=st.floats(0.01, 100))
def test_success_does_not_depend_on_scale_or_order(seed, scale):
    w = sparse_influences(20, 3, 6, seed=seed)
    found = w + 0.7 * torch.randn(6, 20, generator=torch.Generator().manual_seed(seed))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(20))
    for judge in (support_recovered, correlations):
        expected = judge(w, found)
        assert torch.allclose(judge(w[:, order], scale * found[:, order]).double(), expected.double(), atol=1e-9)


def test_correlations_and_lds_are_those_by_hand():
    w = power_law_influences(25, 1.0, 3, seed=0)
    found = w + 0.3 * torch.randn(3, 25, generator=torch.Generator().manual_seed(0))
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(w.numpy(), found.numpy(), strict=True)]
    assert correlations(w, found).tolist() == pytest.approx(expected)
    assert correlations(w, torch.zeros_like(w)).tolist() == [0, 0, 0]
    masks = random_subsets(25, 40, 0.5, seed=7).double()
    by_hand = [spearmanr(masks @ a, masks @ b).statistic for a, b in zip(w, found, strict=True)]
    assert planted_lds(w, found, n_subsets=40, seed=7) == pytest.approx(by_hand)
    assert planted_lds(w, 3 * w, seed=0) == pytest.approx(1)
    assert planted_lds(w, -w, seed=0) == pytest.approx(-1)


def test_twice_the_rule_of_thumb_recovers_the_support_of_99_draws_in_100():
    n, k = 600, 20
    recovered = []
    for seed in range(100):
        M = left_regular(n, rule_of_thumb(n, k, factor=2), 10, seed=seed)
        w = sparse_influences(n, k, 1, seed=seed)
        y = measure(M, w, seed=seed)
        recovered.append(support_recovered(w, recover(M, y, 0.01 * lam_scale(M, y)).weights))
    assert torch.cat(recovered).sum() >= 99


def test_half_way_interpolates_and_ignores_dips():
    assert half_way([10, 20, 30], [0.0, 0.25, 0.75]) == 25
    assert half_way([10, 20, 40], [0.0, 0.5, 1.0]) == 20
    assert half_way([10, 20, 30, 40], [0.4, 0.2, 0.6, 0.5]) == 25  # from .4, which the running maximum keeps
    for success in ([0.0, 0.1, 0.4], [0.6, 0.7, 1.0]):
        with pytest.raises(ValueError, match="must cross 1/2 between K = 10 and 30"):
            half_way([10, 20, 30], success)
    for success in ([0.0, 1.2, 1.0], [0.0, math.nan, 1.0]):
        with pytest.raises(ValueError, match="shares in"):
            half_way([10, 20, 30], success)
    with pytest.raises(ValueError, match="sizes must increase"):
        half_way([10, 30, 20], [0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="sizes must increase"):
        half_way([10, 20], [0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparse_influences(5, 6, 1, seed=0), r"k must lie in 1\.\.5, the number of examples, got 6"),
        (lambda: sparse_influences(5, 0, 1, seed=0), r"k must lie in 1\.\.5, the number of examples, got 0"),
        (lambda: sparse_influences(0, 1, 1, seed=0), "n must be at least 1, got 0"),
        (lambda: power_law_influences(5, 1.0, 0, seed=0), "n_queries must be at least 1, got 0"),
        (lambda: power_law_influences(5, -1.0, 1, seed=0), "exponent must be finite and >= 0, got -1.0"),
        (lambda: power_law_influences(5, math.nan, 1, seed=0), "exponent must be finite and >= 0, got nan"),
        (lambda: measure(torch.ones(2, 3), torch.ones(1, 4), seed=0), r"got \(2, 3\) and \(1, 4\)"),
        (lambda: measure(sparse.eye_array(3), torch.ones(3), seed=0), r"got \(3, 3\) and \(3,\)"),
        (lambda: measure(torch.ones(2, 3), torch.ones(1, 3), -0.1, seed=0), "noise must be finite and >= 0, got -0.1"),
        (lambda: support_recovered(torch.ones(1, 3), torch.ones(1, 4)), r"got \(1, 3\) and \(1, 4\)"),
        (lambda: support_recovered(torch.ones(0, 3), torch.ones(0, 3)), r"got \(0, 3\) and \(0, 3\)"),
        (lambda: support_recovered(torch.tensor([[1.0], [0.0]]), torch.ones(2, 1)), "query 1 has no planted"),
        (lambda: correlations(torch.ones(1, 2), torch.full((1, 2), math.nan)), "recovered influences must be finite"),
        (lambda: planted_lds(torch.full((1, 2), math.inf), torch.ones(1, 2), seed=0), "planted influences must be"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
