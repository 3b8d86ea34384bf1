"""cvxpy as the reference: it agrees with the batched solver, is compiled once, and no bad status passes."""

import itertools

import cvxpy
import numpy as np
import pytest
import torch
from test_recovery import PENALTIES, problem, sklearn_weights

from tda_core.recovery import Penalty, lam_scale, recover
from tda_core.recovery_cvxpy import Objective, Reference, debiased, run

TIGHT = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}


def reference(members, penalty, **options):
    return Reference(members, Objective(penalty.ridge, penalty.nonnegative, penalty.intercept), **options)


@pytest.mark.parametrize("share", [0.03, 0.3])
@pytest.mark.parametrize("name", PENALTIES)
def test_cvxpy_batched_solver_and_scikit_learn_agree(name, share):
    members, y = problem(q=3)
    penalty = PENALTIES[name]
    lam = share * lam_scale(members, y, penalty)
    expected = reference(members, penalty).weights(y, lam, **TIGHT)
    found = recover(members, y, lam, penalty, tolerance=1e-11)
    assert (found.weights - expected).abs().max() < 1e-5
    assert (sklearn_weights(members, y, lam, penalty) - expected).abs().max() < 1e-5
    assert abs(reference(members, penalty).solve(y[0], float(lam[0]), **TIGHT)[1] - float(found.intercepts[0])) < 1e-5


@pytest.mark.parametrize("intercept", [False, True])
def test_group_lasso_is_zero_or_stationary_by_group(intercept):
    members, y = problem()
    groups = np.arange(40) // 4 % 9  # of several sizes
    solver = Reference(members, Objective(groups=groups.tolist(), intercept=intercept))
    rest = (y[0] - y[0].mean() if intercept else y[0]).numpy()
    pulls = [np.linalg.norm(members.numpy()[:, groups == g].T @ rest) / np.sqrt((groups == g).sum()) for g in range(9)]
    lam = 0.4 * max(pulls)
    weights, shift = solver.solve(y[0], lam, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    slope = members.numpy().T @ (y[0].numpy() - shift - members.numpy() @ weights)
    kinds = set()
    for group in range(9):
        own, bound = weights[groups == group], lam * np.sqrt((groups == group).sum())
        zero = np.linalg.norm(own) < 1e-5
        kinds.add(zero)
        if zero:
            assert np.linalg.norm(slope[groups == group]) <= bound * (1 + 1e-5)
        else:
            assert np.allclose(slope[groups == group], bound * own / np.linalg.norm(own), atol=1e-3)
    assert kinds == {True, False}


def test_groups_of_one_are_the_lasso():
    members, y = problem()
    single = Reference(members, Objective(groups=range(40))).solve(y[1], 2.0, **TIGHT)[0]
    assert np.abs(single - recover(members, y, 2.0, tolerance=1e-11).weights[1].numpy()).max() < 1e-5


def test_debiased_refit_agrees():
    members, y = problem()
    lam = 0.2 * lam_scale(members, y)
    plain = recover(members, y, lam).weights.numpy()
    found = recover(members, y, lam, Penalty(debias=True)).weights.numpy()
    for row in range(3):
        assert np.abs(debiased(members, y[row], plain[row]) - found[row]).max() < 1e-5
    assert (debiased(members, y[0], np.zeros(40)) == 0).all()


def test_a_problem_is_compiled_once_for_many_queries(monkeypatch):
    members, y = problem()
    solver, compiled = Reference(members), []
    construct = cvxpy.Problem._construct_chain
    monkeypatch.setattr(
        cvxpy.Problem, "_construct_chain", lambda self, **options: compiled.append(1) or construct(self, **options)
    )
    weights = [solver.solve(row, lam)[0] for row, lam in zip(y, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True)]
    assert compiled == [1]
    assert solver.problem.is_dcp(dpp=True)
    assert all((np.abs(a - b) > 1e-3).any() for a, b in itertools.pairwise(weights))


def test_no_status_but_optimal_passes():
    x = cvxpy.Variable()
    with pytest.raises(RuntimeError, match="CLARABEL ended with status 'infeasible', expected 'optimal'"):
        run(cvxpy.Problem(cvxpy.Minimize(x), [x >= 1, x <= 0]), "CLARABEL")
    with pytest.raises(RuntimeError, match="CLARABEL ended with status 'unbounded'"):
        run(cvxpy.Problem(cvxpy.Minimize(x)), "CLARABEL")
    members, y = problem()
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match=r"CLARABEL ended with status '.*limit'"):
        Reference(members).solve(y[0], 1.0, max_iter=2)


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
def test_an_inaccurate_solution_is_refused(monkeypatch):
    members, y = problem()
    solver = Reference(members)
    monkeypatch.setattr(cvxpy.Problem, "status", property(lambda _: cvxpy.OPTIMAL_INACCURATE))
    with pytest.raises(RuntimeError, match="status 'optimal_inaccurate'"):
        solver.solve(y[0], 1.0)


def test_bad_input_is_named():
    members, y = problem()
    with pytest.raises(ValueError, match=r"unknown solver 'GUROBY', expected one of \['CLARABEL'"):
        Reference(members, solver="GUROBY")
    with pytest.raises(ValueError, match=r"lam must be finite and > 0, got 0"):
        Reference(members).solve(y[0], 0)
    with pytest.raises(ValueError, match=r"\[0, 3\] is nan"):
        Reference(members).solve(torch.where(torch.arange(50) == 3, torch.nan, y[0]), 1.0)
    with pytest.raises(ValueError, match="K = 50, got shape"):
        Reference(members).solve(y[0, 1:], 1.0)
    with pytest.raises(ValueError, match=r"group of each of 40 examples, got shape \(3,\)"):
        Reference(members, Objective(groups=[0, 1, 2]))
    with pytest.raises(ValueError, match="ridge must be finite"):
        Objective(ridge=-2)
    members[:, 0] = 1
    with pytest.raises(ValueError, match="column 3 of M is empty"):
        Reference(members * (torch.arange(40) != 3))
