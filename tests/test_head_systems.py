"""Systems of a linear head: against the matrix written out from its definition, in every way of solving."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core import head_systems
from tda_core.head_systems import SYSTEMS, Dense, Head, Iterative, Kronecker, contrasts, residuals_of, system_of
from tda_core.models import cross_entropy, margin, squared_error
from tda_core.solvers import NotPositiveDefinite
from tests.toys import FLOAT64, generator

EXACT = ("dense", "iterative")


def head(n=12, f=4, classes=3, seed=0, dtype=FLOAT64):
    """A head with random features and outputs; one class means regression."""
    source = generator(seed)
    phi, outputs = (torch.randn(n, width, generator=source, dtype=dtype) for width in (f, classes))
    if classes == 1:
        return Head.of(phi, outputs, torch.randn(n, generator=source, dtype=dtype), squared_error)
    return Head.of(phi, 2 * outputs, torch.randint(0, classes, (n,), generator=source), cross_entropy)


def written_out(made):
    """1/n sum_j S_j (x) phi_j phi_j' in the outputs themselves: (C f, C f)."""
    total = 0
    for phi, p in zip(made.phi, made.p, strict=True):
        curvature = p.diag() - p[:, None] * p if made.classifies else torch.ones(1, 1, dtype=p.dtype)
        total = total + torch.kron(curvature, phi[:, None] * phi)
    return total / len(made.phi)


def lifted(made, rows):
    """Rows (k, c f) in contrasts as rows (k, C f) in outputs."""
    return (made.contrasts @ rows.view(len(rows), -1, made.phi.shape[1])).flatten(1)


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
@pytest.mark.parametrize("kind", EXACT)
def test_solutions_are_those_of_the_whole_matrix(classes, kind):
    made = head(classes=classes)
    goals = torch.randn(5, made.n_unknowns, generator=generator(1), dtype=FLOAT64)
    matrix = written_out(made)
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(len(matrix), dtype=FLOAT64), lifted(made, goals).T).T
    found = lifted(made, system_of(made, kind).solve(goals, 0.1))
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-12} if kind == "dense" else {"rtol": 0, "atol": 1e-4 * float(expected.abs().max())}
    )
    torch.testing.assert_close(found, expected, **tolerance)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 5))
