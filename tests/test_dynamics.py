"""Tangent dynamics against the closed form, an explicit matrix recursion, and the exact solution."""

import math
from dataclasses import replace
from itertools import pairwise, repeat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import FLOAT64, generator, labelled, random_problem

from tda_core import dynamics as module
from tda_core.dynamics import ClosedForm, Dynamics, closed_form, heavy_ball, stable_rate, trajectory
from tda_core.gradients import exact_influence, gradient_dot
from tda_core.problem import Problem

QUERIES = labelled(6, seed=5)
PLAIN = Dynamics(momentum=0.0)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def run(problem: Problem, dynamics: Dynamics) -> list[torch.Tensor]:
    return [response.clone() for response in trajectory(problem, dynamics)]


def push_of(problem: Problem) -> torch.Tensor:
    return problem.gradients(problem.train) / len(problem.train)


def safe_rate(problem: Problem, dynamics: Dynamics, share: float = 0.9) -> float:
    largest = float(torch.linalg.eigvalsh(problem.curvature(dynamics.curvature))[-1]) + dynamics.damping
    return share / largest


def solution(problem: Problem, dynamics: Dynamics) -> torch.Tensor:
    """What infinitely many steps tend to."""
    damped = problem.curvature(dynamics.curvature) + dynamics.damping * torch.eye(
        problem.n_parameters, dtype=FLOAT64
    )  # fmt: skip
    return torch.linalg.solve(damped, push_of(problem).T).T


# -- the full-batch trajectory ----------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [1, 2, 7, 60])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("damping", "kind"), [(0.0, "ggn"), (0.1, "ggn"), (3.0, "hessian")])
def test_trajectory_is_the_closed_form(horizon, momentum, damping, kind):
    problem = random_problem(weight_decay=0.01)
    dynamics = Dynamics(horizon=horizon, damping=damping, momentum=momentum, curvature=kind)
    dynamics = replace(dynamics, rate=safe_rate(problem, dynamics))
    responses = run(problem, dynamics)
    assert len(responses) == horizon
    close(responses[-1], closed_form(problem, dynamics), 1e-8)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_every_step_is_a_heavy_ball_step(momentum):
    problem = random_problem(weight_decay=0.01)
    dynamics = replace(PLAIN, horizon=5, damping=0.2, momentum=momentum, rate=0.3)
    damped = problem.curvature() + 0.2 * torch.eye(problem.n_parameters, dtype=FLOAT64)
    push = push_of(problem)
    before = now = torch.zeros_like(push)
    for found in trajectory(problem, dynamics):
        before, now = now, now - 0.3 * (now @ damped - push) + momentum * (now - before)
        close(found, now, 1e-10)


