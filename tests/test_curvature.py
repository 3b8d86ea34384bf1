"""Curvature from labels that the model draws, and power iteration; products are tested with `Problem`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import FLOAT64, continuous, generator, random_problem

from tda_core import curvature as module
from tda_core.curvature import drawn_labels, largest_eigenvalue
from tda_core.dynamics import Dynamics
from tda_core.examples import Examples
from tda_core.simulation import simulate


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_the_mean_over_all_labels_is_the_ggn():
    """What makes the estimate one of the GGN: every label counted with its probability."""
    problem = random_problem()
    p, n = problem.outputs(problem.train.inputs).softmax(1), len(problem.train)
    total = torch.zeros(problem.n_parameters, problem.n_parameters, dtype=FLOAT64)
    for label in range(3):
        g = problem.gradients(Examples(problem.train.inputs, torch.full((n,), label)))
        total += (g * p[:, label, None]).T @ g / n
    close(total, problem.curvature("ggn"))


def test_the_estimate_is_the_mean_over_drawn_labels():
    problem = random_problem(weight_decay=0.2)
    labels = drawn_labels(problem.outputs(problem.train.inputs))
    g = problem.gradients(Examples(problem.train.inputs, labels))
    decay = 0.2 * torch.eye(problem.n_parameters, dtype=FLOAT64)
    close(problem.curvature("fisher"), g.T @ g / len(g) + decay)
    vectors = torch.randn(3, problem.n_parameters, generator=generator(1), dtype=FLOAT64)
    close(problem.curvature_product(vectors, "fisher"), vectors @ problem.curvature("fisher"))
    rows = torch.tensor([2, 7, 3])
    expected = vectors @ (g[rows].T @ g[rows] / 3 + decay)
    close(problem.curvature_product(vectors, "fisher", rows), expected)


def test_with_many_examples_the_estimate_nears_the_ggn_and_so_do_the_responses():
    problem = random_problem((4, 3), n=20)
    many = replace(problem, train=Examples(*(part.repeat_interleave(2000, 0) for part in vars(problem.train).values())))
    exact, found = problem.curvature("ggn"), many.curvature("fisher")
    assert float((found - exact).norm()) < 0.05 * float(exact.norm())
    dynamics = Dynamics(horizon=50, damping=0.05)
    full = simulate(problem, dynamics).responses
    drawn = simulate(replace(problem, train=many.train[::2000]), replace(dynamics, curvature="fisher")).responses
    correlation = torch.corrcoef(torch.stack([full.flatten(), drawn.flatten()]))[0, 1]
    assert 0.5 < float(correlation) < 1  # twenty labels are few, but the estimate is not another matrix


def test_labels_are_drawn_by_their_probabilities():
    logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=FLOAT64)
    drawn = drawn_labels(logits.expand(40_000, 3))
    shares = torch.bincount(drawn, minlength=3) / 40_000
    close(shares.double(), logits.softmax(1)[0], 0.01)
    assert torch.equal(drawn, drawn_labels(logits.expand(40_000, 3)))
    assert not torch.equal(drawn, drawn_labels(logits.expand(40_000, 3), seed=1))


@settings(max_examples=20, deadline=None)
@given(size=st.integers(1, 15))
def test_blocks_do_not_matter(size):
    problem = random_problem()
    g = problem.gradients(problem.drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", size)
        close(module.fisher(problem), g.T @ g / len(g))


def test_power_iteration_finds_the_largest_eigenvalue_from_below():
    values = torch.tensor([0.1, 1.0, 3.0], dtype=FLOAT64)
    found = largest_eigenvalue(lambda v: v * values, 3, steps=60, dtype=FLOAT64)
    assert found <= 3 + 1e-12
    assert found == pytest.approx(3, rel=1e-9)


def test_bad_input_is_named(monkeypatch):
    regression = random_problem((4, 5, 1))
    assert not continuous().is_classification
    with pytest.raises(ValueError, match="curvature 'fisher' draws labels from the model: it needs the loss cross_ent"):
        regression.curvature("fisher")
    monkeypatch.setattr(module, "FISHER_LIMIT", 40)
    with pytest.raises(ValueError, match=r"holds a \(p, p\) matrix: at most 40 parameters, got 43"):
        random_problem().curvature("fisher")
