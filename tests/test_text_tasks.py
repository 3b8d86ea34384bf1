"""What the language notebooks work on: from our own corpus and from data by name."""

import json

import pytest
import torch
from language_toys import language_model

from tda_core import text_tasks
from tda_core.lm_recipes import LMRecipe
from tda_core.small_lm import small_lms
from tda_core.task_corpus import SETTINGS, TaskCorpus
from tda_core.text_tasks import Sizes, material, selections, together


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    small_lms(TaskCorpus(), LMRecipe(width=16, layers=1, heads=2, steps=2), [0, 1], folder=folder, progress=False)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Instructions and reviews in place of data by name, each twice in a row, and a model in a folder."""
    places = [(i, j) for i in range(2, 39) for j in (3, 4, 5) for _ in range(2)]
    sets = {"alpaca": text_tasks.TextPairs([f"w{i} w{j}" for i, j in places], [f" w{i} w5" for i, _ in places])}
    sets["sst2_train"] = text_tasks.TextPairs([f"w{j} w{i}" for i, j in places], [f" w{10 + i % 2}" for i, _ in places])
    monkeypatch.setattr(text_tasks, "load_pairs", sets.__getitem__)
    language_model().save(tmp_path / "model")
    return str(tmp_path / "model")


def test_our_own_material_has_pools_that_share_nothing_with_the_tasks(folder):
    found = material(folder, "", Sizes(30, 5, 2))
    assert len(found.models) == 2 and len(found.pool) == 30 and list(found.tasks) == list(SETTINGS)
    assert [len(task) for task in found.every] == [5] * 6
    assert not found.pool.shared_with(found.queries).any()
    assert found.rows("held_out_family") == [4, 5] and len(found.task_labels["format"]) == 6
    assert found.labels["family"].shape == (30,)
    prefix = found.template.demonstrations(found.pool)[0]
    assert prefix == "".join(found.pool.pairs[0]) + "\n"
    with pytest.raises(ValueError, match="unknown setting 'abroad'"):
        found.rows("abroad")


def test_selections_have_a_tenth_of_the_task_and_share_nothing_with_what_is_held_out(folder):
    sizes = Sizes(40, 5, 4, 6)
    by_split = {split: selections(folder, "", sizes, split=split) for split in ("validation", "test")}
    for found in by_split.values():
        assert [one.setting for one in found] == [*SETTINGS, SETTINGS[0]]
        for one in found:
            assert len(one.pool) == len(one.own) == 40 and int(one.own.sum()) == one.k == 4
            assert (len(one.task), len(one.held_out)) == (5, 6)
            for other in (one.task, one.held_out):
                assert not one.pool.shared_with(other).any()
            assert not one.task.shared_with(one.held_out).any()
    names = {split: {one.name for one in found} for split, found in by_split.items()}
    assert not names["validation"] & names["test"]
    with pytest.raises(ValueError, match="unknown split 'train', expected one of validation, test"):
        selections(folder, "", sizes, split="train")
    with pytest.raises(ValueError, match="unknown kind 'dirty', expected one of clean, wrong_answers, without_task"):
        selections(folder, "", sizes, split="test", kind="dirty")


def test_pools_with_wrong_answers_and_without_the_task(folder):
    sizes = Sizes(60, 5, 3, 6)
    kinds = {kind: selections(folder, "", sizes, split="test", kind=kind) for kind in text_tasks.POOLS}
    for clean, wrong, without in zip(*kinds.values(), strict=True):
        assert clean.task == wrong.task == without.task and clean.held_out == without.held_out
        assert [len(one.pool) for one in (clean, wrong, without)] == [60] * 3
        assert [(int(one.own.sum()), one.k) for one in (clean, wrong, without)] == [(6, 6), (3, 3), (0, 6)]
        assert wrong.pool.prompts == clean.pool.prompts
        differ = [a != b for a, b in zip(wrong.pool.responses, clean.pool.responses, strict=True)]
        assert differ == (clean.own & ~wrong.own).tolist() and not (wrong.own & ~clean.own).any()
        assert set(clean.pool[~clean.own].pairs) <= set(without.pool.pairs)
        # nothing is to be had from choosing by row, as a score that is the same for all examples does
        assert not clean.own[:6].all() and not clean.own[-6:].all() and not wrong.own[:3].all()
    with pytest.raises(ValueError, match="all responses are equal"):
        text_tasks.wrong_answers(text_tasks.TextPairs(["a", "b"], ["x", "x"]))


def test_models_and_data_by_name_take_the_same_place(hub):
    found = material("nowhere", hub, Sizes(12, 3, 2))
    assert len(found.models) == 1 and list(found.tasks) == ["in_domain", "other_data"] and not found.labels
    assert len(found.pool) == 12 and [len(task) for task in found.every] == [3] * 4
    assert not found.pool.shared_with(found.queries).any() and not found.pool.n_duplicates
    with pytest.raises(ValueError, match="500 different pairs are needed, and there are 111"):
        material("nowhere", hub, Sizes(497, 3, 1))
    assert found.rows("other_data") == [2, 3]
    sizes = Sizes(10, 2, 2, 3)
    chosen = {split: selections("nowhere", hub, sizes, split=split) for split in ("validation", "test")}
    for one in chosen["test"]:
        assert int(one.own.sum()) == 1 and len(one.pool) == 10
        (mine,) = one.pool[one.own].responses
        assert (mine in (" w10", " w11")) == (one.setting == "other_data")
        assert (len(one.task), len(one.held_out)) == (2, 3)
    assert [one.setting for one in chosen["test"]] == ["in_domain", "other_data"]
    assert json.dumps(chosen["test"][0].pool.pairs) != json.dumps(chosen["validation"][0].pool.pairs)


def test_sets_of_pairs_are_joined_in_order(folder):
    found = material(folder, "", Sizes(4, 2, 1))
    assert together(found.every).pairs == sum((task.pairs for task in found.every), ())
    assert torch.equal(together([found.pool]).lengths, found.pool.lengths)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="task must be >= 1, got 0"):
        Sizes(3, 0, 1)
