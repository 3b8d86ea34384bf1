"""The gradient references against explicit formulas in numpy, and against real removal of examples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import (
    FLOAT64,
    continuous,
    converged,
    convex_recipe,
    correlation,
    generator,
    labelled,
    optimum,
    random_problem,
)

from tda_core import gradients as gradients_module
from tda_core.attribution import Attribution, QuerySide, projection_matrix, solve_curvature
from tda_core.examples import Examples
from tda_core.gradients import (
    exact_influence,
    feature_similarity,
    gradient_dot,
    input_similarity,
    last_layer,
    random_scores,
    tracin,
    trak,
)
from tda_core.ground_truth import leave_one_out_warm
from tda_core.problem import Problem

QUERIES = {3: labelled(6, seed=5), 1: continuous(6, seed=5)}
KINDS = pytest.mark.parametrize("layers", [(4, 5, 3), (4, 5, 1)])


def close(found, expected, tolerance=1e-9):
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def influence(problem: Problem, queries: Examples, damping: float, kind: str = "ggn") -> np.ndarray:
    """g_q' (H + damping I)^-1 g_b / n by numpy."""
    curvature = problem.curvature(kind).numpy() + damping * np.eye(problem.n_parameters)
    g_q, g_b = problem.gradients(queries).numpy(), problem.gradients(problem.train).numpy()
    return g_q @ np.linalg.solve(curvature, g_b.T) / len(problem.train)


# -- influence --------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(("kind", "damping"), [("ggn", 0.01), ("ggn", 1.0), ("hessian", 2.0)])
def test_influence_is_the_explicit_solution(layers, kind, damping):
    problem, queries = random_problem(layers, weight_decay=0.05), QUERIES[layers[-1]]
    found = exact_influence(problem, damping, curvature=kind).scores(queries)
    assert found.shape == (6, 12)
    close(found, influence(problem, queries, damping, kind))


def test_influence_averages_over_problems():
    first = random_problem(weight_decay=0.1)
    second = first.at(first.theta.flip(0))
    found = exact_influence([first, second], 0.1).scores(QUERIES[3])
    close(found, (influence(first, QUERIES[3], 0.1) + influence(second, QUERIES[3], 0.1)) / 2)


@KINDS
def test_last_layer_influence_is_that_of_the_head(layers):
    problem, queries = random_problem(layers, weight_decay=0.05), QUERIES[layers[-1]]
    expected = influence(problem.head(), problem.featurise(queries), 0.02)
    close(last_layer(problem, 0.02).scores(queries), expected)
    assert not np.allclose(expected, influence(problem, queries, 0.02), atol=1e-3)
    assert last_layer(problem).train_sides[0].shape == (12, 6 * layers[-1])


@pytest.mark.parametrize("layers", [(4, 3), (4, 1)])
def test_a_linear_model_is_all_last_layer(layers):
    problem, queries = random_problem(layers), QUERIES[layers[-1]]
    assert torch.equal(last_layer(problem, 0.1).scores(queries), exact_influence(problem, 0.1).scores(queries))


@pytest.mark.parametrize(("kind", "damping"), [("ggn", 0.05), ("hessian", 2.0)])
@pytest.mark.parametrize("of_head", [False, True])
def test_conjugate_gradients_take_over_for_many_parameters(monkeypatch, kind, damping, of_head):
    problem, queries = random_problem(weight_decay=0.05), QUERIES[3]
    dense = exact_influence(problem, damping, curvature=kind, last_layer=of_head)
    monkeypatch.setattr(gradients_module, "DENSE_LIMIT", 3)
    iterative = exact_influence(problem, damping, curvature=kind, last_layer=of_head)
    assert (dense.query_side.damping, iterative.query_side.damping) == (None, damping)
    assert iterative.query_side.curvature == kind
    torch.testing.assert_close(iterative.scores(queries), dense.scores(queries), rtol=1e-2, atol=1e-4)
    assert correlation(iterative.scores(queries), dense.scores(queries)) > 0.99999
    torch.testing.assert_close(iterative.self_influence(), dense.self_influence(), rtol=1e-2, atol=1e-4)


