"""Sparse recovery: cvxpy, scikit-learn and the batched solver agree, gaps bound what they say, bad input is named."""

import math
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.linear_model import ElasticNet, Ridge

from tda_core import recovery
from tda_core.recovery import Penalty, lam_scale, recover, recover_path
from tda_core.recovery_design import Design
from tda_core.recovery_newton import Goal

EXACT = 1e-11
PENALTIES = {
    "lasso": Penalty(),
    "nonnegative": Penalty(nonnegative=True),
    "elastic_net": Penalty(ridge=0.7),
    "intercept": Penalty(intercept=True),
    "all": Penalty(ridge=0.2, nonnegative=True, intercept=True),
}


def left_regular(n_subsets: int, n: int, d: int, seed: int) -> torch.Tensor:
    """Each of n examples in d of the subsets; an empty subset gets one example more. Float64 (K, n)."""
    source = np.random.default_rng(seed)
    members = np.zeros((n_subsets, n))
    for column in range(n):
        members[source.choice(n_subsets, d, replace=False), column] = 1
    empty = np.flatnonzero(members.sum(1) == 0)
    members[empty, source.choice(n, len(empty))] = 1
    return torch.from_numpy(members)


def planted(members: torch.Tensor, q: int, k: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k Gaussian influences a query (q, n) and their measurements (q, K), with noise of a share of their size."""
    source = torch.Generator().manual_seed(seed)
    order = torch.rand(q, members.shape[1], generator=source).argsort(1)[:, :k]
    values = torch.randn(q, k, generator=source, dtype=torch.float64)
    weights = torch.zeros(q, members.shape[1], dtype=torch.float64).scatter_(1, order, values)
    y = weights @ members.T
    return weights, y + noise * y.std(1, keepdim=True) * torch.randn(y.shape, generator=source, dtype=torch.float64)


def problem(n_subsets: int = 50, n: int = 40, q: int = 5, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent columns, so that weights are unique: entries of 0 and 1 are in no general position."""
    members = left_regular(n_subsets, n, 4, seed)
    return members, planted(members, q, 5, 0.1, seed)[1] + 0.5


def sklearn_weights(members: torch.Tensor, y: torch.Tensor, lam: torch.Tensor, penalty: Penalty) -> torch.Tensor:
    found, n_subsets = [], len(members)
    for row, value in zip(y.numpy(), lam.tolist(), strict=True):
        total = value + penalty.ridge
        model = ElasticNet(
            total / n_subsets, l1_ratio=value / total, fit_intercept=penalty.intercept, positive=penalty.nonnegative
        )
        found.append(model.set_params(tol=1e-13, max_iter=10**6).fit(members.numpy(), row).coef_)
    return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize("share", [0.03, 0.3])
@pytest.mark.parametrize("name", PENALTIES)
def test_batched_solver_agrees_with_scikit_learn(name, share):
    members, y = problem()
    penalty = PENALTIES[name]
    lam = share * lam_scale(members, y, penalty)
    found = recover(members, y, lam, penalty, tolerance=EXACT)
    expected = sklearn_weights(members, y, lam, penalty)
    assert (found.weights - expected).abs().max() < 1e-6
    assert ((found.weights != 0).sum(1) > 0).all()


def test_dense_random_halves_agree_with_scikit_learn_too():
    # their columns share a large mean, which makes first-order methods slow
    members = (torch.rand(40, 90, generator=torch.Generator().manual_seed(3)) < 0.5).double()
    _, y = planted(members, 4, 6, 0.1, 1)
    lam = 0.05 * lam_scale(members, y)
    found = recover(members, y, lam, tolerance=EXACT).weights
    assert (found - sklearn_weights(members, y, lam, Penalty())).abs().max() < 1e-5


@pytest.mark.parametrize("name", PENALTIES)
def test_where_weights_are_not_unique_fit_and_objective_are(name):
    members, y = problem(30, 60)
    penalty = PENALTIES[name]
    lam = 0.03 * lam_scale(members, y, penalty)
    found = recover(members, y, lam, penalty, tolerance=EXACT).weights
    expected = sklearn_weights(members, y, lam, penalty)
    assert ((found - expected) @ members.T).abs().max() < 1e-5
    values = [objective(members, y, weights, lam, penalty) for weights in (found, expected)]
    assert torch.allclose(*values, rtol=1e-10)


def objective(members, y, weights, lam, penalty):
    """The plain objective of every query, at the best intercept: (q,)."""
    rest = y - weights @ members.T
    rest = rest - rest.mean(1, keepdim=True) if penalty.intercept else rest
    return (rest**2).sum(1) / 2 + lam * weights.abs().sum(1) + penalty.ridge / 2 * (weights**2).sum(1)


@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(PENALTIES)),
    share=st.floats(0.02, 0.9),
    size=st.sampled_from([(6, 40), (12, 12), (20, 9)]),
    wild=st.floats(0.0, 3.0),
)
@settings(max_examples=40, deadline=None)
def test_the_certified_gap_bounds_the_suboptimality(seed, name, share, size, wild):
    """For the solver's answer, and for any weights at all."""
    members, penalty = left_regular(*size, 3, seed), PENALTIES[name]
    _, y = planted(members, 3, 4, 0.2, seed)
    lam = share * lam_scale(members, y, penalty)
    best = recover(members, y, lam, penalty, tolerance=1e-10)
    least = objective(members, y, best.weights, lam, penalty)
    loose = recover(members, y, lam, penalty, tolerance=0.1)
    assert (loose.gaps <= 0.1).all()
    found = objective(members, y, loose.weights, lam, penalty)
    assert (found - least <= (loose.gaps + 1e-9) * found).all()
    source = torch.Generator().manual_seed(seed)
    weights = best.weights + wild * torch.randn(best.weights.shape, generator=source, dtype=torch.float64)
    weights = weights.clamp_min(0) if penalty.nonnegative else weights
    goal = Goal(y, lam, penalty.ridge, penalty.nonnegative, penalty.intercept)
    rest = goal.centred(y - weights @ members.T)
    gaps, value = goal.gaps(rest, rest @ members - penalty.ridge * weights, weights)
    assert torch.allclose(value, objective(members, y, weights, lam, penalty))
    assert (value - least <= (gaps + 1e-9) * value).all()


