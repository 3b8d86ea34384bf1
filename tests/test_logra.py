"""Projected influence against whole gradients and the dense solve, layer by layer."""

import pytest
import torch
from language_toys import language_model, text_pairs
from toys import Branching, labelled, random_problem

from tda_core import logra
from tda_core.logra import LoGraSettings, fit_logra
from tda_core.models import cross_entropy
from tda_core.problem import Problem

TRAIN, QUERIES = text_pairs(9), text_pairs(4, seed=1)


def in_float64(kind: str, parameters: tuple[str, ...] = ("*weight",)) -> tuple[Problem, object]:
    model = language_model(kind)
    model.model.double()
    return model.problem(TRAIN, parameters), model.examples(QUERIES)


def blocks(problem: Problem) -> dict[str, slice]:
    """Where the parameters of each layer lie in theta, in the order of the layers."""
    found: dict[str, slice] = {}
    for name, place in problem.offsets.items():
        layer = name.rpartition(".")[0]
        found[layer] = slice(min(found.get(layer, place).start, place.start), place.stop)
    return found


def dense(problem: Problem, queries, damping: float) -> torch.Tensor:
    """Influence with the block-diagonal empirical Fisher matrix of whole layers."""
    own, goals = problem.gradients(problem.train), problem.gradients(queries)
    total = torch.zeros(len(goals), len(own), dtype=own.dtype)
    for place in blocks(problem).values():
        g = own[:, place]
        fisher = g.T @ g / len(g)
        system = fisher + damping * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=g.dtype)
        total += goals[:, place] @ torch.linalg.solve(system, g.T)
    return total


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [("llama", ("*layers.1*weight",)), ("gpt2", ("*h.1*weight",)), ("neox", ("*layers.1.mlp*",))],
)
def test_at_full_rank_it_is_exact_influence_by_blocks(kind, parameters):
    problem, queries = in_float64(kind, parameters)
    found = fit_logra(problem, LoGraSettings(rank=100, damping=0.2)).scores(queries)
    torch.testing.assert_close(found, dense(problem, queries, 0.2), rtol=1e-7, atol=1e-9)


def test_more_examples_than_parameters_are_solved_alike():
    problem = random_problem((4, 3, 3), n=60)
    found = fit_logra(problem, LoGraSettings(rank=9)).scores(problem.train[:5])
    torch.testing.assert_close(found, dense(problem, problem.train[:5], 0.1), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("projection", ["pca", "random"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cores_are_projections_of_the_whole_gradients(kind, projection):
    problem, queries = in_float64(kind)
    made = fit_logra(problem, LoGraSettings(rank=5, projection=projection, seed=2))
    found, gradients, start = logra._projected(problem, queries, made.factors), problem.gradients(queries), 0
    for name, (p_in, p_out) in made.factors.items():
        whole = gradients[:, problem.offsets[f"{name}.weight"]]
        shape = (len(p_out[0]), len(p_in[0])) if kind == "llama" else (len(p_in[0]), len(p_out[0]))
        whole = whole.view(-1, *shape) if kind == "llama" else whole.view(-1, *shape).transpose(1, 2)
        core = (p_out @ whole @ p_in.T).flatten(1)
        torch.testing.assert_close(found[:, start : start + core.shape[1]], core, rtol=1e-9, atol=1e-11)
        start += core.shape[1]
    assert start == found.shape[1] == made.solved.shape[1]


def test_directions_are_those_of_what_lies_before_the_last_label():
    value = torch.arange(24.0).view(2, 4, 3)
    rows = logra._read(value, torch.tensor([1, 3]))
    assert torch.equal(rows, torch.cat([value[0, :1], value[1, :3]]).double())


def test_principal_directions_keep_more_than_any_others():
    problem, queries = in_float64("llama")
    exact = dense(problem, queries, 0.1).flatten()
    kept = {}
    for projection in ("pca", "random"):
        found = fit_logra(problem, LoGraSettings(rank=8, projection=projection)).scores(queries).flatten()
        kept[projection] = float(torch.corrcoef(torch.stack([found, exact]))[0, 1])
    assert kept["pca"] > kept["random"] > 0
    assert kept["pca"] > 0.5


def test_seeds_repeat_and_blocks_add_up(monkeypatch):
    problem, queries = in_float64("llama")
    first, again, other = (
        fit_logra(problem, LoGraSettings(4, "random", seed=seed)).scores(queries) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.allclose(first, other)
    monkeypatch.setattr(logra, "OUTPUTS", 1)  # an example at a time
    torch.testing.assert_close(fit_logra(problem, LoGraSettings(4, "random")).scores(queries), first)


def test_examples_are_their_own_proponents():
    problem, _ = in_float64("llama")
    assert float(fit_logra(problem).scores(problem.train).diagonal().min()) > 0


def test_saved_and_read_again(tmp_path):
    problem, queries = in_float64("gpt2", ("*h.0.mlp*",))
    made = fit_logra(problem, LoGraSettings(rank=3, damping=0.5))
    made.save(tmp_path / "logra")
    again = logra.LoGra.load(tmp_path / "logra", problem)
    assert again.settings == made.settings and torch.equal(again.scores(queries), made.scores(queries))
    with pytest.raises(ValueError, match="was made for theta"):
        logra.LoGra.load(tmp_path / "logra", in_float64("gpt2", ("*h.1.mlp*",))[0])


def test_bad_input_is_refused():
    for settings, message in (
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"projection": "svd"}, "unknown projection 'svd'"),
        ({"damping": 0.0}, "damping must be finite and > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            LoGraSettings(**settings)
    other = Problem.from_module(Branching().double(), cross_entropy, labelled(8))
    with pytest.raises(ValueError, match="parameters that all lie in linear layers"):
        fit_logra(other)
    problem = random_problem((4, 3, 3))
    with pytest.raises(ValueError, match="inputs must have shape"):
        fit_logra(problem).scores(labelled(3, 7))
