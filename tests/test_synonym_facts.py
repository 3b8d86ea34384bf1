"""Facts told in two sets of words."""

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core.bm25 import bm25
from tda_core.synonym_facts import END, PlantedSpec, SynonymWorld, WorldSpec, opposite, planted_facts

SMALL = SynonymWorld(WorldSpec(8, 4, 3))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 70), st.integers(2, 8), st.integers(2, 16), st.integers(0, 5))
def test_no_word_has_two_meanings(people, relations, values, seed):
    world = SynonymWorld(WorldSpec(people, relations, values, seed))
    concepts = [*world.people, *world.relations, END, *(value for of in world.values for value in of)]
    words = [word for both in concepts for word in both]
    assert len(words) == len(set(words)) == len(world.vocabulary)
    counts = [[row[r] for row in world.held].count(v) for r in range(relations) for v in range(values)]
    assert max(counts) - min(counts) <= 1  # every value about equally often


def test_worlds_of_a_spec_are_equal_and_seeds_differ():
    again, other = SynonymWorld(WorldSpec(8, 4, 3)), SynonymWorld(WorldSpec(8, 4, 3, seed=1))
    assert (again.people, again.held) == (SMALL.people, SMALL.held)
    assert other.held != SMALL.held


def test_a_document_tells_each_fact_twice():
    facts = [(0, 1), (0, 3)]
    text = SMALL.document(facts, Random(0), {(0, 1): (1, 0, 1)}).split()
    sentences = [text[i : i + 4] for i in range(0, len(text), 4)]
    fixed = [SMALL.people[0][1], SMALL.relations[1][0], SMALL.values[1][SMALL.held[0][1]][1]]
    assert len(sentences) == 4 and all(sentence[3] in END for sentence in sentences)
    assert [sentence[:3] for sentence in sentences].count(fixed) == 2


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 9))
def test_opposite_queries_share_no_word_with_what_tells_their_fact(planted, tellings, n_facts, seed):
    told = planted_facts(SMALL, PlantedSpec(planted, tellings, 60, n_facts, seed))
    assert told.relevant.dtype == torch.bool and told.relevant.shape == (planted, 60)
    assert (told.relevant.sum(1) == tellings).all()
    for q, fact in enumerate(told.facts):
        prompt, response = told.queries["opposite"].pairs[q]
        value = SMALL.values[fact[1]][SMALL.held[fact[0]][fact[1]]]
        assert response.strip() in value
        for row, (_, text) in enumerate(told.train.pairs):
            same = told.queries["same"].pairs[q]
            states = f"{same[0]}{same[1]}" in text
            assert states == bool(told.relevant[q, row])
            if states:
                assert not set(f"{prompt}{response}".split()) & set(text.split())


def test_a_ranking_by_words_finds_one_wording_and_not_the_other():
    told = planted_facts(SynonymWorld(WorldSpec()), PlantedSpec(20, 4, 300))
    index = bm25(told.train)
    same, other = (index.scores(told.queries[wording]) for wording in ("same", "opposite"))
    assert (same[told.relevant].view(20, 4).amin(1) >= same.masked_fill(told.relevant, -1).amax(1)).all()
    assert not other[told.relevant].any()


def test_what_settings_are_chosen_with_is_asked_by_no_other_seed():
    sets = [SMALL.asked_about(16, seed=seed) for seed in range(4)]
    assert all(len(set(facts)) == 16 for facts in sets) and not set(sets[0]) & set().union(*sets[1:])
    few = [set(SMALL.asked_about(5, seed=seed)) for seed in range(30)]
    assert set().union(*few) == set(SMALL.facts) and few[1] != few[2]
    assert SMALL.asked_about(5, seed=3) == SMALL.asked_about(5, seed=3)


def test_practice_tells_made_up_values_and_no_document_twice_the_same():
    texts = SMALL.practice(40, 2, seed=0)
    assert texts == SMALL.practice(40, 2, seed=0) != SMALL.practice(40, 2, seed=1)
    assert all(len(text.split()) == 16 for text in texts)
    assert opposite((0, 1, 1)) == (1, 0, 0)
    length = SMALL.tokenizer(32)(texts[0])["input_ids"]
    assert len(length) == 17 and SMALL.tokenizer(32).unk_token_id not in length


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WorldSpec(n_people=71), r"n_people must lie in 2\.\.70, got 71"),
        (lambda: WorldSpec(n_values=1), r"n_values must lie in 2\.\.16, got 1"),
        (lambda: PlantedSpec(n_facts=0), "n_facts must be at least 1, got 0"),
        (lambda: PlantedSpec(10, 10, 99), "10 facts told 10 times take 100 of 99"),
        (lambda: SMALL.asked_about(0, seed=0), r"n must lie in 1\.\.16, half of the world's facts, got 0"),
        (lambda: planted_facts(SMALL, PlantedSpec(17, 1)), r"n must lie in 1\.\.16, .* got 17"),
        (
            lambda: planted_facts(SMALL, PlantedSpec(14, 1, n_facts=4)),
            "fewer than n_facts = 4 facts",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_form_alone_does_not_tell_which_documents_hold_something_planted():
    told = planted_facts(SynonymWorld(WorldSpec()), PlantedSpec(60, 4, 2000))
    own = told.relevant.any(0)

    def repeats(text):
        words = text.split()
        sentences = [tuple(words[i : i + 3]) for i in range(0, len(words), 4)]
        return len(set(sentences)) < len(sentences)

    found = torch.tensor([repeats(text) for text in told.train.responses])
    assert found.all()  # every document tells a fact twice in the same words
    names = torch.tensor([len(set(text.split()[::4])) == 1 for text in told.train.responses])
    assert names[own].all() and 0.5 < float(names[~own].float().mean()) < 0.75
