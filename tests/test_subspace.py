"""A restricted problem: its gradients, curvature and responses are those of the problem, projected."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probes import FLAT, SEQUENTIAL, exact, make, orthonormal
from torch import Tensor
from toys import FLOAT64, random_problem

from tda_core.dynamics import Dynamics, pushes
from tda_core.probes import LayerProbe, layer_probe
from tda_core.problem import Problem
from tda_core.simulation import simulate
from tda_core.subspace import restrict

CONVERGED = Dynamics(horizon=80, damping=0.05)
MODULES = [*FLAT, *SEQUENTIAL]


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def projection(probe: LayerProbe) -> Tensor:
    """The subspace's orthonormal rows: (f, p)."""
    return probe.coordinates(torch.eye(probe.problem.n_parameters, dtype=FLOAT64)).T


@pytest.mark.parametrize("energy", [0.8, 1.0])
@pytest.mark.parametrize("name", MODULES)
def test_a_restricted_problem_is_the_problem_with_the_probes_features_for_gradients(name, energy):
    problem = make(name)
    probe = layer_probe(problem, problem.train, energy)
    small = restrict(problem, probe)
    assert small.n_parameters == probe.n_features
    close(small.outputs(small.train.inputs), problem.outputs(problem.train.inputs))
    close(small.gradients(small.train), probe.features(problem.train))
    close(small.gradients_one_by_one(*vars(small.train).values()), probe.features(problem.train))
    assert small.linear_layers is not None


@pytest.mark.parametrize("name", ["one_layer", "biased", "residual", "attention_last"])
def test_curvature_and_responses_are_projected(name):
    problem = make(name)
    probe = layer_probe(problem, problem.train, 0.8)
    small, rows = restrict(problem, probe), projection(probe)
    close(rows @ rows.T, torch.eye(len(rows), dtype=FLOAT64))
    curved = rows @ problem.curvature() @ rows.T
    close(small.curvature(), curved, 1e-9)
    damped = curved + 0.05 * torch.eye(len(rows), dtype=FLOAT64)
    expected = torch.linalg.solve(damped, rows @ pushes(problem).T).T
    close(simulate(small, CONVERGED).responses, expected, 1e-8)


@pytest.mark.parametrize("name", ["biased", "unbiased", "residual", "attention_mean", "frozen_below"])
def test_with_identities_for_factors_nothing_changes(name):
    problem = make(name)
    small = restrict(problem, exact(problem))
    assert small.n_parameters == problem.n_parameters
    close(simulate(small, CONVERGED).scores(small.train), simulate(problem, CONVERGED).scores(problem.train), 1e-8)


@settings(max_examples=15, deadline=None)
@given(r_in=st.integers(1, 5), r_out=st.integers(1, 5), seed=st.integers(0, 1000))
def test_any_orthonormal_factors_will_do(r_in, r_out, seed):
    problem = random_problem()  # layers 4-5-3 with biases
    factors = {"0": (orthonormal(r_in, 5, seed), orthonormal(r_out, 5, seed + 1)), "2": (None, None)}
    probe = LayerProbe(problem, factors)
    small = restrict(problem, probe)
    close(small.gradients(small.train), probe.features(problem.train))
    along = torch.randn(2, probe.n_features, dtype=FLOAT64)
    close(
        small.derivatives_along(small.train, along), problem.derivatives_along(problem.train, along @ projection(probe))
    )


def test_the_problem_and_its_module_stay_as_they_are():
    problem = random_problem()
    before = [value.clone() for value in problem.module.parameters()]
    small = restrict(problem, layer_probe(problem, problem.train, 0.8))
    moved = small.at(torch.ones_like(small.theta))
    assert not torch.allclose(moved.outputs(small.train.inputs), small.outputs(small.train.inputs))
    assert all(torch.equal(a, b) for a, b in zip(before, problem.module.parameters(), strict=True))
    assert small.identity["theta"] != problem.identity["theta"]


def test_weight_decay_stays():
    problem = random_problem(weight_decay=0.3)
    probe = layer_probe(problem, problem.train, 0.8)
    small, rows = restrict(problem, probe), projection(probe)
    close(small.curvature(), rows @ problem.curvature() @ rows.T)


def test_a_probe_of_another_problem_is_refused():
    problem: Problem = random_problem()
    other = random_problem(seed=3)
    with pytest.raises(ValueError, match=r"the probe was made for theta \w{16}, but this problem has theta \w{16}"):
        restrict(problem, exact(other))


def test_the_rank_of_factors_can_be_bounded():
    problem = random_problem((4, 6, 5, 3), n=30)
    bounded = layer_probe(problem, problem.train, 1.0, max_rank=2)
    assert all(len(factor) == 2 for pair in bounded.factors.values() for factor in pair)
    assert restrict(problem, bounded).n_parameters == 12
    free = layer_probe(problem, problem.train, 1.0)
    for name, (a, _) in bounded.factors.items():
        found, whole = a, layer_probe(problem, problem.train, 0.7).factors[name][0]
        assert free.factors[name] == (None, None)
        rows = min(len(found), len(whole))
        close((found[:rows] * whole[:rows]).sum(1).abs(), torch.ones(rows, dtype=FLOAT64), 1e-8)
    for rank in (0, -2):
        with pytest.raises(ValueError, match=f"max_rank must be >= 1, or None, got {rank}"):
            layer_probe(problem, problem.train, max_rank=rank)