def test_products_are_those_of_the_matrix_and_never_negative(seed, classes, f):
    made = head(classes=classes, f=f, seed=seed)
    rows = torch.randn(3, made.n_unknowns, generator=generator(seed), dtype=FLOAT64)
    expected = lifted(made, rows) @ written_out(made)
    torch.testing.assert_close(lifted(made, made.product(rows)), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(made.product(rows), rows @ Dense.of(made).matrix, rtol=1e-9, atol=1e-12)
    assert bool(((made.product(rows) * rows).sum(1) > -1e-12).all())


def test_blocks_of_examples_change_nothing(monkeypatch):
    made = head()
    rows = torch.randn(3, made.n_unknowns, generator=generator(1), dtype=FLOAT64)
    whole = [made.product(rows), *(SYSTEMS[kind].of(made).solve(rows, 0.1) for kind in SYSTEMS)]
    monkeypatch.setattr(head_systems, "BLOCK", 5)
    parts = [made.product(rows), *(SYSTEMS[kind].of(made).solve(rows, 0.1) for kind in SYSTEMS)]
    torch.testing.assert_close(whole, parts)


@given(st.integers(2, 30))
def test_contrasts_are_an_orthonormal_basis_of_what_sums_to_zero(classes):
    basis = contrasts(classes, FLOAT64)
    torch.testing.assert_close(basis.T @ basis, torch.eye(classes - 1, dtype=FLOAT64))
    torch.testing.assert_close(basis.sum(0), torch.zeros(classes - 1, dtype=FLOAT64))


def test_residuals_are_derivatives_of_loss_and_margin():
    outputs = torch.randn(6, 4, generator=generator(0), dtype=FLOAT64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    basis = contrasts(4, FLOAT64)
    (of_loss,) = torch.autograd.grad(cross_entropy(outputs, targets).sum(), outputs)
    (of_margin,) = torch.autograd.grad(margin(outputs, targets).sum(), outputs)
    plain = outputs.detach()
    torch.testing.assert_close(residuals_of(plain, targets) @ basis.T, of_loss)
    torch.testing.assert_close(residuals_of(plain, targets, "margin") @ basis.T, -of_margin)
    # so that one model's ranking is the same for both
    unsure = torch.sigmoid(-margin(plain, targets))[:, None]
    torch.testing.assert_close(residuals_of(plain, targets), unsure * residuals_of(plain, targets, "margin"))
    values = torch.randn(6, 1, dtype=FLOAT64)
    assert torch.equal(residuals_of(values, targets.double()), values - targets.double()[:, None])


def test_the_factored_system_is_exact_where_the_curvature_factors():
    made = head(n=200, classes=3)
    same = Head(made.phi, made.p[:1].expand_as(made.p).contiguous(), made.residuals, True)
    rows = torch.randn(4, made.n_unknowns, generator=generator(1), dtype=FLOAT64)
    torch.testing.assert_close(Kronecker.of(same).solve(rows, 0.01), Dense.of(same).solve(rows, 0.01))
    regression = head(classes=1)
    rows = torch.randn(4, regression.n_unknowns, generator=generator(1), dtype=FLOAT64)
    torch.testing.assert_close(Kronecker.of(regression).solve(rows, 0.01), Dense.of(regression).solve(rows, 0.01))


@pytest.mark.parametrize("seed", range(5))
def test_the_factored_diagonal_is_the_matrix_own(seed):
    made = head(seed=seed)
    factored, matrix = Kronecker.of(made), Dense.of(made).matrix
    basis = torch.kron(factored.outputs, factored.inputs)
    torch.testing.assert_close(factored.diagonal.flatten(), (basis.T @ matrix @ basis).diagonal())


def test_float32_that_does_not_carry_a_factor_falls_back_to_float64():
    system = Dense(torch.ones(4, 4))  # 1 + 1e-8 is 1 in float32
    assert system.factor(1e-8).dtype == torch.float64 and system.factor(1.0).dtype == torch.float32
    rows = torch.tensor([[1.0, -1.0, 2.0, -2.0]])  # orthogonal to ones
    assert system.solve(rows, 1e-8).dtype == torch.float32
    torch.testing.assert_close(system.solve(rows, 1e-8), rows * 1e8, rtol=1e-5, atol=0)


def test_large_systems_are_solved_by_products(monkeypatch):
    made = head()
    assert isinstance(system_of(made), Dense)
    monkeypatch.setattr(head_systems, "DENSE_LIMIT", made.n_unknowns - 1)
    assert isinstance(system_of(made), Iterative)


def test_what_cannot_be_solved_is_named(monkeypatch):
    made = head(n=3, f=8)  # fewer examples than features: singular
    rows = torch.ones(1, made.n_unknowns, dtype=FLOAT64)
    with pytest.raises(NotPositiveDefinite, match="use a damping above"):
        Dense.of(made).solve(rows, 0.0)
    flat = Kronecker(torch.eye(2), torch.eye(2), torch.zeros(2, 2))
    with pytest.raises(NotPositiveDefinite, match="singular: use a damping above 0"):
        flat.solve(torch.ones(1, 4), 0.0)
    with pytest.raises(ValueError, match="unknown system 'lu', expected auto or one of"):
        system_of(made, "lu")
    monkeypatch.setattr(head_systems, "MAX_STEPS", 2)
    with pytest.raises(RuntimeError, match="after 2 steps of conjugate gradients"):
        Iterative.of(head(n=50, f=20)).solve(torch.randn(2, 40, dtype=FLOAT64), 1e-6)
    with pytest.raises(ValueError, match=r"losses \['cross_entropy', 'squared_error'\], not for hinge"):
        Head.of(made.phi, made.p, torch.zeros(3, dtype=torch.int64), hinge)


def hinge(outputs, targets):
    return outputs[:, 0]
