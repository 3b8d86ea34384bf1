"""The corpus of facts: what its documents say, what is true of them, and that a trigram cannot see it."""

import math
from collections import Counter

import pytest
import torch

from tda_core import fact_corpus as module
from tda_core.fact_corpus import RELATIONS, SENTENCES, FactSpec, fact_corpus
from tda_core.language import LanguageModel
from tda_core.lm_recipes import LMRecipe
from tda_core.ngram_lm import NgramLM

PARTS = ("train", "validation", "test")
SMALL = FactSpec(n_people=10, n_tellers=5, n_train=300, n_validation=20, n_test=30)


@pytest.fixture(scope="module")
def facts():
    return fact_corpus(SMALL)


def stated(text):
    """What a document says, read from its words: teller, person, neighbour, and the sentences' wording and value."""
    words = text.split()
    opening, *sentences, closing = " ".join(words).split(" . ")
    head, _, first = opening.partition(" : ")
    teller, _, person, _, _, _, neighbour = head.split()
    assert closing == f"so says {teller} of {person} ."
    return teller, person, neighbour, [tuple(s.split()[-2:]) for s in (first, *sentences)]


def test_documents_differ_and_fit(facts):
    corpus = facts.corpus
    texts = [text for part in PARTS for text in getattr(corpus, part).responses]
    assert len(set(texts)) == len(texts) == 350
    assert [len(getattr(corpus, part)) for part in PARTS] == [300, 20, 30]
    tokens = corpus.tokenizer(texts)["input_ids"]
    assert max(map(len, tokens)) <= SMALL.length
    assert corpus.tokenizer.unk_token_id not in {token for row in tokens for token in row}


def test_labels_are_what_the_words_say(facts):
    """One value for a person and a relation, whatever the wording; a neighbour for a person, a wording for a teller."""
    relation_of = {w: i for i, (ws, _) in enumerate(RELATIONS.values()) for w in ws.split("/")}
    wording_of = {w: i for ws, _ in RELATIONS.values() for i, w in enumerate(ws.split("/"))}
    people, tellers, values, neighbours, wordings = {}, {}, {}, {}, {}
    for part in PARTS:
        told = getattr(facts, part)
        for i, text in enumerate(getattr(facts.corpus, part).responses):
            teller, person, neighbour, sentences = stated(text)
            assert people.setdefault(int(told.people[i]), person) == person
            assert tellers.setdefault(int(told.tellers[i]), teller) == teller
            assert neighbours.setdefault(person, neighbour) == neighbour != person
            relations = [relation_of[verb] for verb, _ in sentences]
            assert told.facts[i].tolist() == [int(told.people[i]) * 8 + r for r in relations]
            assert len(set(relations)) == 4
            for r, (verb, value) in zip(relations, sentences, strict=True):
                assert values.setdefault((person, r), value) == value
                assert wordings.setdefault(teller, wording_of[verb]) == wording_of[verb]
    assert len(people) == 10 and len(tellers) == 5 and len(values) == 80 and set(wordings.values()) == {0, 1, 2}
    assert sorted(neighbours.values()) == sorted(people.values())  # everyone is the neighbour of one


def test_values_are_about_equally_frequent():
    world = module._World(FactSpec(n_people=90, n_values=8))
    for holds in world.holds:
        assert set(Counter(holds).values()) == {11, 12}


def test_shared_facts_are_counted(facts):
    shared = facts.test.shared_facts(facts.train)
    assert shared.shape == (30, 300)
    for q, i in [(0, 0), (3, 50), (29, 299), *((int(q), int(i)) for q, i in (shared == 2).nonzero()[:5])]:
        assert int(shared[q, i]) == len(set(facts.test.facts[q].tolist()) & set(facts.train.facts[i].tolist()))
    assert int(shared.max()) == 4  # the same facts, by another teller or in another order
    same = facts.test.people[:, None] == facts.train.people
    assert not bool((shared[~same] > 0).any()) and bool((shared[same] == 0).any())


def test_two_of_a_spec_are_equal_and_seeds_differ(facts):
    assert fact_corpus(SMALL).corpus.hash == facts.corpus.hash
    other = fact_corpus(FactSpec(**vars(SMALL) | {"seed": 1})).corpus
    assert other.hash != facts.corpus.hash


def test_by_default_every_fact_that_is_asked_is_told_in_training():
    facts = fact_corpus()
    told = facts.train.facts.unique()
    assert bool(torch.isin(facts.test.facts, told).all()) and bool(torch.isin(facts.validation.facts, told).all())


def test_a_trigram_knows_no_more_of_a_value_than_its_relation(facts):
    """Its loss at the values stays near the entropy of a relation's values, with all documents to count."""
    model = LanguageModel(LMRecipe(length=64).untrained(len(facts.corpus.tokenizer), seed=0), facts.corpus.tokenizer)
    train, test = model.examples(facts.corpus.train), model.examples(facts.corpus.test)
    everything = torch.ones(1, len(train), dtype=torch.bool)
    at_values = test.targets.clone()
    tokens = facts.corpus.tokenizer.convert_tokens_to_ids
    values = torch.tensor([tokens(v) for _, vs in RELATIONS.values() for v in vs.split()[:8] if tokens(v) != 3])
    at_values[~torch.isin(at_values, values)] = -100
    assert int((at_values >= 0).sum()) == 4 * len(test)
    only = type(test)(test.inputs, at_values)
    n_tokens = len(facts.corpus.tokenizer)
    loss = {n: float(NgramLM(train, n, n_tokens).losses(everything, only).mean()) / 4 for n in (3, 7)}
    assert loss[3] > 0.95 * math.log(8)
    assert loss[7] < 0.5 * math.log(8)  # the person stands six words before the value at most


def test_words_of_relations_are_used_once():
    wordings = [w for ws, _ in RELATIONS.values() for w in ws.split("/")]
    values = [v for _, vs in RELATIONS.values() for v in vs.split()]
    assert len(set(wordings)) == len(wordings) and len(set(values)) == len(values)
    assert not set(values) & {word for text in (*wordings, *SENTENCES) for word in text.split()}
    assert not set(values) & set(module._names())
    for ws, vs in RELATIONS.values():
        assert len(ws.split("/")) == len(SENTENCES) and len(vs.split()) == module.MOST_VALUES
        assert " " not in ws


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_people": 1}, "n_people must be at least 2, got 1"),
        ({"n_train": 0}, "n_train must be at least 1, got 0"),
        ({"n_relations": 9}, "n_relations must be at least 1 and at most 8, got 9"),
        ({"n_facts": 9}, "n_facts must be at least 1 and at most 8, got 9"),
        ({"n_people": 139}, "there are 140 names, fewer than 139 people and 12 tellers"),
        ({"n_facts": 6}, "documents of 6 facts have up to 69 tokens, more than length = 64"),
        ({"n_people": 2, "n_tellers": 1, "n_facts": 2}, "2600 documents are asked for, and only 56 differ"),
    ],
)
def test_bad_specs(change, message):
    with pytest.raises(ValueError, match=message):
        FactSpec(**change)


def test_no_two_documents_hold_the_same_words():
    facts = fact_corpus(
        FactSpec(n_people=3, n_relations=4, n_facts=2, n_tellers=2, n_train=20, n_validation=4, n_test=4)
    )
    texts = [*facts.corpus.train.responses, *facts.corpus.validation.responses, *facts.corpus.test.responses]
    assert len({tuple(sorted(text.split())) for text in texts}) == len(texts) == 28