def test_solve_curvature_reaches_the_tolerance_it_is_asked_for():
    problem = random_problem(weight_decay=0.05)
    goals = torch.randn(3, problem.n_parameters, generator=generator(0), dtype=FLOAT64)
    for tolerance in (1e-1, 1e-3, 1e-9):
        found = solve_curvature(problem, goals, 0.01, "ggn", tolerance)
        residual = problem.curvature_product(found) + 0.01 * found - goals
        relative = residual.norm(dim=1) / goals.norm(dim=1)
        assert float(relative.max()) <= tolerance * 1.01
        assert float(relative.max()) > tolerance * 1e-3  # and takes no more steps than that
    with pytest.raises(RuntimeError, match=r"relative residual .* after 1000 steps, not -1"):
        solve_curvature(problem, goals, 0.01, "ggn", tolerance=-1)


def test_influence_predicts_what_refitting_without_an_example_does():
    """A strictly convex problem at its optimum: the one place where the true effect is known to rounding."""
    problem = converged(120)
    mean = problem.gradients(problem.train).mean(0)
    assert float((mean + problem.weight_decay * problem.theta).norm()) < 1e-9
    queries = labelled(10, seed=8)
    before, n = problem.losses(queries), len(problem.train)
    truth = torch.stack([
        problem.losses(queries, optimum(problem, torch.ones(n, dtype=FLOAT64).index_fill(0, torch.tensor(b), 0.0)))
        - before
        for b in range(n)
    ]).T  # fmt: skip
    found = exact_influence(problem, 0.0).scores(queries)
    assert correlation(found, truth) > 0.99
    assert float((found - truth).norm() / truth.norm()) < 0.15  # in the same units: a fall of the loss in nats
    small = 1e-4  # and exactly the derivative in the example's weight
    weights = torch.ones(n, dtype=FLOAT64)
    refitted = problem.losses(queries, optimum(problem, weights))
    weights[3] -= small
    change = (problem.losses(queries, optimum(problem, weights)) - refitted) / small
    torch.testing.assert_close(found[:, 3], change, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_warm_leave_one_out_is_the_refit(loss):
    problem = converged(20, loss=loss)
    queries = QUERIES[3 if loss == "cross_entropy" else 1]
    indices = torch.tensor([4, 0, 17])
    warm = leave_one_out_warm(convex_recipe(loss), problem, indices, queries, n_jobs=1, progress=False)
    for row, b in zip(warm.effects, indices, strict=True):
        weights = torch.ones(20, dtype=FLOAT64)
        weights[b] = 0
        theta = optimum(problem, weights)
        if loss == "cross_entropy":
            expected = problem.margins(queries) - problem.margins(queries, theta)
        else:
            expected = problem.losses(queries, theta) - problem.losses(queries)
        torch.testing.assert_close(row[0], expected, rtol=1e-5, atol=1e-8)


# -- gradient products ------------------------------------------------------------------------------


@KINDS
def test_gradient_dot_and_tracin_are_explicit_sums(layers):
    problem, queries = random_problem(layers), QUERIES[layers[-1]]
    points = [problem, problem.at(-problem.theta), problem.at(problem.theta.flip(0))]
    products = [p.gradients(queries) @ p.gradients(p.train).T / 12 for p in points]
    close(gradient_dot(problem).scores(queries), products[0])
    close(gradient_dot(points).scores(queries), sum(products) / 3)
    rates = [0.1, 0.5, 0.02]
    close(tracin(points, rates).scores(queries), sum(r * p for r, p in zip(rates, products, strict=True)) / 3)
    close(tracin([problem], [1.0]).scores(queries), products[0])


# -- TRAK -------------------------------------------------------------------------------------------


def trak_parts(problem, queries):
    """phi of queries and of training examples, and the training examples' pull, one example at a time."""
    target = "margin" if problem.train.is_classification else "output"
    phi_q, phi_b = problem.gradients(queries, target).numpy(), problem.gradients(problem.train, target).numpy()
    outputs = problem.outputs(problem.train.inputs).detach().numpy()
    if problem.train.is_classification:
        exponentials = np.exp(outputs)
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        pull = 1 - probabilities[np.arange(12), problem.train.targets.numpy()]
        return phi_q, phi_b, pull
    error = problem.outputs(queries.inputs).detach().numpy()[:, 0] - queries.targets.numpy()
    return phi_q * error[:, None], phi_b, outputs[:, 0] - problem.train.targets.numpy()


@KINDS
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_unprojected_trak_in_the_dual_equals_the_primal_formula(layers, damping):
    problem, queries = random_problem(layers), QUERIES[layers[-1]]
    phi_q, phi_b, pull = trak_parts(problem, queries)
    kernel = phi_b.T @ phi_b / 12 + damping * np.eye(problem.n_parameters)
    expected = phi_q @ np.linalg.solve(kernel, phi_b.T) * pull / 12
    close(trak(problem, damping, dimension=None).scores(queries), expected)


@KINDS
@pytest.mark.parametrize(("damping", "dimension"), [(0.0, 4), (0.3, 4), (0.3, 40)])
def test_projected_trak_is_the_explicit_formula(layers, damping, dimension):
    problem, queries = random_problem(layers), QUERIES[layers[-1]]
    phi_q, phi_b, pull = trak_parts(problem, queries)
    projection = projection_matrix(problem.n_parameters, dimension, 3, dtype=FLOAT64).numpy()
    phi_q, phi_b = phi_q @ projection, phi_b @ projection
    kernel = phi_b.T @ phi_b / 12 + damping * np.eye(dimension)
    expected = phi_q @ np.linalg.solve(kernel, phi_b.T) * pull / 12
    close(trak(problem, damping, dimension=dimension, seed=3).scores(queries), expected)
    assert not np.allclose(trak(problem, damping, dimension=dimension, seed=4).scores(queries), expected)


def test_every_model_has_a_projection_of_its_own():
    problem = random_problem()
    other = problem.at(problem.theta.flip(0))
    alone = [trak(p, 0.5, dimension=4, seed=s).scores(QUERIES[3]) for p, s in ((problem, 7), (other, 8))]
    together = trak([problem, other], 0.5, dimension=4, seed=7)
    close(together.scores(QUERIES[3]), (alone[0] + alone[1]) / 2)
    close(together.self_influence(), together.scores(problem.train).diagonal())


def test_trak_averages_over_problems_and_a_wide_projection_tends_to_none():
    problem = random_problem()
    other = problem.at(problem.theta.flip(0))
    alone = [trak(p, 0.5, dimension=None).scores(QUERIES[3]) for p in (problem, other)]
    close(trak([problem, other], 0.5, dimension=None).scores(QUERIES[3]), (alone[0] + alone[1]) / 2)
    wide = trak(problem, 0.5, dimension=1500, seed=1).scores(QUERIES[3])
    assert correlation(wide, alone[0]) > 0.98


def test_trak_agrees_in_sign_and_for_regression_in_value_with_influence():
    """For squared error phi phi' is the GGN and the pull is the loss' slope, so TRAK is influence."""
    problem = random_problem((4, 5, 1))
    close(trak(problem, 0.3, dimension=None).scores(QUERIES[1]), influence(problem, QUERIES[1], 0.3))
    binary = Examples(QUERIES[3].inputs, QUERIES[3].targets.clamp(max=1))
    two = random_problem((4, 5, 2))
    margins, losses = trak(two, 0.3, dimension=None).scores(binary), exact_influence(two, 0.3).scores(binary)
    assert correlation(margins, losses) > 0.5


def test_projection_keeps_inner_products_on_average():
    matrix = projection_matrix(300, 200, 0, dtype=FLOAT64)
    assert matrix.shape == (300, 200)
    assert matrix.dtype == FLOAT64
    close(matrix.float(), projection_matrix(300, 200, 0), 1e-6)
    assert not torch.allclose(matrix, projection_matrix(300, 200, 1, dtype=FLOAT64), atol=0.01)
    assert float(matrix.mean()) == pytest.approx(0, abs=1e-3)
    assert float(matrix.std()) == pytest.approx(200**-0.5, rel=0.02)
    v = torch.randn(300, dtype=FLOAT64, generator=generator(1))
    assert float((v @ matrix) @ (v @ matrix)) == pytest.approx(float(v @ v), rel=0.3)


# -- controls ---------------------------------------------------------------------------------------


def test_similarities_are_cosines():
    problem, queries = random_problem((4, 5, 3)), QUERIES[3]
    for method, of_queries, of_train in (
        (input_similarity(problem), queries.inputs, problem.train.inputs),
        (feature_similarity(problem), problem.features(queries.inputs), problem.features(problem.train.inputs)),
    ):
        q, b = of_queries.numpy(), of_train.numpy()
        expected = (q @ b.T) / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(b, axis=1)
        close(method.scores(queries), expected)
        own = method.scores(problem.train)
        close(own.diagonal(), torch.ones(12, dtype=FLOAT64))
        assert float(own.abs().max()) <= 1 + 1e-12
    assert not torch.allclose(input_similarity(problem).scores(queries), feature_similarity(problem).scores(queries))


def test_images_are_compared_as_vectors():
    problem = random_problem((4, 5, 3))
    module = torch.nn.Sequential(torch.nn.Flatten(), problem.module)
    images = replace(problem, module=module, train=Examples(problem.train.inputs.view(-1, 2, 2), problem.train.targets))
    queries = Examples(QUERIES[3].inputs.view(-1, 2, 2), QUERIES[3].targets)
    close(input_similarity(images).scores(queries), input_similarity(problem).scores(QUERIES[3]))


def test_random_scores_are_standard_normal_and_reproducible():
    scores = random_scores(200, 100, seed=0)
    assert scores.shape == (200, 100)
    assert float(scores.mean()) == pytest.approx(0, abs=0.02)
    assert float(scores.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(scores, random_scores(200, 100, seed=0))
    assert not torch.equal(scores, random_scores(200, 100, seed=1))


# -- properties of all methods ----------------------------------------------------------------------

METHODS = {
    "influence": lambda p: exact_influence(p, 0.1),
    "hessian": lambda p: exact_influence(p, 3.0, curvature="hessian"),
    "last_layer": lambda p: last_layer(p, 0.1),
    "gradient_dot": gradient_dot,
    "tracin": lambda p: tracin([p, p.at(p.theta / 2)], [0.1, 0.2]),
    "trak": lambda p: trak(p, 0.1, dimension=8),
    "trak_dual": lambda p: trak(p, 0.1, dimension=None),
}
each_method = pytest.mark.parametrize("name", METHODS)


@each_method
@KINDS
def test_self_influence_is_the_diagonal(name, layers):
    method = METHODS[name](random_problem(layers))
    close(method.self_influence(), method.scores(method.problems[0].train).diagonal())
    close(method.self_influence(chunk_size=5), method.self_influence())


@each_method
@settings(deadline=None, max_examples=5)
@given(order=st.permutations(range(6)))
def test_scores_follow_a_permutation_of_the_queries(name, order):
    method = METHODS[name](random_problem())
    order = torch.tensor(order)
    close(method.scores(QUERIES[3][order]), method.scores(QUERIES[3])[order], 1e-12)


@each_method
def test_scores_follow_a_permutation_of_the_training_examples(name):
    problem = random_problem()
    order = torch.randperm(12, generator=generator(0))
    permuted = METHODS[name](replace(problem, train=problem.train[order])).scores(QUERIES[3])
    close(permuted, METHODS[name](problem).scores(QUERIES[3])[:, order])


@each_method
def test_two_calls_are_equal_bit_for_bit(name):
    first, second = (METHODS[name](random_problem()).scores(QUERIES[3]) for _ in range(2))
    assert torch.equal(first, second)


@each_method
def test_a_saved_method_comes_back_equal_bit_for_bit(name, tmp_path):
    method = METHODS[name](random_problem())
    method.save(tmp_path / "method.safetensors")
    again = Attribution.load(str(tmp_path / "method.safetensors"), method.problems)
    assert again.query_side == method.query_side
    assert torch.equal(again.scores(QUERIES[3]), method.scores(QUERIES[3]))


def test_a_saved_method_is_refused_for_another_model_or_other_data(tmp_path):
    problem = random_problem()
    path = tmp_path / "method.safetensors"
    gradient_dot(problem).save(path)
    moved = problem.at(problem.theta + 1)
    hashes = f"theta {problem.identity['theta']}.* theta {moved.identity['theta']}"
    with pytest.raises(ValueError, match=f"method.safetensors was made for {hashes}"):
        Attribution.load(path, [moved])
    other = replace(problem, train=labelled(12, seed=9))
    with pytest.raises(ValueError, match=f"data {problem.identity['data']}.* data {other.identity['data']}"):
        Attribution.load(path, [other])
    with pytest.raises(ValueError, match="was made for 1 problems, but got 2"):
        Attribution.load(path, [problem, problem])


def test_a_file_of_another_kind_is_refused(tmp_path):
    from tda_core.store import save_tensors

    save_tensors(tmp_path / "other", {"x": torch.ones(1)}, {"kind": "GroundTruth"})
    with pytest.raises(ValueError, match=r"other does not hold an Attribution, but \['kind'\]"):
        Attribution.load(tmp_path / "other", [random_problem()])


@each_method
def test_removing_the_top_proponents_raises_the_loss_and_the_top_opponents_lowers_it(name):
    """The sign convention, by real refits of a convex model."""
    problem, queries = converged(40), labelled(6, seed=8)
    scores = METHODS[name](problem).scores(queries)
    for q in range(len(queries)):
        order = scores[q].argsort(descending=True)
        losses = {}
        for which, removed in (("top", order[:5]), ("bottom", order[-5:])):
            weights = torch.ones(40, dtype=FLOAT64)
            weights[removed] = 0
            losses[which] = float(problem.losses(queries, optimum(problem, weights))[q])
        before = float(problem.losses(queries)[q])
        assert losses["bottom"] < before < losses["top"]


@each_method
def test_a_duplicate_of_the_query_is_a_proponent(name):
    problem = converged(30)
    scores = METHODS[name](problem).scores(problem.train)
    assert bool((scores.diagonal() > 0).all())


# -- bad input --------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        (labelled(3).inputs, TypeError, "got Tensor"),
        (labelled(3, d=5), ValueError, r"inputs must have shape \(n, 4\), got \(n, 5\)"),
        (Examples(torch.zeros(1, 4), torch.tensor([5])), ValueError, "label 5 is out of range for 3 outputs"),
        (continuous(3), ValueError, r"targets must be torch.int64 as in training"),
    ],
)
def test_queries_that_do_not_fit_are_refused(name, queries, error, message):
    with pytest.raises(error, match=message):
        METHODS[name](random_problem()).scores(queries)


