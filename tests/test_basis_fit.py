"""Fitting a basis: exact at full rank, optimal below, measured on others, and never more than a block in memory."""

import logging
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probes import Attention, problem_of, sequences
from toys import FLOAT64, Branching, continuous, labelled, random_problem

from tda_core import basis as basis_module
from tda_core import basis_fit as module
from tda_core.basis import BasisSettings, block_size
from tda_core.basis_fit import Fitted, fit_basis
from tda_core.dynamics import Dynamics
from tda_core.examples import Examples
from tda_core.probes import LayerProbe, TangentProbe
from tda_core.problem import Problem
from tda_core.simulation import ForwardOnly, simulate

QUICK, PLAIN = Dynamics(horizon=5), Dynamics(horizon=8, momentum=0.0, rate=0.1)
HEAVY = replace(PLAIN, momentum=0.6)
CONVERGED = Dynamics(horizon=80, damping=0.05)
QUERIES = labelled(9, seed=5)
EXACT = BasisSettings(energy=1.0)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def held_out(problem: Problem) -> Examples:
    shape = problem.train.inputs.shape[1:]
    if not problem.train.is_classification:
        return continuous(9, seed=5)
    flat = labelled(9, shape.numel(), seed=5)
    return Examples(flat.inputs.view(9, *shape), flat.targets)


def fit(problem: Problem, dynamics: Dynamics = QUICK, *, responses=None, **changes) -> Fitted:
    return fit_basis(problem, dynamics, held_out(problem), replace(EXACT, **changes), responses=responses)


def products(found: Fitted, queries: Examples, rank: int | None = None) -> torch.Tensor:
    """z_q . c_b of q's stratum over the simulated examples, by the first directions alone."""
    z, strata = found.basis.read(queries)
    c = found.coefficients[..., :rank]
    return torch.stack([c[stratum] @ row[:rank] for row, stratum in zip(z, strata.tolist(), strict=True)])


@cache
def shared() -> Problem:
    return random_problem()


@cache
def full_scores(n: int = 12) -> torch.Tensor:
    """Of the training examples as queries: (n, n)."""
    problem = random_problem(n=n)
    return simulate(problem, QUICK).scores(problem.train)


# -- full rank --------------------------------------------------------------------------------------

PROBLEMS = {
    "more_parameters": (lambda: random_problem(), 12),
    "more_examples": (lambda: random_problem((4, 3), n=30), 15),
    "regression": (lambda: random_problem((4, 5, 1)), 12),
    "linear_regression": (lambda: random_problem((4, 1), n=20), 5),
    "tangents": (lambda: problem_of(Branching()), 12),
    "sequences": (lambda: problem_of(Attention(), sequences(10)), 10),
    "decayed": (lambda: random_problem(weight_decay=0.1), 12),
}


@cache
def simulation(name: str, dynamics: Dynamics) -> ForwardOnly:
    return simulate(PROBLEMS[name][0](), dynamics)


