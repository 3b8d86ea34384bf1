"""Steering operators: against a plain loop, the losses against numerical gradients and written-out forms, bad input."""

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn
from torch.nn import functional as F

from tda_core import steering, steering_losses
from tda_core.designs import balanced, left_regular
from tda_core.examples import Examples
from tda_core.features import hidden, raw_input, with_bias
from tda_core.models import cross_entropy, margin
from tda_core.problem import Problem
from tda_core.steering import Operators, make_basis, site_of
from tda_core.steering_fit import Steering, _Subsets, _Training, fit_operators
from tests.toys import FLOAT64, generator, labelled, random_problem

CLASSIFIER = random_problem((4, 5, 3), "tanh", n=14)
REGRESSION = random_problem((4, 5, 1), "tanh", n=14)
PROBLEMS = pytest.mark.parametrize("problem", [CLASSIFIER, REGRESSION], ids=["classifier", "regression"])
PLACEMENTS = pytest.mark.parametrize("placement", ["logits", "1", "0"])


def features_of(problem):
    return with_bias(raw_input(problem.train.inputs))


def membership(k=6, n=14, d=2):
    return balanced(n, k, d, seed=0)


def random_operators(problem, placement="logits", basis="identity", k=4):
    features, site = features_of(problem), site_of(problem, placement)
    made = make_basis(basis, features.n_features, 3, seed=0, dtype=FLOAT64)
    r = made(features(problem.train.inputs)).shape[1]
    matrices = 0.3 * torch.randn(k, r, site.width, generator=generator(1), dtype=FLOAT64)
    return Operators(problem, features, site, made.requires_grad_(False), matrices)


def steered_one_by_one(operators, placement, inputs):
    """Every operator and example by itself, through the layers of an MLP written out."""
    layers = list(operators.problem.placed)
    found = []
    for a in operators.matrices:
        rows = []
        for x in inputs:
            shift = operators.basis(operators.features(x[None])) @ a
            z = x[None]
            for i, layer in enumerate(layers):
                z = layer(z)
                if str(i) == placement:
                    z = z + shift
            rows.append(z[0] + (shift[0] if placement == "logits" else 0))
        found.append(torch.stack(rows))
    return torch.stack(found)


# -- operators --------------------------------------------------------------------------------------


@PROBLEMS
@PLACEMENTS
@pytest.mark.parametrize("basis", steering.BASES)
def test_steered_outputs_are_those_of_a_plain_loop(problem, placement, basis):
    operators = random_operators(problem, placement, basis)
    inputs = problem.train.inputs[:5]
    expected = steered_one_by_one(operators, placement, inputs)
    torch.testing.assert_close(operators.steered(inputs), expected, rtol=0, atol=1e-12)


@PROBLEMS
def test_measurements_are_falls_of_the_loss(problem, monkeypatch):
    operators = random_operators(problem, "1")
    queries = problem.train[:7]
    steered = operators.steered(queries.inputs)
    after = torch.stack([problem.loss(out, queries.targets) for out in steered], dim=1)
    expected = problem.losses(queries)[:, None] - after
    torch.testing.assert_close(operators.measurements(queries), expected, rtol=0, atol=1e-12)
    monkeypatch.setattr(steering, "BLOCK_FLOATS", 1)  # one query at a time
    torch.testing.assert_close(operators.measurements(queries), expected, rtol=0, atol=1e-12)


def test_margin_measurements():
    operators, queries = random_operators(CLASSIFIER), CLASSIFIER.train[:5]
    after = torch.stack([margin(out, queries.targets) for out in operators.steered(queries.inputs)], dim=1)
    expected = after - CLASSIFIER.margins(queries)[:, None]
    torch.testing.assert_close(operators.measurements(queries, "margin"), expected, rtol=0, atol=1e-12)


@PLACEMENTS
def test_operators_at_zero_change_nothing(placement):
    operators = random_operators(CLASSIFIER, placement)
    silent = Operators(operators.problem, operators.features, operators.site, operators.basis, 0 * operators.matrices)
    assert float(silent.measurements(CLASSIFIER.train).abs().max()) < 1e-14


def test_a_layer_of_a_convolutional_network_can_be_steered():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()
    data = Examples(torch.randn(6, 1, 4, 4, dtype=FLOAT64), torch.tensor([0, 1, 2, 0, 1, 2]))
    problem = Problem.from_module(module, "cross_entropy", data)
    site = site_of(problem, "0")
    assert site.width == 8
    shift = torch.randn(6, 8, generator=generator(0), dtype=FLOAT64)
    expected = module[3](F.relu(module[0](data.inputs) + shift.view(6, 2, 2, 2)).flatten(1))
    torch.testing.assert_close(site.outputs(site.anchors(data.inputs) + shift), expected.detach())