def test_optimality_conditions_hold():
    members, y = problem(q=8)
    lam = 0.1 * lam_scale(members, y)
    weights = recover(members, y, lam, tolerance=EXACT).weights
    correlation = (y - weights @ members.T) @ members / lam[:, None]
    assert (correlation.abs() <= 1 + 1e-5).all()
    on = weights != 0
    assert (correlation[on] - weights[on].sign()).abs().max() < 1e-5


def test_a_warm_path_gives_what_cold_solves_give():
    members, y = problem(q=6)
    shares = [0.5, 0.2, 0.08, 0.03, 0.3]
    scale = lam_scale(members, y)
    path = recover_path(members, y, [share * scale for share in shares], tolerance=EXACT)
    for share, warm in zip(shares, path, strict=True):
        cold = recover(members, y, share * scale, tolerance=EXACT)
        assert (warm.weights - cold.weights).abs().max() < 1e-6
        assert torch.equal(warm.lam, cold.lam)


@pytest.mark.parametrize("name", PENALTIES)
def test_sparse_equals_dense(name, monkeypatch):
    members, y = problem(60, 50, 4)
    y, penalty = y * 3, PENALTIES[name]
    scale = lam_scale(members, y, penalty)
    dense = recover(members, y, 0.1 * scale, penalty, tolerance=EXACT)
    # few candidates at a time, and few queries, so that the working set grows and chunks are joined
    monkeypatch.setattr(recovery, "CANDIDATES", 8)
    monkeypatch.setattr(recovery, "HELD_FLOATS", 300)
    monkeypatch.setattr("tda_core.recovery_design.DENSE_FLOATS", 0)
    kept = Design.of(scipy.sparse.csr_matrix(members.numpy()))
    assert kept.is_sparse
    assert torch.allclose(lam_scale(kept, y, penalty), scale)
    sparse = recover(kept, y, 0.1 * scale, penalty, tolerance=EXACT)
    assert (sparse.weights - dense.weights).abs().max() < 1e-6
    assert (sparse.gaps <= EXACT).all()
    assert torch.allclose(sparse.intercepts, dense.intercepts, atol=1e-6)
    for kind in ("ridge", "correlation"):
        lam, other = (None if kind == "correlation" else 2.0), Penalty(kind=kind, intercept=penalty.intercept)
        assert torch.allclose(recover(kept, y, lam, other).weights, recover(members, y, lam, other).weights)
    assert torch.allclose(
        recover_path(kept, y, [scale, 0.2 * scale], penalty)[1].predict(kept).mean(1), y.mean(1), atol=2
    )


def test_sparse_membership_is_left_as_it_was_and_may_have_wide_indices():
    members, y = problem()
    matrix = scipy.sparse.csc_array(members.numpy().astype(np.float64))
    matrix.data[0] = 0.0  # a stored zero
    matrix.indices, matrix.indptr = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
    stored = matrix.nnz
    found = recover(matrix, y, 1.0, tolerance=1e-10).weights
    assert matrix.nnz == stored
    expected = recover(torch.from_numpy(matrix.toarray()), y, 1.0, tolerance=1e-10).weights
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_sparse_membership_and_bool_are_taken():
    members, y = problem()
    expected = recover(members, y, 1.0).weights
    of_sparse = recover(scipy.sparse.csc_array(members.numpy()), y, 1.0, tolerance=1e-11).weights
    torch.testing.assert_close(of_sparse, recover(members, y, 1.0, tolerance=1e-11).weights, rtol=0, atol=1e-5)
    assert torch.equal(recover(members.bool(), y, 1.0).weights, expected)
    assert torch.equal(recover(members.numpy(), y, 1.0).weights, expected)


