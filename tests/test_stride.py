"""STRIDE from end to end: planted influences, additivity, files, recovery settings, bad input."""

import numpy as np
import pytest
import torch
from scipy import sparse

from tda_core.designs import balanced, left_regular
from tda_core.examples import Examples
from tda_core.features import hidden, raw_input, with_bias
from tda_core.gradients import InfluenceFamily
from tda_core.metrics import SignError, check_sign
from tda_core.recovery import Penalty
from tda_core.recovery_choice import choose_lambda
from tda_core.steering_fit import Steering
from tda_core.store import save_tensors
from tda_core.stride import Recovery, Stride, fit_stride, heldout_monitor
from tda_core.subsets import random_subsets
from tests.toys import FLOAT64, converged, labelled, random_problem

PROBLEM = random_problem((4, 5, 3), "tanh", n=30)
FEATURES = with_bias(raw_input(PROBLEM.train.inputs))
MEMBERSHIP = balanced(30, 12, 3, seed=0)


def fitted(problem=PROBLEM, membership=MEMBERSHIP, **changes):
    features = with_bias(raw_input(problem.train.inputs))
    return fit_stride(problem, membership, features, Steering(steps=20, outside=None).but(**changes))


def test_one_example_a_subset_is_what_its_own_operator_does():
    """K = n singleton subsets: the Lasso is y itself, moved towards zero by lambda."""
    stride = fitted(membership=sparse.csc_array(np.eye(30, dtype=np.float32)))
    queries = PROBLEM.train[:4]
    y = stride.measurements(queries)
    expected = y.sign() * (y.abs() - 0.1 * y.abs().amax(1, keepdim=True)).clamp_min(0)
    found = stride.recovering(Recovery(lam=0.1, tolerance=1e-10)).scores(queries)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(y.abs().max()))


def test_small_steps_are_gradient_products_and_are_recovered():
    """One small step from zero without stability moves logits along sums of members' gradients: their products with
    a query's gradient are what is measured, and with K = n independent subsets they are recovered."""
    rng = np.random.default_rng(0)
    dense = np.zeros((30, 30), dtype=np.float32)
    for k in range(30):  # equally large subsets, so that means are sums over 15
        dense[k, rng.permutation(30)[:15]] = 1
    assert np.linalg.matrix_rank(dense) == 30
    problem = converged(30)
    features = with_bias(raw_input(problem.train.inputs))
    one_step = Steering(steps=1, rate=1e-4, stability=0.0)
    stride = fit_stride(problem, sparse.csc_array(dense), features, one_step)
    stride = stride.recovering(Recovery(lam=1e-9, penalty=Penalty("ridge")))
    queries = labelled(5, seed=7)
    products = problem.gradients(queries) @ problem.gradients(problem.train).T  # a linear model: operators are its own
    scores = stride.scores(queries)
    scale = (scores * products).sum() / (products * products).sum()
    assert scale > 0
    torch.testing.assert_close(scores / scale, products, rtol=0, atol=2e-2 * float(products.abs().max()))


def test_proponents_are_positive():
    """Against a truth of first-order influence; check_sign refuses the reversed matrix."""
    problem = converged(30)
    stride = fitted(problem, left_regular(30, 25, 5, seed=1), steps=60)
    queries = labelled(12, seed=3)
    masks = random_subsets(30, 60, 0.5, seed=0)
    outcomes = masks.double() @ InfluenceFamily.of(problem).at(1e-2).scores(queries).T
    scores = stride.recovering(Recovery(lam=0.03)).scores(queries)
    check_sign(scores, masks, outcomes)
    with pytest.raises(SignError):
        check_sign(-scores, masks, outcomes)


def test_queries_are_measured_independently():
    stride = fitted()
    whole, parts = stride.scores(PROBLEM.train[:6]), [stride.scores(PROBLEM.train[i]) for i in range(6)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-6)


@pytest.mark.parametrize("placement", ["logits", "1"])
@pytest.mark.parametrize("basis", ["identity", "two_layer"])
def test_saved_and_loaded(tmp_path, placement, basis):
    stride = fitted(placement=placement, basis=basis, rank=3)
    recovery = Recovery(lam="pooled", penalty=Penalty(intercept=True), target="margin", tolerance=1e-3)
    stride = stride.recovering(recovery)
    stride.save(tmp_path / "stride.safetensors")
    again = Stride.load(tmp_path / "stride.safetensors", PROBLEM)
    queries = labelled(3, seed=5)
    assert torch.equal(again.measurements(queries), stride.measurements(queries))
    assert torch.equal(again.scores(queries), stride.scores(queries))
    assert again.recovery == recovery and again.steering == stride.steering
    assert again.course.kept == 20 and torch.equal(again.course.losses, stride.course.losses)


def test_thin_memberships_are_recovered_by_the_loaded_method_too(tmp_path):
    problem = random_problem((4, 5, 3), "tanh", n=60)
    stride = fitted(problem, balanced(60, 20, 2, seed=0), steps=3)
    stride.save(tmp_path / "stride.safetensors")
    again = Stride.load(tmp_path / "stride.safetensors", problem)
    assert torch.equal(again.scores(problem.train[:2]), stride.scores(problem.train[:2]))
    assert again.membership.indptr.dtype == stride.membership.indptr.dtype


