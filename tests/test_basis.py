"""A fitted basis: readings, coefficients of further examples, the residual, and the way to a file and back."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probes import Attention, problem_of, sequences
from toys import FLOAT64, Branching, continuous, generator, labelled, random_problem

from tda_core import basis as module
from tda_core.basis import Basis, BasisSettings, block_size, blocks, simulated
from tda_core.basis_fit import Fitted, fit_basis
from tda_core.dynamics import Dynamics
from tda_core.examples import Examples
from tda_core.probes import LayerProbe, TangentProbe
from tda_core.problem import Problem
from tda_core.simulation import simulate
from tda_core.store import load_tensors, save_tensors

QUICK, PLAIN = Dynamics(horizon=5), Dynamics(horizon=8, momentum=0.0, rate=0.2)
CONVERGED = Dynamics(horizon=80, damping=0.05)
QUERIES, NEW = labelled(6, seed=5), labelled(7, seed=6)
EXACT = BasisSettings(rank=6, energy=1.0)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def tangents() -> Problem:
    return problem_of(Branching())


def fitted(layers=(4, 5, 3), dynamics=QUICK, n=12, problem: Problem | None = None, **changes) -> Fitted:
    problem = random_problem(layers, n=n) if problem is None else problem
    held_out = QUERIES if problem.train.is_classification else continuous(6, seed=5)
    return fit_basis(problem, dynamics, held_out, replace(EXACT, **changes))


def products(basis: Basis, queries: Examples, c: torch.Tensor, mode: str | None = None) -> torch.Tensor:
    """z_q . c_b of q's stratum, one query at a time."""
    z, strata = basis.read(queries, mode)
    return torch.stack([c[stratum] @ row for row, stratum in zip(z, strata.tolist(), strict=True)])


# -- readings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "by_label"),
    [("layers", False), ("layers", True), ("tangents", False), ("tangents", True), ("regression", False)],
)
def test_a_reading_is_the_derivative_along_the_directions_of_the_stratum(kind, by_label):
    problem = {"layers": random_problem, "tangents": tangents, "regression": lambda: random_problem((4, 5, 1))}[kind]()
    queries = QUERIES if problem.train.is_classification else continuous(6, seed=5)
    basis = fitted(problem=problem, by_label=by_label).basis
    assert isinstance(basis.probe, TangentProbe if kind == "tangents" else LayerProbe)
    assert (basis.n_strata, basis.rank) == (3 if by_label else 1, 6)
    z, strata = basis.read(queries)
    assert z.shape == (6, 6)
    assert torch.equal(strata, queries.targets if by_label else torch.zeros(6, dtype=torch.int64))
    features = basis.probe.features(queries)
    for row, stratum, phi in zip(z, strata.tolist(), features, strict=True):
        close(row, basis.reading[stratum] @ phi)
    assert float(z.abs().max()) > 1e-3


@pytest.mark.parametrize("by_label", [False, True])
@pytest.mark.parametrize("kind", ["layers", "tangents"])
def test_each_query_is_read_alone_as_among_others(kind, by_label):
    basis = fitted(problem=tangents() if kind == "tangents" else None, by_label=by_label).basis
    z, strata = basis.read(QUERIES)
    for q in range(6):
        alone, stratum = basis.read(QUERIES[q : q + 1])
        close(alone[0], z[q], 1e-12)
        assert stratum.tolist() == [int(strata[q])]


@pytest.mark.parametrize("by_label", [False, True])
def test_both_modes_read_alike(by_label, monkeypatch):
    basis = fitted(by_label=by_label).basis
    seen = []
    original = LayerProbe.features
    monkeypatch.setattr(
        LayerProbe, "features", lambda self, e, mode="reverse": seen.append(mode) or original(self, e, mode)
    )
    close(basis.read(QUERIES, "forward")[0], basis.read(QUERIES)[0], 1e-12)
    close(basis.read(QUERIES, "reverse")[0], basis.read(QUERIES)[0], 0)
    assert seen == ["forward", "reverse", "reverse", "reverse"]
    own = fitted(problem=tangents(), by_label=by_label).basis
    close(own.read(QUERIES, "forward")[0], own.read(QUERIES)[0], 0)


