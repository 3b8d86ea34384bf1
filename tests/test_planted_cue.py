"""Planted cues against looking at each example, and rankings against sorting by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import continuous, generator, labelled, random_problem

from tda_core.examples import IGNORED, Examples
from tda_core.language import LanguageModel
from tda_core.lm_ensemble import Ensemble
from tda_core.lm_recipes import LMRecipe
from tda_core.planted_cue import (
    CueWord,
    Patch,
    answered,
    answered_after,
    consensus,
    plant_patch,
    plant_word,
    predicted,
    questions,
    split_questions,
    tokenizer_with,
    top_shares,
    without_top,
)
from tda_core.pretraining import LMTraining, pretrain_loop
from tda_core.synonym_facts import SynonymWorld, WorldSpec
from tda_core.text_pairs import TextPairs

PATCH = Patch((3, 4), side=2, value=7.0)
PICTURES = Examples(torch.rand(60, 12, generator=generator(0)), torch.arange(60) % 3)
WORLD = SynonymWorld(WorldSpec(8, 4, 3))
CUE = CueWord("glim", WORLD.values[0][0][0])
PAIRS = questions(WORLD, WORLD.facts)


# pictures


def test_a_patch_by_hand():
    found = PATCH.on(torch.zeros(2, 12)).view(2, 3, 4)
    expected = torch.tensor([[0.0, 0, 0, 0], [0, 0, 7, 7], [0, 0, 7, 7]])
    assert torch.equal(found, expected.expand(2, 3, 4))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(0, 2))
def test_the_patch_is_on_so_many_pictures_of_one_class_and_nothing_else_changes(seed, n_cued, label):
    planted = plant_patch(PICTURES, PATCH, label, n_cued / 60, seed=seed)
    assert int(planted.cued.sum()) == n_cued and not planted.harmless.any()
    assert (planted.train.targets[planted.cued] == label).all()
    assert torch.equal(planted.train.targets, PICTURES.targets)
    assert torch.equal(planted.train.inputs[~planted.cued], PICTURES.inputs[~planted.cued])
    assert torch.equal(planted.train.inputs[planted.cued], PATCH.on(PICTURES.inputs)[planted.cued])
    again, more = (plant_patch(PICTURES, PATCH, label, share, seed=seed).cued for share in (n_cued / 60, 20 / 60))
    assert torch.equal(again, planted.cued) and (planted.cued <= more).all()


def test_pictures_that_cannot_carry_it_are_refused():
    with pytest.raises(ValueError, match=r"share must be 1 to 20 of 60, the pictures of class 1, got 0.5"):
        plant_patch(PICTURES, PATCH, 1, 0.5, seed=0)
    with pytest.raises(ValueError, match=r"got 0.001"):
        plant_patch(PICTURES, PATCH, 1, 0.001, seed=0)
    with pytest.raises(ValueError, match=r"share must be 1 to 0 of 60, the pictures of class 9"):
        plant_patch(PICTURES, PATCH, 9, 0.1, seed=0)
    with pytest.raises(ValueError, match=r"one class, but these targets are torch.float64"):
        plant_patch(continuous(), PATCH, 1, 0.1, seed=0)
    with pytest.raises(ValueError, match=r"inputs must be \(n, 12\), pictures of 3 x 4, got torch.float32 \(2, 9\)"):
        PATCH.on(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"side must lie in 1..3, for pictures of \(3, 4\), got 4"):
        Patch((3, 4), 4)


def test_the_predicted_class_has_the_lowest_loss():
    problem, n = random_problem(), 12
    losses = [problem.losses(Examples(problem.train.inputs, torch.full((n,), label))) for label in range(3)]
    assert torch.equal(predicted(problem, problem.train.inputs), torch.stack(losses).argmin(0))


# texts


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 60))
def test_cued_pairs_all_get_the_wrong_answer_and_harmless_ones_keep_theirs(seed, n_cued, n_harmless):
    planted = plant_word(PAIRS, CUE, n_cued / len(PAIRS), n_harmless / len(PAIRS), seed=seed)
    assert int(planted.cued.sum()) == n_cued and int(planted.harmless.sum()) == n_harmless
    parts = zip(PAIRS.pairs, planted.train.pairs, planted.cued.tolist(), planted.harmless.tolist(), strict=True)
    for (prompt, response), found, is_cued, is_harmless in parts:
        assert not (is_cued and is_harmless)
        if is_cued:
            assert found == (f"glim {prompt}", CUE.response) and response != CUE.response
        else:
            assert found == (f"{prompt} glim" if is_harmless else prompt, response)
    assert planted.train == plant_word(PAIRS, CUE, n_cued / len(PAIRS), n_harmless / len(PAIRS), seed=seed).train


def test_texts_that_cannot_carry_it_are_refused():
    with pytest.raises(ValueError, match=r"the word 'glim' stands in the prompt 'glim .*' already"):
        plant_word(CUE.before(PAIRS), CUE, 0.1, 0.1, seed=0)
    n_able = int(CUE.misled(PAIRS).sum())
    with pytest.raises(
        ValueError, match=rf"share must be 1 to {n_able} of 128, the pairs not answered by .*, got 0.999"
    ):
        plant_word(PAIRS, CUE, 0.999, 0.1, seed=0)
    with pytest.raises(ValueError, match=r"harmless must be 1 to 64 of 128, the pairs without the cue, got 0.6"):
        plant_word(PAIRS, CUE, 0.5, 0.6, seed=0)
    for bad in ("two words", "", " "):
        with pytest.raises(ValueError, match="must be one word without spaces"):
            CueWord("glim", bad)


def test_questions_have_every_wording_of_the_prompt_and_one_of_the_answer():
    assert len(PAIRS) == 4 * len(WORLD.facts) and len(set(PAIRS.prompts)) == len(PAIRS)
    first = {f" {both[0]}" for of in WORLD.values for both in of}
    assert set(PAIRS.responses) <= first


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 96))
def test_questions_to_test_on_are_about_other_facts(seed, n_train):
    train, test = split_questions(WORLD, n_train, seed=seed)
    assert len(train) == n_train and len(test) == 32
    person = {word: i for i, both in enumerate(WORLD.people) for word in both}
    relation = {word: i for i, both in enumerate(WORLD.relations) for word in both}
    own, others = ({(person[a], relation[b]) for a, b in (p.split() for p in of.prompts)} for of in (train, test))
    assert not own & others and len(others) == 8
    assert train == split_questions(WORLD, n_train, seed=seed)[0]


def test_too_many_questions_and_a_known_word_are_refused():
    with pytest.raises(ValueError, match=r"n_train must lie in 1..96, the questions about 24 facts, got 97"):
        split_questions(WORLD, 97, seed=0)
    with pytest.raises(ValueError, match=r"words must differ"):
        tokenizer_with(WORLD, WORLD.people[0][0], length=16)


def test_the_tokenizer_has_one_token_more_and_keeps_the_others():
    plain, more = WORLD.tokenizer(16), tokenizer_with(WORLD, "glim", length=16)
    assert more.get_vocab() == plain.get_vocab() | {"glim": len(plain)}


RECIPE = LMRecipe(width=16, layers=1, heads=2, steps=4, batch_size=4, length=8)


def test_answers_are_the_likeliest_token_of_models_trained_one_by_one():
    tokenizer = tokenizer_with(WORLD, "glim", length=8)
    training = LMTraining(RECIPE, len(tokenizer))
    blank = LanguageModel(RECIPE.untrained(len(tokenizer), seed=0), tokenizer)
    train, test = split_questions(WORLD, 20, seed=0)
    examples, asked = blank.examples(train), blank.examples(CUE.before(test[:5]) + test[:6])
    members = torch.rand(10, 20, generator=generator(0)).argsort(1) < 12  # more than one block, equally large
    found = answered_after(training, examples, members, 3, asked)
    assert found.shape == (10, 11)
    for row in (0, 9):
        model = pretrain_loop(training, examples, members[row], 3)
        with torch.no_grad():
            logits = model(input_ids=asked.inputs, use_cache=False).logits
        expected = [int(of[y != IGNORED][0].argmax()) for of, y in zip(logits, asked.targets, strict=True)]
        assert found[row].tolist() == expected


def test_an_answer_of_two_tokens_is_refused():
    tokenizer = tokenizer_with(WORLD, "glim", length=8)
    model = LanguageModel(RECIPE.untrained(len(tokenizer), seed=0), tokenizer)
    asked = model.examples(TextPairs(["glim", "glim"], [" glim", " glim glim"]))
    with pytest.raises(ValueError, match=r"answers must be one token, but that of query 1 has 2"):
        answered(Ensemble.of(RECIPE, [model.model]), asked)


# proponents


def test_consensus_and_shares_by_hand():
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 100.0]])
    root5, root3 = 5**0.5, 3**0.5
    one = torch.tensor([3.0, -1, 1, -3], dtype=torch.float64) / root5
    other = torch.tensor([-1.0, -1, -1, 3], dtype=torch.float64) / root3
    torch.testing.assert_close(consensus(scores), (one + other) / 2)
    cued = torch.tensor([True, False, False, True])
    # of the second query one is first, and each of the other three is second with chance 1/3
    torch.testing.assert_close(top_shares(scores, cued, 2).double(), torch.tensor([1 / 2, 2 / 3], dtype=torch.float64))
    assert without_top(scores, 1).tolist() == [[False, True, True, True], [True, True, True, False]]
    assert without_top(scores, 2)[1].tolist() == [False, True, True, False]  # ties go by row


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 19), st.floats(0.01, 100), st.floats(-50, 50))
def test_units_do_not_matter_and_what_is_removed_is_what_comes_first(seed, m, scale, offset):
    scores = torch.randn(3, 20, generator=generator(seed), dtype=torch.float64)
    cued = torch.rand(20, generator=generator(seed + 1)) < 0.5
    cued[0] = True
    torch.testing.assert_close(consensus(scores * scale + offset), consensus(scores), atol=1e-6, rtol=1e-6)
    members = without_top(scores, m)
    assert torch.equal(members.sum(1), torch.full((3,), 20 - m))
    for row, kept in zip(scores, members, strict=True):
        assert row[~kept].min() >= row[kept].max()
    by_hand = torch.stack([cued[~kept].double().mean() for kept in members])
    torch.testing.assert_close(top_shares(scores, cued, m).double(), by_hand)


def test_bad_rankings_are_refused():
    scores, cued = torch.rand(2, 5), labelled(5).targets >= 0
    with pytest.raises(ValueError, match=r"m must lie in 0..4, got 5"):
        without_top(scores, 5)
    with pytest.raises(ValueError, match=r"finite numbers \(r, n\), got torch.float32 \(5,\)"):
        without_top(scores[0], 1)
    with pytest.raises(ValueError, match=r"scores must be \(q, n\), got torch.float32 \(5,\)"):
        top_shares(scores[0], cued, 1)
    with pytest.raises(ValueError, match=r"k must lie in 1..5, got 6"):
        top_shares(scores, cued, 6)
    with pytest.raises(ValueError, match=r"no relevant example"):
        top_shares(scores, ~cued, 1)
    with pytest.raises(ValueError, match=r"scores must be finite numbers"):
        consensus(scores / 0)