@pytest.mark.parametrize("coefficients", ["responses", "gradients"])
@pytest.mark.parametrize("dynamics", [PLAIN, CONVERGED], ids=["plain", "converged"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_at_full_rank_scores_are_those_of_the_simulation(name, dynamics, coefficients):
    method, rank = simulation(name, dynamics), PROBLEMS[name][1]
    problem = method.problem
    found = fit(problem, dynamics, rank=rank, coefficients=coefficients, responses=method.responses)
    assert isinstance(found.basis.probe, TangentProbe if name == "tangents" else LayerProbe)
    assert found.basis.rank == rank
    assert found.coefficients.shape == (1, len(problem.train), rank)
    assert sorted(found.rows.tolist()) == list(range(len(problem.train)))
    for queries in (held_out(problem), problem.train):
        expected = method.scores(queries)[:, found.rows]
        close(products(found, queries), expected, 1e-6 * float(expected.abs().max()))
    assert found.basis.kept == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("coefficients", ["responses", "gradients"])
@pytest.mark.parametrize("dynamics", [PLAIN, CONVERGED], ids=["plain", "converged"])
def test_directions_by_label_at_full_rank(dynamics, coefficients):
    problem = random_problem((4, 3), n=80)
    assert int(problem.train.targets.bincount().min()) >= 10  # as many as the gradients of a class have dimensions
    method = simulate(problem, dynamics)
    found = fit(problem, dynamics, rank=15, by_label=True, coefficients=coefficients, responses=method.responses)
    assert found.basis.n_strata == 3
    assert found.coefficients.shape == (3, 80, 15)
    for queries in (QUERIES, problem.train):
        close(products(found, queries), method.scores(queries)[:, found.rows], 1e-6)


@pytest.mark.parametrize("by_label", [False, True])
def test_queries_like_the_fitted_examples_are_exact_at_the_rank_of_their_stratum(by_label):
    """More parameters than examples: with directions by label only the fitted examples are certain to be exact."""
    problem = shared()
    found = fit(problem, rank=12, by_label=by_label)
    close(products(found, problem.train), full_scores()[:, found.rows], 1e-7)


def test_factors_change_the_scores_to_those_of_their_probe():
    problem = random_problem((8, 9, 3), n=30)
    method = simulate(problem, QUICK)
    found = fit(problem, rank=30, energy=0.8)
    probe = found.basis.probe
    assert probe.n_features < problem.n_parameters
    queries = held_out(problem)
    expected = probe.features(queries) @ probe.coordinates(method.responses[found.rows]).T
    close(products(found, queries), expected, 1e-6)
    assert float((expected - method.scores(queries)[:, found.rows]).norm() / expected.norm()) > 0.01


def test_single_precision_is_exact_to_its_rounding():
    problem = shared()
    single = Problem(problem.module, problem.theta.float(), problem.loss, problem.train)
    method = simulate(single, CONVERGED)
    found = fit(single, CONVERGED, rank=12)
    assert found.basis.reading.dtype == found.coefficients.dtype == torch.float32
    expected = method.scores(QUERIES)[:, found.rows]
    assert float((products(found, QUERIES) - expected).norm() / expected.norm()) < 1e-3


# -- below full rank: what a singular value decomposition does ---------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
@pytest.mark.parametrize("name", ["layers", "tangents"])
def test_directions_are_the_singular_vectors_of_scores_in_rows_of_unit_length(name, rank):
    problem = random_problem(n=30) if name == "layers" else problem_of(Branching(), labelled(30))
    found = fit(problem, rank=rank)
    scores = simulate(problem, QUICK).scores(problem.train)[found.rows][:, found.rows].numpy()
    length = np.linalg.norm(scores, axis=1, keepdims=True)
    _, sigma, right = np.linalg.svd(scores / length)
    # each direction up to its sign, and the scores without any
    match = found.coefficients[0].numpy().T @ right[:rank].T
    np.testing.assert_allclose(np.abs(match), np.eye(rank), atol=1e-6)
    expected = scores @ right[:rank].T @ right[:rank]
    close(products(found, problem.train[found.rows]).numpy(), expected, 1e-7)
    missed = np.linalg.norm((products(found, problem.train[found.rows]).numpy() - scores) / length)
    assert missed == pytest.approx(np.sqrt((sigma[rank:] ** 2).sum()), rel=1e-7)


def test_directions_by_label_are_optimal_for_the_queries_of_each_label():
    problem = random_problem(n=30)
    found = fit(problem, rank=3, by_label=True)
    rows = found.rows
    scores = simulate(problem, QUICK).scores(problem.train)[:, rows]
    scores = scores / scores.norm(dim=1, keepdim=True)
    strata = found.basis.read(problem.train)[1]
    for label in range(3):
        own = (problem.train.targets == label).nonzero()[:, 0]
        sigma = torch.linalg.svdvals(scores[own])
        c = found.coefficients[label]
        missed = (scores[own] - scores[own] @ c @ c.T).norm()
        assert float(missed) == pytest.approx(float((sigma[3:] ** 2).sum().sqrt()), rel=1e-7)
        assert torch.equal(strata[own], torch.full((len(own),), label))
    one = fit(problem, rank=3)
    whole = simulate(problem, QUICK).scores(problem.train)[:, rows]
    size = whole.norm(dim=1, keepdim=True)
    assert ((products(found, problem.train) - whole) / size).norm() < (
        ((products(one, problem.train) - whole[:, _places(rows, one.rows)]) / size).norm()
    )


def _places(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return torch.stack([(rows == other).nonzero()[0, 0] for other in others])


@pytest.mark.parametrize("by_label", [False, True])
def test_the_error_falls_with_every_direction(by_label):
    problem = shared()
    found = fit(problem, rank=12, by_label=by_label)
    full = full_scores()[:, found.rows]
    size = full.norm(dim=1, keepdim=True)
    errors = [float(((products(found, problem.train, rank) - full) / size).norm()) for rank in range(13)]
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(errors))
    assert errors[0] == pytest.approx(12**0.5)
    assert errors[2] < 0.9 * errors[0]
    assert errors[12] < 1e-6


def test_every_query_counts_alike_however_large_its_loss():
    problem = shared()
    method = simulate(problem, QUICK)
    probe = fit(problem, rank=4).basis.probe
    features, coordinates = probe.features(problem.train), probe.coordinates(method.responses)
    setting = replace(EXACT, rank=4)
    expected = module._subspace(features, coordinates, slice(None), setting)
    size = torch.logspace(-12, 12, 12, dtype=FLOAT64)[:, None]
    found = module._subspace(features * size, coordinates, slice(None), setting)
    for own, other in zip(found, expected, strict=True):
        close(own, other, 1e-6)


@pytest.mark.parametrize("by_label", [False, True])
def test_fewer_directions_are_the_first_of_more(by_label):
    problem = shared()
    whole = fit(problem, rank=12, by_label=by_label)
    for rank in (1, 3, 7):
        cut = fit(problem, rank=rank, by_label=by_label)
        for name in ("reading", "writing"):
            close(getattr(cut.basis, name), getattr(whole.basis, name)[:, :rank], 1e-7)
        close(cut.coefficients, whole.coefficients[..., :rank], 1e-7)
        close(cut.basis.sketched_by, whole.basis.sketched_by[..., :rank], 1e-6)
        close(cut.basis.sketched, whole.basis.sketched, 1e-12)
        assert torch.equal(cut.rows, whole.rows)


def test_a_stratum_with_fewer_directions_is_filled_up_with_zeros():
    problem = shared()
    counts = problem.train.targets.bincount(minlength=3)
    assert int(counts.min()) < int(counts.max())
    found = fit(problem, rank=int(counts.max()), by_label=True)
    for label, count in enumerate(counts.tolist()):
        for tensor in (found.basis.reading[label], found.basis.writing[label], found.coefficients[label].T):
            assert bool(tensor[:count].any(1).all())
            assert not tensor[count:].any()
    # more directions than the scores have dimensions are filled up alike: shifting all logits changes nothing
    linear = fit(random_problem((4, 3), n=30), rank=15).basis
    assert not linear.reading[0, 10:].any()
    assert linear.reading[0, 9].any()


# -- coefficients and sketches ----------------------------------------------------------------------


@pytest.mark.parametrize("by_label", [False, True])
@pytest.mark.parametrize("dynamics", [PLAIN, HEAVY, CONVERGED], ids=["plain", "heavy", "converged"])
def test_gradients_give_the_coefficients_of_responses(dynamics, by_label):
    """The simulated inverse curvature is symmetric: a polynomial in the curvature, or the inverse itself."""
    problem = random_problem(n=20)
    new = labelled(5, seed=9)
    one, other = (
        fit(problem, dynamics, rank=4, by_label=by_label, coefficients=name) for name in ("responses", "gradients")
    )
    close(one.coefficients, other.coefficients, 1e-6)
    close(one.basis.reading, other.basis.reading, 1e-6)
    close(one.basis.coefficients(new), other.basis.coefficients(new), 1e-6)
    assert not torch.allclose(one.basis.writing, other.basis.writing, atol=1e-3)


def test_gradients_do_not_give_them_before_the_adaptive_simulation_has_converged():
    problem = random_problem(n=20)
    new = labelled(5, seed=9)
    early = Dynamics(horizon=2, damping=1e-3)
    one, other = (fit(problem, early, rank=4, coefficients=name).basis for name in ("responses", "gradients"))
    assert not torch.allclose(one.coefficients(new), other.coefficients(new), atol=1e-2)


def test_sketches_are_signed_sums_over_the_fitted_examples():
    problem = random_problem(n=20)
    responses = simulate(problem, QUICK).responses
    found = fit(problem, rank=4, by_label=True, sketch=24, n_fit=12)
    fitted = found.rows[:12]
    # more sums than examples: the signs are what solves for both sides
    signs = torch.linalg.lstsq(responses[fitted].T, found.basis.sketched.T).solution.T
    assert found.basis.sketched.shape == (24, problem.n_parameters)
    close(signs.abs(), torch.ones(24, 12, dtype=FLOAT64), 1e-6)
    assert 80 < int((signs > 0).sum()) < 208  # of 288
    assert len(signs.round().unique(dim=0)) == 24
    close(found.basis.sketched_by, signs.round() @ found.coefficients[:, :12], 1e-9)


@settings(deadline=None, max_examples=8)
@given(size=st.floats(1e-9, 1e9), by_label=st.booleans(), name=st.sampled_from(["responses", "gradients"]))
def test_larger_responses_are_larger_scores_and_nothing_else(size, by_label, name):
    problem, responses = shared(), simulate_once()
    one, other = (
        fit(problem, rank=4, by_label=by_label, coefficients=name, responses=own)
        for own in (responses, size * responses)
    )
    close(other.coefficients, one.coefficients, 1e-6)
    expected = products(one, QUERIES)
    close(products(other, QUERIES) / size, expected, 1e-6)
    assert other.basis.kept_at == pytest.approx(one.basis.kept_at, abs=1e-8)
    close(other.basis.residual(QUERIES), one.basis.residual(QUERIES), 1e-6)


@cache
def simulate_once() -> torch.Tensor:
    return simulate(shared(), QUICK).responses


@settings(deadline=None, max_examples=8)
@given(order=st.permutations(range(12)), by_label=st.booleans())
def test_the_order_of_the_training_examples_does_not_matter(order, by_label):
    problem, order = shared(), torch.tensor(order)
    permuted = replace(problem, train=problem.train[order])
    one, other = (
        fit(own, rank=4, by_label=by_label, responses=responses)
        for own, responses in ((problem, simulate_once()), (permuted, simulate_once()[order]))
    )
    expected = products(one, QUERIES)[:, one.rows.argsort()][:, order]
    close(products(other, QUERIES)[:, other.rows.argsort()], expected, 1e-7)
    assert other.basis.kept_at == pytest.approx(one.basis.kept_at, abs=1e-7)


def test_duplicates_have_equal_coefficients():
    problem = shared()
    twice = replace(problem, train=problem.train[torch.tensor([*range(12), 3, 3])])
    found = fit(twice, rank=5)
    c = found.coefficients[0, found.rows.argsort()]
    close(c[12:], c[3].expand(2, -1), 1e-9)
    assert not torch.allclose(c[3], c[4], atol=1e-3)


@pytest.mark.parametrize("coefficients", ["responses", "gradients"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_examples_fit_to_rounding_probe_nothing_and_harm_nothing(dtype, coefficients):
    """Confident examples have no gradient at all: they have no direction of their own, and coefficients 0."""
    problem = random_problem((4, 3), n=20)
    inputs, targets = problem.train.inputs.clone(), problem.train.targets.clone()
    sure = torch.arange(20) % 3 == 0
    inputs[sure] *= 1e4
    targets[sure] = problem.outputs(inputs[sure]).argmax(1)
    problem = Problem(problem.module, problem.theta.to(dtype), problem.loss, Examples(inputs, targets))
    gone = (problem.gradients(problem.train) == 0).all(1)
    assert torch.equal(gone, sure)
    method = simulate(problem, CONVERGED)
    found = fit(problem, CONVERGED, rank=15, coefficients=coefficients)
    order = found.rows.argsort()
    assert not found.coefficients[0, order][sure].any()
    assert found.basis.kept == pytest.approx(1, abs=1e-4)
    tolerance = 1e-6 if dtype == FLOAT64 else 1e-3
    close(products(found, QUERIES)[:, order], method.scores(QUERIES), tolerance)


# -- what is kept -----------------------------------------------------------------------------------


def mean_correlation(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(found, expected, strict=True)]))


@pytest.mark.parametrize("by_label", [False, True])
@pytest.mark.parametrize(
    ("n_fit", "judged"), [(4000, range(40)), (24, range(24, 30)), (36, range(36, 40)), (38, range(38))]
)
def test_kept_is_the_mean_correlation_with_the_full_scores(n_fit, judged, by_label):
    """Over the fitted examples where all are fitted, otherwise over a quarter as many others (3 at least)."""
    problem = random_problem(n=40)
    found = fit(problem, rank=12, by_label=by_label, n_fit=n_fit)
    assert len(found.rows) == judged[-1] + 1
    full = simulate(problem, QUICK).scores(QUERIES)[:, found.rows[list(judged)]].numpy()
    assert list(found.basis.kept_at) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12]
    for rank, kept in found.basis.kept_at.items():
        scores = products(found, QUERIES, rank)[:, list(judged)].numpy()
        assert kept == pytest.approx(mean_correlation(scores, full), abs=1e-9)
    assert found.basis.kept == found.basis.kept_at[12]
    assert found.basis.kept_at[1] < found.basis.kept_at[12] < 1


def test_examples_that_were_fitted_flatter_what_is_kept():
    problem = random_problem(n=60)
    found = fit(problem, rank=20, n_fit=40)
    full = simulate(problem, QUICK).scores(QUERIES)[:, found.rows].numpy()
    scores = products(found, QUERIES).numpy()
    assert found.basis.kept == pytest.approx(mean_correlation(scores[:, 40:], full[:, 40:]), abs=1e-9)
    assert found.basis.kept < mean_correlation(scores[:, :40], full[:, :40]) - 0.005


def test_queries_without_any_gradient_do_not_count_in_what_is_kept():
    linear = random_problem((4, 3), n=20)
    far = Examples(QUERIES.inputs.clone(), QUERIES.targets.clone())
    far.inputs[:4] *= 1e5
    far.targets[:4] = linear.outputs(far.inputs[:4]).argmax(1)
    assert not linear.gradients(far[:4]).any()
    setting = replace(EXACT, rank=3)
    found, expected = (fit_basis(linear, QUICK, queries, setting).basis for queries in (far, far[4:]))
    assert found.kept_at == pytest.approx(expected.kept_at, abs=1e-12)
    assert fit_basis(linear, QUICK, far[:4], setting).basis.kept == 0


@pytest.mark.parametrize("size", [1e-12, 1e9])
def test_kept_does_not_depend_on_the_size_of_the_loss(size):
    """Down to scores of 1e-15: confident queries have such."""
    problem = shared()
    scaled = Problem(problem.module, problem.theta, lambda o, y: size * problem.loss(o, y), problem.train)
    one, other = (fit(own, rank=3, responses=simulate_once()).basis for own in (problem, scaled))
    assert other.kept_at == pytest.approx(one.kept_at, abs=1e-8)


@pytest.mark.parametrize("by_label", [False, True])
@pytest.mark.parametrize("keep", [0.8, 0.9, 0.97])
def test_a_search_takes_the_fewest_directions_that_keep_enough(keep, by_label, caplog):
    problem = random_problem(n=40)
    whole = fit(problem, rank=None, keep=1 - 1e-12, by_label=by_label).basis
    caplog.clear()
    found = fit(problem, rank=None, keep=keep, by_label=by_label)
    expected = next(rank for rank, kept in whole.kept_at.items() if kept >= keep)
    assert found.basis.rank == expected == found.coefficients.shape[2]
    assert found.basis.kept == whole.kept_at[expected] >= keep
    assert found.basis.kept_at == whole.kept_at
    close(found.basis.reading, whole.reading[:, :expected], 1e-12)
    assert not caplog.records
    assert 1 < expected < whole.rank


def test_a_search_that_falls_short_says_so(caplog, monkeypatch):
    problem = random_problem(n=40)
    monkeypatch.setattr(module, "MAX_RANK", 5)
    with caplog.at_level(logging.WARNING):
        basis = fit(problem, rank=None, keep=0.999).basis
    assert basis.rank == 5 == max(basis.kept_at)
    assert caplog.messages == [f"rank 5, the highest there is, keeps {basis.kept:.3f}, below 0.999"]
    caplog.clear()
    assert fit(problem, rank=7, keep=0.999).basis.rank == 7  # who names a rank gets it, in silence
    assert not caplog.records


def test_directions_do_not_depend_on_the_held_out_queries():
    problem = shared()
    one, other = (fit_basis(problem, QUICK, labelled(5, seed=s), replace(EXACT, rank=4)).basis for s in (5, 6))
    assert torch.equal(one.reading, other.reading)
    assert torch.equal(one.writing, other.writing)
    assert one.kept != other.kept


# -- which examples ---------------------------------------------------------------------------------


def test_a_seed_chooses_the_fitted_examples_and_two_fits_are_equal_bit_for_bit():
    problem = random_problem(n=40)
    first, again, other = (fit(problem, rank=4, n_fit=16, seed=seed) for seed in (3, 3, 4))
    assert first.basis.fingerprint == again.basis.fingerprint
    assert torch.equal(first.coefficients, again.coefficients)
    assert torch.equal(first.rows, again.rows)
    assert len(first.rows) == 20 == len(first.rows.unique())
    assert set(first.rows[:16].tolist()) != set(other.rows[:16].tolist())
    torch.manual_seed(1)
    assert fit(problem, rank=4, n_fit=16, seed=3).basis.fingerprint == first.basis.fingerprint


def test_only_the_fitted_examples_shape_the_directions():
    problem = random_problem(n=40)
    responses = simulate(problem, QUICK).responses
    found = fit(problem, rank=4, n_fit=16, responses=responses)
    moved = responses.clone()
    moved[found.rows[16:]] += 1
    absent = torch.ones(40, dtype=torch.bool)
    absent[found.rows] = False
    other = fit(problem, rank=4, n_fit=16, responses=moved)
    assert torch.equal(other.basis.reading, found.basis.reading)
    assert torch.equal(other.basis.sketched, found.basis.sketched)
    assert other.basis.kept != found.basis.kept
    moved = responses.clone()
    moved[absent] = float("nan")
    again = fit(problem, rank=4, n_fit=16, responses=moved)
    assert again.basis.fingerprint == found.basis.fingerprint


def test_memory_bounds_how_many_are_fitted(caplog):
    problem = shared()
    with caplog.at_level(logging.INFO, logger="tda_core.basis_fit"):
        found = fit(problem, rank=4, block_bytes=2 * 8 * 43 * 7)
    assert "fitting 7 examples, as many as block_bytes 4816 holds" in caplog.messages
    assert found.basis.sketched_by.shape == (1, 32, 4)
    assert len(found.rows) == 7  # 1 other is too few to measure on
    close(found.coefficients[0].T @ found.coefficients[0], torch.eye(4, dtype=FLOAT64))
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="tda_core.basis_fit"):
        assert len(fit(problem, rank=4, block_bytes=2 * 8 * 43 * 12).rows) == 12
        assert len(fit(problem, rank=1, block_bytes=1).rows) == 1
    assert caplog.messages == ["fitting 1 examples, as many as block_bytes 1 holds"]