@settings(deadline=None, max_examples=10)
@given(order=st.permutations(range(6)), by_label=st.booleans())
def test_readings_follow_a_permutation_of_the_queries(order, by_label):
    basis, order = SHARED[by_label], torch.tensor(order)
    z, strata = basis.read(QUERIES)
    found, own = basis.read(QUERIES[order])
    close(found, z[order], 1e-12)
    assert torch.equal(own, strata[order])


# -- coefficients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficients", ["responses", "gradients"])
@pytest.mark.parametrize("by_label", [False, True])
@pytest.mark.parametrize("kind", ["layers", "tangents"])
def test_coefficients_of_the_fitted_examples_are_orthonormal_and_found_again(kind, by_label, coefficients):
    problem = tangents() if kind == "tangents" else random_problem()
    found = fitted(problem=problem, by_label=by_label, coefficients=coefficients, rank=3)
    basis = found.basis
    assert found.coefficients.shape == (basis.n_strata, 12, 3)
    for c, reading in zip(found.coefficients, basis.reading, strict=True):
        used = int(reading.any(1).sum())
        close(c[:, :used].T @ c[:, :used], torch.eye(used, dtype=FLOAT64))
        assert not c[:, used:].any()
    close(basis.coefficients(problem.train[found.rows]), found.coefficients)


def test_coefficients_are_linear_in_responses_or_gradients():
    problem = random_problem()
    method, coordinates = simulate(problem, QUICK), SHARED[False].probe.coordinates
    for name, rows in (("responses", method.responses), ("gradients", problem.gradients(problem.train))):
        basis = fitted(coefficients=name, by_label=True).basis
        expected = torch.stack([coordinates(rows) @ writing.T for writing in basis.writing])
        close(basis.coefficients(problem.train), expected)


@pytest.mark.parametrize("coefficients", ["responses", "gradients"])
@pytest.mark.parametrize("dynamics", [PLAIN, replace(PLAIN, momentum=0.6, rate=0.1), CONVERGED])
def test_further_examples_score_what_their_own_simulation_does(dynamics, coefficients):
    """At full rank, where the fitted examples span all that responses can be."""
    problem = random_problem((4, 3), n=30)
    basis = fitted(problem=problem, dynamics=dynamics, rank=15, coefficients=coefficients).basis
    expected = problem.gradients(QUERIES) @ simulated(problem, dynamics, NEW).T
    close(products(basis, QUERIES, basis.coefficients(NEW)), expected, 1e-7)
    assert float(expected.abs().max()) > 1e-2


@settings(deadline=None, max_examples=10)
@given(order=st.permutations(range(7)), name=st.sampled_from(["responses", "gradients"]), by_label=st.booleans())
def test_coefficients_follow_a_permutation_of_the_examples(order, name, by_label):
    basis, order = SHARED[by_label], torch.tensor(order)
    basis = replace(basis, setting=replace(basis.setting, coefficients=name))
    close(basis.coefficients(NEW[order]), basis.coefficients(NEW)[:, order], 1e-10)
    close(basis.coefficients(NEW[order[:1]]), basis.coefficients(NEW)[:, order[:1]], 1e-10)


@settings(deadline=None, max_examples=10)
@given(a=st.floats(-5, 5), b=st.floats(-5, 5), seed=st.integers(0, 99), by_label=st.booleans())
def test_scores_are_linear_in_responses(a, b, seed, by_label):
    basis = SHARED[by_label]
    r, s = (torch.randn(7, basis.probe.n_features, generator=generator(seed + i), dtype=FLOAT64) for i in range(2))
    mixed, first, second = (products(basis, QUERIES, basis.coefficients(NEW, x)) for x in (a * r + b * s, r, s))
    close(mixed, a * first + b * second, 1e-8)


def test_known_coordinates_are_not_simulated_again(monkeypatch):
    basis = fitted().basis
    expected = basis.coefficients(NEW)
    coordinates = basis.probe.coordinates(simulated(basis.problem, QUICK, NEW))
    monkeypatch.setattr(module, "last_response", None)
    close(basis.coefficients(NEW, coordinates), expected, 1e-12)
    close(basis.coefficients(NEW[:3], coordinates[:3]), expected[:, :3], 1e-12)
    with pytest.raises(TypeError):
        basis.coefficients(NEW)


