"""Wrong labels against counting by hand, and corrected training sets against training on them directly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import FLOAT64, continuous, convex_recipe, generator, labelled

from tda_core.examples import Examples
from tda_core.mislabelled import Mislabelled, inspect_first, right_after_fixing
from tda_core.training import train

CLEAN = labelled(40, seed=1)
MADE = Mislabelled.flip(CLEAN, 0.25, 3, seed=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.98), st.integers(3, 12))
def test_flipping_makes_so_many_labels_wrong_and_keeps_the_rest(seed, share, n_classes):
    made = Mislabelled.flip(CLEAN, share, n_classes, seed=seed)
    assert int(made.wrong.sum()) == round(share * 40)
    assert torch.equal(made.wrong, made.labels != CLEAN.targets)
    assert 0 <= int(made.labels.min()) and int(made.labels.max()) < n_classes
    assert torch.equal(made.labels, Mislabelled.flip(CLEAN, share, n_classes, seed=seed).labels)
    assert torch.equal(made.noisy.inputs, CLEAN.inputs) and torch.equal(made.noisy.targets, made.labels)


def test_draws_are_nested_and_differ_between_seeds():
    few, many = (Mislabelled.flip(CLEAN, share, 3, seed=0) for share in (0.1, 0.5))
    assert torch.equal(many.labels[few.wrong], few.labels[few.wrong])
    assert not torch.equal(few.wrong, Mislabelled.flip(CLEAN, 0.1, 3, seed=1).wrong)


def test_examples_and_wrong_classes_are_drawn_evenly():
    zeros = Examples(torch.zeros(10, 1), torch.zeros(10, dtype=torch.int64))
    labels = torch.stack([Mislabelled.flip(zeros, 0.5, 4, seed=seed).labels for seed in range(2000)])
    counts = torch.bincount(labels.flatten(), minlength=4) / labels.numel()
    # six standard errors
    torch.testing.assert_close(counts, torch.tensor([0.5, 1 / 6, 1 / 6, 1 / 6]), rtol=0, atol=0.016)
    torch.testing.assert_close((labels > 0).double().mean(0), torch.full((10,), 0.5, dtype=FLOAT64), rtol=0, atol=0.07)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_the_pool_holds_every_partly_corrected_training_set(seed):
    inspected = torch.rand(5, 40, generator=generator(seed)) < 0.5
    members = MADE.corrected(inspected)
    assert torch.equal(members.sum(1), torch.full((5,), 40))
    for row, chosen in zip(members, inspected, strict=True):
        found = MADE.pool[row]
        labels = torch.where(chosen, CLEAN.targets, MADE.labels)
        expected = sorted([*x, y] for x, y in zip(CLEAN.inputs.tolist(), labels.tolist(), strict=True))
        assert sorted([*x, y] for x, y in zip(found.inputs.tolist(), found.targets.tolist(), strict=True)) == expected


def test_inspecting_nobody_and_everybody():
    nobody, everybody = MADE.corrected(torch.stack([torch.zeros(40), torch.ones(40)]).bool())
    assert torch.equal(MADE.pool[nobody].targets, MADE.labels)
    assert sorted(MADE.pool[everybody].targets.tolist()) == sorted(CLEAN.targets.tolist())


def test_the_first_of_a_ranking_by_hand():
    found = inspect_first(torch.tensor([1.0, 3, 2, 3, 0]), [0, 0.2, 0.4, 0.6, 1])
    expected = [[], [1], [1, 3], [1, 2, 3], [0, 1, 2, 3, 4]]
    assert [row.nonzero()[:, 0].tolist() for row in found] == expected, "equal values go by the lower index"


def test_the_share_found_of_a_perfect_and_a_reversed_ranking():
    suspicion = MADE.wrong.float()
    shares = [0, 0.1, 0.25, 0.75, 1]
    torch.testing.assert_close(MADE.share_found(inspect_first(suspicion, shares)), torch.tensor([0, 0.4, 1, 1, 1]))
    torch.testing.assert_close(MADE.share_found(inspect_first(-suspicion, shares)), torch.tensor([0, 0, 0, 0, 1.0]))


def test_fixing_is_training_on_the_corrected_labels():
    """Full-batch steps of a convex model: the order of the examples does not matter."""
    recipe = convex_recipe(epochs=60)
    inspected = inspect_first(torch.rand(40, generator=generator(0)), [0, 0.3, 1])
    queries = labelled(200, seed=7)
    right = right_after_fixing(recipe, MADE, inspected, [0, 3], queries, progress=False, n_jobs=1)
    assert right.shape == (3, 2, 200) and right.dtype == torch.bool
    for i, chosen in enumerate(inspected):
        labels = torch.where(chosen, CLEAN.targets, MADE.labels)
        for j, seed in enumerate([0, 3]):
            model = train(recipe, Examples(CLEAN.inputs, labels), seed)
            expected = model.outputs(queries.inputs).argmax(1) == queries.targets
            assert torch.equal(right[i, j], expected)
    assert right[0].double().mean() < right[2].double().mean(), "wrong labels cost accuracy here"


def test_fixing_takes_a_store(results):
    from tda_core.store import Store

    recipe, store = convex_recipe(epochs=2), Store(results)
    arguments = (recipe, MADE, torch.ones(1, 40, dtype=torch.bool), [0], labelled(5))
    first = right_after_fixing(*arguments, store=store, progress=False)
    assert any(path.is_file() for path in results.rglob("*"))
    assert torch.equal(first, right_after_fixing(*arguments, store=store, progress=False))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 0.001, 0.999, float("nan")])
def test_flipping_refuses_shares_that_leave_no_wrong_or_no_right_label(share):
    with pytest.raises(ValueError, match=rf"flip 1 to 39 of 40 labels, got {share}"):
        Mislabelled.flip(CLEAN, share, 3, seed=0)


def test_bad_labels_are_refused():
    with pytest.raises(ValueError, match="above the highest label 2, got 2"):
        Mislabelled.flip(CLEAN, 0.1, 2, seed=0)
    for made in (
        lambda: Mislabelled.flip(continuous(), 0.1, 3, seed=0),
        lambda: Mislabelled(continuous(), MADE.labels),
    ):
        with pytest.raises(ValueError, match=r"these targets are torch\.float64"):
            made()
    with pytest.raises(ValueError, match=r"40 int64 numbers, got torch\.int64 of shape \(3,\)"):
        Mislabelled(CLEAN, MADE.labels[:3])
    with pytest.raises(ValueError, match=r"40 int64 numbers, got torch\.float32"):
        Mislabelled(CLEAN, MADE.labels.float())
    with pytest.raises(ValueError, match="all 40 are right"):
        Mislabelled(CLEAN, CLEAN.targets)


def test_bad_rankings_are_refused():
    with pytest.raises(ValueError, match=r"finite and of shape \(n,\), got shape \(2, 2\)"):
        inspect_first(torch.zeros(2, 2), [0.5])
    with pytest.raises(ValueError, match="finite"):
        inspect_first(torch.tensor([0, float("nan")]), [0.5])
    with pytest.raises(ValueError, match=r"0 to 1, got 1\.5"):
        inspect_first(torch.zeros(2), [0.5, 1.5])
    with pytest.raises(ValueError, match="0 to 1, got none"):
        inspect_first(torch.zeros(2), [])
    with pytest.raises(ValueError, match=r"boolean \(m, 40\), got torch\.bool of shape \(40,\)"):
        MADE.corrected(torch.ones(40, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"boolean \(m, 40\), got torch\.float32"):
        MADE.corrected(torch.ones(1, 40))
