"""Conjugate gradients and the dense solver against numpy's solution."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import FLOAT64, generator

from tda_core.solvers import conjugate_gradients, solve_dense


def spd(p: int, seed: int, *, smallest: float = 0.5, dtype=FLOAT64) -> torch.Tensor:
    """A random symmetric matrix with eigenvalues in [smallest, smallest + 5]."""
    source = generator(seed)
    q = torch.linalg.qr(torch.randn(p, p, generator=source, dtype=FLOAT64))[0]
    matrix = q @ torch.diag(smallest + 5 * torch.rand(p, generator=source, dtype=FLOAT64)) @ q.T
    return ((matrix + matrix.T) / 2).to(dtype)


def goals_of(k: int, p: int, seed: int) -> torch.Tensor:
    return torch.randn(k, p, generator=generator(seed + 1), dtype=FLOAT64)


def iterates(matrix, goals, steps):
    """Copies of the first iterates and residuals."""
    run = conjugate_gradients(lambda v: v @ matrix, goals)
    return [(x.clone(), r.clone()) for _, (x, r) in zip(range(steps), run, strict=False)]


def exact(matrix, goals):
    return torch.from_numpy(np.linalg.solve(matrix.numpy(), goals.numpy().T).T.copy())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_as_many_steps_as_dimensions_solve_any_system(p, k, seed):
    matrix, goals = spd(p, seed), goals_of(k, p, seed)
    steps = iterates(matrix, goals, p + 2)
    torch.testing.assert_close(steps[-1][0], exact(matrix, goals), rtol=1e-8, atol=1e-8)
    errors = [exact(matrix, goals) - x for x, _ in steps]
    energy = torch.stack([((e @ matrix) * e).sum(1) for e in errors])
    assert bool((energy[1:] <= energy[:-1] + 1e-14).all())  # every step is a descent in the energy norm


def test_the_reported_residuals_are_the_true_ones():
    matrix, goals = spd(8, 0), goals_of(3, 8, 0)
    for x, residuals in iterates(matrix, goals, 6):
        true = (goals - x @ matrix).norm(dim=1) / goals.norm(dim=1)
        torch.testing.assert_close(residuals, true, rtol=1e-6, atol=1e-9)


def test_the_first_step_is_steepest_descent_and_the_second_is_best_in_the_krylov_space():
    matrix, goals = spd(6, 1), goals_of(1, 6, 1)
    (first, _), (second, _) = iterates(matrix, goals, 2)
    g = goals[0]
    torch.testing.assert_close(first[0], g * (g @ g) / (g @ matrix @ g))
    basis = torch.stack([g, matrix @ g])  # minimiser of the energy over span {g, A g}
    coefficients = torch.linalg.solve(basis @ matrix @ basis.T, basis @ g)
    torch.testing.assert_close(second[0], coefficients @ basis)


def test_rows_are_solved_independently_and_solved_ones_are_left_alone():
    matrix = spd(7, 2)
    eigenvector = torch.linalg.eigh(matrix)[1][:, 3]
    goals = torch.stack([goals_of(1, 7, 2)[0], torch.zeros(7, dtype=FLOAT64), eigenvector])
    sizes = []

    def product(v):
        sizes.append(len(v))
        return v @ matrix

    run = conjugate_gradients(product, goals)
    together = [(x.clone(), r.clone()) for _, (x, r) in zip(range(12), run, strict=False)]
    alone = iterates(matrix, goals[:1], 5)
    for (x, r), (single, s) in zip(together, alone, strict=False):
        torch.testing.assert_close(x[:1], single)
        torch.testing.assert_close(r[:1], s)
    assert not together[-1][0][1].any()  # nothing to solve
    torch.testing.assert_close(together[-1][0], exact(matrix, goals))
    assert sizes[0] == 2  # the zero row is never multiplied
    assert sizes[3] == 1  # an eigenvector is solved after one step, give or take rounding
    assert len(sizes) < 12  # and when all are solved the product is no longer asked for
    assert together[-1][1].tolist() == [0, 0, 0]
    assert torch.isfinite(torch.stack([r for _, r in together])).all()


def test_goals_are_left_as_they_were():
    matrix, goals = spd(4, 3), goals_of(2, 4, 3)
    before = goals.clone()
    iterates(matrix, goals, 4)
    assert torch.equal(goals, before)


def test_negative_curvature_is_refused():
    matrix = torch.diag(torch.tensor([1.0, -2.0]))
    with pytest.raises(ValueError, match="negative curvature -2 met"):
        iterates(matrix, torch.tensor([[0.0, 1.0]]), 1)
    with pytest.raises(ValueError, match="negative curvature 0 met"):
        iterates(torch.zeros(2, 2), torch.tensor([[0.0, 1.0]]), 1)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6), st.floats(0, 10))
def test_dense_solutions_are_numpys(p, k, seed, damping):
    matrix, goals = spd(p, seed), goals_of(k, p, seed)
    found = solve_dense(matrix, goals, damping)
    expected = exact(matrix + damping * torch.eye(p, dtype=FLOAT64), goals)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found.shape == (k, p)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10**6), st.floats(0.001, 3), st.sampled_from([FLOAT64, torch.float32]))
def test_the_damping_that_an_error_names_is_enough(p, seed, lift, dtype):
    indefinite = spd(p, seed, dtype=dtype) - (0.5 + 5 + lift) * torch.eye(p, dtype=dtype)
    with pytest.raises(ValueError, match=r"damping 0.001 is not positive definite \(smallest eigenvalue -") as caught:
        solve_dense(indefinite, torch.ones(1, p, dtype=dtype), 0.001)
    needed = float(re.search(r"use a damping above (\S+)", str(caught.value)).group(1))
    assert torch.isfinite(solve_dense(indefinite, torch.ones(1, p, dtype=dtype), 1.01 * needed + 1e-9)).all()
    with pytest.raises(ValueError, match="not positive definite"):
        solve_dense(indefinite, torch.ones(1, p, dtype=dtype), 0.98 * needed)


@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32])
@pytest.mark.parametrize("seed", range(20))
def test_a_singular_system_is_refused_and_not_solved_by_rounding(dtype, seed):
    half = torch.randn(5, 9, generator=generator(seed), dtype=dtype)
    half = torch.cat([half, half[:1]])  # two equal rows
    gram = half @ half.T
    with pytest.raises(ValueError, match=r"damping 0.0 is not positive definite .* use a damping above \d") as caught:
        solve_dense(gram, torch.ones(1, 6, dtype=dtype), 0.0)
    needed = float(re.search(r"above (\S+)", str(caught.value)).group(1))
    assert 0 < needed < 1e-3
    assert torch.isfinite(solve_dense(gram, torch.ones(1, 6, dtype=dtype), 2 * needed)).all()


def test_unequal_scales_are_not_mistaken_for_a_singular_system():
    matrix = torch.diag(torch.tensor([1e6, 1.0, 1e-6]))
    found = solve_dense(matrix, torch.ones(1, 3), 0.0)
    torch.testing.assert_close(found, torch.tensor([[1e-6, 1.0, 1e6]]))


@pytest.mark.parametrize("kind", ["zero", "ones in the null space", "indefinite", "low rank"])
def test_large_systems_that_are_not_positive_definite_name_a_damping_that_is_enough(kind):
    """Beyond 200 rows only the extreme eigenvalues are found, by iteration."""
    half = torch.randn(30, 250, generator=generator(0), dtype=FLOAT64)
    matrix = {
        "zero": torch.zeros(250, 250, dtype=FLOAT64),
        "ones in the null space": (half - half.mean(1, keepdim=True)).T @ (half - half.mean(1, keepdim=True)),
        "indefinite": half[:, :30].new_zeros(250, 250).fill_diagonal_(1.0) - half.T @ half / 100,
        "low rank": half.T @ half,
    }[kind]
    goals = torch.ones(1, 250, dtype=FLOAT64)
    with pytest.raises(ValueError, match=r"damping 0.0 is not positive definite \(smallest eigenvalue") as caught:
        solve_dense(matrix, goals, 0.0)
    needed = float(re.search(r"above (\S+)", str(caught.value)).group(1))
    exact_need = max(-float(torch.linalg.eigvalsh(matrix)[0]), 0.0)
    assert needed == pytest.approx(exact_need, rel=0.01, abs=1e-9)
    assert torch.isfinite(solve_dense(matrix, goals, 1.01 * needed + 1e-9)).all()
