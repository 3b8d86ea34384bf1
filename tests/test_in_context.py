"""Losses behind demonstrations: against transformers one text at a time; and which demonstrations are drawn."""

import pytest
import torch

from tda_core.in_context import KINDS, contexts, in_context_curve, of_kind
from tda_core.lm_recipes import LMRecipe
from tda_core.small_lm import small_lms
from tda_core.task_corpus import SEPARATOR, SETTINGS, TaskCorpus

CORPUS = TaskCorpus()
TARGETS = {setting: CORPUS.targets(setting, 2, 6, split="validation") for setting in SETTINGS}
each_setting = pytest.mark.parametrize("setting", SETTINGS)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lm(request, tmp_path_factory):
    recipe = LMRecipe(request.param, width=16, layers=1, heads=2, steps=5, batch_size=4, length=40)
    return small_lms(CORPUS, recipe, [0], folder=tmp_path_factory.mktemp("lm"), progress=False)[0]


def one_by_one(lm, before, pairs):
    """Summed losses of the responses, by transformers' own loss of one text at a time."""
    found = []
    for context, (prompt, response) in zip(before, pairs.pairs, strict=True):
        head = lm.tokenizer(context + prompt, return_tensors="pt")["input_ids"]
        both = lm.tokenizer(context + prompt + response, return_tensors="pt")["input_ids"]
        labels = both.clone()
        labels[:, : head.shape[1]] = -100
        with torch.no_grad():
            found.append(lm.model(input_ids=both, labels=labels).loss * (both.shape[1] - head.shape[1]))
    return torch.stack(found)


@each_setting
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_shares_what_it_says(setting, kind):
    shared = {"same_task": (True, True, True), "same_family": (True, False, False), "same_base": (False, True, False)}
    for target in TARGETS[setting]:
        tasks = of_kind(CORPUS, target, kind)
        own = (target.family, target.base, target.format)
        assert tasks
        for task in tasks:
            same = tuple(a == b for a, b in zip(task, own, strict=True))
            if setting == "in_domain":
                assert same == shared.get(kind, (False, False, False))
            else:  # a held-out task is answered in wordings that other families have
                assert same[:2] == shared.get(kind, (False, False, False))[:2]


@each_setting
def test_contexts_hold_k_demonstrations_and_none_of_the_target(setting):
    target = TARGETS[setting][0]
    own = {prompt + response for prompt, response in target.examples.pairs.pairs}
    for kind in KINDS:
        tasks = of_kind(CORPUS, target, kind)
        known = {"".join(CORPUS.render(t, q)) for t in tasks for q in range(len(CORPUS.questions[t[0]]))} - own
        found = contexts(CORPUS, target, kind, 3, seed=0)
        assert len(found) == len(target.examples) and len(set(found)) > 1
        for context in found:
            texts = context.split(SEPARATOR)
            assert texts.pop() == "" and len(set(texts)) == 3 and set(texts) <= known
        assert found == contexts(CORPUS, target, kind, 3, seed=0) != contexts(CORPUS, target, kind, 3, seed=1)
        assert set(contexts(CORPUS, target, kind, 0, seed=0)) == {""}


def test_a_curve_is_the_mean_loss_behind_its_contexts(lm):
    targets = TARGETS["in_domain"]
    found = in_context_curve(lm, CORPUS, targets, [0, 2], seed=3)
    assert set(found) == set(KINDS) and all(curve.shape == (2, 2) for curve in found.values())
    assert len({float(curve[0, 0]) for curve in found.values()}) == 1  # no demonstration is of no kind
    before = contexts(CORPUS, targets[1], "same_base", 2, seed=3)
    expected = one_by_one(lm, before, targets[1].examples.pairs).mean()
    assert float(found["same_base"][1, 1]) == pytest.approx(float(expected), rel=1e-4)


def test_bad_input_is_named(lm):
    target = TARGETS["in_domain"][0]
    for call, message in [
        (lambda: of_kind(CORPUS, target, "same"), "unknown kind of demonstration 'same', expected one of same_task"),
        (lambda: contexts(CORPUS, target, "same_task", -1, seed=0), "k must be at least 0 demonstrations, got -1"),
        (lambda: contexts(CORPUS, target, "same_task", 500, seed=0), "demonstrations same_task, fewer than k = 500"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
