"""Retraining on a dask cluster of two worker processes: the numbers of one process, and stopped runs that go on."""

import contextlib
import os
import time

import joblib
import pytest
import torch
from toys import labelled

from tda_core import ground_truth as module
from tda_core.ground_truth import leave_one_out, retrain
from tda_core.recipes import Recipe
from tda_core.store import Store
from tda_core.subsets import random_subsets

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.slow

RECIPE = Recipe((4, 5, 3), epochs=3, batch_size=5, precision="float64")
TRAIN, ASKED, MASKS = labelled(14), labelled(6, seed=4), random_subsets(14, 20, 0.5, seed=0)
SEEDS = [0, 1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A client of two worker processes."""
    folder = str(tmp_path_factory.mktemp("dask"))
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options, local_directory=folder) as local, distributed.Client(local) as client:
        yield client


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of eight models instead of 32: five of them here."""
    monkeypatch.setattr(Recipe, "models_per_block", 8)


def test_a_cluster_gives_the_numbers_of_one_process(cluster, small_blocks):
    alone = retrain(RECIPE, TRAIN, MASKS, SEEDS, ASKED, n_jobs=1, progress=False)
    with joblib.parallel_config(backend="dask"):
        found = retrain(RECIPE, TRAIN, MASKS, SEEDS, ASKED, progress=False)
        left_out = leave_one_out(RECIPE, TRAIN, torch.arange(14), SEEDS, ASKED, progress=False)
    assert torch.equal(found.losses, alone.losses) and torch.equal(found.margins, alone.margins)
    expected = leave_one_out(RECIPE, TRAIN, torch.arange(14), SEEDS, ASKED, n_jobs=1, progress=False)
    assert torch.equal(left_out.effects, expected.effects)


def test_blocks_go_to_the_workers(cluster, small_blocks, monkeypatch):
    """Nothing is trained in this process, and each worker has a part of it."""
    monkeypatch.setattr(module, "_train_block", process_id)
    with joblib.parallel_config(backend="dask"):
        found = retrain(RECIPE, TRAIN, MASKS, SEEDS, ASKED, progress=False).losses
    assert set(found.flatten().tolist()) == set(cluster.run(os.getpid).values())


def process_id(recipe, data, weights, seeds, queries, initial):
    """In place of a block's losses, the process that was asked for them, which takes a while."""
    time.sleep(0.2)
    return {"losses": torch.full((len(seeds), len(queries)), os.getpid(), dtype=torch.float64)}


def test_a_stopped_run_goes_on_where_it_stopped(cluster, small_blocks, tmp_path, monkeypatch):
    store = Store(tmp_path)
    save, saved = store.save, []

    def save_three(name, params, tensors):
        if len(saved) == 3:
            raise KeyboardInterrupt("stopped by hand")
        saved.append(params)
        save(name, params, tensors)

    monkeypatch.setattr(store, "save", save_three)
    with joblib.parallel_config(backend="dask"), contextlib.suppress(KeyboardInterrupt):
        retrain(RECIPE, TRAIN, MASKS, SEEDS, ASKED, store=store, progress=False)
    assert len(list(tmp_path.glob("retrain-*"))) == 3
    monkeypatch.setattr(
        store, "save", lambda name, params, tensors: (saved.append(params), save(name, params, tensors))
    )
    with joblib.parallel_config(backend="dask"):
        found = retrain(RECIPE, TRAIN, MASKS, SEEDS, ASKED, store=store, progress=False)
    assert len(saved) == 5, "the three finished blocks were not done again"
    alone = retrain(RECIPE, TRAIN, MASKS, SEEDS, ASKED, n_jobs=1, progress=False)
    assert torch.equal(found.losses, alone.losses)
    # and all of it is had without any training
    monkeypatch.setattr(module, "_train_block", lambda *a: pytest.fail("trained again"))
    with joblib.parallel_config(backend="dask"):
        again = retrain(RECIPE, TRAIN, MASKS, SEEDS, ASKED, store=store, progress=False)
    assert torch.equal(again.losses, alone.losses)
