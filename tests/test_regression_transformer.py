"""The transformer for regression: packed queries against plain ones, causality, resuming, learning, named errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core import regression_transformer
from tda_core.regression_references import one_step_predictor, ridge_predictor, squared_errors
from tda_core.regression_tasks import Family, Pairs, Sizes, draw_pairs, draw_tasks
from tda_core.regression_transformer import Settings, trained, untrained
from tda_core.store import Store

FAMILY = Family(2, 0.3)
SMALL = Settings(width=16, blocks=2, heads=2, length=6, steps=5, batch=8, rate=3e-3)


@settings(max_examples=15, deadline=None)
@given(k=st.integers(0, 5), m=st.integers(1, 4), seed=st.integers(0, 99))
def test_packed_queries_are_answered_as_if_each_were_alone(k, m, seed):
    model = untrained(FAMILY, SMALL, seed=seed).double()
    tasks = draw_tasks(FAMILY, Sizes(3, k, 1, m), seed=seed)
    context, queries = tasks.background.to(torch.float64), tasks.queries.to(torch.float64)
    found = model.after(context, queries.inputs)
    for j in range(m):
        inputs = torch.cat([context.inputs, queries.inputs[:, j : j + 1]], 1)
        targets = torch.cat([context.targets, queries.targets[:, j : j + 1]], 1)
        torch.testing.assert_close(found[:, j], model(Pairs(inputs, targets))[:, -1], rtol=1e-10, atol=1e-10)


def test_a_prediction_sees_what_comes_before_it_only():
    model, pairs = untrained(FAMILY, SMALL, seed=0), draw_pairs(FAMILY, 4, 6, seed=0)
    before = model(pairs)
    changed = pairs.targets.clone()
    changed[:, 3] += 1
    after = model(Pairs(pairs.inputs, changed))
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_training_learns_to_use_the_context(tmp_path):
    learnt = Settings(width=32, blocks=2, heads=2, length=6, steps=250, batch=64, rate=5e-3)
    model = trained(FAMILY, learnt, Store(tmp_path), seeds=[0])[0].model
    tasks = draw_tasks(FAMILY, Sizes(300, 5, 1, 10), seed=10**6)
    found = {
        name: float(squared_errors(predictor, tasks.background, tasks.queries).mean())
        for name, predictor in {
            "model": model.after,
            "bayes": ridge_predictor(FAMILY.ridge),
            "nothing": one_step_predictor(0.0),
        }.items()
    }
    assert found["bayes"] < found["model"] < 0.5 * found["nothing"]


def test_a_stopped_training_goes_on_and_ends_as_if_never_stopped(tmp_path, monkeypatch):
    whole = trained(FAMILY, SMALL, Store(tmp_path / "whole"), seeds=[1])[0].model
    monkeypatch.setattr(regression_transformer, "KEPT_EVERY", 2)
    store, drawn = Store(tmp_path / "stopped"), []

    def stops(*arguments, **keywords):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(keywords["seed"])
        return draw_pairs(*arguments, **keywords)

    monkeypatch.setattr(regression_transformer, "draw_pairs", stops)
    with pytest.raises(KeyboardInterrupt):
        trained(FAMILY, SMALL, store, seeds=[1])
    drawn.clear()
    again = trained(FAMILY, SMALL, store, seeds=[1])[0].model  # of 5 steps 3 are left, after the state kept at 2
    assert len(drawn) == 3
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert len(list(store.folder.iterdir())) == 1  # the part is gone


def test_a_trained_model_is_read_from_the_store(tmp_path, monkeypatch):
    first = trained(FAMILY, SMALL, Store(tmp_path), seeds=[0])[0].model
    monkeypatch.setattr(regression_transformer, "draw_pairs", None)  # any step would fail
    again = trained(FAMILY, SMALL, Store(tmp_path), seeds=[0])[0].model
    pairs = draw_pairs(FAMILY, 4, 6, seed=0)
    assert torch.equal(first(pairs), again(pairs)) and not again.training


def test_a_seed_decides_the_start_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b, c = (untrained(FAMILY, SMALL, seed=seed).position for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


def test_a_training_that_diverges_says_so(tmp_path):
    wild = Settings(width=16, blocks=1, heads=1, length=4, steps=30, batch=4, rate=1e30)
    with pytest.raises(FloatingPointError, match="lower the rate of 1e\\+30"):
        trained(FAMILY, wild, Store(tmp_path), seeds=[0])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: Settings(width=0), "width must be at least 1, got 0"),
        (lambda m: Settings(steps=-1), "steps must be at least 0, got -1"),
        (lambda m: Settings(rate=float("nan")), "rate must be above 0, got nan"),
        (lambda m: Settings(width=10, heads=4), "got 4 heads and width 10"),
        (lambda m: m(draw_pairs(FAMILY, 1, 7, seed=0)), "at most 6 tokens, got 7"),
        (lambda m: m.after(draw_pairs(FAMILY, 1, 6, seed=0), torch.zeros(1, 1, 2)), "at most 6 tokens, got 7"),
        (lambda m: m(draw_pairs(Family(3), 1, 4, seed=0)), "2 dimensions, got 3"),
        (
            lambda m: m.after(draw_pairs(FAMILY, 1, 2, seed=0), torch.zeros(1, 1, 3)),
            r"\(1, m, 2\) to fit the context, got \(1, 1, 3\)",
        ),
        (lambda m: m.after(draw_pairs(FAMILY, 1, 2, seed=0), torch.full((1, 1, 2), float("nan"))), "finite"),
    ],
)
def test_bad_input_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act(untrained(FAMILY, SMALL, seed=0))


def test_models_trained_side_by_side_are_those_trained_alone(tmp_path):
    together = trained(FAMILY, SMALL, Store(tmp_path / "together"), seeds=[0, 1])
    for seed, found in enumerate(together):
        (alone,) = trained(FAMILY, SMALL, Store(tmp_path / f"{seed}"), seeds=[seed])
        assert all(torch.equal(v, alone.model.state_dict()[name]) for name, v in found.model.state_dict().items())
        assert found.seconds > 0
    again = trained(FAMILY, SMALL, Store(tmp_path / "together"), seeds=[1, 0])
    assert [one.seconds for one in again] == pytest.approx([one.seconds for one in together[::-1]], rel=1e-6)