def test_a_layer_before_one_that_works_in_place_keeps_its_own_activations():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    problem = Problem.from_module(module, "cross_entropy", labelled())
    site, inputs = site_of(problem, "0"), problem.train.inputs
    expected = module[0](inputs).detach()
    torch.testing.assert_close(site.anchors(inputs), expected)
    shift = torch.ones_like(expected)
    torch.testing.assert_close(site.outputs(expected + shift), module[2](F.relu(expected + shift)).detach())


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(x + torch.tanh(self.first(x)))


def test_a_layer_with_a_way_around_it_is_refused():
    problem = Problem.from_module(Skipping().double(), "cross_entropy", labelled())
    with pytest.raises(ValueError, match="layer 'first' cannot be steered"):
        site_of(problem, "first")


def test_unknown_layer_names_those_that_exist():
    with pytest.raises(ValueError, match=r"unknown layer 'conv9', expected 'logits' or one of \['0', '1', '2'\]"):
        site_of(CLASSIFIER, "conv9")


def test_bad_bases_and_targets():
    with pytest.raises(ValueError, match="unknown basis 'cubic'"):
        make_basis("cubic", 4, 2, seed=0, dtype=FLOAT64)
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        make_basis("linear", 4, 0, seed=0, dtype=FLOAT64)
    with pytest.raises(ValueError, match="unknown target 'accuracy'"):
        random_operators(CLASSIFIER).measurements(CLASSIFIER.train, "accuracy")
    with pytest.raises(ValueError, match="'margin' is for classifiers"):
        random_operators(REGRESSION).measurements(REGRESSION.train, "margin")
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, 4\), got \(n, 6\)"):
        random_operators(CLASSIFIER).measurements(labelled(d=6))


# -- losses -----------------------------------------------------------------------------------------


def test_fidelity_is_the_weighted_loss_of_members():
    steered = torch.randn(3, 4, 5, generator=generator(0), dtype=FLOAT64)
    targets = torch.randint(0, 5, (3, 4), generator=generator(1))
    weights = torch.rand(3, 4, generator=generator(2), dtype=FLOAT64)
    expected = sum(
        float(weights[k, i]) * float(F.cross_entropy(steered[k, i], targets[k, i])) for k in range(3) for i in range(4)
    )
    assert float(steering_losses.fidelity(cross_entropy, steered, targets, weights)) == pytest.approx(expected, 1e-12)


def test_stability_is_the_divergence_from_the_frozen_model():
    base = torch.randn(4, 5, generator=generator(0), dtype=FLOAT64)
    steered = torch.randn(3, 4, 5, generator=generator(1), dtype=FLOAT64)
    weights = torch.rand(3, 4, generator=generator(2), dtype=FLOAT64)
    log_steered, log_base = F.log_softmax(steered, 2), F.log_softmax(base, 1).expand(3, 4, 5)
    divergence = F.kl_div(log_steered, log_base, log_target=True, reduction="none").sum(2)
    expected = float((divergence * weights).sum())
    assert float(steering_losses.stability(base, steered, weights, classifies=True)) == pytest.approx(expected, 1e-12)
    one = torch.distributions.Normal(base, 1.0)
    other = torch.distributions.Normal(steered, 1.0)
    normal = float((torch.distributions.kl_divergence(one, other).sum(2) * weights).sum())
    assert float(steering_losses.stability(base, steered, weights, classifies=False)) == pytest.approx(normal, 1e-12)


@pytest.mark.parametrize("dimension", [3, 20])
def test_linearity_is_the_residual_of_a_ridge_regression(dimension):
    matrix = membership()
    residual = steering_losses.linearity_residual(matrix, dimension, 0.7, seed=3, dtype=FLOAT64)
    sketch = matrix.toarray() @ np.random.default_rng(3).standard_normal((14, dimension)) / dimension**0.5
    y = torch.randn(5, 6, generator=generator(0), dtype=FLOAT64)
    expected = 0.0
    for row in y.numpy():
        # the ridge regression itself, as least squares with gamma's rows appended
        augmented = np.concatenate([sketch, 0.7**0.5 * np.eye(dimension)])
        v = np.linalg.lstsq(augmented, np.concatenate([row, np.zeros(dimension)]), rcond=None)[0]
        expected += ((sketch @ v - row) ** 2).sum() / 5
    assert float(steering_losses.linearity(y, residual)) == pytest.approx(expected, 1e-9)


