"""Weights that made the outcomes are found again, and the check on subsets left out is one."""

import pytest
import torch

from tda_core.subsets import random_subsets
from tda_core.term_weights import fit_term_weights

MASKS = random_subsets(30, 24, 0.4, seed=0)


def made(weights, noise: float = 0.0, *, seed: int = 0):
    """Terms (F, 6, 30), and outcomes (24, 6) that these weights make of them."""
    generator = torch.Generator().manual_seed(seed)
    terms = torch.randn(len(weights), 6, 30, generator=generator)
    outcomes = MASKS.float() @ torch.einsum("f,fqn->qn", torch.tensor(weights), terms).T
    return terms, outcomes + noise * torch.randn(24, 6, generator=generator)


def test_the_weights_that_made_the_outcomes_are_found():
    terms, outcomes = made([2.0, 0.0, 0.5])
    shifted = outcomes + torch.arange(6.0)  # a query's own level says nothing
    for value in (outcomes, shifted):
        found = fit_term_weights(terms, MASKS, value)
        torch.testing.assert_close(found.values, torch.tensor([2.0, 0.0, 0.5]), rtol=1e-4, atol=1e-5)
        assert found.held_out == pytest.approx(1.0)
    assert found.alone.shape == (3,) and float(found.alone[0]) > float(found.alone[1]) + 0.2


def test_opponents_get_no_weight():
    terms, outcomes = made([1.0, -1.0])
    found = fit_term_weights(terms, MASKS, outcomes)
    assert found.values[1] == 0 and found.values[0] > 0
    assert float(found.alone[1]) < 0


def test_queries_count_alike_whatever_their_spread():
    terms, outcomes = made([1.0, 1.0], noise=0.5)
    scales = torch.tensor([1.0, 100.0, 1.0, 0.01, 1.0, 1.0])
    scaled = fit_term_weights(terms * scales[:, None], MASKS, outcomes * scales)
    torch.testing.assert_close(scaled.values, fit_term_weights(terms, MASKS, outcomes).values, rtol=1e-4, atol=1e-6)


def test_noise_alone_predicts_nothing_that_was_left_out():
    terms = made([1.0] * 8)[0]
    outcomes = torch.randn(24, 6, generator=torch.Generator().manual_seed(5))
    assert abs(fit_term_weights(terms, MASKS, outcomes, n_splits=20).held_out) < 0.25


def test_seeds_repeat_and_dead_terms_and_queries_are_borne():
    terms, outcomes = made([1.0, 1.0], noise=2.0)
    terms[1] = 0
    outcomes[:, 2] = 3.0
    first, again = (fit_term_weights(terms, MASKS, outcomes, seed=4) for _ in range(2))
    assert first.held_out == again.held_out and torch.equal(first.values, again.values)
    assert first.values[0] > 0 and first.values[1] == 0


def test_bad_input_is_refused():
    terms, outcomes = made([1.0])
    with pytest.raises(ValueError, match=r"expected terms \(F, q, n\), .* got \(1, 6, 30\), \(24, 30\), \(24, 5\)"):
        fit_term_weights(terms, MASKS, outcomes[:, :5])
    with pytest.raises(ValueError, match=r"masks must be boolean, got torch.float32"):
        fit_term_weights(terms, MASKS.float(), outcomes)
    with pytest.raises(ValueError, match="give 6 or more, got 5"):
        fit_term_weights(terms, MASKS[:5], outcomes[:5])
    with pytest.raises(ValueError, match="outcomes must be finite"):
        fit_term_weights(terms, MASKS, outcomes * torch.nan)
