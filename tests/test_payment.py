"""Payment: shares that sum to one, the correction for leaving a source out, and a stream that drifts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import FLOAT64, continuous, converged, generator, labelled, optimum, random_problem

from tda_core.dynamics import Dynamics, pushes
from tda_core.examples import Examples
from tda_core.payment import drifting_stream, left_out, misplaced, payment_shares
from tda_core.simulation import ForwardOnly, last_response, simulate

SIZES = torch.tensor([5, 3, 2])
GROUPS = torch.tensor([0] * 12 + [1] * 7 + [2] * 5)


def test_the_positive_part_is_paid_and_the_rest_by_head_count():
    scores = torch.tensor([[3.0, 1.0, -9.0], [0.0, 0.0, 2.0], [-1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 1.0], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    torch.testing.assert_close(payment_shares(scores, SIZES), expected)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-44, 37))
def test_shares_are_a_distribution_whatever_the_scale_and_the_order(seed, exponent):
    scores = torch.randn(6, 4, generator=generator(seed)) * 10.0**exponent
    sizes = torch.randint(1, 9, (4,), generator=generator(seed))
    shares = payment_shares(scores, sizes)
    assert shares.dtype == scores.dtype and bool((shares >= 0).all())
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    assert bool((shares[(scores > 0).any(1)][scores[(scores > 0).any(1)] <= 0] == 0).all())
    order = torch.randperm(4, generator=generator(seed + 1))
    torch.testing.assert_close(payment_shares(scores[:, order], sizes[order]), shares[:, order])
    torch.testing.assert_close(payment_shares(scores.double() * 7, sizes).float(), shares)


def test_leaving_out_is_the_response_to_the_exact_change_of_the_objective():
    """Of the mean over the rest minus the mean over all; steps that do not depend on the push are linear in it."""
    problem, queries = random_problem(n=24), labelled(6, seed=2)
    dynamics = Dynamics(horizon=9, damping=0.1, momentum=0.5)
    gradients = 24 * pushes(problem)
    change = torch.stack([gradients.mean(0) - gradients[GROUPS != source].mean(0) for source in range(3)])
    expected = ForwardOnly(problem, last_response(problem, dynamics, change), dynamics).scores(queries)
    found = left_out(simulate(problem, dynamics, groups=GROUPS).scores(queries), torch.bincount(GROUPS))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_leaving_out_is_nearer_to_the_optimum_without_the_source():
    problem, queries = converged(40), labelled(30, seed=8)
    groups = torch.arange(40) % 4 // 3  # a source of 30 examples and one of 10
    scores = simulate(problem, Dynamics(horizon=60, damping=0.0, curvature="hessian"), groups=groups).scores(queries)
    weights = (groups == 0).to(FLOAT64) * 40 / 30
    true = problem.losses(queries, optimum(problem, weights)) - problem.losses(queries)
    error = {"zero": scores[:, 1] - true, "left out": left_out(scores, torch.bincount(groups))[:, 1] - true}
    assert float(error["left out"].norm()) < 0.7 * float(error["zero"].norm())


def test_for_one_of_many_examples_leaving_out_hardly_differs():
    scores = torch.randn(5, 1000, generator=generator(0), dtype=FLOAT64)
    found = left_out(scores, torch.ones(1000))
    assert float((found - scores).norm() / scores.norm()) < 0.1
    torch.testing.assert_close(found.sum(1), torch.zeros(5, dtype=FLOAT64), atol=1e-9, rtol=0)


def test_what_is_misplaced_is_what_others_get():
    shares = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    other = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0], [0.2, 0.3, 0.5]])
    torch.testing.assert_close(misplaced(shares, other), torch.tensor([0.25, 1.0, 0.0]))
    torch.testing.assert_close(misplaced(other, shares), misplaced(shares, other))


def test_a_stream_holds_queries_and_their_noise():
    queries = labelled(30, classes=3)
    plain, noisy, again = (drifting_stream(queries, 4000, noise=noise, seed=1) for noise in (0.0, 0.2, 0.2))
    row = {tuple(inputs.tolist()): int(target) for inputs, target in zip(queries.inputs, queries.targets, strict=True)}
    assert all(row[tuple(x.tolist())] == int(y) for x, y in zip(plain.inputs, plain.targets, strict=True))
    assert len({tuple(x.tolist()) for x in plain.inputs}) == 30, "every query comes back"
    assert torch.equal(noisy.inputs, again.inputs) and torch.equal(noisy.targets, plain.targets)
    added = noisy.inputs - plain.inputs
    assert float(added.std()) == pytest.approx(0.2 * float(queries.inputs.std()), rel=0.03)
    assert not torch.equal(drifting_stream(queries, 50, noise=0.0, seed=2).targets, plain.targets[:50])


def test_the_mix_drifts_between_the_mixes_and_stays_with_one():
    queries = Examples(torch.zeros(40, 2), torch.arange(40) % 4)

    def mixes(n_mixes):
        parts = drifting_stream(queries, 8000, noise=0.0, n_mixes=n_mixes, seed=0).targets.split(400)
        return torch.stack([torch.bincount(part, minlength=4) / 400 for part in parts])

    still, moving = mixes(1), mixes(2)
    assert float((still - still.mean(0)).abs().max()) < 0.1
    assert float((moving[0] - moving[-1]).abs().max()) > 0.2
    torch.testing.assert_close(moving[9:11].mean(0), moving[[0, 19]].mean(0), atol=0.07, rtol=0)


def test_bad_input_is_named():
    scores = torch.zeros(2, 3)
    for function in (payment_shares, left_out):
        with pytest.raises(ValueError, match=r"sizes must be \(3,\), one a unit, got \(2,\)"):
            function(scores, SIZES[:2])
        with pytest.raises(ValueError, match="scores must be finite floats"):
            function(scores / 0, SIZES)
        with pytest.raises(ValueError, match=r"\(n_query, n_units\), got torch.float32 \(3,\)"):
            function(scores[0], SIZES)
        with pytest.raises(ValueError, match=r"sizes must be >= 0 and not all zero, got \[1, -1, 0\]"):
            function(scores, torch.tensor([1, -1, 0]))
        with pytest.raises(ValueError, match="not all zero"):
            function(scores, torch.zeros(3))
    with pytest.raises(ValueError, match="without unit 1 no training example would be left"):
        left_out(scores, torch.tensor([0, 4, 0]))
    with pytest.raises(ValueError, match=r"shares are \(2, 3\), but the reference \(2, 2\)"):
        misplaced(scores, scores[:, :2])
    queries = labelled(5)
    with pytest.raises(ValueError, match="n and n_mixes must be >= 1, got 0 and 5"):
        drifting_stream(queries, 0, noise=0.1, seed=0)
    for noise in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="noise must be finite and >= 0"):
            drifting_stream(queries, 3, noise=noise, seed=0)
    with pytest.raises(ValueError, match="these targets are numbers"):
        drifting_stream(continuous(5), 3, noise=0.1, seed=0)
