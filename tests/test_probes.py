"""Probes: features times coordinates is the product of gradient and direction, whatever the layers."""

import pytest
import torch
from torch import nn
from toys import FLOAT64, Branching, generator, labelled, random_problem

from tda_core.examples import Examples
from tda_core.probes import LayerProbe, TangentProbe, has_linear_layers_only, layer_probe
from tda_core.problem import Problem
from tda_core.transformer import LastBlocks, Transformer


def directions(problem: Problem, k: int = 5) -> torch.Tensor:
    return torch.randn(k, problem.n_parameters, generator=generator(7), dtype=problem.theta.dtype)


def sequences() -> Problem:
    """The last block of a transformer, its head frozen."""
    torch.manual_seed(0)
    model = Transformer(vocabulary=6, width=8, blocks=2, heads=2, length=5).to(FLOAT64)
    tokens = torch.randint(0, 6, (9, 5), generator=generator(1))
    with torch.no_grad():
        hidden = model.hidden(tokens, 1)
    data = Examples(hidden, torch.randint(0, 6, (9,), generator=generator(2)))
    return Problem.from_module(LastBlocks(model, 1), "cross_entropy", data)


@pytest.mark.parametrize("layers", [(4, 3), (4, 5, 3), (4, 6, 5, 3)])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_an_exact_probe_reads_gradients_times_directions(layers, mode):
    problem, queries = random_problem(layers), labelled(7, seed=3)
    probe, along = layer_probe(problem, problem.train, 1.0), directions(problem)
    assert probe.n_features == problem.n_parameters
    found = probe.read(queries, probe.coordinates(along), mode)
    torch.testing.assert_close(found, problem.gradients(queries) @ along.T, rtol=1e-10, atol=1e-10)


def test_sequences_are_read_by_summing_over_positions():
    problem = sequences()
    probe, along = layer_probe(problem, problem.train, 1.0), directions(problem)
    found = probe.read(problem.train, probe.coordinates(along))
    torch.testing.assert_close(found, problem.gradients(problem.train) @ along.T, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="forward mode is for one position an example"):
        probe.features(problem.train, "forward")


def test_factors_project_each_layer_and_both_modes_agree():
    problem, queries = random_problem((4, 6, 3), n=40), labelled(6, seed=3)
    probe = layer_probe(problem, problem.train, 0.7)
    a, b = probe.factors["0"]
    assert a is not None and len(a) < 5
    torch.testing.assert_close(a @ a.T, torch.eye(len(a), dtype=FLOAT64))
    gradients = problem.gradients(queries)
    weight = gradients[:, problem.offsets["0.weight"]].view(-1, 6, 4)
    weight = torch.cat([weight, gradients[:, problem.offsets["0.bias"], None]], 2) @ a.T
    expected = (weight if b is None else b @ weight).flatten(1)
    torch.testing.assert_close(probe.features(queries)[:, probe.slices["0"]], expected)
    torch.testing.assert_close(probe.features(queries), probe.features(queries, "forward"))
    torch.testing.assert_close(probe.coordinates(gradients), probe.features(queries))


def test_energy_is_the_share_that_is_kept_and_more_keeps_more():
    problem = random_problem((4, 6, 3), n=60)
    x = torch.cat([problem.train.inputs, torch.ones(60, 1, dtype=FLOAT64)], 1)
    sizes = []
    for energy in (0.3, 0.6, 0.8):
        a, _ = layer_probe(problem, problem.train, energy).factors["0"]
        assert float(((x @ a.T) ** 2).sum() / (x**2).sum()) >= energy
        assert float(((x @ a[:-1].T) ** 2).sum() / (x**2).sum()) < energy
        sizes.append(len(a))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_a_tangent_probe_is_exact_for_any_module():
    torch.manual_seed(0)
    problem = Problem.from_module(Branching().to(FLOAT64), "cross_entropy", labelled(8))
    probe, along = TangentProbe(problem), directions(problem)
    expected = probe.features(problem.train) @ probe.coordinates(along).T
    torch.testing.assert_close(probe.read(problem.train, along), expected)
    with pytest.raises(ValueError, match="mode 'forward' only, got 'reverse'"):
        probe.read(problem.train, along, "reverse")


def test_only_whole_linear_layers_fit_a_layer_probe():
    assert has_linear_layers_only(random_problem()) and has_linear_layers_only(sequences())
    torch.manual_seed(0)
    branching = Problem.from_module(Branching().to(FLOAT64), "cross_entropy", labelled(8))
    half_frozen = nn.Linear(4, 3).to(FLOAT64)
    half_frozen.bias.requires_grad_(False)
    normed = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).to(FLOAT64)
    assert not has_linear_layers_only(branching)
    assert not has_linear_layers_only(Problem.from_module(half_frozen, "cross_entropy", labelled(8)))
    assert not has_linear_layers_only(Problem.from_module(normed, "cross_entropy", labelled(8)))
    with pytest.raises(ValueError, match="parameters all lie in"):
        LayerProbe(branching, {})


def test_bad_input_is_named():
    problem = random_problem()
    with pytest.raises(ValueError, match=r"energy must lie in \(0, 1\], got 0"):
        layer_probe(problem, problem.train, 0)
    with pytest.raises(ValueError, match=r"factors must be of the layers \['0', '2'\], got \['head'\]"):
        LayerProbe(problem, {"head": (None, None)})
    probe = layer_probe(problem, problem.train, 1.0)
    with pytest.raises(ValueError, match="unknown mode 'backward'"):
        probe.features(problem.train, "backward")
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, 4\), got \(n, 5\)"):
        probe.features(labelled(3, d=5))