# -- blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_label", [False, True])
@pytest.mark.parametrize("coefficients", ["responses", "gradients"])
@pytest.mark.parametrize("name", ["layers", "tangents", "factors"])
def test_blocks_give_what_one_block_does(name, coefficients, by_label):
    make = {
        "layers": random_problem,
        "tangents": lambda: problem_of(Branching()),
        "factors": lambda: random_problem((8, 9, 3)),
    }
    problem = make[name]()
    changes = {
        "rank": 4,
        "by_label": by_label,
        "coefficients": coefficients,
        "energy": 0.8 if name == "factors" else 1.0,
    }
    one = fit(problem, CONVERGED, **changes)
    size = 6 * 8 * problem.n_parameters * 5
    assert block_size(problem, BasisSettings(block_bytes=size)) == 5
    many = fit(problem, CONVERGED, block_bytes=size, **changes)
    assert torch.equal(many.rows, one.rows)
    close(many.coefficients, one.coefficients, 1e-8)
    for tensor, expected in one.basis.tensors().items():
        close(many.basis.tensors()[tensor], expected, 1e-8 * max(1, float(expected.abs().max())))
    assert many.basis.kept_at == pytest.approx(one.basis.kept_at, abs=1e-9)


@pytest.mark.parametrize("name", ["layers", "tangents"])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_no_more_than_a_block_is_ever_simulated(rows, name, monkeypatch):
    problem = random_problem(n=30) if name == "layers" else problem_of(Branching(), labelled(30))
    pushed, differentiated, along = [], [], []
    response, gradients, derivatives = basis_module.last_response, Problem.gradients, Problem.derivatives_along

    def spy(problem, dynamics, push, **keywords):
        pushed.append(len(push))
        return response(problem, dynamics, push, **keywords)

    monkeypatch.setattr(basis_module, "last_response", spy)
    monkeypatch.setattr(
        Problem, "gradients", lambda self, e, *rest: differentiated.append(len(e)) or gradients(self, e, *rest)
    )
    monkeypatch.setattr(
        Problem, "derivatives_along", lambda self, e, d: along.append(len(d)) or derivatives(self, e, d)
    )
    setting = {"block_bytes": 6 * 8 * problem.n_parameters * rows, "rank": 2, "n_fit": 12, "coefficients": "gradients"}
    found = fit(problem, **setting)
    n = min(12, 3 * rows)
    others = n // 4 if n == 12 else 0
    assert len(found.rows) == n + others
    assert sum(pushed) == n + others
    assert max(pushed) == rows
    assert max(differentiated) <= rows
    assert all(k <= 2 for k in along)
    pushed.clear()
    differentiated.clear()
    found.basis.coefficients(problem.train)
    assert not pushed
    assert all(k <= rows for k in differentiated)
    simulating = replace(found.basis, setting=replace(found.basis.setting, coefficients="responses"))
    simulating.coefficients(problem.train)
    assert sum(pushed) == 30
    assert max(pushed) == rows == max(differentiated)


