"""The model that applications start from."""

from dataclasses import replace

import pytest

from tda_core.base_models import base_model
from tda_core.corpora import documents_of
from tda_core.lm_recipes import LMRecipe
from tda_core.synonym_facts import SynonymWorld, WorldSpec

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


def test_a_model_of_other_things_is_replaced(tmp_path):
    def made(documents=DOCUMENTS, recipe=RECIPE, initial=None):
        return base_model(recipe, WORLD.tokenizer(32), documents, tmp_path / "model", initial=initial)

    first = made()
    found = [made(documents=DOCUMENTS[:5]), made(recipe=replace(RECIPE, steps=4)), made(initial=first)]
    assert len({first.identity, *(model.identity for model in found)}) == 4
    assert made().identity == first.identity


def test_a_killed_writers_leftovers_are_no_model(tmp_path):
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "config.json").write_text("{")
    assert base_model(RECIPE, WORLD.tokenizer(32), DOCUMENTS, tmp_path / "model").tokenizer is not None
