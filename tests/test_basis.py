"""The low-rank basis: exact at full rank, optimal below, honest about what it keeps."""

import json
from dataclasses import replace

import pytest
import torch
from toys import continuous, converged, labelled, random_problem

from tda_core import basis as basis_module
from tda_core import basis_fit
from tda_core.basis import Basis, BasisSettings
from tda_core.basis_fit import fit_basis
from tda_core.dynamics import Dynamics
from tda_core.problem import Problem
from tda_core.simulation import ForwardOnly, simulate

PLAIN = Dynamics(horizon=30, damping=0.1, momentum=0.5)
EXACT = Dynamics(horizon=60, damping=0.1)  # conjugate gradients, to convergence
FULL = BasisSettings(energy=1.0, rank=12)


def low_rank_scores(basis: Basis, queries, examples) -> torch.Tensor:
    z, strata = basis.read(queries)
    c = basis.coefficients(examples)
    return torch.stack([c[stratum] @ row for row, stratum in zip(z, strata, strict=True)])


@pytest.mark.parametrize("dynamics", [PLAIN, EXACT])
@pytest.mark.parametrize("layers", [(4, 5, 3), (4, 3)])
def test_full_rank_equals_the_derivative_along_each_response(dynamics, layers):
    problem, queries = random_problem(layers, n=12), labelled(8, seed=5)
    basis = fit_basis(problem, dynamics, queries, FULL).basis
    expected = simulate(problem, dynamics).scores(queries)
    torch.testing.assert_close(low_rank_scores(basis, queries, problem.train), expected, rtol=1e-7, atol=1e-9)
    assert basis.kept == pytest.approx(1)
    assert float(basis.residual(queries).max()) < 1e-5


def test_the_error_is_the_smallest_of_any_rank_and_falls():
    problem = random_problem(n=30)
    train = problem.train
    scores = simulate(problem, EXACT).scores(train)
    scale = 1 / scores.norm(dim=1, keepdim=True)
    singular, errors = torch.linalg.svdvals(scores * scale), []
    for rank in (1, 3, 6, 12):
        basis = fit_basis(problem, EXACT, train, BasisSettings(energy=1.0, rank=rank)).basis
        errors.append(float(((low_rank_scores(basis, train, train) - scores) * scale).norm()))
        assert errors[-1] == pytest.approx(float(singular[rank:].norm()), rel=1e-6)
    assert errors == sorted(errors, reverse=True)


def test_directions_of_each_class_serve_its_queries_better():
    problem, queries = random_problem((4, 6, 3), n=60), labelled(30, seed=5)
    kept = [
        fit_basis(problem, EXACT, queries, BasisSettings(energy=1.0, rank=4, by_label=by_label)).basis.kept
        for by_label in (False, True)
    ]
    assert kept[1] > kept[0] + 0.01


@pytest.mark.parametrize("by_label", [False, True])
def test_what_is_kept_is_the_mean_correlation_and_the_rank_the_least_that_keeps_it(by_label):
    problem, queries = random_problem(n=40), labelled(20, seed=5)
    basis = fit_basis(problem, EXACT, queries, BasisSettings(energy=1.0, keep=0.9, by_label=by_label)).basis
    found, full = low_rank_scores(basis, queries, problem.train), simulate(problem, EXACT).scores(queries)
    pairs = zip(found, full, strict=True)
    correlations = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
    assert basis.kept == pytest.approx(sum(correlations) / len(queries), abs=1e-6)
    assert basis.kept >= 0.9 and all(kept < 0.9 for k, kept in basis.kept_at.items() if k < basis.rank)


def test_what_is_kept_is_measured_on_examples_that_were_not_fitted():
    problem, queries = random_problem(n=40), labelled(20, seed=5)
    fitted = fit_basis(problem, EXACT, queries, BasisSettings(energy=1.0, rank=4, n_fit=20))
    assert len(fitted.rows) == 25 and fitted.coefficients.shape == (1, 25, 4)
    others = fitted.rows[20:]
    found = low_rank_scores(fitted.basis, queries, problem.train[others])
    full = simulate(problem, EXACT).scores(queries)[:, others]
    correlations = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(found, full, strict=True)]
    assert fitted.basis.kept == pytest.approx(sum(correlations) / len(queries), abs=1e-6)


def test_coefficients_from_gradients_are_those_from_responses_once_the_simulation_has_converged():
    problem, queries = converged(30), labelled(6, seed=5)
    settings = [BasisSettings(energy=1.0, rank=6, coefficients=how) for how in ("responses", "gradients")]
    first, second = (fit_basis(problem, EXACT, queries, setting).basis for setting in settings)
    new = labelled(5, seed=9)
    expected = low_rank_scores(first, queries, new)
    torch.testing.assert_close(low_rank_scores(second, queries, new), expected, rtol=1e-6, atol=1e-9)