def test_similarities_refuse_queries_that_do_not_fit():
    for method in (input_similarity, feature_similarity):
        with pytest.raises(ValueError, match=r"inputs must have shape \(n, 4\), got \(n, 5\)"):
            method(random_problem()).scores(labelled(3, d=5))


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("method", [exact_influence, last_layer, trak])
def test_impossible_dampings_are_refused(method, damping):
    with pytest.raises(ValueError, match=f"damping must be finite and >= 0, got {damping}"):
        method(random_problem(), damping)


def test_an_indefinite_hessian_names_the_damping_that_it_needs():
    problem = random_problem((4, 5, 3), n=6)
    smallest = float(torch.linalg.eigvalsh(problem.curvature("hessian"))[0])
    assert smallest < -0.01
    with pytest.raises(ValueError, match=f"damping 0.0001 is not positive definite.*above {-smallest:.3g}"):
        exact_influence(problem, 1e-4, curvature="hessian")
    assert torch.isfinite(exact_influence(problem, 1.01 * -smallest, curvature="hessian").scores(QUERIES[3])).all()


def test_an_indefinite_hessian_is_noticed_by_conjugate_gradients(monkeypatch):
    monkeypatch.setattr(gradients_module, "DENSE_LIMIT", 3)
    method = exact_influence(random_problem((4, 5, 3), n=6), 1e-4, curvature="hessian")
    with pytest.raises(ValueError, match=r"negative curvature .* must be positive"):
        method.scores(QUERIES[3])


