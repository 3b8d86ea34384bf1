"""Speed measurements: what is timed, and that the comparison's models are the same kind of models."""

import importlib.util
import time
from pathlib import Path

import pytest
import torch
from toys import labelled, random_problem

from tda_core import pretraining_speed, speed
from tda_core.dynamics import Dynamics
from tda_core.examples import Examples
from tda_core.lm_recipes import LMRecipe
from tda_core.pretraining import LMTraining
from tda_core.pretraining_speed import pretraining_rates
from tda_core.recipes import Recipe
from tda_core.simulation import simulate
from tda_core.speed import ForwardPass, Readout, peak_memory, query_costs, watched
from tda_core.subsets import random_subsets


def test_seconds_takes_the_shortest():
    pauses = iter([0.05, 0.0, 0.05])
    assert speed.seconds(lambda: time.sleep(next(pauses)), 3) < 0.04
    with pytest.raises(ValueError, match="repeats must be >= 1, got 0"):
        speed.seconds(lambda: None, 0)


def test_rates_of_every_implementation():
    generator = torch.Generator().manual_seed(0)
    data = Examples(torch.randn(40, 6, generator=generator), torch.arange(40) % 3)
    threads = torch.get_num_threads()
    rates = speed.retraining_rates(Recipe(layers=(6, 3), epochs=2, batch_size=10), data, n_loop=1)
    expected = {"ensemble", "loop"} | ({"dattri"} if importlib.util.find_spec("dattri") else set())
    assert set(rates) == expected
    assert all(rate > 0 for rate in rates.values())
    assert torch.get_num_threads() == threads


@pytest.mark.peers
def test_dattri_retrains_the_number_asked(monkeypatch):
    retrain = pytest.importorskip("dattri.model_util.retrain")
    seen = []
    original = retrain.retrain_lds

    def watched(train_func, loader, folder, **options):
        seen.append(options)
        return original(train_func, loader, folder, **options)

    monkeypatch.setattr(retrain, "retrain_lds", watched)
    data = Examples(torch.randn(20, 4), torch.arange(20) % 2)
    speed._retrain_with_dattri(Recipe(layers=(4, 2), epochs=1, batch_size=5), data, 3)
    assert seen == [{"num_subsets": 3, "subset_ratio": 0.5, "seed": 0}]


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory()
    assert 10e6 < before < 1e12
    held = torch.ones(max(40_000_000, before // 4))  # as much as there was before, or more
    assert peak_memory() >= held.nbytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are reset on Linux alone")
def test_watched_memory_is_what_a_call_takes_above_what_there_was():
    held = torch.ones(50_000_000)  # 200 MB that are there before
    took = watched(lambda: torch.ones(25_000_000).sum())
    assert took.megabytes is not None and 90 < took.megabytes < 180, held.nbytes
    assert float(took.value) == 25_000_000 and took.cpu > 0 and took.wall > 0


def test_rates_of_pretraining_are_of_models(monkeypatch):
    """Both kinds take a second here: eight models at once are eight times the rate of one."""
    calls = []
    monkeypatch.setattr(pretraining_speed, "pretrain_many", lambda *a: calls.append(("many", a)))
    monkeypatch.setattr(pretraining_speed, "pretrain_loop", lambda *a: calls.append(("loop", a)))
    monkeypatch.setattr(pretraining_speed, "seconds", lambda function, n: function() or 1.0)
    training = LMTraining(LMRecipe(width=8, layers=1, heads=2, steps=36), 10)
    data = Examples(torch.ones(6, 4).long(), torch.ones(6, 4).long())
    masks = random_subsets(6, 10, 0.5, seed=0)
    assert pretraining_rates(training, data, masks) == {"ensemble": 8 / 3, "loop": 1 / 3}
    (_, many), (_, loop) = calls
    assert many[0].recipe.steps == loop[0].recipe.steps == 12 and torch.equal(many[2], masks[:8])
    assert torch.equal(loop[2], masks[0])


class Slow:
    """Takes some milliseconds a call and some more a query, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def scores(self, queries: Examples) -> torch.Tensor:
        assert torch.get_num_threads() == 1
        self.asked.append(len(queries))
        time.sleep(0.002 + 0.004 * len(queries))
        return torch.zeros(len(queries), 1)


def test_query_costs_are_per_query_and_of_each_batch():
    slow, other = Slow(), Slow()
    costs = query_costs({"slow": slow, "other": other}, labelled(8), [1, 4], budget=0.04)
    assert {name: list(of_batch) for name, of_batch in costs.items()} == {"slow": [1, 4], "other": [1, 4]}
    assert costs["slow"][1] >= 6 and costs["slow"][4] >= 4.5
    assert slow.asked.count(1) >= 3 and set(slow.asked) == {1, 4}
    for batch in (0, 9):
        with pytest.raises(ValueError, match=f"a batch must lie in 1..8, the queries there are, got {batch}"):
            query_costs({"slow": slow}, labelled(8), [1, batch])


def test_forward_passes_and_readouts_stand_in_for_methods():
    problem, queries = random_problem(), labelled(3, seed=2)
    assert torch.equal(ForwardPass(problem).scores(queries)[:, 0], problem.losses(queries))
    method = simulate(problem, Dynamics(horizon=3))
    assert torch.equal(Readout(method, "two_trajectory").scores(queries), method.scores(queries, "two_trajectory"))