def test_weights_come_in_the_measurements_type():
    members, y = problem()
    found = recover(members.float(), y.float(), 1.0)
    assert found.weights.dtype == found.lam.dtype == torch.float32
    assert (found.weights - recover(members, y, 1.0).weights).abs().max() < 1e-4


@given(factor=st.floats(1e-6, 1e6), name=st.sampled_from(["lasso", "nonnegative", "intercept"]))
@settings(max_examples=15, deadline=None)
def test_scaling_measurements_and_lam_scales_weights(factor, name):
    members, y = problem(40, 30, 3)
    penalty = PENALTIES[name]
    base = recover(members, y, 2.0, penalty, tolerance=EXACT)
    scaled = recover(members, factor * y, 2.0 * factor, penalty, tolerance=EXACT)
    assert torch.allclose(scaled.weights, factor * base.weights, atol=1e-5 * factor)
    assert torch.allclose(lam_scale(members, factor * y, penalty), factor * lam_scale(members, y, penalty))


def test_queries_are_independent_and_of_their_own_lam():
    members, y = problem(q=7)
    lam = torch.linspace(0.05, 0.9, 7).double() * lam_scale(members, y)
    together = recover(members, y, lam, tolerance=EXACT).weights
    for row in range(7):
        alone = recover(members, y[row : row + 1], float(lam[row]), tolerance=EXACT).weights[0]
        assert (alone - together[row]).abs().max() < 1e-6


def test_lam_max_is_the_edge_of_zero():
    members, y = problem()
    for penalty in PENALTIES.values():
        top = lam_scale(members, y, penalty)
        assert (recover(members, y, top, penalty).weights == 0).all()
        assert ((recover(members, y, 0.98 * top, penalty, tolerance=1e-9).weights != 0).sum(1) >= 1).all()


def test_a_base_shift_is_the_intercepts_affair():
    members, y = problem()
    penalty = Penalty(intercept=True)
    lam = 0.1 * lam_scale(members, y, penalty)
    first, second = (recover(members, y + shift, lam, penalty, tolerance=EXACT) for shift in (0, 100.0))
    assert (first.weights - second.weights).abs().max() < 1e-6
    assert torch.allclose(second.intercepts - first.intercepts, torch.full((5,), 100.0).double())
    rest = y - first.predict(members)
    assert rest.mean(1).abs().max() < 1e-9


def test_duplicate_columns_and_fewer_subsets_than_examples_are_solved():
    members = left_regular(6, 60, 3, 0)  # at most 20 different columns
    _, y = planted(members, 5, 10, 0.3, 0)
    lam = 0.01 * lam_scale(members, y)
    assert (recover(members, y, lam, tolerance=1e-9).gaps <= 1e-9).all()


def test_long_paths_do_not_jam():
    """Many active columns, where each Newton step is cut short by another change of sign."""
    members = left_regular(60, 300, 5, 0)
    _, y = planted(members, 20, 15, 0.1, 0)
    scale = lam_scale(members, y)
    path = recover_path(members, y, [share * scale for share in (0.3, 0.1, 0.05, 0.02, 0.01, 0.003)], tolerance=1e-6)
    assert max(float(found.gaps.max()) for found in path) <= 1e-6
    assert (path[-1].weights != 0).sum(1).max() > 45


@pytest.mark.parametrize("name", ["lasso", "nonnegative", "intercept"])
def test_debiasing_is_least_squares_on_the_support(name):
    members, y = problem(q=4)
    plain = PENALTIES[name]
    penalty = Penalty(nonnegative=plain.nonnegative, intercept=plain.intercept, debias=True)
    lam = 0.3 * lam_scale(members, y, penalty)
    support = recover(members, y, lam, plain).weights != 0
    found = recover(members, y, lam, penalty)
    assert (found.weights[~support] == 0).all()
    for row in range(4):
        columns = members[:, support[row]].numpy()
        goal = y[row].numpy()
        if plain.intercept:
            columns, goal = columns - columns.mean(0), goal - goal.mean()
        if plain.nonnegative:
            expected = nnls(columns, goal)[0]
        else:
            expected = np.linalg.lstsq(columns, goal, rcond=None)[0]
        assert np.abs(found.weights[row, support[row]].numpy() - expected).max() < 1e-8