def test_stored_zeros_are_no_members():
    dense = MEMBERSHIP.toarray()
    columns, rows = (part.ravel() for part in np.meshgrid(np.arange(30), np.arange(12), indexing="ij"))
    stored = sparse.csc_array((dense[rows, columns], rows, np.arange(0, 361, 12)), shape=(12, 30))
    assert stored.nnz == 360
    queries = PROBLEM.train[:3]
    found, expected = (fitted(membership=one).measurements(queries) for one in (stored, MEMBERSHIP))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert stored.nnz == 360


def test_checks_of_a_monitor_are_saved(tmp_path):
    monitor = heldout_monitor(MEMBERSHIP, PROBLEM.train[:5])
    steering = Steering(steps=12, check_every=5)
    stride = fit_stride(PROBLEM, MEMBERSHIP, FEATURES, steering, monitor=monitor)
    assert list(stride.course.checks) == [5, 10, 12]
    assert all(value <= 1 for value in stride.course.checks.values())
    stride.save(tmp_path / "stride.safetensors")
    assert Stride.load(tmp_path / "stride.safetensors", PROBLEM).course.checks == stride.course.checks


def test_files_of_other_models_and_kinds_are_refused(tmp_path):
    path = tmp_path / "stride.safetensors"
    fitted().save(path)
    with pytest.raises(ValueError, match="was made for theta"):
        Stride.load(path, PROBLEM.at(2 * PROBLEM.theta))
    save_tensors(path, {"a": torch.ones(1)}, {"kind": "something"})
    with pytest.raises(ValueError, match="does not hold a Stride"):
        Stride.load(path, PROBLEM)


def test_hidden_features_are_saved_with_their_model(tmp_path):
    stride = fit_stride(PROBLEM, MEMBERSHIP, hidden(PROBLEM), Steering(steps=3))
    stride.save(tmp_path / "stride.safetensors")
    again = Stride.load(tmp_path / "stride.safetensors", PROBLEM)
    assert torch.equal(again.measurements(PROBLEM.train), stride.measurements(PROBLEM.train))


@pytest.mark.parametrize("rule", ["pooled", "per_query", "universal"])
def test_lambda_by_a_rule_is_that_of_the_rule(rule):
    stride = fitted()
    y = stride.measurements(PROBLEM.train[:3])
    recovered = Recovery(lam=rule)(MEMBERSHIP, y)
    assert torch.equal(recovered.lam, choose_lambda(MEMBERSHIP, y, rule))
    assert torch.equal(recovered.weights, stride.recovering(Recovery(lam=rule)).scores(PROBLEM.train[:3]))


def test_controls_of_recovery():
    stride, queries = fitted(), PROBLEM.train[:3]
    y = stride.measurements(queries)
    correlation = stride.recovering(Recovery(penalty=Penalty("correlation"))).scores(queries)
    expected = y @ torch.from_numpy(MEMBERSHIP.toarray()).to(y)
    torch.testing.assert_close(correlation, expected, rtol=0, atol=1e-6)


def test_regression():
    problem = random_problem((4, 5, 1), "tanh", n=30)
    stride = fitted(problem)
    assert stride.scores(problem.train[:4]).shape == (4, 30)
    with pytest.raises(ValueError, match="'margin' is for classifiers"):
        stride.recovering(Recovery(target="margin")).scores(problem.train[:4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam": 0.0}, r"lam must be > 0 and finite, got 0\.0"),
        ({"lam": -1.0}, r"lam must be > 0 and finite, got -1\.0"),
        ({"lam": float("nan")}, "lam must be > 0 and finite, got nan"),
        ({"lam": "oracle"}, "unknown lam 'oracle', expected a share of the largest lam or one of"),
    ],
)
def test_bad_recoveries(changes, message):
    with pytest.raises(ValueError, match=message):
        Recovery().but(**changes)


def test_bad_memberships():
    with pytest.raises(ValueError, match="K >= 2"):
        fitted(membership=MEMBERSHIP[:1])
    dense = MEMBERSHIP.toarray()
    dense[3] = 0
    with pytest.raises(ValueError, match="subset 3 of 12 is empty"):
        fitted(membership=sparse.csc_array(dense))
    dense = MEMBERSHIP.toarray()
    dense[:, 7] = 0
    with pytest.raises(ValueError, match="example 7 of 30 is in none"):
        fitted(membership=sparse.csc_array(dense))
    with pytest.raises(ValueError, match="a column for each of 30 training examples"):
        fitted(membership=balanced(40, 12, 3, seed=0))


def test_queries_of_another_shape():
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, 4\), got \(n, 6\)"):
        fitted().scores(labelled(3, d=6))
    with pytest.raises(ValueError, match="finite"):
        fitted().scores(Examples(torch.full((2, 4), torch.nan, dtype=FLOAT64), torch.tensor([0, 1])))
