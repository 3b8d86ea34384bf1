"""A bank of ground truths: grows without training anything twice, is shared, and refuses what does not belong."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from test_pretraining import N_TOKENS, RECIPE, N, documents

from tda_core import truth_bank
from tda_core.pretraining import LMTraining, evaluate, pretrain_many
from tda_core.store import CorruptFile
from tda_core.subsets import random_subsets
from tda_core.truth_bank import HEADER, TruthBank

MASKS = random_subsets(N, 10, 0.5, seed=0)


def bank(folder, **changes):
    parts = {"training": LMTraining(RECIPE, N_TOKENS), "examples": documents(), "queries": documents(6, seed=1)}
    return TruthBank(folder, **(parts | changes))


def measure(of, masks=MASKS[:4], seeds=(0, 1)):
    return of.measure(masks, seeds, n_jobs=1, progress=False)


@pytest.fixture
def trained(monkeypatch):
    """How many models were trained, block by block."""
    counts = []
    train = truth_bank.train_block

    def counting(of, masks, seeds):
        counts.append(len(masks))
        return train(of, masks, seeds)

    monkeypatch.setattr(truth_bank, "train_block", counting)
    return counts


def test_losses_are_those_of_models_trained_on_each_subset_with_each_seed(tmp_path):
    found = measure(bank(tmp_path, checkpoints=(5,)))
    assert found.steps == (5, 12) and found.last.losses.shape == (4, 2, 6) and found.own.shape == (2, 4, 2)
    ensemble = pretrain_many(LMTraining(RECIPE, N_TOKENS), documents(), MASKS[2:3], [1])
    assert torch.equal(found.last.losses[2, 1], evaluate(ensemble, documents(6, seed=1))[0])
    own = evaluate(ensemble, documents()[MASKS[2]]).mean()
    assert float(found.own[1, 2, 1]) == pytest.approx(float(own), rel=1e-5)
    assert not torch.equal(found.truths[0].losses, found.last.losses) and bool((found.seconds > 0).all())
    assert torch.equal(found.last.masks, MASKS[:4]) and found.last.seeds.tolist() == [0, 1]


def test_a_bank_grows_by_subsets_and_seeds_and_trains_only_what_is_new(tmp_path, trained):
    measure(bank(tmp_path / "grown"))
    assert sum(trained) == 8
    grown = measure(bank(tmp_path / "grown"), MASKS, (0, 1, 7))
    assert sum(trained) == 30
    at_once = measure(bank(tmp_path / "once"), MASKS, (0, 1, 7))
    assert torch.equal(grown.last.losses, at_once.last.losses)
    trained.clear()
    again = measure(bank(tmp_path / "grown"), MASKS[[9, 3]], (7,))
    assert trained == [] and torch.equal(again.last.losses[:, 0], at_once.last.losses[[9, 3], 2])


def test_a_killed_run_loses_one_block_at_most(tmp_path, trained, monkeypatch):
    counting = truth_bank.train_block

    def dying(of, masks, seeds):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return counting(of, masks, seeds)

    monkeypatch.setattr(truth_bank, "train_block", dying)
    with pytest.raises(KeyboardInterrupt):
        measure(bank(tmp_path / "killed"), MASKS, (0, 1))
    assert bank(tmp_path / "killed").n_models == 16
    monkeypatch.setattr(truth_bank, "train_block", counting)
    resumed = measure(bank(tmp_path / "killed"), MASKS, (0, 1))
    assert sum(trained) == 20 and torch.equal(
        resumed.last.losses, measure(bank(tmp_path / "whole"), MASKS, (0, 1)).last.losses
    )


def test_banks_merge(tmp_path, trained):
    measure(bank(tmp_path / "one"), MASKS[:3], (0,))
    measure(bank(tmp_path / "two"), MASKS[2:5], (0,))
    both = bank(tmp_path / "one")
    assert both.merge(tmp_path / "two") == 2 and both.n_models == 5
    trained.clear()
    measure(both, MASKS[:5], (0,))
    assert trained == []
    with pytest.raises(ValueError, match="holds no bank"):
        both.merge(tmp_path)


def test_what_a_killed_writer_has_left_is_no_model(tmp_path, trained):
    measure(bank(tmp_path / "one"), MASKS[:2], (0,))
    (tmp_path / "one" / ".tda-partial-0123456789ab-cdef-0.safetensors").write_bytes(b"half")
    other = bank(tmp_path / "other")
    assert bank(tmp_path / "one").n_models == other.merge(tmp_path / "one") == other.n_models == 2


def test_a_damaged_model_of_another_bank_is_not_merged(tmp_path, trained):
    other = bank(tmp_path / "other")
    measure(other, MASKS[:1], (0,))
    path = other.path(MASKS[0], 0)
    path.write_bytes(path.read_bytes()[:-10])
    own = bank(tmp_path / "own")
    with pytest.raises(CorruptFile):
        own.merge(other.folder)
    assert own.n_models == 0


def test_a_copied_bank_is_the_same_bank(tmp_path, trained):
    measure(bank(tmp_path / "one"))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    trained.clear()
    measure(bank(tmp_path / "copy"))
    assert trained == []


def test_a_damaged_model_is_trained_again(tmp_path, trained, caplog):
    first = bank(tmp_path)
    expected = measure(first)
    path = first.path(MASKS[1], 0)
    path.write_bytes(path.read_bytes()[:-10])
    assert torch.equal(measure(first).last.losses, expected.last.losses)
    assert trained == [8, 1] and "training a model again" in caplog.text


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"examples": documents(seed=3)}, "data"),
        ({"queries": documents(7, seed=1)}, "queries"),
        ({"training": LMTraining(replace(RECIPE, learning_rate=1e-3), N_TOKENS)}, "training"),
        ({"checkpoints": (3,)}, "checkpoints"),
    ],
)
def test_a_bank_of_something_else_is_refused(tmp_path, changes, name):
    first = bank(tmp_path / "here")
    measure(first, MASKS[:1], (0,))
    with pytest.raises(ValueError, match=f"was made with {name} .*, but expected"):
        bank(tmp_path / "here", **changes)
    other = bank(tmp_path / "there", **changes)
    with pytest.raises(ValueError, match=f"was made with {name}"):
        other.merge(tmp_path / "here")
    assert first.n_models == 1


def test_an_initial_model_belongs_to_what_a_bank_was_made_with(tmp_path):
    start = LMTraining(RECIPE, N_TOKENS).start(4)
    bank(tmp_path)
    with pytest.raises(ValueError, match="was made with training"):
        bank(tmp_path, training=LMTraining(RECIPE, N_TOKENS, start))


def test_other_code_is_a_warning(tmp_path, caplog):
    bank(tmp_path)
    header = json.loads((tmp_path / HEADER).read_text())
    (tmp_path / HEADER).write_text(json.dumps(header | {"code": "0" * 16}))
    bank(tmp_path)
    assert "another version of the training code" in caplog.text


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoints must rise within 1..11, got \(12,\)"):
        bank(tmp_path, checkpoints=(12,))
    with pytest.raises(ValueError, match=r"checkpoints must rise within 1..11, got \(0,\)"):
        bank(tmp_path, checkpoints=(0,))
    with pytest.raises(ValueError, match="seeds must be distinct"):
        measure(bank(tmp_path), seeds=(0, 0))
    with pytest.raises(ValueError, match=r"masks must be boolean \(m, 20\)"):
        measure(bank(tmp_path), masks=MASKS[:, :5])