@pytest.mark.parametrize("intercept", [False, True])
def test_ridge_is_scikit_learns_and_correlation_is_a_product(intercept):
    members, y = problem()
    lam = torch.tensor([0.1, 1, 3, 10, 1000.0]).double()
    found = recover(members, y, lam, Penalty(kind="ridge", intercept=intercept))
    for row in range(5):
        model = Ridge(float(lam[row]), fit_intercept=intercept, solver="svd").fit(members.numpy(), y[row].numpy())
        assert np.abs(found.weights[row].numpy() - model.coef_).max() < 1e-9
        assert math.isclose(found.intercepts[row], model.intercept_, abs_tol=1e-9)
    product = recover(members, y, penalty=Penalty(kind="correlation", intercept=intercept)).weights
    centre = members.mean(0) if intercept else 0
    assert torch.allclose(product, y @ (members - centre))


def test_supports_are_recovered_exactly_at_twice_the_rule_of_thumb():
    """K = 2 k log(n/k) measurements without noise; lam small, and weights of rounding size left out."""
    n, k, draws = 400, 8, 100
    n_subsets = round(2 * k * math.log(n / k))
    members = left_regular(n_subsets, n, 7, 5)
    weights, y = planted(members, draws, k, 0.0, 7)
    # magnitudes from 1/2 up: a support is a matter of definition where weights may be tiny
    weights = weights.sign() * (0.5 + weights.abs()) * (weights != 0)
    y = weights @ members.T
    found = recover(members, y, 1e-3 * lam_scale(members, y), tolerance=1e-6).weights
    assert (((found.abs() > 0.1) == (weights != 0)).all(1)).sum() >= 99


def test_measurements_of_nothing_recover_nothing():
    members, y = problem()
    y[1] = 0
    lam = 0.1 * lam_scale(members, y)
    found = recover(members, y, lam)
    assert (found.weights[1] == 0).all() and found.gaps[1] == 0 and (found.weights[0] != 0).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, y: (m, y, 0.0), "lam must be finite and > 0, got 0.0 for query 0"),
        (lambda m, y: (m, y, -1.0), "lam must be finite and > 0, got -1.0"),
        (lambda m, y: (m, y, torch.tensor([1, 1, float("nan"), 1, 1])), "got nan for query 2"),
        (lambda m, y: (m, y, torch.ones(4)), r"\(5,\), one a query, got shape \(4,\)"),
        (lambda m, y: (m, y, None), "lasso needs a lam > 0"),
        (lambda m, y: (m, torch.where(y == y[1, 2], torch.nan, y), 1.0), r"\[1, 2\] is nan"),
        (lambda m, y: (m, y[:, :-1], 1.0), r"\(q, K\) with K = 50, got shape \(5, 49\)"),
        (lambda m, y: (m, y[0], 1.0), r"\(q, K\) with K = 50, got shape \(50,\)"),
        (lambda m, y: (m, y[:0], 1.0), r"got shape \(0, 50\)"),
        (lambda m, y: (m[:1], y[:, :1], 1.0), r"K >= 2 subsets .* got \(1, 40\)"),
        (lambda m, y: (m[0], y, 1.0), r"must be \(K, n\), got shape \(40,\)"),
        (lambda m, y: (m * (torch.arange(40) != 7), y, 1.0), "column 7 of M is empty"),
        (lambda m, y: (m * (torch.arange(50) != 3)[:, None], y, 1.0), "row 3 of M is empty"),
        (lambda m, y: (m / m, y, 1.0), "must be finite"),
        (
            lambda m, y: (scipy.sparse.csc_array((m * (torch.arange(40) != 9)).numpy()), y, 1.0),
            "column 9 of M is empty",
        ),
    ],
)
def test_bad_input_is_named(change, message):
    members, y = problem()
    with pytest.raises(ValueError, match=message):
        recover(*change(members, y))


def test_bad_penalties_and_settings_are_named():
    members, y = problem()
    with pytest.raises(ValueError, match=r"unknown penalty 'huber', expected one of \['lasso'"):
        Penalty(kind="huber")
    with pytest.raises(ValueError, match="ridge must be finite and >= 0, got -1"):
        Penalty(ridge=-1)
    with pytest.raises(ValueError, match="for the lasso, got them with 'ridge'"):
        Penalty(kind="ridge", nonnegative=True)
    with pytest.raises(ValueError, match=r"correlation has no lam, got 1\.0"):
        recover(members, y, 1.0, Penalty(kind="correlation"))
    with pytest.raises(ValueError, match="tolerance must be finite and > 0, got 0"):
        recover(members, y, 1.0, tolerance=0)
    with pytest.raises(ValueError, match="at least one lam"):
        recover_path(members, y, [])
    with pytest.raises(RuntimeError, match=r"query \d was solved to a relative duality gap of .* tolerance 1\.0e-30"):
        recover(members, y, 1.0, tolerance=1e-30)


def test_nothing_warns():
    members, y = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recover(members, y.float(), 1.0, Penalty(debias=True, intercept=True)).predict(members)
