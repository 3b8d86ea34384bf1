"""A test bench for language models: built once, loaded again, centred and raw."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from tda_core.corpora import CorpusSize, load_corpus
from tda_core.lm_bench import LMBench, LMGoal, bank_of, build_bench
from tda_core.lm_recipes import SIZES, LMRecipe, standard_recipe
from tda_core.ngram_lm import NgramLM

RECIPE = LMRecipe(width=8, layers=1, heads=2, length=24, batch_size=8)
GOAL = LMGoal(RECIPE, epochs=3, fraction=0.5, n_subsets=6, n_seeds=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    corpus = load_corpus("help_topics", CorpusSize(30, 4, 5, 24, 300, 4))
    folder = tmp_path_factory.mktemp("bench")
    bank = bank_of(corpus, GOAL, folder / "bank")
    measured = build_bench(corpus, GOAL, folder, bank, n_jobs=1)
    return corpus, folder, bank, measured


def test_a_bench_is_loaded_as_it_was_built(built):
    corpus, folder, bank, measured = built
    for k, state in enumerate(("half", "end")):
        bench = LMBench.load(folder, state)
        assert bench.corpus.hash == corpus.hash and bench.corpus.source == corpus.source
        losses = torch.cat([bench.validation.losses, bench.test.losses], 2)
        assert torch.equal(losses, measured.truths[k].losses) and torch.equal(bench.own, measured.own[k])
        assert bench.test.losses.shape == (6, 2, 5) and bench.masks.sum(1).tolist() == [15] * 6
        assert torch.equal(bench.examples("train").inputs, bank.examples.inputs)
    with pytest.raises(FileNotFoundError, match="run the notebook that builds it first"):
        LMBench.load(folder / "nowhere")
    with pytest.raises(ValueError, match="unknown state 'middle'"):
        LMBench.load(folder, "middle")


def test_the_attributed_model_learns_from_all_documents_and_is_trained_once(built):
    corpus, folder, bank, _ = built
    half, end = (LMBench.load(folder, state) for state in ("half", "end"))
    losses = [float(bench.model.token_losses(bench.examples("train")).sum()) for bench in (half, end)]
    assert losses[1] < losses[0]
    file = next((folder / "model_end").glob("*.safetensors"))
    before = file.stat().st_mtime_ns
    build_bench(corpus, GOAL, folder, bank, n_jobs=1)
    assert file.stat().st_mtime_ns == before
    shutil.rmtree(folder / "model_end")  # as if a run had been stopped between the two
    build_bench(corpus, GOAL, folder, bank, n_jobs=1)
    again = LMBench.load(folder).model
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), end.model.model.parameters(), strict=True))
    more = build_bench(corpus, replace(GOAL, n_seeds=3), folder, bank, n_jobs=1)
    assert more.last.losses.shape[1] == 3 and LMBench.load(folder).test.losses.shape[1] == 3


def test_models_of_another_goal_are_replaced(built, tmp_path):
    corpus = built[0]
    for recipe, width in ((RECIPE, 8), (replace(RECIPE, width=12), 12)):
        goal = LMGoal(recipe, epochs=1, fraction=0.5, n_subsets=3, n_seeds=1)
        build_bench(corpus, goal, tmp_path, bank_of(corpus, goal, tmp_path / f"bank{width}"), n_jobs=1)
        assert LMBench.load(tmp_path).model.width == width


def test_centred_and_raw_lds_are_what_they_say(built):
    bench = LMBench.load(built[1])
    scores = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    predicted = bench.masks.double().numpy() @ scores.double().numpy().T
    true = -bench.test.losses.double().mean(1).numpy()
    raw = np.mean([spearmanr(predicted[:, i], true[:, i]).statistic for i in range(5)])
    a, b = (x - x.mean(1, keepdims=True) for x in (predicted, true))
    centred = np.mean([spearmanr(a[:, i], b[:, i]).statistic for i in range(5)])
    assert bench.lds(scores, raw=True).value == pytest.approx(raw, abs=1e-9)
    assert bench.lds(scores).value == pytest.approx(centred, abs=1e-9)
    assert bench.lds(torch.from_numpy(predicted)).value == pytest.approx(centred, abs=1e-9)
    assert bench.difference(scores, scores).value == 0
    # what is added to a subset for all queries alike moves the raw score alone
    shifted = scores + 10 * torch.arange(30.0)
    assert bench.lds(shifted).value == pytest.approx(centred, abs=1e-9)
    assert bench.lds(shifted, raw=True).value != pytest.approx(raw, abs=1e-3)


def test_a_model_of_the_subset_is_judged_by_its_predictions(built):
    bench = LMBench.load(built[1])
    ngram = NgramLM(bench.examples("train"), 1, len(bench.corpus.tokenizer))
    found = -ngram.losses(bench.masks, bench.examples("test"))
    assert -1 <= bench.lds(found).low <= bench.lds(found).value


def test_settings_are_chosen_by_validation_queries(built):
    bench = LMBench.load(built[1])
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(4, 30, generator=generator) for name in "abc"}
    best, table = bench.choose(found.__getitem__, "abc")
    assert table == pytest.approx({name: bench.lds(found[name], part="validation").value for name in "abc"}, abs=1e-9)
    assert table[best] == max(table.values())
    with pytest.raises(ValueError, match="at least one setting"):
        bench.choose(found.__getitem__, [])


def test_ceilings_are_of_the_part_and_kind_that_is_asked_for(built):
    bench = LMBench.load(built[1])
    found = {(raw, part): bench.ceiling(raw=raw, part=part) for raw in (True, False) for part in ("test", "validation")}
    assert len({ceiling.single_run.value for ceiling in found.values()}) == 4
    assert found[False, "test"].ceiling.n == 5


def test_scores_of_other_shapes_are_refused(built):
    bench = LMBench.load(built[1])
    with pytest.raises(ValueError, match=r"scores of test queries, \(5, 30\), or predictions, \(6, 5\), got \(4, 30\)"):
        bench.lds(torch.zeros(4, 30))


def test_standard_recipes_have_the_sizes_of_their_names():
    for size in list(SIZES)[:3]:
        n = sum(value.numel() for value in standard_recipe(size).untrained(2048, seed=0).parameters())
        assert n == pytest.approx(float(size[:-1]) * 1e6, rel=0.15)
    with pytest.raises(ValueError, match=r"unknown size '2M', expected one of 0.1M, 0.4M"):
        standard_recipe("2M")