def test_without_momentum_it_is_the_geometric_sum():
    problem = random_problem(weight_decay=0.01)
    dynamics = replace(PLAIN, horizon=9, damping=0.2)
    dynamics = replace(dynamics, rate=safe_rate(problem, dynamics))
    damped = problem.curvature() + 0.2 * torch.eye(problem.n_parameters, dtype=FLOAT64)
    shrink = torch.eye(problem.n_parameters, dtype=FLOAT64) - dynamics.rate * damped
    expected = push_of(problem) @ torch.linalg.solve(
        damped, torch.eye(len(shrink), dtype=FLOAT64) - torch.linalg.matrix_power(shrink, 9)
    )  # fmt: skip
    close(run(problem, dynamics)[-1], expected, 1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_step_is_the_gradient_dot_product(momentum):
    problem = random_problem()
    dynamics = Dynamics(horizon=1, momentum=momentum, rate=0.25)
    close(run(problem, dynamics)[0], 0.25 * push_of(problem), 1e-14)
    scores = problem.gradients(QUERIES) @ run(problem, dynamics)[0].T
    close(scores, 0.25 * gradient_dot(problem).scores(QUERIES))


@pytest.mark.parametrize("dynamics", [
    Dynamics(horizon=400, momentum=0.0, damping=0.5),
    Dynamics(horizon=350, momentum=0.9, damping=0.1),
    Dynamics(horizon=60, damping=0.1),
])  # fmt: skip
def test_many_steps_tend_to_exact_influence(dynamics):
    problem = random_problem(weight_decay=0.05)
    for response in trajectory(problem, dynamics):
        last = response
    close(last, solution(problem, dynamics), 1e-8)
    close(problem.gradients(QUERIES) @ last.T, exact_influence(problem, dynamics.damping).scores(QUERIES), 1e-8)


def test_early_stopping_damps_about_like_one_over_rate_times_horizon():
    problem = random_problem(n=20)
    dynamics = replace(PLAIN, horizon=25, damping=0.0)
    dynamics = replace(dynamics, rate=safe_rate(problem, dynamics))
    scores = problem.gradients(QUERIES) @ run(problem, dynamics)[-1].T

    def distance(damping):
        found = exact_influence(problem, damping).scores(QUERIES)
        return float((found / found.norm() - scores / scores.norm()).norm())

    equivalent = 1 / (dynamics.rate * 25)
    assert distance(equivalent) < 0.15
    assert distance(equivalent) < min(distance(equivalent / 30), distance(equivalent * 30))


# -- the closed form --------------------------------------------------------------------------------


def test_closed_form_serves_many_settings_from_one_decomposition():
    problem = random_problem(weight_decay=0.02)
    form = ClosedForm.of(problem)
    dynamics = replace(PLAIN, horizon=12, damping=0.1, rate=0.2, momentum=0.3)
    factors = form.filter(dynamics)
    assert factors.shape == (problem.n_parameters,)
    close(form.responses(dynamics), closed_form(problem, dynamics), 1e-12)
    close(form.scores(QUERIES, factors), problem.gradients(QUERIES) @ form.responses(dynamics).T)
    exact = form.scores(QUERIES, 1 / (form.values + 0.1))
    close(exact, exact_influence(problem, 0.1).scores(QUERIES), 1e-8)
    without = form.filter(replace(dynamics, momentum=0.0))
    h = form.values + 0.1
    close(without, (1 - (1 - 0.2 * h) ** 12) / h)


def test_closed_form_takes_the_rate_of_the_trajectory_where_none_is_given():
    problem = random_problem(weight_decay=0.02)
    found, expected = run(problem, PLAIN)[-1], closed_form(problem, PLAIN)
    assert float((found - expected).norm() / expected.norm()) < 1e-2  # lambda_max by power iteration


def test_closed_form_refuses_what_it_cannot_do():
    problem = random_problem()
    for dynamics in (Dynamics(), replace(PLAIN, batch_size=4)):
        with pytest.raises(ValueError, match="closed form is for full-batch steps with a fixed momentum"):
            closed_form(problem, dynamics)
    with pytest.raises(ValueError, match="closed form is of curvature 'ggn', not 'hessian'"):
        ClosedForm.of(problem).filter(replace(PLAIN, curvature="hessian"))


# -- adaptive momentum ------------------------------------------------------------------------------


def test_adaptive_momentum_is_conjugate_gradients():
    problem = random_problem(weight_decay=0.05)
    dynamics = Dynamics(horizon=30, damping=0.05)
    exact = solution(problem, dynamics)
    damped = problem.curvature() + 0.05 * torch.eye(problem.n_parameters, dtype=FLOAT64)
    errors = []
    for response in trajectory(problem, dynamics):
        difference = response - exact
        errors.append(((difference @ damped) * difference).sum())
    assert len(errors) == 30
    assert all(later <= earlier * (1 + 1e-9) + 1e-25 for earlier, later in pairwise(errors))
    assert float(errors[-1]) < 1e-15 * float(errors[0])
    push = push_of(problem)
    first = next(trajectory(problem, dynamics))
    steps = (push**2).sum(1) / ((push @ damped) * push).sum(1)
    close(first, steps[:, None] * push, 1e-10)


def test_adaptive_momentum_beats_every_fixed_momentum_in_as_many_steps():
    problem = random_problem(weight_decay=0.05)
    exact = solution(problem, Dynamics(damping=0.01))
    values = torch.linalg.eigvalsh(problem.curvature()) + 0.01
    rate, best = heavy_ball(float(values[0]), float(values[-1]))

    def error(**settings):
        return float((run(problem, Dynamics(horizon=15, damping=0.01, **settings))[-1] - exact).norm())

    assert error(momentum="adaptive") < error(rate=rate, momentum=best) < error(momentum=0.0)


@pytest.mark.parametrize("changes", [{"rate": 0.1}, {"batch_size": 4}, {"tail": 0.5}])
def test_adaptive_momentum_takes_no_other_settings(changes):
    with pytest.raises(ValueError, match="adaptive momentum is full batch: leave rate, batch_size and tail"):
        Dynamics(**changes)


# -- mini-batches and tail averaging ----------------------------------------------------------------


@pytest.mark.parametrize(("tail", "first"), [(1.0, 0), (0.5, 4), (0.25, 6), (0.01, 7)])
def test_the_tail_average_is_the_mean_of_the_last_iterates(tail, first):
    problem = random_problem()
    dynamics = replace(PLAIN, horizon=8, rate=0.2, momentum=0.3)
    iterates = torch.stack(run(problem, dynamics))
    averaged = run(problem, replace(dynamics, tail=tail))
    assert len(averaged) == 8
    for step in range(8):
        expected = iterates[step] if step < first else iterates[first : step + 1].mean(0)
        close(averaged[step], expected, 1e-12)


def test_mini_batches_take_the_curvature_of_their_rows_in_shuffled_epochs():
    problem = random_problem(n=12, weight_decay=0.03)
    dynamics = replace(PLAIN, horizon=6, rate=0.2, damping=0.1, batch_size=5, seed=3)
    source, rows = generator(3), []
    while len(rows) < 5:
        rows += torch.randperm(12, generator=source)[:10].split(5)
    push = push_of(problem)
    response = 0.2 * push
    found = run(problem, dynamics)
    close(found[0], response)
    for step in range(1, 6):
        curved = problem.curvature_product(response, rows=rows[step - 1]) + 0.1 * response
        response = response - 0.2 * (curved - push)
        close(found[step], response)


def test_mini_batches_are_reproducible_by_seed():
    problem = random_problem()
    dynamics = replace(PLAIN, horizon=8, rate=0.2, batch_size=5)
    assert torch.equal(run(problem, dynamics)[-1], run(problem, dynamics)[-1])
    assert not torch.equal(run(problem, dynamics)[-1], run(problem, replace(dynamics, seed=1))[-1])
    full = run(problem, replace(dynamics, batch_size=None))[-1]
    assert torch.equal(run(problem, replace(dynamics, batch_size=12))[-1], full)
    assert torch.equal(run(problem, replace(dynamics, batch_size=99))[-1], full)
    assert not torch.equal(run(problem, dynamics)[-1], full)


def test_tail_averaging_is_what_makes_mini_batches_work():
    problem = random_problem(n=40, weight_decay=0.05)
    dynamics = replace(PLAIN, horizon=120, damping=0.05, batch_size=4)
    dynamics = replace(dynamics, rate=safe_rate(problem, dynamics))
    exact = solution(problem, dynamics)

    def error(responses):
        return float((responses - exact).norm() / exact.norm())

    plain, averaged = (
        [run(problem, replace(dynamics, tail=tail, seed=seed))[-1] for seed in range(3)] for tail in (0.0, 0.5)
    )
    for last, mean in zip(plain, averaged, strict=True):
        assert error(mean) < 0.4 * error(last)
    # and over shuffles the noise averages out further: there is little bias
    assert error(sum(averaged) / 3) < min(0.03, *map(error, averaged))


# -- the rate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_rate_past_the_limit_is_refused_naming_the_limit(momentum):
    problem = random_problem(weight_decay=0.1)
    largest = problem.largest_curvature() + 0.01
    limit = 2 * (1 + momentum) / largest
    refused = replace(PLAIN, momentum=momentum, rate=1.01 * limit)
    message = rf"rate {1.01 * limit:g} is past the stability limit 2 \(1 \+ momentum\) / lambda_max = {limit:.4g}"
    for call in (stable_rate, lambda *a: next(trajectory(*a))):
        with pytest.raises(ValueError, match=message):
            call(problem, refused)
    assert stable_rate(problem, replace(refused, rate=0.99 * limit)) == 0.99 * limit


def test_the_limit_is_where_the_recursion_turns_unstable():
    """One eigendirection of the largest curvature, by the recursion itself."""
    for momentum in (0.0, 0.5, 0.9):
        for share, grows in ((0.99, False), (1.01, True)):
            rate = share * 2 * (1 + momentum)
            response = velocity = 0.0
            for _ in range(3000):
                velocity = momentum * velocity - rate * (response - 1)
                response += velocity
            assert (abs(response - 1) > 10) == grows


def test_no_rate_means_one_over_lambda_max():
    problem = random_problem()
    assert stable_rate(problem, PLAIN) == 1 / (problem.largest_curvature() + 0.01)
    hessian = replace(PLAIN, curvature="hessian")
    assert stable_rate(problem, hessian) == 1 / (problem.largest_curvature("hessian") + 0.01)


def test_a_curvature_of_zero_without_damping_is_refused():
    problem = random_problem((4, 3))
    saturated = problem.at(problem.theta * 1e6)
    with pytest.raises(ValueError, match=r"curvature and damping 0.0 are both zero"):
        stable_rate(saturated, replace(PLAIN, damping=0.0))
    assert stable_rate(saturated, replace(PLAIN, damping=0.5)) == 2.0


@settings(deadline=None)
@given(st.floats(0.01, 10), st.floats(1.0, 1000))
def test_heavy_ball_contracts_at_polyaks_rate_at_both_ends(smallest, condition):
    """Both extreme directions contract by sqrt(momentum), and neighbouring settings do worse."""
    largest = smallest * condition
    rate, momentum = heavy_ball(smallest, largest)

    def contraction(rate, momentum):
        """Largest spectral radius of one step over the two ends."""
        radii = []
        for h in (smallest, largest):
            trace = 1 + momentum - rate * h
            root = complex(trace**2 - 4 * momentum) ** 0.5
            radii.append(max(abs(trace + root), abs(trace - root)) / 2)
        return max(radii)

    best = contraction(rate, momentum)
    root = math.sqrt(condition)
    assert best == pytest.approx((root - 1) / (root + 1), abs=1e-3)
    assert contraction(rate * 1.05, momentum) > best - 1e-6
    assert contraction(rate * 0.9, momentum) > best - 1e-6
    assert contraction(rate, min(momentum * 1.1, 0.999)) >= best - 1e-6


@pytest.mark.parametrize(("smallest", "largest"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
def test_heavy_ball_refuses_impossible_curvatures(smallest, largest):
    with pytest.raises(ValueError, match=f"need 0 < smallest <= largest curvature, got {smallest} and {largest}"):
        heavy_ball(smallest, largest)


# -- divergence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("horizon", [4, 8, 43, 200])
def test_mini_batches_that_diverge_are_noticed_at_the_latest_at_the_end(horizon, monkeypatch):
    problem = random_problem((4, 1), n=20)
    scaled = replace(problem, train=problem.train[torch.arange(20)])
    scaled.train.inputs[0] *= 300.0  # one example's curvature is far above the mean
    dynamics = replace(PLAIN, horizon=horizon, damping=0.0, batch_size=1)
    dynamics = replace(dynamics, rate=1.9 / scaled.largest_curvature())
    if horizon < 10:  # too few to meet that example often by chance
        monkeypatch.setattr(module, "_batches", lambda n, dynamics: repeat(torch.tensor([0])))
    message = rf"diverged at step \d+ with rate {dynamics.rate:.4g} and momentum 0.0: mini-batches have larger"
    with pytest.raises(FloatingPointError, match=message):
        run(scaled, dynamics)
    monkeypatch.undo()
    run(scaled, replace(dynamics, batch_size=None))


def test_a_hessian_with_negative_eigenvalues_diverges_with_other_advice():
    problem = random_problem(n=6)
    dynamics = replace(PLAIN, horizon=2000, damping=0.0, curvature="hessian")
    with pytest.raises(FloatingPointError, match="negative eigenvalues, so raise the damping or use the GGN"):
        run(problem, dynamics)
    with pytest.raises(ValueError, match=r"negative curvature .* met"):
        run(problem, replace(dynamics, momentum="adaptive"))


# -- bad settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "horizon must be >= 1 step, got 0"),
        ({"horizon": -4}, "horizon must be >= 1 step, got -4"),
        ({"damping": -0.1}, "damping must be finite and >= 0, got -0.1"),
        ({"damping": math.nan}, "damping must be finite and >= 0, got nan"),
        ({"damping": math.inf}, "got inf"),
        ({"rate": 0.0}, "rate must be finite and > 0, or None for 1/lambda_max, got 0.0"),
        ({"rate": -1.0}, "got -1.0"),
        ({"rate": math.nan}, "rate must be finite and > 0.*got nan"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\) or 'adaptive', got 1.0"),
        ({"momentum": -0.5}, "got -0.5"),
        ({"momentum": math.nan}, "got nan"),
        ({"momentum": "nesterov"}, "got 'nesterov'"),
        ({"batch_size": 0}, "batch_size must be >= 1, or None for full batch, got 0"),
        ({"tail": -0.1}, r"tail must be in \[0, 1\], got -0.1"),
        ({"tail": 1.1}, "got 1.1"),
        ({"tail": math.nan}, "got nan"),
        ({"curvature": "kfac"}, r"unknown curvature 'kfac', expected one of \('ggn', 'hessian', 'fisher'\)"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Dynamics(**{"momentum": 0.0} | changes)
