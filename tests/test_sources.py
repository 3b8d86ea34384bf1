"""Sources: dealt exactly, removed for real, and group responses that are sums of their members' responses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import CONVEX, continuous, converged, labelled, optimum, random_problem

from tda_core import ground_truth
from tda_core.dynamics import Dynamics
from tda_core.examples import Examples
from tda_core.recipes import Recipe
from tda_core.simulation import simulate, sum_groups
from tda_core.sources import Sources, removal_effects
from tda_core.store import Store
from tda_core.training import evaluate, train_many

TRAIN, QUERIES = labelled(24), labelled(7, seed=3)
SOURCES = Sources(TRAIN, torch.tensor([0] * 12 + [1] * 7 + [2] * 5), ("a", "b", "c"))
QUIET = {"n_jobs": 1, "progress": False}


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 60),
    part=st.floats(0, 1),
    concentration=st.floats(0.01, 100),
    decay=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_every_example_is_dealt_once_and_sizes_fall(n, part, concentration, decay, seed):
    n_sources = max(1, round(part * n))
    data = labelled(n, seed=seed)
    found = Sources.split(data, n_sources, concentration=concentration, decay=decay, seed=seed)
    sizes = found.sizes.tolist()
    assert sum(sizes) == n and len(sizes) == n_sources and min(sizes) >= 1
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1 or decay > 0
    again = Sources.split(data, n_sources, concentration=concentration, decay=decay, seed=seed)
    assert torch.equal(found.groups, again.groups)


def test_sizes_follow_the_power_law():
    # shares 6/11, 3/11, 2/11 of what is left after one each
    assert Sources.split(labelled(113), 3, decay=1.0, seed=0).sizes.tolist() == [61, 31, 21]
    assert Sources.split(labelled(12), 4, decay=0.0, seed=0).sizes.tolist() == [3, 3, 3, 3]


def test_concentration_decides_how_much_sources_differ():
    data = Examples(torch.zeros(600, 2), torch.arange(600) % 3)

    def largest_class(concentration):
        counts = Sources.split(data, 3, concentration=concentration, decay=0.0, seed=1).class_counts
        return float((counts.amax(1) / counts.sum(1)).mean())

    assert largest_class(1000.0) < 0.45 < 0.65 < largest_class(0.05)
    other = Sources.split(data, 3, seed=2)
    assert not torch.equal(other.groups, Sources.split(data, 3, seed=1).groups)


def test_class_counts_are_counts():
    for source in range(3):
        labels = TRAIN.targets[SOURCES.groups == source]
        assert SOURCES.class_counts[source].tolist() == [int((labels == label).sum()) for label in range(3)]


def test_what_is_removed_belongs_to_the_source_and_parts_are_nested():
    whole = SOURCES.removed()
    assert torch.equal(whole, torch.stack([SOURCES.groups == source for source in range(3)]))
    quarter, half = SOURCES.removed(0.25, seed=4), SOURCES.removed(0.5, seed=4)
    assert quarter.sum(1).tolist() == [3, 2, 1] and half.sum(1).tolist() == [6, 4, 2]
    assert not (quarter & ~half).any() and not (half & ~whole).any()
    assert not torch.equal(half, SOURCES.removed(0.5, seed=5))
    assert SOURCES.removed(0.001).sum(1).tolist() == [1, 1, 1]


def test_a_copy_holds_the_same_examples():
    found = SOURCES.copied(1)
    assert found.names == ("a", "b", "c", "copy of b") and found.sizes.tolist() == [12, 7, 5, 7]
    assert torch.equal(found.examples.inputs[-7:], TRAIN.inputs[SOURCES.groups == 1])
    assert torch.equal(found.examples.targets[-7:], TRAIN.targets[SOURCES.groups == 1])
    assert torch.equal(found.examples.inputs[:24], TRAIN.inputs) and len(SOURCES) == 3


def test_wrong_labels_are_wrong_and_of_one_source_only():
    found = SOURCES.mislabelled(0, 0.5, seed=1)
    changed = found.examples.targets != TRAIN.targets
    assert int(changed.sum()) == 6 and bool((SOURCES.groups[changed] == 0).all())
    assert int(found.examples.targets.max()) <= 2 and torch.equal(found.examples.inputs, TRAIN.inputs)
    assert not torch.equal(found.examples.targets, SOURCES.mislabelled(0, 0.5, seed=2).examples.targets)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_effects_are_those_of_models_trained_one_by_one(loss):
    layers = (4, 5, 3) if loss == "cross_entropy" else (4, 5, 1)
    recipe = Recipe(layers, loss=loss, epochs=3, batch_size=5, precision="float64")
    data, asked = (labelled(14), labelled(6, seed=4)) if layers[-1] > 1 else (continuous(14), continuous(6, seed=4))
    removed = torch.zeros(2, 14, dtype=torch.bool)
    removed[0, :5], removed[1, 9] = True, True
    found = removal_effects(recipe, data, removed, [3, 8], asked, **QUIET)
    assert found.shape == (2, 2, 6)
    for s, seed in enumerate([3, 8]):
        kept = [torch.ones(1, 14, dtype=torch.bool), ~removed[:1], ~removed[1:]]
        full, first, second = (
            evaluate(recipe, train_many(recipe, data, mask, [seed]), asked)["losses"][0] for mask in kept
        )
        torch.testing.assert_close(found[:, s], torch.stack([first - full, second - full]), rtol=1e-10, atol=1e-12)


def test_the_effect_in_a_convex_model_is_that_of_the_optimum_without_the_source():
    problem = converged(40)
    split = Sources.split(problem.train, 8, concentration=5.0, decay=0.0, seed=0)
    asked = labelled(5, seed=9)
    effects = removal_effects(CONVEX, problem.train, split.removed(), [0], asked, **QUIET)[:, 0].T
    for s, mask in enumerate(split.removed()):
        weights = 40 / 35 * (~mask).double()  # the mean is over the rest
        there = problem.losses(asked, optimum(problem, weights))
        torch.testing.assert_close(effects[:, s], there - problem.losses(asked), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("momentum", "horizon"), [(0.5, 7), ("adaptive", 60)])
def test_group_responses_are_the_sums_of_their_members(momentum, horizon):
    """Exactly so where the step does not depend on the push, otherwise once converged."""
    problem = random_problem(n=24)
    dynamics = Dynamics(horizon=horizon, damping=0.1, momentum=momentum)
    together = simulate(problem, dynamics, groups=SOURCES.groups).scores(QUERIES)
    summed = sum_groups(simulate(problem, dynamics).scores(QUERIES).T, SOURCES.groups).T
    torch.testing.assert_close(together, summed, rtol=1e-7, atol=1e-9)


def test_finished_retraining_is_kept(tmp_path, monkeypatch):
    arguments = (Recipe((4, 3), epochs=1, batch_size=8), TRAIN, SOURCES.removed(), [0, 1], QUERIES)
    first = removal_effects(*arguments, store=Store(tmp_path), **QUIET)

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(ground_truth, "_train_block", refuse)
    assert torch.equal(removal_effects(*arguments, store=Store(tmp_path), **QUIET), first)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"groups must be 24 int64 numbers, got torch.int64 of shape \(3,\)"):
        Sources(TRAIN, torch.arange(3), ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"groups must lie in 0\.\.1, one name each, got 2"):
        Sources(TRAIN, SOURCES.groups, ("a", "b"))
    with pytest.raises(ValueError, match="'d' has no example"):
        replace(SOURCES, names=("a", "b", "c", "d"))
    for n_sources in (0, 25):
        with pytest.raises(
            ValueError, match=rf"n_sources must lie in 1\.\.24, the examples there are, got {n_sources}"
        ):
            Sources.split(TRAIN, n_sources, seed=0)
    with pytest.raises(ValueError, match="these targets are numbers"):
        Sources.split(continuous(9), 2, seed=0)
    with pytest.raises(ValueError, match=r"concentration > 0 and decay >= 0, got 0\.0 and 1\.0"):
        Sources.split(TRAIN, 2, concentration=0.0, seed=0)
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got"):
            SOURCES.removed(share)
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got"):
            SOURCES.mislabelled(0, share)
    with pytest.raises(ValueError, match=r"source must lie in 0\.\.2, got 3"):
        SOURCES.copied(3)
    one = Sources(Examples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)), torch.arange(3), ("a", "b", "c"))
    with pytest.raises(ValueError, match="there is one class"):
        one.mislabelled(0)
    with pytest.raises(ValueError, match="no classes to count"):
        _ = Sources(continuous(3), torch.arange(3), ("a", "b", "c")).class_counts
    recipe = Recipe((4, 3), epochs=1)
    with pytest.raises(ValueError, match=r"removed must be \(k, 24\) booleans, k >= 1, got torch.float32"):
        removal_effects(recipe, TRAIN, torch.zeros(2, 24), [0], QUERIES, **QUIET)
    with pytest.raises(ValueError, match="is empty"):
        removal_effects(recipe, TRAIN, torch.ones(1, 24, dtype=torch.bool), [0], QUERIES, **QUIET)