@PROBLEMS
@PLACEMENTS
@pytest.mark.parametrize("which", ["fidelity", "stability", "linearity"])
def test_the_gradient_of_each_loss_is_its_numerical_one(problem, placement, which):
    weights = {name: float(name == which) for name in ("fidelity", "stability", "linearity")}
    settings = Steering(placement=placement, outside=None, **weights | {"stability": float(which != "fidelity")})
    features, matrix = features_of(problem), membership()
    site = site_of(problem, placement)
    phi = features(problem.train.inputs)
    residual = steering_losses.linearity_residual(matrix, 3, 0.5, seed=0, dtype=FLOAT64)
    base, anchors = problem.outputs(problem.train.inputs).detach(), site.anchors(problem.train.inputs)
    training = _Training(problem, site, settings, phi, anchors, base, _Subsets.of(matrix, FLOAT64), residual)
    index = ("fidelity", "stability", "linearity").index(which)
    matrices = 0.2 * torch.randn(6, 5, site.width, generator=generator(4), dtype=FLOAT64)
    matrices.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: training.losses(phi, a, generator(0))[index], (matrices,))


# -- training ---------------------------------------------------------------------------------------


def test_identity_operators_on_logits_reach_the_convex_optimum():
    """Fidelity + stability on logits is convex in a_k: many full-batch steps end where its gradient is zero."""
    matrix, features = membership(), features_of(CLASSIFIER)
    settings = Steering(stability=1.0, rate=1.0, steps=2500, outside=None)
    operators, course = fit_operators(CLASSIFIER, matrix, features, settings, seed=0)
    phi, base = features(CLASSIFIER.train.inputs), CLASSIFIER.outputs(CLASSIFIER.train.inputs).detach()
    dense = torch.from_numpy(matrix.toarray()).bool()
    for a, members in zip(operators.matrices, dense, strict=True):
        a = a.clone().requires_grad_()
        out = base + phi @ a
        inside = F.cross_entropy(out[members], CLASSIFIER.train.targets[members])
        away = F.kl_div(F.log_softmax(out[~members], 1), F.log_softmax(base[~members], 1), log_target=True,
                        reduction="batchmean")  # fmt: skip
        gradient = torch.autograd.grad(inside + away, a)[0]
        assert float(gradient.abs().max()) < 1e-3
    assert float(course.losses[-1, 0]) < float(course.losses[0, 0])


def test_the_first_step_adds_up_over_members():
    """One plain gradient step from zero: an operator is the mean of its members' own, so M recovers them exactly."""
    features = features_of(CLASSIFIER)
    settings = Steering(stability=0.0, steps=1, outside=None)
    single = sparse.csc_array(np.eye(14, dtype=np.float32))
    alone, _ = fit_operators(CLASSIFIER, single, features, settings, seed=0)
    joint, _ = fit_operators(CLASSIFIER, membership(), features, settings, seed=0)
    means = membership().toarray().astype(float)
    means /= means.sum(1, keepdims=True)
    expected = torch.einsum("kn,nrc->krc", torch.from_numpy(means), alone.matrices)
    torch.testing.assert_close(joint.matrices, expected, rtol=0, atol=1e-12)


def test_operators_do_not_depend_on_each_other():
    features = features_of(CLASSIFIER)
    settings = Steering(steps=20, outside=None)
    matrix = membership()
    together, _ = fit_operators(CLASSIFIER, matrix, features, settings, seed=0)
    few, _ = fit_operators(CLASSIFIER, sparse.csc_array(matrix[:3]), features, settings, seed=0)
    torch.testing.assert_close(together.matrices[:3], few.matrices, rtol=0, atol=1e-12)


def test_mini_batches_of_everything_are_the_full_batch():
    features, matrix = features_of(CLASSIFIER), membership()
    full = Steering(steps=10, outside=None, members=None)
    same = full.but(outside=14, members=50)
    one, _ = fit_operators(CLASSIFIER, matrix, features, full, seed=0)
    other, _ = fit_operators(CLASSIFIER, matrix, features, same, seed=0)
    torch.testing.assert_close(one.matrices, other.matrices, rtol=0, atol=0)