@pytest.mark.parametrize("kind", ["layers", "tangents"])
@pytest.mark.parametrize("coefficients", ["responses", "gradients"])
def test_coefficients_are_found_in_blocks_of_the_size_that_is_set(kind, coefficients, monkeypatch):
    basis = fitted(problem=tangents() if kind == "tangents" else None, coefficients=coefficients).basis
    expected = basis.coefficients(NEW)
    sizes = []
    response, gradients, features = module.last_response, Problem.gradients, LayerProbe.features

    def spy(problem, dynamics, push, **keywords):
        sizes.append(len(push))
        return response(problem, dynamics, push, **keywords)

    monkeypatch.setattr(module, "last_response", spy)
    monkeypatch.setattr(Problem, "gradients", lambda self, e, *rest: sizes.append(len(e)) or gradients(self, e, *rest))
    monkeypatch.setattr(LayerProbe, "features", lambda self, e, *rest: sizes.append(len(e)) or features(self, e, *rest))
    small = replace(basis, setting=replace(basis.setting, block_bytes=6 * 8 * basis.problem.n_parameters * 3))
    close(small.coefficients(NEW), expected, 1e-10)
    assert set(sizes) == {3, 1}
    assert sum(sizes) == (14 if coefficients == "responses" else 7)  # a gradient pushes each simulation


@pytest.mark.parametrize(("rows", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (50, [7])])
def test_blocks_are_parts_in_order(rows, sizes):
    problem = random_problem()
    for bytes_, expected in ((6 * 8 * 43 * rows, rows), (6 * 8 * 43 * (rows + 1) - 1, rows)):
        setting = BasisSettings(block_bytes=bytes_)
        assert block_size(problem, setting) == expected
    parts = blocks(problem, NEW, setting)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat([part.inputs for part in parts]), NEW.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts]), NEW.targets)
    assert block_size(problem, BasisSettings(block_bytes=1)) == 1
    single = Problem(problem.module, problem.theta.float(), problem.loss, problem.train)
    assert block_size(single, BasisSettings(block_bytes=6 * 4 * 43 * 5)) == 5


def test_simulated_responses_are_those_of_the_simulation():
    problem = random_problem()
    for dynamics in (PLAIN, CONVERGED, replace(PLAIN, batch_size=4, tail=0.5)):
        expected = simulate(problem, dynamics).responses
        close(simulated(problem, dynamics, problem.train), expected, 1e-12)
        close(simulated(problem, dynamics, problem.train[torch.tensor([7, 2])]), expected[[7, 2]], 1e-9)


# -- the residual -----------------------------------------------------------------------------------


@pytest.mark.parametrize("by_label", [False, True])
@pytest.mark.parametrize("kind", ["layers", "tangents"])
def test_the_residual_is_the_share_that_is_missed(kind, by_label):
    problem = tangents() if kind == "tangents" else random_problem(n=16)
    found = fitted(problem=problem, rank=2, by_label=by_label, sketch=4000)
    full = problem.gradients(QUERIES) @ simulate(problem, QUICK).responses[found.rows].T
    share = (full - products(found.basis, QUERIES, found.coefficients)).norm(dim=1) / full.norm(dim=1)
    assert float(share.max()) > 0.2
    residual = found.basis.residual(QUERIES)
    assert residual.shape == (6,)
    torch.testing.assert_close(residual, share, rtol=0.06, atol=1e-3)


def test_the_residual_is_over_the_fitted_examples_alone():
    problem = random_problem(n=30)
    found = fitted(problem=problem, rank=2, n_fit=12, sketch=4000)
    full = problem.gradients(QUERIES) @ simulate(problem, QUICK).responses[found.rows[:12]].T
    share = (full - products(found.basis, QUERIES, found.coefficients[:, :12])).norm(dim=1) / full.norm(dim=1)
    torch.testing.assert_close(found.basis.residual(QUERIES), share, rtol=0.06, atol=1e-3)


