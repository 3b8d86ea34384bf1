"""Test items in the training data, and how far scores make each training example suspect."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core.contamination import LeakSpec, leak, standardised, suspicion, suspicions
from tda_core.corpora import Corpus
from tda_core.lm_bench import Subject
from tda_core.lm_judging import Answer, Method
from tda_core.synonym_facts import SynonymWorld, WorldSpec

WORLD = SynonymWorld(WorldSpec(12, 4, 3))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["verbatim", "reworded"]), st.integers(1, 9), st.integers(0, 20))
def test_leaks_are_items_and_nothing_else_is(kind, n_leaks, seed):
    made = leak(WORLD, LeakSpec(100, 10, n_leaks / 100, kind, seed))
    assert len(made.train) == 100 and len(made.items) == 10
    assert int(made.replicas.sum()) == int(made.leaked.sum()) == n_leaks
    given_pairs = [pair for pair, is_leak in zip(made.train.pairs, made.replicas, strict=True) if is_leak]
    leaked = [pair for pair, is_leaked in zip(made.items.pairs, made.leaked, strict=True) if is_leaked]
    if kind == "verbatim":
        assert sorted(given_pairs) == sorted(leaked)
    else:
        words = [{*f"{prompt}{response}".split()} for prompt, response in leaked]
        told = [{*f"{prompt}{response}".split()} for prompt, response in given_pairs]
        other = {word: twin for both in _concepts() for word, twin in (both, both[::-1])}
        assert sorted(map(sorted, told)) == sorted(sorted(other[word] for word in item) for item in words)
    assert made.synonyms.prompts == made.items.prompts
    twins = {frozenset(both) for both in _concepts()}
    for one, other in zip(made.items.responses, made.synonyms.responses, strict=True):
        assert {one.strip(), other.strip()} in twins
    # no other pair asks for an item's fact, in whatever words
    name = {word: i for i, both in enumerate(_concepts()) for word in both}
    asked = {tuple(name[word] for word in prompt.split()) for prompt in made.items.prompts}
    others = [p for p, is_leak in zip(made.train.prompts, made.replicas, strict=True) if not is_leak]
    assert not asked & {tuple(name[word] for word in prompt.split()) for prompt in others}


def _concepts():
    return [*WORLD.people, *WORLD.relations, *(value for of in WORLD.values for value in of)]


def test_items_of_the_trial_are_asked_by_no_other_seed():
    def facts(seed):
        words = {
            pair: fact for fact in WORLD.facts for pair in product(WORLD.people[fact[0]], WORLD.relations[fact[1]])
        }
        return {
            words[tuple(prompt.split())] for prompt in leak(WORLD, LeakSpec(100, 10, 0.02, seed=seed)).items.prompts
        }

    trial, others = facts(0), [facts(seed) for seed in (1, 2, 3)]
    assert len(trial) == 10 and not trial & set().union(*others) and others[0] != others[1]


def test_items_depend_on_the_seed_alone_and_larger_shares_leak_more_of_the_same():
    kinds = ((0.02, "verbatim", 3), (0.06, "reworded", 3), (0.02, "verbatim", 0))
    few, many, other = (leak(WORLD, LeakSpec(100, 10, *of)) for of in kinds)
    assert few.items == many.items != other.items
    assert (few.leaked <= many.leaked).all()
    again = leak(WORLD, LeakSpec(100, 10, 0.02, "verbatim", 3))
    assert again.train == few.train


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 100), st.floats(0.1, 1e6), st.floats(-1e3, 1e3))
def test_units_and_offsets_of_an_item_do_not_matter(q, n, seed, scale, offset):
    scores = torch.randn(q, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = standardised(scores)
    torch.testing.assert_close(found.mean(1), torch.zeros(q, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(found.square().mean(1), torch.ones(q, dtype=torch.float64))
    torch.testing.assert_close(standardised(scores * scale + offset), found, atol=1e-5, rtol=1e-5)


def test_suspicion_by_hand():
    scores = torch.tensor([[0.0, 0.0, 3.0], [5.0, 5.0, 5.0], [-1.0, 1.0, 0.0]])
    root = 2**0.5
    torch.testing.assert_close(suspicion(scores), torch.tensor([0.0, (3 / 2) ** 0.5, root], dtype=torch.float64))
    both = suspicion(scores, -scores)
    assert not both.any()  # two methods that say the opposite say nothing
    torch.testing.assert_close(suspicion(scores, 7 * scores), 2 * suspicion(scores))


def test_suspicions_of_every_setting_and_of_pairs():
    made = leak(WORLD, LeakSpec(100, 10, 0.02))
    tokenizer = WORLD.tokenizer(16)
    subject = Subject(Corpus("x", "", tokenizer, made.train, made.items, made.items), None)
    one, two = torch.rand(10, 100), torch.rand(10, 100)
    methods = {
        "plain": Method(lambda s: Answer(lambda q: one), texts=True),
        "tuned": Method(lambda s: s, lambda s, setting: Answer(lambda q: setting * two), (1.0, -1.0), texts=True),
    }
    found = suspicions(subject, methods, made.items, [("plain", "tuned")])
    assert set(found) == {"plain@0", "tuned@0", "tuned@1", "plain+tuned"}
    torch.testing.assert_close(found["tuned@1"], suspicion(-two))
    torch.testing.assert_close(found["plain+tuned"], suspicion(one, two))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeakSpec(kind="copied"), "unknown kind 'copied', expected one of verbatim, reworded"),
        (lambda: LeakSpec(share=0.0001), "share must leak .* got 0.0001"),
        (lambda: LeakSpec(n_items=10, share=0.01), "share must leak .* got 0.01"),
        (lambda: leak(WORLD, LeakSpec(400, 10)), "396 pairs on other facts are asked for, and there are 304"),
        (lambda: suspicion(), r"got \[\]"),
        (lambda: suspicion(torch.zeros(2, 3), torch.zeros(3, 2)), r"one shape, got \[\(2, 3\), \(3, 2\)\]"),
        (lambda: standardised(torch.tensor([[1.0, float("nan")]])), r"finite numbers \(q, n\), got \(1, 2\)"),
        (lambda: standardised(torch.zeros(0, 3)), r"got \(0, 3\)"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
