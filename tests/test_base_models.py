"""The model that applications start from, and whether it gives an answer."""

import pytest
import torch

from tda_core.base_models import base_model, right_answers
from tda_core.corpora import documents_of
from tda_core.lm_recipes import LMRecipe
from tda_core.synonym_facts import SynonymWorld, WorldSpec
from tda_core.text_pairs import TextPairs

WORLD = SynonymWorld(WorldSpec(4, 3, 2))
RECIPE = LMRecipe(width=16, layers=1, heads=2, steps=3, batch_size=4, length=32)
DOCUMENTS = documents_of(WORLD.practice(8, 2, seed=0))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    return folder, base_model(RECIPE, WORLD.tokenizer(32), DOCUMENTS, folder)


def test_a_model_is_trained_once_and_read_after_that(made):
    folder, model = made
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    again = base_model(RECIPE, WORLD.tokenizer(32), DOCUMENTS, folder)
    assert again.identity == model.identity
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert not folder.with_name("model.partial").exists()


def test_training_goes_on_from_the_initial_model(made, tmp_path):
    _, model = made
    later = base_model(RECIPE, WORLD.tokenizer(32), DOCUMENTS, tmp_path / "later", initial=model)
    losses = [float(of.losses(DOCUMENTS, "mean").mean()) for of in (model, later)]
    assert losses[1] < losses[0]


def test_a_killed_writers_leftovers_are_no_model(tmp_path):
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "config.json").write_text("{")
    assert base_model(RECIPE, WORLD.tokenizer(32), DOCUMENTS, tmp_path / "model").tokenizer is not None


def test_right_answers_are_those_of_greedy_decoding(made):
    _, model = made
    prompts = [WORLD.question(fact, (0, 0, 0))[0] for fact in WORLD.facts] * 3
    lengths = [1, 2, 3] * len(WORLD.facts)
    decoded = []
    for prompt, length in zip(prompts, lengths, strict=True):
        tokens = torch.tensor([[*model.start, *model.tokens([prompt])[0]]])
        grown = model.model.generate(tokens, max_new_tokens=length, min_new_tokens=length, do_sample=False)
        decoded.append(model.tokenizer.decode(grown[0, tokens.shape[1] :]))
    greedy = TextPairs(tuple(prompts), tuple(f" {text}" for text in decoded))
    usable = [
        i for i, text in enumerate(decoded) if model.tokens([text]) and len(model.tokens([text])[0]) == lengths[i]
    ]
    assert len(usable) > 10
    assert right_answers(model, greedy[usable]).all()
    wrong = TextPairs(
        greedy.prompts, tuple(f"{r} {WORLD.relations[0][0]} {WORLD.people[0][0]}" for r in greedy.responses)
    )
    other = right_answers(model, wrong)
    assert not other.all()
    one_by_one = torch.cat([right_answers(model, wrong[[i]]) for i in range(len(wrong))])
    assert torch.equal(other, one_by_one)