@pytest.mark.parametrize("dynamics", [QUICK, PLAIN, replace(PLAIN, batch_size=4, tail=0.5)])
def test_known_responses_are_taken_in_place_of_a_simulation(dynamics, monkeypatch):
    problem = random_problem(n=20)
    responses = simulate(problem, dynamics).responses
    expected = fit(problem, dynamics, rank=4, n_fit=14)
    monkeypatch.setattr(basis_module, "last_response", None)
    found = fit(problem, dynamics, rank=4, n_fit=14, responses=responses)
    assert torch.equal(found.rows, expected.rows)
    close(found.coefficients, expected.coefficients, 1e-8)
    for tensor, own in expected.basis.tensors().items():
        close(found.basis.tensors()[tensor], own, 1e-8)
    assert found.basis.kept_at == pytest.approx(expected.basis.kept_at, abs=1e-9)
    with pytest.raises(TypeError):
        fit(problem, dynamics, rank=4, n_fit=14)


def test_a_basis_needs_no_settings():
    problem = shared()
    found = fit_basis(problem, QUICK, QUERIES)
    assert found.basis.setting == BasisSettings()
    assert found.basis.kept >= 0.95 or found.basis.rank == max(found.basis.kept_at)
    assert found.basis.dynamics == QUICK


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        (labelled(3).inputs, TypeError, "got Tensor"),
        (labelled(3, d=5), ValueError, r"inputs must have shape \(n, 4\), got \(n, 5\)"),
        (Examples(torch.zeros(1, 4), torch.tensor([5])), ValueError, "label 5 is out of range for 3 outputs"),
        (continuous(3), ValueError, "targets must be torch.int64 as in training"),
    ],
)
def test_held_out_queries_that_do_not_fit_are_refused(queries, error, message, monkeypatch):
    monkeypatch.setattr(basis_module, "last_response", None)  # before anything is simulated
    with pytest.raises(error, match=message):
        fit_basis(shared(), QUICK, queries, EXACT)