def test_mini_batches_go_where_the_full_batch_goes():
    features, matrix = features_of(CLASSIFIER), left_regular(14, 6, 3, seed=1)
    full = Steering(steps=400, rate=0.02, outside=None)
    one, _ = fit_operators(CLASSIFIER, matrix, features, full, seed=0)
    other, _ = fit_operators(CLASSIFIER, matrix, features, full.but(outside=7, members=2), seed=0)
    assert float((one.matrices - other.matrices).norm() / one.matrices.norm()) < 0.2
    assert not torch.equal(one.matrices, other.matrices)


@pytest.mark.parametrize("basis", ["linear", "two_layer"])
def test_learned_bases_learn(basis):
    features, matrix = features_of(CLASSIFIER), membership()
    settings = Steering(basis=basis, rank=3, steps=60, rate=1.0)
    operators, course = fit_operators(CLASSIFIER, matrix, features, settings, seed=0)
    start = make_basis(basis, 5, 3, seed=0, dtype=FLOAT64)
    moved = [bool((a != b).any()) for a, b in zip(start.parameters(), operators.basis.parameters(), strict=True)]
    assert all(moved) and float(course.losses[-1, 0]) < float(course.losses[0, 0])
    assert not any(value.requires_grad for value in operators.basis.parameters())


def test_two_fits_with_one_seed_are_equal():
    settings = Steering(steps=5, outside=4, members=2, linearity=0.1)
    fits = [fit_operators(CLASSIFIER, membership(), features_of(CLASSIFIER), settings, seed=3)[0] for _ in range(2)]
    assert torch.equal(fits[0].matrices, fits[1].matrices)


def test_large_linearity_silences_the_operators():
    features, matrix = features_of(CLASSIFIER), membership()
    quiet = Steering(stability=0.0, linearity=300.0, steps=300, rate=0.003)
    loud = quiet.but(linearity=0.0)
    sizes = [
        float(fit_operators(CLASSIFIER, matrix, features, s, seed=0)[0].measurements(CLASSIFIER.train).norm())
        for s in (quiet, loud)
    ]
    assert sizes[0] < 0.5 * sizes[1]


def test_a_monitor_keeps_the_best_and_stops():
    asked = []

    def monitor(operators):
        asked.append(operators)
        return [1.0, 3.0, 2.0, 2.5, 9.0][len(asked) - 1]

    settings = Steering(steps=100, check_every=4, patience=2, outside=None)
    matrix, features = membership(), features_of(CLASSIFIER)
    operators, course = fit_operators(CLASSIFIER, matrix, features, settings, seed=0, monitor=monitor)
    assert course.checks == {4: 1.0, 8: 3.0, 12: 2.0, 16: 2.5} and course.kept == 8 and len(course.losses) == 16
    until, _ = fit_operators(CLASSIFIER, matrix, features, settings.but(steps=8), seed=0)
    assert torch.equal(operators.matrices, until.matrices)


def test_divergence_is_an_error():
    regression = REGRESSION
    settings = Steering(rate=100.0, steps=400)
    with pytest.raises(FloatingPointError, match=r"steering diverged: lower rate=100.0"):
        fit_operators(regression, membership(), features_of(regression), settings, seed=0)


def test_features_that_are_zero_are_refused():
    dead = REGRESSION.at(torch.zeros_like(REGRESSION.theta))
    with pytest.raises(ValueError, match="the losses are flat in the operators"):
        fit_operators(dead, membership(), hidden(dead), Steering(), seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fidelity": -1.0}, "fidelity must be finite and >= 0, got -1.0"),
        ({"stability": float("nan")}, "stability must be finite and >= 0, got nan"),
        ({"linearity": float("inf")}, "linearity must be finite and >= 0, got inf"),
        ({"fidelity": 0.0, "stability": 0.0}, "must not both be 0"),
        ({"rate": 0.0}, "rate must be finite and > 0, got 0.0"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"members": 0}, r"members must be None \(all\) or >= 1, got 0"),
        ({"outside": -3}, r"outside must be None \(all\) or >= 1, got -3"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        Steering().but(**changes)


def test_bad_sketches():
    with pytest.raises(ValueError, match="the sketch's dimension must be >= 1, got 0"):
        steering_losses.linearity_residual(membership(), 0, 1.0, seed=0)
    with pytest.raises(ValueError, match=r"gamma must be positive and finite, got 0\.0"):
        steering_losses.linearity_residual(membership(), 3, 0.0, seed=0)
