"""Two processes that accelerate starts on the CPU give what one gives."""

import os

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, PartialState
from language_toys import VOCABULARY, language_model, text_pairs

from tda_core.lm_recipes import LMRecipe
from tda_core.ngram_lm import NgramLM
from tda_core.pretraining import LMTraining
from tda_core.processes import losses_by_process, measured_by_process, rows_by_process, scores_by_process
from tda_core.subsets import random_subsets
from tda_core.truth_bank import TruthBank

N = 7  # which two processes cannot share equally


@pytest.fixture(autouse=True)
def alone():
    """Neither this test nor one before it leaves its view of the processes to those that it starts."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def material():
    model = language_model()
    queries = model.examples(text_pairs(N, seed=1, response=(1, 9)))
    return model, queries, NgramLM(model.examples(text_pairs(12, seed=2)), 2, VOCABULARY)


def work(folder):
    """What each process does."""
    torch.set_num_threads(1)
    model, queries, method = material()
    seen = []
    found = {
        "losses": losses_by_process(model, queries),
        "scores": scores_by_process(method, queries),
        "rows": rows_by_process(lambda rows: seen.append(rows) or rows[:, None] * 2, N),
        "one": rows_by_process(lambda rows: rows + 5, 1),  # less than there are processes
        "seen": torch.cat(seen),
        "process": torch.tensor(os.getpid()),
    }
    torch.save(found, folder / f"{PartialState().process_index}.pt")


def bank_in(folder):
    model = language_model()
    documents, queries = (model.examples(text_pairs(n, seed=n, response=(3, 9))) for n in (10, 4))
    recipe = LMRecipe(width=8, layers=1, heads=2, steps=6, batch_size=2, length=64)
    return TruthBank(folder, LMTraining(recipe, VOCABULARY), documents, queries), random_subsets(10, 3, 0.5, seed=0)


def measures(folder):
    """A ground truth in a shared folder: which of its models this process trained, and what it got."""
    torch.set_num_threads(1)
    bank, masks = bank_in(folder / "bank")
    trained = []
    own = TruthBank._train
    TruthBank._train = lambda self, some, missing, n_jobs: trained.extend(missing) or own(self, some, missing, n_jobs)
    losses = measured_by_process(bank, masks, [0, 1]).last.losses
    assert torch.equal(measured_by_process(bank, masks, [0, 1]).last.losses, losses), "nothing is lacking any more"
    torch.save((len(trained), losses), folder / f"{PartialState().process_index}.pt")


def fails(folder):
    torch.set_num_threads(1)
    with pytest.raises(ValueError, match="process 1 was asked for 3 rows and computed 2"):
        rows_by_process(lambda rows: rows if 0 in rows else rows[1:], N)
    (folder / str(PartialState().process_index)).touch()


def test_two_processes_give_what_one_gives(tmp_path):
    debug_launcher(work, (tmp_path,), num_processes=2)
    first, second = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    assert len({int(first["process"]), int(second["process"]), os.getpid()}) == 3
    assert first["seen"].tolist() == [0, 1, 2, 3] and second["seen"].tolist() == [4, 5, 6]
    model, queries, method = material()
    expected = {
        "losses": model.token_losses(queries).sum(1),
        "scores": method.scores(queries),
        "rows": torch.arange(N)[:, None] * 2,
        "one": torch.tensor([5]),
    }
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), "all processes have all of it"
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)


def test_two_processes_share_a_ground_truth(tmp_path):
    bank, masks = bank_in(tmp_path / "bank")
    bank.measure(masks[:1], [0, 1], n_jobs=1)
    debug_launcher(measures, (tmp_path,), num_processes=2)
    (first, one), (second, two) = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    assert (first, second) == (2, 2), "of 6 models two were there before, and none is trained twice"
    bank, masks = bank_in(tmp_path / "alone")
    assert torch.equal(one, two)
    torch.testing.assert_close(one, bank.measure(masks, [0, 1], n_jobs=1).last.losses, rtol=1e-4, atol=1e-5)


def diverges(folder):
    torch.set_num_threads(1)
    bank, masks = bank_in(folder / "bank")
    if Accelerator().process_index == 1:
        TruthBank._train = lambda *_: (_ for _ in ()).throw(FloatingPointError("training diverged"))
    with pytest.raises(RuntimeError, match="process 1 has failed: FloatingPointError"):
        measured_by_process(bank, masks, [0, 1])
    (folder / str(PartialState().process_index)).touch()


def test_a_process_that_fails_is_an_error_in_all(tmp_path):
    debug_launcher(diverges, (tmp_path,), num_processes=2)
    assert {"0", "1"} <= {path.name for path in tmp_path.iterdir()}
    assert bank_in(tmp_path / "bank")[0].n_models == 3, "what the other has trained is kept"


def test_a_share_of_another_length_is_refused_by_all(tmp_path):
    debug_launcher(fails, (tmp_path,), num_processes=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_one_process_does_all():
    model, queries, method = material()
    assert torch.equal(losses_by_process(model, queries), model.token_losses(queries).sum(1))
    assert torch.equal(scores_by_process(method, queries), method.scores(queries))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        rows_by_process(lambda rows: rows, 0)
    with pytest.raises(ValueError, match="process 0 was asked for 7 rows and computed 6"):
        rows_by_process(lambda rows: rows[1:], N)