@pytest.mark.parametrize("dimension", [None, 30])
@pytest.mark.parametrize("seed", range(3))
def test_trak_without_damping_is_refused_for_duplicates(dimension, seed):
    problem = random_problem(seed=seed)
    twice = torch.cat([torch.arange(12), torch.tensor([3])])
    problem = replace(problem, train=problem.train[twice])
    with pytest.raises(ValueError, match=r"damping 0.0 is not positive definite.*use a damping above"):
        trak(problem, 0.0, dimension=dimension)
    assert torch.isfinite(trak(problem, 1e-6, dimension=dimension).scores(QUERIES[3])).all()


def test_other_impossible_settings_are_refused():
    problem = random_problem()
    with pytest.raises(ValueError, match="dimension must be >= 1 or None, got 0"):
        trak(problem, dimension=0)
    with pytest.raises(ValueError, match=r"unknown curvature 'kfac', expected one of \('ggn', 'hessian', 'fisher'\)"):
        exact_influence(problem, curvature="kfac")
    with pytest.raises(ValueError, match=r"one rate per checkpoint, got 2 and 1"):
        tracin([problem, problem], [0.1])
    with pytest.raises(ValueError, match=r"one rate per checkpoint, got 0 and 0"):
        tracin([], [])
    for method in (exact_influence, gradient_dot, trak):
        with pytest.raises(ValueError, match="give at least one problem, got none"):
            method([])


def test_problems_with_other_training_sets_are_never_added_up():
    problem = random_problem()
    other = replace(problem, train=labelled(12, seed=9))
    hashes = f"got data {problem.identity['data']} and {other.identity['data']}"
    for method in (exact_influence, gradient_dot, lambda p: trak(p, 0.1), lambda p: tracin(p, [1, 1])):
        with pytest.raises(ValueError, match=f"must share one training set, {hashes}"):
            method([problem, other])


def test_the_rule_for_queries_is_plain_data():
    assert QuerySide() == QuerySide("loss", False, None, None, "ggn", False)


@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32])
def test_an_undamped_linear_classifier_is_refused_with_advice(dtype):
    """Shifting all logits alike changes nothing, so its curvature is singular; 205 parameters go by iteration."""
    module = torch.nn.Linear(40, 5).to(dtype)
    problem = Problem.from_module(module, "cross_entropy", labelled(300, 40, 5, dtype=dtype))
    with pytest.raises(ValueError, match=r"damping 0.0 is not positive definite .*: use a damping above \d"):
        exact_influence(problem, 0.0)
    assert torch.isfinite(exact_influence(problem, 1e-3).scores(problem.train)).all()