def test_blocks_and_given_responses_change_nothing(monkeypatch):
    problem, queries = random_problem(n=20), labelled(6, seed=5)
    setting = BasisSettings(energy=1.0, rank=5)
    whole = fit_basis(problem, EXACT, queries, setting)
    rows = []
    inner = basis_module.last_response

    def spy(problem, dynamics, push, **options):
        rows.append(len(push))
        return inner(problem, dynamics, push, **options)

    monkeypatch.setattr(basis_module, "last_response", spy)
    small = replace(setting, block_bytes=6 * 8 * problem.n_parameters * 3 + 1)
    monkeypatch.setattr(basis_fit, "_n_fitted", lambda *_: 20)
    in_blocks = fit_basis(problem, EXACT, queries, small)
    assert max(rows) == 3 and sum(rows) == 20
    given = fit_basis(problem, EXACT, queries, setting, responses=simulate(problem, EXACT).responses)
    expected = low_rank_scores(whole.basis, queries, problem.train)
    for other in (in_blocks, given):
        found = low_rank_scores(other.basis, queries, problem.train)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_the_residual_estimates_the_share_that_is_missed():
    problem, queries = random_problem(n=40), labelled(20, seed=5)
    basis = fit_basis(problem, EXACT, queries, BasisSettings(energy=1.0, rank=3, sketch=4000)).basis
    full = simulate(problem, EXACT).scores(queries)
    missed = (low_rank_scores(basis, queries, problem.train) - full).norm(dim=1) / full.norm(dim=1)
    torch.testing.assert_close(basis.residual(queries), missed, rtol=0.1, atol=0.01)


def test_a_basis_comes_back_from_its_tensors_and_settings():
    problem, queries = random_problem(n=20), labelled(6, seed=5)
    basis = fit_basis(problem, EXACT, queries, BasisSettings(energy=0.9, rank=4, by_label=True)).basis
    back = Basis.restore(problem, basis.tensors(), json.loads(json.dumps(basis.settings())))
    assert back.fingerprint == basis.fingerprint and back.kept_at == basis.kept_at
    assert torch.equal(back.read(queries)[0], basis.read(queries)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be >= 1, or None to choose it, got 0"),
        ({"keep": 1.0}, r"keep must lie in \(0, 1\), got 1.0"),
        ({"n_fit": 0}, "n_fit must be >= 1, got 0"),
        ({"coefficients": "both"}, "unknown coefficients 'both'"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        BasisSettings(**changes)


def test_bad_input_is_named():
    problem, queries = random_problem(n=12), labelled(6, seed=5)
    with pytest.raises(ValueError, match=r"12 fitted examples and 43 parameters, got 13"):
        fit_basis(problem, PLAIN, queries, BasisSettings(rank=13))
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, 4\), got \(n, 5\)"):
        fit_basis(problem, PLAIN, labelled(6, d=5), FULL)
    with pytest.raises(ValueError, match=r"responses must be \(12, 43\), got \(3, 43\)"):
        fit_basis(problem, PLAIN, queries, FULL, responses=torch.zeros(3, 43))
    regression = random_problem((4, 5, 1))
    with pytest.raises(ValueError, match="by_label needs class labels"):
        fit_basis(regression, PLAIN, continuous(4), BasisSettings(by_label=True))
    one_class = Problem(problem.module, problem.theta, problem.loss, problem.train[problem.train.targets < 2])
    basis = fit_basis(one_class, PLAIN, queries[queries.targets < 2], BasisSettings(by_label=True, rank=2)).basis
    with pytest.raises(ValueError, match="no directions for queries of class 2"):
        basis.read(queries)


# -- group responses --------------------------------------------------------------------------------


def test_the_response_to_removing_a_group_is_the_sum_of_its_members():
    problem, groups = random_problem(n=12), torch.arange(12) % 3
    together, single = simulate(problem, PLAIN, groups=groups), simulate(problem, PLAIN)
    expected = torch.stack([single.responses[groups == group].sum(0) for group in range(3)])
    torch.testing.assert_close(together.responses, expected)
    assert isinstance(together, ForwardOnly) and together.scores(labelled(4)).shape == (4, 3)
    with pytest.raises(ValueError, match="these are 3 groups"):
        together.self_influence()


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (torch.arange(5), "groups must be 12 int64 numbers"),
        (torch.zeros(12), "groups must be 12 int64 numbers, got torch.float32"),
        (torch.tensor([0, 2] * 6), "without gaps, but look at 1"),
        (torch.tensor([0, -1] * 6), "without gaps, but look at -1"),
    ],
)
def test_bad_groups_are_named(groups, message):
    with pytest.raises(ValueError, match=message):
        simulate(random_problem(n=12), PLAIN, groups=groups)