@pytest.mark.parametrize("by_label", [False, True])
def test_nothing_is_missed_at_full_rank_and_the_residual_lies_between_0_and_1(by_label):
    full = fitted((4, 3), n=80, rank=15, by_label=by_label).basis
    assert float(full.residual(NEW).max()) < 1e-6
    for rank in (1, 2, 4):
        basis = fitted(rank=rank, by_label=by_label).basis
        assert bool(((basis.residual(NEW) >= 0) & (basis.residual(NEW) <= 1)).all())
        close(basis.residual(NEW[torch.arange(7).flip(0)]), basis.residual(NEW).flip(0), 1e-8)


def test_the_residual_does_not_depend_on_the_size_of_a_query_even_in_single_precision():
    problem = random_problem()
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        own = Problem(problem.module, problem.theta.to(dtype), problem.loss, problem.train)
        basis = fitted(problem=own, rank=2).basis
        expected = basis.residual(QUERIES)
        tiny = Problem(own.module, own.theta, lambda o, y, loss=own.loss: 1e-22 * loss(o, y), own.train)
        found = replace(basis, problem=tiny, probe=replace(basis.probe, problem=tiny)).residual(QUERIES)
        assert found.dtype == dtype
        close(found, expected, tolerance)


# -- tensors, settings and back ---------------------------------------------------------------------


def fitted_with_factors() -> Fitted:
    problem = random_problem((8, 9, 3))
    return fit_basis(problem, QUICK, labelled(6, 8, seed=5), replace(EXACT, rank=3, energy=0.8))


CASES = {
    "factors": fitted_with_factors,
    "layers": lambda: fitted(),
    "by_label": lambda: fitted(by_label=True, coefficients="gradients"),
    "tangents": lambda: fitted(problem=tangents()),
    "searched": lambda: fitted(rank=None, dynamics=Dynamics(horizon=3)),
    "one_layer": lambda: fitted(problem=problem_of(torch.nn.Linear(4, 3))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_basis_comes_back_equal_bit_for_bit(case, tmp_path):
    basis = CASES[case]().basis
    if case == "factors":
        assert any(name.startswith("factor/") for name in basis.tensors())
    described = json.loads(json.dumps(basis.settings()))
    assert described == basis.settings()
    save_tensors(tmp_path / "basis", basis.tensors(), basis.settings())
    for tensors, kept in ((basis.tensors(), described), load_tensors(tmp_path / "basis")):
        again = Basis.restore(basis.problem, tensors, kept)
        assert type(again.probe) is type(basis.probe)
        assert (again.setting, again.dynamics) == (basis.setting, basis.dynamics)
        assert (again.kept, again.kept_at) == (basis.kept, basis.kept_at)
        assert all(isinstance(k, int) for k in again.kept_at)
        assert again.tensors().keys() == basis.tensors().keys()
        assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in basis.tensors().items())
        assert again.fingerprint == basis.fingerprint
        width = basis.problem.train.inputs.shape[1]
        queries = labelled(6, width, seed=5)
        assert torch.equal(again.read(queries)[0], basis.read(queries)[0])
        assert torch.equal(again.coefficients(queries), basis.coefficients(queries))
        assert torch.equal(again.residual(queries), basis.residual(queries))


def test_the_fingerprint_is_of_all_tensors_and_settings():
    basis = fitted(by_label=True).basis
    assert len(basis.fingerprint) == 16
    assert fitted(by_label=True).basis.fingerprint == basis.fingerprint
    changed = [replace(basis, **{name: 2 * getattr(basis, name)}) for name in
               ("reading", "writing", "sketched", "sketched_by")]  # fmt: skip
    changed += [replace(basis, kept=0.1), replace(basis, kept_at={1: 0.5}), replace(basis, dynamics=CONVERGED)]
    changed += [replace(basis, setting=replace(basis.setting, seed=1)), fitted_with_factors().basis]
    assert len({basis.fingerprint, *(other.fingerprint for other in changed)}) == 10


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be >= 1, or None to choose it, got 0"),
        ({"rank": -3}, "rank must be >= 1, or None to choose it, got -3"),
        ({"keep": 0.0}, r"keep must lie in \(0, 1\), got 0.0"),
        ({"keep": 1.0}, r"keep must lie in \(0, 1\), got 1.0"),
        ({"keep": -0.1}, r"keep must lie in \(0, 1\), got -0.1"),
        ({"keep": float("nan")}, r"keep must lie in \(0, 1\), got nan"),
        ({"energy": 0.0}, r"energy must lie in \(0, 1\], got 0.0"),
        ({"energy": 1.01}, r"energy must lie in \(0, 1\], got 1.01"),
        ({"energy": float("nan")}, r"energy must lie in \(0, 1\], got nan"),
        ({"n_fit": 0}, "n_fit must be >= 1, got 0"),
        ({"sketch": 0}, "sketch must be >= 1, got 0"),
        ({"block_bytes": 0}, "block_bytes must be >= 1, got 0"),
        ({"coefficients": "curvatures"}, r"unknown coefficients 'curvatures', expected one of \('responses', 'grad"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        BasisSettings(**changes)


@pytest.mark.parametrize("by_label", [False, True])
@pytest.mark.parametrize("kind", ["layers", "tangents"])
@pytest.mark.parametrize("call", ["read", "coefficients", "residual"])
@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        (labelled(3).inputs, TypeError, "got Tensor"),
        (labelled(3, d=5), ValueError, r"inputs must have shape \(n, 4\), got \(n, 5\)"),
        (Examples(torch.zeros(1, 4), torch.tensor([5])), ValueError, "label 5 is out of range for 3 outputs"),
        (continuous(3), ValueError, "targets must be torch.int64 as in training"),
    ],
)
def test_examples_that_do_not_fit_are_refused(by_label, kind, call, queries, error, message):
    basis = (SHARED if kind == "layers" else TANGENT_SHARED)[by_label]
    with pytest.raises(error, match=message):
        getattr(basis, call)(queries)


