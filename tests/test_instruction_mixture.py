"""The mixture for instruction tuning: what pre-training must not hold, how pairs are labelled, that tuning teaches."""

import json
from dataclasses import replace

import pytest
import torch

from tda_core.data import MIXTURES, is_available, where_to_put
from tda_core.data.instructions import hub_file
from tda_core.fine_tuning import FineTuning, fine_tune
from tda_core.instruction_mixture import MOST, MixtureSpec, instruction_mixture, mixture_of, named_mixture
from tda_core.language import LanguageModel
from tda_core.lm_recipes import LMRecipe
from tda_core.task_corpus import SEPARATOR, TaskCorpus
from tda_core.text_pairs import TextPairs

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
            assert corpus.questions[own][question - MOST * family][0] == prompt
            possible = {
                corpus.render((own, family % 3, form), question - MOST * family)[1] for form in corpus.seen[own]
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


SPEC = MixtureSpec(n_documents=80, n_train=30, n_validation=6, n_test=12, length=40)


def families(n=120):
    """Two tasks of one's own, one of them three times as large, with some pairs that fit no window."""
    sums = [(f"what is {i} and {i + 1} ?", f" {2 * i + 1}") for i in range(n)]
    names = [(f"name number {i} :", f" n{i}") for i in range(n // 3)]
    long = [("word " * 60 + f"{i}", f" {i}") for i in range(9)] + [("name number 1 :", " again")] * 5
    return {"sums": TextPairs(*zip(*sums, strict=True)), "names": TextPairs(*zip(*names, *long, strict=True))}


def test_pairs_of_ones_own_are_shared_out_by_family():
    mixture = mixture_of(families(), SPEC, vocabulary=300)
    assert mixture.families == ("sums", "names")
    assert [len(getattr(mixture, part)) for part in PARTS] == [30, 6, 12]
    pairs = [pair for part in PARTS for pair in getattr(mixture, part).pairs.pairs]
    texts = [text for part in PARTS for text in getattr(mixture.pretraining, part).responses]
    assert len(texts) == 80 and len(set(pairs)) == 48 and not set(texts) & {"".join(pair) for pair in pairs}
    share = float((mixture.train.families == 0).double().mean())
    assert 0.6 < share < 0.85, "as in the whole: three quarters"
    tokenizer = mixture.pretraining.tokenizer
    assert max(len(tokens) for tokens in tokenizer(["".join(pair) for pair in pairs])["input_ids"]) <= 40
    assert all("word" not in prompt for prompt, _ in pairs), "what fits no window is left out"
    assert "name number 1 : again" not in [*texts, *map("".join, pairs)], "and so are prompts that were there before"
    for part in PARTS:
        own = getattr(mixture, part)
        for (prompt, _), family in zip(own.pairs.pairs, own.families.tolist(), strict=True):
            assert prompt.startswith(("what", "name")[family])
    again = mixture_of(families(), SPEC, vocabulary=300)
    assert again.test.pairs == mixture.test.pairs and again.pretraining.hash == mixture.pretraining.hash
    with pytest.raises(ValueError, match="548 pairs of at most 40 tokens are asked for, and sums, names have 160"):
        mixture_of(families(), replace(SPEC, n_train=450), vocabulary=300)


def test_data_sets_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("TDA_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("tda_core.paths.data_dirs", lambda: [tmp_path])
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    assert not is_available("flan") and where_to_put("flan").count("fetch train/") == 4
    for file in map(hub_file, MIXTURES["flan"]):
        path = tmp_path / "hub" / file.repository / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"inputs": f"{path.stem} asks {i}?", "targets": f"answer {i % 7}"} for i in range(60)]
        path.write_text("\n".join(map(json.dumps, rows)))
    assert is_available("flan")
    mixture = named_mixture("flan", replace(SPEC, length=64), vocabulary=300)
    assert mixture.families == ("rte", "sst2", "trec", "wic") and len(mixture.test) == 12
    with pytest.raises(ValueError, match="unknown data set 'dolly', expected one of alpaca, tulu, safe_rlhf, flan"):
        named_mixture("dolly", SPEC)
