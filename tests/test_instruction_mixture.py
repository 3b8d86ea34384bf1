"""The mixture for instruction tuning: what pre-training must not hold, how pairs are labelled, that tuning teaches."""

import pytest
import torch

from tda_core.fine_tuning import FineTuning, fine_tune
from tda_core.instruction_mixture import MixtureSpec, instruction_mixture
from tda_core.language import LanguageModel
from tda_core.lm_recipes import LMRecipe
from tda_core.task_corpus import SEPARATOR, TaskCorpus

SMALL = MixtureSpec(n_documents=200, n_train=120, n_validation=20, n_test=40)
PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def mixture():
    return instruction_mixture(SMALL)


def test_pretraining_holds_no_question_and_no_wording_of_what_is_tuned(mixture):
    documents = [text for part in PARTS for text in getattr(mixture.pretraining, part).responses]
    assert len(documents) == 200 and [len(getattr(mixture.pretraining, part)) for part in PARTS] == [180, 10, 10]
    words = {word for text in documents for word in text.split()}
    assert not words & set("totem banner minus reverse spirit dyed leaves remain backwards swapped kamur".split())
    assert {"plus", "makes", "filed", "pferd"} <= words  # other families are there
    asked = {prompt for part in PARTS for prompt in getattr(mixture, part).pairs.prompts}
    examples = {example for text in documents for example in text.split(SEPARATOR)}
    assert not any(example.startswith(prompt) for example in examples for prompt in asked)


def test_documents_and_pairs_fit_the_window_in_known_words(mixture):
    tokenizer = mixture.pretraining.tokenizer
    texts = [text for part in PARTS for text in getattr(mixture.pretraining, part).responses]
    texts += [p + r for part in PARTS for p, r in getattr(mixture, part).pairs.pairs]
    rows = tokenizer(texts)["input_ids"]
    assert max(map(len, rows)) <= SMALL.length
    assert tokenizer.unk_token_id not in {token for row in rows for token in row}
    short = instruction_mixture(MixtureSpec(n_documents=20, length=45)).pretraining  # longer ones are left out
    assert max(map(len, short.tokenizer(list(short.train.responses))["input_ids"])) <= 45


def test_pairs_differ_and_labels_say_what_they_ask(mixture):
    corpus = TaskCorpus()
    pairs = [pair for part in PARTS for pair in getattr(mixture, part).pairs.pairs]
    assert len(set(pairs)) == len(pairs) == 180
    for part in PARTS:
        labelled = getattr(mixture, part)
        for (prompt, response), family, question in zip(
            labelled.pairs.pairs, labelled.families.tolist(), labelled.questions.tolist(), strict=True
        ):
            own = corpus.families.index(mixture.families[family])
            assert corpus.questions[own][question - 1000 * family][0] == prompt
            possible = {
                corpus.render((own, family % 3, form), question - 1000 * family)[1] for form in corpus.seen[own]
            }
            assert response in possible
    rows = torch.cat([mixture.test.of_family(family) for family in range(4)])
    assert sorted(rows.tolist()) == list(range(40))


def test_most_queries_are_answered_in_training_in_other_words():
    mixture = instruction_mixture()
    answered = torch.isin(mixture.test.questions, mixture.train.questions)
    assert float(answered.float().mean()) > 0.6 and mixture.train.pairs.n_duplicates == 0
    assert not bool(mixture.test.pairs.shared_with(mixture.train.pairs).any())


def test_two_of_a_spec_are_equal_and_seeds_differ(mixture):
    again, other = instruction_mixture(SMALL), instruction_mixture(MixtureSpec(**vars(SMALL) | {"seed": 1}))
    for part in PARTS:
        assert getattr(again, part).pairs == getattr(mixture, part).pairs != getattr(other, part).pairs
    assert again.pretraining.hash == mixture.pretraining.hash != other.pretraining.hash


def test_tuning_on_a_part_teaches_the_rest(mixture):
    """Even from random weights: what the pairs share, and more of it from more of them."""
    tokenizer = mixture.pretraining.tokenizer
    model = LanguageModel(LMRecipe(width=32, layers=1, length=64).untrained(len(tokenizer), seed=0), tokenizer)
    setting = FineTuning(steps=60, batch_size=8, learning_rate=1e-2)
    before = float(model.losses(mixture.test.pairs).mean())
    part = torch.arange(120) % 2 == 0
    after = float(fine_tune(model, mixture.train.pairs[part], setting, seed=0).losses(mixture.test.pairs).mean())
    assert after < 0.5 * before
    # a part of one family teaches that family most
    one = fine_tune(model, mixture.train.pairs[mixture.train.of_family(0)], setting, seed=0)
    losses = one.losses(mixture.test.pairs)
    of_each = [float(losses[mixture.test.of_family(family)].mean()) for family in range(4)]
    assert of_each[0] == min(of_each)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tuned": ()}, "tuned must be different families, some but not all of totem, banner,"),
        ({"tuned": ("totem", "totem")}, "tuned must be different families"),
        ({"tuned": ("crest",)}, r"got \('crest',\)"),
        ({"n_test": 0}, "n_test must be at least 1, got 0"),
    ],
)
def test_bad_specs(change, message):
    with pytest.raises(ValueError, match=message):
        MixtureSpec(**change)


def test_more_pairs_than_there_are():
    with pytest.raises(ValueError, match="100160 pairs are asked for, and these families have 591"):
        instruction_mixture(MixtureSpec(n_train=100_000))
