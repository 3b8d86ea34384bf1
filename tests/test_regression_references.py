"""References of a regression: closed forms against plain refits and autograd, limits, and named errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core import regression_references as references
from tda_core.regression_tasks import Family, Pairs, Shift, Sizes, Tasks, draw_tasks


def tasks_in_float64(background: int = 3, *, seed: int = 0, shift: Shift | None = None) -> Tasks:
    drawn = draw_tasks(Family(4, 0.5), Sizes(3, background, 6, 5), shift, seed=seed)
    parts = (part.to(torch.float64) for part in (drawn.background, drawn.candidates, drawn.queries))
    return Tasks(drawn.vectors.double(), *parts)


@settings(max_examples=25, deadline=None)
@given(background=st.integers(0, 6), ridge=st.floats(0.01, 10), seed=st.integers(0, 99), noise=st.floats(0, 5))
def test_leave_one_in_is_the_loss_change_of_plain_refits(background, ridge, seed, noise):
    tasks = tasks_in_float64(background, seed=seed, shift=Shift(noise=noise, rotation=60))
    plain = references.loss_changes(references.ridge_predictor(ridge), tasks)
    torch.testing.assert_close(references.leave_one_in(tasks, ridge), plain, rtol=1e-9, atol=1e-9)


def test_leave_one_in_of_least_squares_is_refitting_without_a_ridge():
    tasks = tasks_in_float64(6)
    plain = references.loss_changes(references.least_squares_predictor, tasks)
    torch.testing.assert_close(references.leave_one_in(tasks, 0.0), plain, rtol=1e-8, atol=1e-8)


def test_the_ridge_fit_is_where_its_objective_is_flat():
    pairs, ridge = tasks_in_float64().background, 0.7
    weights = references.ridge_fit(pairs, ridge).requires_grad_()
    objective = ((references.predict(weights, pairs.inputs) - pairs.targets) ** 2).sum() / 2
    (gradient,) = torch.autograd.grad(objective + ridge / 2 * weights.square().sum(), weights)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("background", [0, 3])
def test_inner_product_and_influence_are_those_of_autograd(background):
    tasks, ridge, damping = tasks_in_float64(background), 0.4, 0.3
    products, influence = (torch.empty(3, 6, 5, dtype=torch.float64) for _ in range(2))
    for t, weights in enumerate(references.ridge_fit(tasks.background, ridge)):

        def losses(w, pairs, t=t):
            return (pairs.inputs[t] @ w - pairs.targets[t]) ** 2 / 2

        def objective(w, losses=losses):
            return losses(w, tasks.background).sum() + (ridge + damping) / 2 * w @ w

        own, others = (torch.func.jacrev(losses)(weights, pairs) for pairs in (tasks.candidates, tasks.queries))
        products[t] = own @ others.T
        influence[t] = own @ torch.linalg.inv(torch.func.hessian(objective)(weights)) @ others.T
    torch.testing.assert_close(references.inner_product(tasks, ridge), products)
    torch.testing.assert_close(references.influence(tasks, ridge, damping=damping), influence)


def test_without_a_background_influence_is_the_inner_product_over_the_ridge():
    tasks = tasks_in_float64(0)
    torch.testing.assert_close(references.influence(tasks, 0.5), references.inner_product(tasks, 0.5) / 0.5)


def test_a_weak_candidate_moves_the_loss_by_its_influence():
    tasks, small = tasks_in_float64(), 1e-4
    # an example whose input and error are scaled by small has the influence of small^2 times that of the whole one
    weights = references.ridge_fit(tasks.background, 0.5)
    error = tasks.candidates.targets - references.predict(weights, tasks.candidates.inputs)
    inputs = small * tasks.candidates.inputs
    weak = Pairs(inputs, references.predict(weights, inputs) + small * error)
    found = references.leave_one_in(Tasks(tasks.vectors, tasks.background, weak, tasks.queries), 0.5) / small**2
    torch.testing.assert_close(found, references.influence(tasks, 0.5), rtol=1e-5, atol=1e-5)


def test_one_step_is_a_step_of_the_mean_loss_from_zero():
    pairs = tasks_in_float64().background
    zero = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    loss = ((references.predict(zero, pairs.inputs) - pairs.targets) ** 2).mean(1).sum() / 2
    (gradient,) = torch.autograd.grad(loss, zero)
    torch.testing.assert_close(references.one_step_fit(pairs, 0.3), -0.3 * gradient)
    assert (references.one_step_fit(pairs.first(0), 0.3) == 0).all()


def test_least_squares_solves_what_can_be_solved_and_stays_short():
    pairs = tasks_in_float64(3).background  # fewer examples than dimensions: all are met exactly
    weights = references.least_squares_fit(pairs)
    torch.testing.assert_close(references.predict(weights, pairs.inputs), pairs.targets)
    torch.testing.assert_close(weights, references.ridge_fit(pairs, 1e-9), rtol=1e-5, atol=1e-5)


def test_a_predictor_is_given_each_candidate_last_behind_the_background():
    tasks = tasks_in_float64(2)
    contexts = references.with_candidates(tasks)
    assert contexts.inputs.shape == (18, 3, 4)
    assert torch.equal(contexts.inputs[7, :2], tasks.background.inputs[1])  # task 1, candidate 1
    assert torch.equal(contexts.inputs[7, 2], tasks.candidates.inputs[1, 1])
    assert contexts.targets[7, 2] == tasks.candidates.targets[1, 1]


def test_blocks_change_nothing(monkeypatch):
    tasks = tasks_in_float64()
    whole = references.loss_changes(references.ridge_predictor(0.5), tasks)
    monkeypatch.setattr(references, "BLOCK", 4)
    torch.testing.assert_close(references.loss_changes(references.ridge_predictor(0.5), tasks), whole)


def test_the_indicator_counts_losses_that_fall_strictly():
    gains = torch.tensor([[[1.0, 0.0, -1.0, 2.0]]])
    assert references.indicator(gains).tolist() == [[0.5]]


def test_errors_are_means_over_queries():
    tasks = tasks_in_float64()
    found = references.squared_errors(references.ridge_predictor(0.5), tasks.background, tasks.queries)
    weights = references.ridge_fit(tasks.background, 0.5)
    triples = zip(tasks.queries.inputs, weights, tasks.queries.targets, strict=True)
    expected = [(inputs @ w - targets).square().mean() for inputs, w, targets in triples]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda t: references.leave_one_in(t, -1.0), "ridge must be finite and >= 0, got -1.0"),
        (lambda t: references.leave_one_in(t, float("nan")), "ridge must be finite and >= 0, got nan"),
        (lambda t: references.leave_one_in(t, 0.0), "without a ridge a fit needs at least 4 examples, got 3"),
        (lambda t: references.influence(t, 1.0, damping=-0.5), "damping must be finite and >= 0, got -0.5"),
        (
            lambda t: references.loss_changes(lambda context, inputs: inputs[:, :, 0] * float("inf"), t),
            "predictions must be finite: 90 loss changes are not",
        ),
    ],
)
def test_bad_input_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act(tasks_in_float64())
