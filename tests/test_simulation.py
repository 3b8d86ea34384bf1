"""Forward-only attribution: readouts, their convergence rates, the literal form, and saved responses."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from toys import FLOAT64, continuous, converged, generator, labelled, optimum, random_problem

from tda_core.dynamics import Dynamics, closed_form
from tda_core.examples import Examples
from tda_core.gradients import exact_influence, gradient_dot, last_layer
from tda_core.models import LOSSES, mlp
from tda_core.problem import Problem
from tda_core.recipes import Recipe
from tda_core.simulation import ForwardOnly, simulate, simulate_literal
from tda_core.store import save_tensors
from tda_core.training import train_many

QUERIES = {3: labelled(6, seed=5), 1: continuous(6, seed=5)}
PLAIN = Dynamics(horizon=8, momentum=0.0, rate=0.2)
KINDS = pytest.mark.parametrize("layers", [(4, 5, 3), (4, 5, 1)])


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -- simulation and readouts ------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("dynamics", [PLAIN, Dynamics(), replace(PLAIN, batch_size=4, tail=0.5)])
def test_the_jvp_readout_is_the_product_with_gradients(layers, dynamics):
    problem, queries = random_problem(layers), QUERIES[layers[-1]]
    method = simulate(problem, dynamics)
    assert method.responses.shape == (12, problem.n_parameters)
    assert method.scores(queries).shape == (6, 12)
    close(method.scores(queries), problem.gradients(queries) @ method.responses.T)
    assert method.dynamics == dynamics


def test_simulation_gives_the_last_response_of_the_trajectory():
    problem = random_problem()
    close(simulate(problem, PLAIN).responses, closed_form(problem, PLAIN), 1e-10)
    assert not torch.allclose(closed_form(problem, PLAIN), closed_form(problem, replace(PLAIN, horizon=7)), atol=1e-6)


def test_one_step_ranks_like_the_gradient_dot_product():
    problem = random_problem()
    found, expected = (
        simulate(problem, replace(PLAIN, horizon=1)).scores(QUERIES[3]),
        gradient_dot(problem).scores(QUERIES[3]),
    )
    close(found, 0.2 * expected, 1e-12)
    for row, other in zip(found, expected, strict=True):
        assert spearmanr(row, other).statistic == pytest.approx(1)


@KINDS
def test_a_long_adaptive_simulation_is_exact_influence(layers):
    problem, queries = random_problem(layers, weight_decay=0.02), QUERIES[layers[-1]]
    found = simulate(problem, Dynamics(horizon=80, damping=0.05)).scores(queries)
    close(found, exact_influence(problem, 0.05).scores(queries), 1e-7)


@KINDS
def test_two_simulations_are_equal_bit_for_bit(layers):
    problem, queries = random_problem(layers), QUERIES[layers[-1]]
    for dynamics in (PLAIN, Dynamics(), replace(PLAIN, batch_size=4, tail=0.5, seed=2)):
        first, second = (simulate(problem, dynamics).scores(queries) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize(("readout", "order"), [("two_trajectory", 2), ("one_trajectory", 1)])
@KINDS
def test_trajectory_readouts_tend_to_the_jvp_at_their_order(readout, order, layers):
    problem, queries = random_problem(layers), QUERIES[layers[-1]]
    method = simulate(problem, Dynamics(horizon=10, damping=0.3))
    limit = method.scores(queries)
    errors = [float((method.scores(queries, readout, amplitude=a) - limit).norm()) for a in (0.2, 0.1, 0.05)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)
    assert errors[-1] < 0.1 * float(limit.norm())


@KINDS
def test_trajectory_readouts_are_loss_differences(layers):
    problem, queries = random_problem(layers), QUERIES[layers[-1]]
    method = simulate(problem, PLAIN)
    for amplitude in (1.0, 0.3):
        ahead, behind = (
            torch.stack([problem.losses(queries, problem.theta + sign * amplitude * r) for r in method.responses], 1)
            for sign in (1, -1)
        )
        two = method.scores(queries, "two_trajectory", amplitude=amplitude)
        one = method.scores(queries, "one_trajectory", amplitude=amplitude)
        close(two, (ahead - behind) / (2 * amplitude), 1e-10)
        close(one, (ahead - problem.losses(queries)[:, None]) / amplitude, 1e-10)
    close(method.scores(queries, "one_trajectory"), method.scores(queries, "one_trajectory", amplitude=1.0))


def test_no_readout_runs_a_backward_pass(monkeypatch):
    problem = random_problem()
    method, head_method = simulate(problem, PLAIN), simulate(problem, PLAIN, last_layer=True)

    def refuse(*arguments, **keywords):
        raise AssertionError("a backward pass")

    for name in ("tda_core.problem.grad", "tda_core.curvature.vjp", "tda_core.layers.flows", "torch.autograd.grad"):
        monkeypatch.setattr(name, refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    for readout in ("jvp", "two_trajectory", "one_trajectory"):
        assert torch.isfinite(method.scores(QUERIES[3], readout)).all()
        assert torch.isfinite(head_method.scores(QUERIES[3], readout)).all()


@KINDS
@pytest.mark.parametrize("readout", ["jvp", "two_trajectory", "one_trajectory"])
def test_last_layer_simulation_is_that_of_the_head(layers, readout):
    problem, queries = random_problem(layers, weight_decay=0.02), QUERIES[layers[-1]]
    head, featured = problem.head(), problem.featurise(queries)
    method, of_head = simulate(problem, PLAIN, last_layer=True), simulate(head, PLAIN)
    assert method.responses.shape == (12, 6 * layers[-1])
    close(method.responses, of_head.responses, 1e-12)
    close(method.scores(queries, readout), of_head.scores(featured, readout), 1e-12)
    close(method.self_influence(), of_head.self_influence(), 1e-12)
    long = simulate(problem, Dynamics(horizon=60, damping=0.1), last_layer=True)
    close(long.scores(queries), last_layer(problem, 0.1).scores(queries), 1e-7)


@KINDS
@pytest.mark.parametrize("of_head", [False, True])
def test_self_influence_is_the_diagonal(layers, of_head):
    method = simulate(random_problem(layers), PLAIN, last_layer=of_head)
    close(method.self_influence(), method.scores(method.problem.train).diagonal())
    assert bool((method.self_influence() > 0).all())


@settings(deadline=None, max_examples=5)
@given(st.permutations(range(6)))
def test_scores_follow_a_permutation_of_the_queries(order):
    method, order = simulate(random_problem(), PLAIN), torch.tensor(order)
    for readout in ("jvp", "two_trajectory", "one_trajectory"):
        close(method.scores(QUERIES[3][order], readout), method.scores(QUERIES[3], readout)[order], 1e-12)


@pytest.mark.parametrize("readout", ["jvp", "two_trajectory", "one_trajectory"])
def test_removing_the_top_proponents_raises_the_loss_and_the_top_opponents_lowers_it(readout):
    problem, queries = converged(40), labelled(6, seed=8)
    scores = simulate(problem, Dynamics(horizon=10)).scores(queries, readout)
    for q in range(len(queries)):
        order, losses = scores[q].argsort(descending=True), {}
        for which, removed in (("top", order[:5]), ("bottom", order[-5:])):
            weights = torch.ones(40, dtype=FLOAT64)
            weights[removed] = 0
            losses[which] = float(problem.losses(queries, optimum(problem, weights))[q])
        assert losses["bottom"] < float(problem.losses(queries)[q]) < losses["top"]


# -- the literal form -------------------------------------------------------------------------------


def quadratic(n: int = 9, momentum: float = 0.0, decay: float = 0.0) -> tuple[Recipe, Problem]:
    """A linear model with squared error: at its optimum training is the tangent dynamics, exactly."""
    data = continuous(n)
    problem = Problem(
        mlp((4, 1)).to(FLOAT64), torch.zeros(5, dtype=FLOAT64), LOSSES["squared_error"], data, decay
    )  # fmt: skip
    recipe = Recipe(
        (4, 1),
        loss="squared_error",
        learning_rate=0.2,
        momentum=momentum,
        weight_decay=decay,
        epochs=6,
        batch_size=n,
        precision="float64",
    )
    return recipe, problem.at(optimum(problem, torch.ones(n, dtype=FLOAT64)))


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("one_sided", [False, True])
def test_literal_runs_on_a_quadratic_are_the_closed_form(momentum, decay, one_sided):
    recipe, problem = quadratic(momentum=momentum, decay=decay)
    dynamics = Dynamics(horizon=6, damping=0.0, rate=0.2, momentum=momentum)
    expected = closed_form(problem, dynamics)
    errors = []
    for amplitude in (1e-2, 1e-3):
        found = simulate_literal(recipe, problem, amplitude=amplitude, one_sided=one_sided)
        errors.append(float((found.responses - expected).norm() / expected.norm()))
    order = 1 if one_sided else 2  # the example's own curvature moves with its weight
    assert errors[0] / errors[1] == pytest.approx(10**order, rel=0.1)
    assert errors[1] < (1e-2 if one_sided else 1e-5)


@pytest.mark.parametrize("share_noise", [True, False])
@pytest.mark.parametrize("one_sided", [True, False])
def test_literal_runs_are_training_runs_with_other_weights(share_noise, one_sided, monkeypatch):
    monkeypatch.setattr(Recipe, "models_per_block", 4)
    problem = random_problem(n=6)
    recipe = Recipe((4, 5, 3), activation="tanh", epochs=2, batch_size=4, precision="float64")
    found = simulate_literal(recipe, problem, amplitude=0.5, share_noise=share_noise, one_sided=one_sided, seed=7)
    for b in range(6):
        down, up = torch.ones(1, 6, dtype=FLOAT64), torch.ones(1, 6, dtype=FLOAT64)
        down[0, b], up[0, b] = 0.5, 1.0 if one_sided else 1.5
        seeds = (7, 7) if share_noise else (7 + b, 13 + b)
        ends = [
            train_many(recipe, problem.train, weights, [seed], problem.theta)[0]
            for weights, seed in zip((up, down), seeds, strict=True)
        ]
        close(found.responses[b], (ends[1] - ends[0]) / (0.5 if one_sided else 1.0), 1e-10)
    assert found.problem is problem


def test_noise_that_is_not_shared_swamps_the_literal_response():
    recipe, problem = quadratic(n=20)
    recipe = replace(recipe, batch_size=4, learning_rate=0.05)
    expected = closed_form(problem, Dynamics(horizon=30, damping=0.0, rate=0.05, momentum=0.0))

    def error(**variants):
        responses = simulate_literal(recipe, problem, amplitude=0.05, **variants).responses
        return float((responses - expected).norm() / expected.norm())

    assert error(share_noise=True) < 0.5
    assert error(share_noise=False) > 2.0
    assert error() == error(share_noise=True)


def test_literal_scores_have_the_sign_of_influence():
    recipe, problem = quadratic(n=20)
    queries = QUERIES[1]
    literal = simulate_literal(replace(recipe, epochs=200), problem, amplitude=0.1).scores(queries)
    exact = exact_influence(problem, 0.0).scores(queries)
    assert float((literal - exact).norm() / exact.norm()) < 0.01


def test_small_amplitudes_keep_their_digits_in_float64():
    recipe, problem = quadratic()
    expected = closed_form(problem, Dynamics(horizon=6, damping=0.0, rate=0.2, momentum=0.0))
    found = simulate_literal(recipe, problem, amplitude=1e-5).responses
    assert float((found - expected).norm() / expected.norm()) < 1e-8


# -- saving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_head", [False, True])
def test_saved_responses_come_back_equal_bit_for_bit(of_head, tmp_path):
    problem = random_problem()
    method = simulate(problem, replace(PLAIN, tail=0.5, batch_size=4), last_layer=of_head)
    method.save(str(tmp_path / "responses"))
    again = ForwardOnly.load(tmp_path / "responses", problem)
    assert (again.dynamics, again.last_layer) == (method.dynamics, of_head)
    for readout in ("jvp", "two_trajectory"):
        assert torch.equal(again.scores(QUERIES[3], readout), method.scores(QUERIES[3], readout))
    adaptive = simulate(problem, Dynamics(horizon=2))
    adaptive.save(tmp_path / "adaptive")
    assert ForwardOnly.load(tmp_path / "adaptive", problem).dynamics == adaptive.dynamics


def test_saved_responses_are_refused_for_another_model_or_other_data(tmp_path):
    problem = random_problem()
    path = tmp_path / "responses"
    simulate(problem, PLAIN).save(path)
    moved = problem.at(problem.theta + 1)
    hashes = f"theta {problem.identity['theta']}.* theta {moved.identity['theta']}"
    with pytest.raises(ValueError, match=f"responses was made for {hashes}"):
        ForwardOnly.load(path, moved)
    other = replace(problem, train=labelled(12, seed=9))
    with pytest.raises(ValueError, match=f"data {problem.identity['data']}.* data {other.identity['data']}"):
        ForwardOnly.load(path, other)
    save_tensors(tmp_path / "foreign", {"x": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="foreign was made for theta None"):
        ForwardOnly.load(tmp_path / "foreign", problem)


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_head", [False, True])
@pytest.mark.parametrize("readout", ["jvp", "two_trajectory", "one_trajectory"])
@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        (labelled(3).inputs, TypeError, "got Tensor"),
        (labelled(3, d=5), ValueError, r"inputs must have shape \(n, 4\), got \(n, 5\)"),
        (Examples(torch.zeros(1, 4), torch.tensor([5])), ValueError, "label 5 is out of range for 3 outputs"),
        (continuous(3), ValueError, "targets must be torch.int64 as in training"),
    ],
)
def test_queries_that_do_not_fit_are_refused(of_head, readout, queries, error, message):
    method = simulate(random_problem(), PLAIN, last_layer=of_head)
    with pytest.raises(error, match=message):
        method.scores(queries, readout)


@pytest.mark.parametrize("amplitude", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_amplitudes_are_refused(amplitude):
    recipe, problem = quadratic()
    with pytest.raises(ValueError, match=f"amplitude must be finite and > 0, got {amplitude}"):
        simulate(problem, PLAIN).scores(QUERIES[1], "two_trajectory", amplitude=amplitude)
    with pytest.raises(ValueError, match=f"amplitude must be finite and > 0, got {amplitude}"):
        simulate_literal(recipe, problem, amplitude=amplitude)


def test_other_impossible_calls_are_refused():
    recipe, problem = quadratic()
    method = simulate(problem, PLAIN)
    with pytest.raises(ValueError, match=r"unknown readout 'backward', expected one of \('jvp', 'two_trajectory'"):
        method.scores(QUERIES[1], "backward")
    with pytest.raises(TypeError, match=r"unknown variant .*'shared'.*expected share_noise, one_sided, seed"):
        simulate_literal(recipe, problem, shared=True)
    with pytest.raises(ValueError, match="past the stability limit"):
        simulate(problem, Dynamics(momentum=0.0, rate=1e3))
    with pytest.raises(ValueError, match=r"initial must be \(31,\) or \(9, 31\), got \(5,\)"):
        simulate_literal(replace(recipe, layers=(4, 5, 1)), problem)


def test_a_literal_run_that_diverges_names_the_learning_rate():
    recipe, problem = quadratic()
    diverging = replace(recipe, learning_rate=1e6, epochs=80)
    with pytest.raises(FloatingPointError, match=r"lower learning_rate=1000000.0"):
        simulate_literal(diverging, problem)


def test_responses_do_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = simulate(random_problem(), replace(PLAIN, batch_size=4)).responses
    torch.manual_seed(2)
    assert torch.equal(first, simulate(random_problem(), replace(PLAIN, batch_size=4)).responses)
    assert torch.equal(torch.randn(3, generator=generator(0)), torch.randn(3, generator=generator(0)))
