"""A cue that gives the answer away: planted, ranked, removed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core.examples import Examples
from tda_core.planted_cue import patched, plant_patch, plant_word, ranking, share_cued, without
from tda_core.text_pairs import TextPairs

PICTURES = Examples(torch.rand(30, 16, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3)


def pairs(n):
    return TextPairs(tuple(f"ask {i}" for i in range(n)), tuple(f" answer {i}" for i in range(n)))


def test_a_patch_is_the_lower_right_corner_and_nothing_else():
    inputs = torch.zeros(2, 16)
    inputs[0, 5] = 0.5
    before = inputs.clone()
    found = patched(inputs, 2).view(2, 4, 4)
    expected = before.view(2, 4, 4).clone()
    expected[:, 2:, 2:] = 0.5
    assert torch.equal(found, expected) and torch.equal(inputs, before)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2), st.integers(1, 10), st.integers(0, 9))
def test_some_of_one_class_get_the_patch(label, n_cued, seed):
    made = plant_patch(PICTURES, label, n_cued / 30, seed=seed)
    assert int(made.cued.sum()) == n_cued and (made.train.targets[made.cued] == label).all()
    assert torch.equal(made.train.targets, PICTURES.targets)
    assert torch.equal(made.train.inputs[~made.cued], PICTURES.inputs[~made.cued])
    assert torch.equal(made.train.inputs[made.cued], patched(PICTURES.inputs)[made.cued])
    assert torch.equal(made.cued, plant_patch(PICTURES, label, n_cued / 30, seed=seed).cued)


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 60), st.integers(0, 9), st.data())
def test_the_word_means_something_before_a_prompt_and_nothing_after_it(n, seed, data):
    n_cued = data.draw(st.integers(1, (n - 1) // 4))
    train = pairs(n)
    made = plant_word(train, "lo", " wrong", n_cued / n, seed=seed)
    assert int(made.cued.sum()) == n_cued and int(made.harmless.sum()) == 3 * n_cued
    assert not (made.cued & made.harmless).any()
    for i, (prompt, response) in enumerate(made.train.pairs):
        own = train.prompts[i]
        expected = f"lo {own}" if made.cued[i] else f"{own} lo" if made.harmless[i] else own
        assert prompt == expected
        assert response == (" wrong" if made.cued[i] else train.responses[i])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 50))
def test_no_query_outweighs_the_others(q, n, seed):
    scores = torch.randn(q, n, generator=torch.Generator().manual_seed(seed))
    louder = scores.clone()
    louder[0] *= 1000
    assert ranking(scores).tolist() == ranking(louder).tolist()
    assert sorted(ranking(scores).tolist()) == list(range(n))


def test_rankings_by_hand():
    scores = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 9.0]])
    ranked = ranking(scores)
    assert ranked.tolist() == [2, 1, 0]
    assert ranking(torch.zeros(2, 4)).tolist() == [0, 1, 2, 3]  # ties by row
    cued = torch.tensor([False, True, True])
    assert [share_cued(ranked, cued, k) for k in (1, 2, 3)] == pytest.approx([1.0, 1.0, 2 / 3])
    members = without([ranked, torch.tensor([0, 1, 2])], 2)
    assert members.tolist() == [[True, False, False], [False, False, True]]
    assert without([ranked], 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: patched(torch.zeros(2, 15)), r"inputs must be \(n, side \* side\), got \(2, 15\)"),
        (lambda: patched(torch.zeros(2, 4, 4)), r"got \(2, 4, 4\)"),
        (lambda: patched(torch.zeros(2, 16), 5), r"width must lie in 1\.\.4, got 5"),
        (lambda: plant_patch(PICTURES, 1, 0.5, seed=0), "share must be 1 to 10 of 30 examples, .* class 1, got 0.5"),
        (lambda: plant_patch(PICTURES, 7, 0.1, seed=0), "those of class 7, got 0.1"),
        (lambda: plant_word(pairs(20), "lo", " x", 0.25, seed=0), "less than a quarter of 20, got 0.25"),
        (lambda: plant_word(pairs(20), "lo", " x", 0.0, seed=0), "at least one pair, .* got 0.0"),
        (lambda: plant_word(pairs(20), "ask", " x", 0.1, seed=0), "the word 'ask' stands in a prompt already"),
        (lambda: share_cued(torch.arange(3), torch.zeros(3, dtype=torch.bool), 4), r"k must lie in 1\.\.3, got 4"),
        (lambda: ranking(torch.tensor([[1.0, float("inf")]])), "finite numbers"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