@pytest.mark.parametrize("shape", [(11, 43), (12, 42), (12,), (12, 43, 1)])
def test_responses_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"responses must be \(12, 43\), got \(1"):
        fit(shared(), responses=torch.zeros(shape, dtype=FLOAT64))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (shared, {"rank": 13}, "rank must be at most the least of 12 fitted examples and 43 parameters, got 13"),
        (shared, {"rank": 6, "n_fit": 5}, "at most the least of 5 fitted examples and 43 parameters, got 6"),
        (lambda: random_problem((4, 3), n=30), {"rank": 16}, "30 fitted examples and 15 parameters, got 16"),
        (shared, {"rank": 8, "block_bytes": 2 * 8 * 43 * 7}, "7 fitted examples and 43 parameters, got 8"),
        (
            lambda: random_problem((4, 5, 1)),
            {"by_label": True},
            "by_label needs class labels, but the targets .* numbers",
        ),
    ],
)
def test_impossible_fits_are_refused_before_anything_is_simulated(make, changes, message, monkeypatch):
    monkeypatch.setattr(basis_module, "last_response", None)
    with pytest.raises(ValueError, match=message):
        fit(make(), **changes)


def test_held_out_queries_of_a_class_without_examples_are_refused():
    problem = shared()
    two = replace(problem, train=Examples(problem.train.inputs, problem.train.targets.clamp(max=1)))
    assert 2 in QUERIES.targets
    with pytest.raises(ValueError, match="no directions for queries of class 2: no fitted example is of it"):
        fit(two, rank=3, by_label=True)
    assert fit(two, rank=3).basis.rank == 3


def test_a_simulation_that_cannot_be_run_is_refused_by_its_own_words():
    with pytest.raises(ValueError, match="past the stability limit"):
        fit(shared(), replace(PLAIN, rate=1e3))
