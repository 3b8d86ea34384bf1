"""Heads fitted to the end: optimality, against scikit-learn and the normal equations, and named errors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from tda_core import linear_heads
from tda_core.closed_form import stride_closed_form
from tda_core.examples import Examples
from tda_core.features import input_pca, kernel_pca, raw_input, with_bias
from tda_core.gradients import exact_influence
from tda_core.kernels import ReluKernel
from tda_core.linear_heads import mean_network, own_fit, settle
from tda_core.models import mlp
from tda_core.problem import Problem
from tests.toys import FLOAT64, continuous, labelled, random_problem


def features(problem):
    return kernel_pca(problem.train.inputs, ReluKernel((4, 9, 3)), 4)


def test_ridge_regression_solves_its_normal_equations():
    problem = random_problem((4, 5, 1), n=30)
    phi = with_bias(raw_input(problem.train.inputs))
    x, y = phi(problem.train.inputs), problem.train.targets
    for fit, offset in ((own_fit, 0.0), (settle, problem.outputs(problem.train.inputs)[:, 0])):
        made = fit(problem, phi, 0.3)
        expected = torch.linalg.solve(x.T @ x / 30 + 0.3 * torch.eye(5, dtype=FLOAT64), x.T @ (y - offset) / 30)
        torch.testing.assert_close(made.theta, expected)
        queries = continuous(5, seed=9)
        start = 0 if fit is own_fit else problem.outputs(queries.inputs)
        torch.testing.assert_close(made.outputs(queries.inputs), start + (phi(queries.inputs) @ expected)[:, None])


def test_softmax_regression_agrees_with_scikit_learn():
    problem = random_problem((4, 5, 3), n=60)
    phi, ridge = raw_input(problem.train.inputs), 0.02
    x, y = problem.train.inputs.numpy(), problem.train.targets.numpy()
    theirs = LogisticRegression(C=1 / (60 * ridge), fit_intercept=False, tol=1e-12, max_iter=10_000).fit(x, y)
    ours = own_fit(problem, phi, ridge).theta.view(3, 4)
    np.testing.assert_allclose(ours - ours.mean(0), theirs.coef_ - theirs.coef_.mean(0), atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.sampled_from([1e-4, 1e-2, 1.0]), st.sampled_from([(4, 5, 3), (4, 5, 2), (4, 5, 1)]))
def test_nothing_is_left_to_gain(seed, ridge, layers):
    problem = random_problem(layers, n=25, seed=seed)
    for made in (own_fit(problem, features(problem), ridge), settle(problem, features(problem), ridge)):
        slope = made.gradients(made.train).mean(0) + ridge * made.theta
        assert float(slope.norm()) < 1e-3 * float(made.gradients(made.train).norm(dim=1).mean())


def test_influence_in_a_fitted_head_is_the_closed_form():
    problem, queries = random_problem((4, 5, 3), n=40), labelled(6, seed=3)
    for fit in (own_fit, settle):
        made = fit(problem, features(problem), 0.05)
        expected = exact_influence(made, 0.1).scores(queries)
        torch.testing.assert_close(stride_closed_form(made, features(problem), 0.15).scores(queries), expected)


def test_a_large_ridge_leaves_the_network_as_it_is_and_a_small_one_fits_the_data():
    problem = random_problem((4, 5, 3), n=40)
    x = problem.train.inputs
    far = settle(problem, features(problem), 1e6)
    torch.testing.assert_close(far.outputs(x), problem.outputs(x), rtol=1e-4, atol=1e-4)
    losses = [
        float(settle(problem, features(problem), ridge).losses(problem.train).mean()) for ridge in (1, 1e-2, 1e-4)
    ]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("size", [1.0, 10.0, 100.0])
def test_heads_of_confident_networks_are_fitted_in_float32(size):
    exact = random_problem((4, 5, 3), n=200)
    labels = exact.outputs(exact.train.inputs).argmax(1)  # that it is sure of
    exact = Problem(exact.module, size * exact.theta, exact.loss, Examples(exact.train.inputs, labels))
    data = Examples(exact.train.inputs.float(), labels)
    rounded = Problem(mlp((4, 5, 3), "tanh"), exact.theta.float(), exact.loss, data)
    for ridge in (1e-5, 1e-2):
        losses = [settle(p, features(p), ridge).losses(p.train).mean().double() for p in (exact, rounded)]
        assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-2, abs=1e-6)


def test_of_the_network_the_control_uses_nothing():
    problem = random_problem((4, 5, 3))
    other = problem.at(torch.randn_like(problem.theta))
    assert torch.equal(own_fit(problem, features(problem), 0.1).theta, own_fit(other, features(problem), 0.1).theta)
    assert not torch.equal(settle(problem, features(problem), 0.1).theta, settle(other, features(problem), 0.1).theta)


def test_files_tell_heads_on_other_features_apart():
    problem = random_problem((4, 5, 3))
    x = problem.train.inputs
    made = [
        own_fit(problem, input_pca(x, 2, whiten=floor), 1e9).at(torch.zeros(6, dtype=FLOAT64)) for floor in (0.1, 0.2)
    ]
    assert made[0].identity != made[1].identity


@pytest.mark.parametrize("layers", [(4, 5, 3), (4, 5, 1)])
def test_the_mean_of_networks_has_their_mean_probabilities(layers):
    first = random_problem(layers)
    problems = [first.at(first.theta * factor) for factor in (1.0, -1.0, 3.0)]
    made, x = mean_network(problems, first.train), first.train.inputs
    outputs = torch.stack([problem.outputs(x) for problem in problems])
    if layers[-1] == 1:
        torch.testing.assert_close(made.outputs(x), outputs.mean(0))
    else:
        torch.testing.assert_close(made.outputs(x).exp(), outputs.softmax(2).mean(0))
    alone = mean_network(problems[:1], first.train)
    found = [stride_closed_form(p, features(first), 0.1).scores(first.train[:3]) for p in (first, alone)]
    torch.testing.assert_close(*found)
    assert made.identity != mean_network(problems[:2], first.train).identity


def test_networks_of_halves_are_attributed_to_the_whole():
    problem = random_problem((4, 5, 3), n=12)
    halves = [
        Problem(problem.module, problem.theta, problem.loss, problem.train[part])
        for part in (slice(0, 6), slice(6, 12))
    ]
    made = mean_network(halves, problem.train)
    assert stride_closed_form(made, features(problem), 0.1).scores(problem.train[:2]).shape == (2, 12)


def test_networks_that_have_no_mean_are_named():
    problem, regression = random_problem((4, 5, 3)), random_problem((4, 5, 1))
    with pytest.raises(ValueError, match="at least one problem, got none"):
        mean_network([], problem.train)
    with pytest.raises(ValueError, match=r"must share one loss, got .*'cross_entropy', 'squared_error'"):
        mean_network([problem, regression], problem.train)
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, 4\)"):
        mean_network([problem], labelled(5, 6))


def test_what_is_wrong_is_named(monkeypatch):
    problem = random_problem((4, 5, 3))
    for ridge in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"ridge must be finite and > 0, got {ridge}"):
            own_fit(problem, features(problem), ridge)
    monkeypatch.setattr(linear_heads, "MAX_STEPS", 1)
    with pytest.raises(RuntimeError, match="did not converge in 1 steps"):
        own_fit(problem, features(problem), 1e-3)