@pytest.mark.parametrize("by_label", [False, True])
def test_impossible_modes_are_refused(by_label):
    with pytest.raises(ValueError, match="unknown mode 'backward', expected one of"):
        SHARED[by_label].read(QUERIES, "backward")
    with pytest.raises(ValueError, match="a TangentProbe reads in mode 'forward' only, got 'reverse'"):
        TANGENT_SHARED[by_label].read(QUERIES, "reverse")


def test_sequences_are_read_in_reverse_mode_only():
    problem, queries = problem_of(Attention(), sequences(10)), sequences(4, seed=3)
    found = fit_basis(problem, CONVERGED, queries, replace(EXACT, rank=10))
    full = problem.gradients(queries) @ simulate(problem, CONVERGED).responses[found.rows].T
    close(products(found.basis, queries, found.coefficients), full, 1e-6)
    with pytest.raises(ValueError, match="forward mode is for one position an example"):
        found.basis.read(queries, "forward")


@pytest.mark.parametrize("shape", [(6, 43), (7, 42), (1, 43), (7,)])
def test_coordinates_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"coordinates must be \(7, 43\), got"):
        SHARED[False].coefficients(NEW, torch.zeros(shape, dtype=FLOAT64))


@pytest.mark.parametrize("kind", ["layers", "tangents"])
def test_queries_of_a_class_that_no_fitted_example_has_are_refused(kind):
    problem = random_problem() if kind == "layers" else tangents()
    two = Problem(problem.module, problem.theta, problem.loss, Examples(NEW.inputs, NEW.targets.clamp(max=1)))
    seen = Examples(QUERIES.inputs, QUERIES.targets.clamp(max=1))
    basis = fit_basis(two, QUICK, seen, replace(EXACT, by_label=True)).basis
    assert basis.n_strata == 3
    basis.read(seen)
    for queries in (
        Examples(QUERIES.inputs[:1], torch.tensor([2])),
        Examples(QUERIES.inputs[:2], torch.tensor([0, 2])),
    ):
        for call in (basis.read, basis.residual):
            with pytest.raises(ValueError, match="no directions for queries of class 2: no fitted example is of it"):
                call(queries)
    fit_basis(two, QUICK, seen, EXACT).basis.read(queries)  # one stratum serves all


SHARED = {by_label: fitted(by_label=by_label).basis for by_label in (False, True)}
TANGENT_SHARED = {by_label: fitted(problem=tangents(), by_label=by_label).basis for by_label in (False, True)}
