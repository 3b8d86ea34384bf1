"""Ground truth: blocks against single runs, both leave-one-out definitions, and stopping and going on."""

import logging
from dataclasses import replace

import pytest
import torch
from toys import FLOAT64, continuous, labelled

from tda_core import ground_truth as module
from tda_core.ground_truth import (
    GroundTruth,
    LeaveOneOut,
    leave_one_out,
    leave_one_out_warm,
    retrain,
    warm_precision,
)
from tda_core.recipes import Recipe
from tda_core.store import Store, save_tensors
from tda_core.subsets import random_subsets
from tda_core.training import evaluate, train, train_many

RECIPES = {
    "cross_entropy": Recipe((4, 5, 3), epochs=3, batch_size=5, precision="float64"),
    "squared_error": Recipe((4, 5, 1), loss="squared_error", epochs=3, batch_size=5, precision="float64"),
}
DATA = {"cross_entropy": labelled(14), "squared_error": continuous(14)}
QUERIES = {"cross_entropy": labelled(6, seed=4), "squared_error": continuous(6, seed=4)}
RECIPE, TRAIN, ASKED = RECIPES["cross_entropy"], DATA["cross_entropy"], QUERIES["cross_entropy"]
MASKS = random_subsets(14, 5, 0.5, seed=0)
QUIET = {"n_jobs": 1, "progress": False}
losses_of = pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of four models instead of 32."""
    monkeypatch.setattr(Recipe, "models_per_block", 4)


def counting(monkeypatch, stop_after: int | None = None) -> list[int]:
    """Counts the models of each block that is really trained; raises after `stop_after` blocks."""
    trained: list[int] = []
    original = module._train_block

    def counted(*arguments):
        if len(trained) == stop_after:
            raise KeyboardInterrupt("stopped by hand")
        result = original(*arguments)
        trained.append(len(arguments[2]))
        return result

    monkeypatch.setattr(module, "_train_block", counted)
    return trained


def close(found, expected, tolerance=1e-11):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -- subset retraining ------------------------------------------------------------------------------


@losses_of
def test_every_subset_and_seed_is_a_training_run_of_its_own(loss, small_blocks):
    recipe, queries = RECIPES[loss], QUERIES[loss]
    truth = retrain(recipe, DATA[loss], MASKS, [3, 8], queries, **QUIET)
    assert truth.losses.shape == (5, 2, 6)
    assert torch.equal(truth.masks, MASKS)
    assert truth.seeds.tolist() == [3, 8]
    for i, mask in enumerate(MASKS):
        for j, seed in enumerate([3, 8]):
            problem = train(recipe, DATA[loss], seed, mask=mask)
            close(truth.losses[i, j], problem.losses(queries))
            if loss == "cross_entropy":
                close(truth.margins[i, j], problem.margins(queries))
    if loss == "cross_entropy":
        assert torch.equal(truth.outcomes, truth.margins)
    else:
        assert truth.margins is None
        assert torch.equal(truth.outcomes, -truth.losses)


@losses_of
def test_ground_truth_of_some_queries_and_from_a_file(loss, tmp_path):
    truth = retrain(RECIPES[loss], DATA[loss], MASKS, [0], QUERIES[loss], **QUIET)
    some = truth.queries(slice(2, 5))
    assert some.losses.shape == (5, 1, 3)
    assert torch.equal(some.outcomes, truth.outcomes[..., 2:5])
    assert torch.equal(truth.queries(torch.tensor([4, 0])).losses, truth.losses[..., [4, 0]])
    assert torch.equal(some.masks, truth.masks)
    truth.save(str(tmp_path / "truth"))
    again = GroundTruth.load(str(tmp_path / "truth"))
    for name in ("masks", "seeds", "losses", "outcomes"):
        assert torch.equal(getattr(again, name), getattr(truth, name))
    assert (again.margins is None) == (truth.margins is None)


def test_a_file_of_another_kind_is_refused(tmp_path):
    save_tensors(tmp_path / "other", {"x": torch.ones(1)}, {"data": "abc"})
    with pytest.raises(ValueError, match=r"other does not hold a GroundTruth, but \['data'\]"):
        GroundTruth.load(tmp_path / "other")


def test_two_workers_give_the_bits_of_one(small_blocks):
    recipe = replace(RECIPE, precision="float32", layers=(4, 16, 3))
    before = torch.get_num_threads()
    alone = retrain(recipe, TRAIN, MASKS, [0, 1], ASKED, **QUIET)
    together = retrain(recipe, TRAIN, MASKS, [0, 1], ASKED, n_jobs=2, progress=True)
    assert torch.equal(alone.losses, together.losses)
    assert torch.equal(alone.margins, together.margins)
    assert torch.get_num_threads() == before


def test_blocks_are_trained_on_one_thread(monkeypatch):
    seen = []
    original = module.train_many
    monkeypatch.setattr(module, "train_many", lambda *a: seen.append(torch.get_num_threads()) or original(*a))
    torch.set_num_threads(2)
    try:
        retrain(RECIPE, TRAIN, MASKS, [0], ASKED, **QUIET)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [1]


# -- leave-one-out ----------------------------------------------------------------------------------


@losses_of
def test_leave_one_out_from_scratch_pairs_the_seeds(loss, small_blocks):
    recipe, data, queries = RECIPES[loss], DATA[loss], QUERIES[loss]
    loo = leave_one_out(recipe, data, torch.tensor([7, 2, 13]), [5, 1], queries, **QUIET)
    assert loo.definition == "scratch"
    assert loo.indices.tolist() == [7, 2, 13]
    assert loo.reference.shape == (2, 6)
    assert loo.removed.shape == loo.effects.shape == (3, 2, 6)
    for j, seed in enumerate([5, 1]):
        plain = train(recipe, data, seed)  # weights of one are no weights
        close(loo.reference[j], outcomes(plain, queries))
        for i, removed in enumerate([7, 2, 13]):
            weights = torch.ones(1, 14)
            weights[0, removed] = 0
            theta = train_many(recipe, data, weights, [seed])[0]
            close(loo.removed[i, j], outcomes(plain.at(theta), queries))
            close(loo.effects[i, j], outcomes(plain, queries) - outcomes(plain.at(theta), queries))


def outcomes(problem, queries):
    return problem.margins(queries) if queries.is_classification else -problem.losses(queries)


@losses_of
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_warm_leave_one_out_takes_full_batch_steps_from_the_trained_parameters(loss, precision):
    recipe = replace(
        RECIPES[loss], precision=precision, schedule="cosine", weight_decay=0.01, learning_rate=0.05, momentum=0.5
    )
    problem = train(recipe, DATA[loss], 0)
    loo = leave_one_out_warm(recipe, problem, [3, 9], QUERIES[loss], steps=7, **QUIET)
    assert loo.definition == "warm"
    assert loo.reference.shape == (1, 6)
    assert loo.removed.shape == (2, 1, 6)
    weights = torch.ones(3, 14)
    weights[1, 3] = weights[2, 9] = 0
    rate = 1 / problem.largest_curvature()
    assert rate != recipe.learning_rate
    for row, expected in zip(weights, [loo.reference[0], *loo.removed[:, 0]], strict=True):
        theta, velocity = problem.theta.double(), 0
        for step in range(7):
            exact = replace(problem, module=problem.module.double(), theta=theta)
            gradient = row.double() @ exact.gradients(DATA[loss]) / 14 + 0.01 * theta
            velocity = 0.9 * velocity + gradient  # of the recipe's settings only the weight decay counts
            theta = theta - rate * (1 - step / 7) * velocity
        tolerance = 1e-10 if precision == "float64" else 1e-4
        expected_outcome = outcomes(replace(problem, theta=theta), QUERIES[loss])
        torch.testing.assert_close(expected.double(), expected_outcome, rtol=tolerance, atol=tolerance)


def test_warm_precision_is_never_bfloat16():
    assert [warm_precision(replace(RECIPE, precision=p)) for p in ("bfloat16", "float32", "float64")] == [
        "float32",
        "float32",
        "float64",
    ]


def test_effects_are_positive_for_proponents():
    loo = LeaveOneOut(torch.tensor([0]), torch.tensor([[2.0]]), torch.tensor([[[0.5]]]), "warm")
    assert loo.effects.tolist() == [[[1.5]]]  # without the example the outcome falls


# -- stopping and going on --------------------------------------------------------------------------


def test_a_stopped_run_goes_on_where_it_stopped(small_blocks, monkeypatch, tmp_path):
    whole = retrain(RECIPE, TRAIN, MASKS, [0, 1], ASKED, **QUIET)
    store = Store(tmp_path)
    trained = counting(monkeypatch, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        retrain(RECIPE, TRAIN, MASKS, [0, 1], ASKED, store=store, **QUIET)
    assert trained == [4, 4]
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    monkeypatch.setattr(Recipe, "models_per_block", 4)
    trained = counting(monkeypatch)
    found = retrain(RECIPE, TRAIN, MASKS, [0, 1], ASKED, store=store, **QUIET)
    assert trained == [2]  # ten models: only the last, smaller block was left
    assert torch.equal(found.losses, whole.losses)
    assert torch.equal(found.margins, whole.margins)
    retrain(RECIPE, TRAIN, MASKS, [0, 1], ASKED, store=store, **QUIET)
    assert trained == [2]


def test_a_damaged_block_is_redone_and_said_so(small_blocks, monkeypatch, tmp_path, caplog):
    store = Store(tmp_path)
    whole = retrain(RECIPE, TRAIN, MASKS, [0, 1], ASKED, store=store, **QUIET)
    victim = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-40])
    trained = counting(monkeypatch)
    with caplog.at_level(logging.WARNING):
        found = retrain(RECIPE, TRAIN, MASKS, [0, 1], ASKED, store=store, **QUIET)
    assert trained == [4]
    assert "redoing retrain" in caplog.text
    assert victim.name in caplog.text
    assert torch.equal(found.losses, whole.losses)


def test_more_subsets_reuse_the_finished_blocks(small_blocks, monkeypatch, tmp_path):
    masks = random_subsets(14, 8, 0.5, seed=0)
    store = Store(tmp_path)
    retrain(RECIPE, TRAIN, masks[:4], [0, 1], ASKED, store=store, **QUIET)
    trained = counting(monkeypatch)
    retrain(RECIPE, TRAIN, masks, [0, 1], ASKED, store=store, **QUIET)
    assert trained == [4, 4]


def test_anything_that_changes_the_outcome_changes_the_key(monkeypatch, tmp_path):
    store = Store(tmp_path)
    trained = counting(monkeypatch)

    def run(recipe=RECIPE, data=TRAIN, masks=MASKS, seeds=(0,), queries=ASKED):
        before = len(trained)
        retrain(recipe, data, masks, list(seeds), queries, store=store, **QUIET)
        return len(trained) - before

    assert run() == 1
    assert run() == 0
    changes = [
        {"recipe": replace(RECIPE, learning_rate=0.2)},
        {"recipe": replace(RECIPE, activation="tanh")},
        {"data": labelled(14, seed=1)},
        {"masks": ~MASKS},
        {"seeds": (1,)},
        {"queries": labelled(6, seed=5)},
    ]
    assert [run(**change) for change in changes] == [1] * len(changes)
    assert run() == 0
    monkeypatch.setattr(module, "source_fingerprint", lambda modules: "another code")
    assert run() == 1


def test_warm_and_scratch_runs_are_kept_apart_by_their_starting_point(monkeypatch, tmp_path):
    store = Store(tmp_path)
    trained = counting(monkeypatch)
    recipe = replace(RECIPE, batch_size=14)
    problem = train(recipe, TRAIN, 0)
    options = {"store": store, **QUIET}
    warm = leave_one_out_warm(recipe, problem, [1], ASKED, steps=3, **options)
    moved = leave_one_out_warm(recipe, problem.at(problem.theta * 2), [1], ASKED, steps=3, **options)
    scratch = leave_one_out(recipe, TRAIN, [1], [0], ASKED, **options)
    assert len(trained) == 3
    assert not torch.allclose(warm.reference, scratch.reference)
    assert not torch.allclose(warm.reference, moved.reference)
    again = leave_one_out_warm(recipe, problem, [1], ASKED, steps=3, **options)
    assert len(trained) == 3
    assert torch.equal(again.effects, warm.effects)


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "seeds", "error", "message"),
    [
        (MASKS.float(), [0], TypeError, r"masks must be boolean \(m, n\), got torch.float32"),
        (MASKS[0], [0], ValueError, r"masks must be \(m, 14\) with m >= 1, got \(14,\)"),
        (MASKS[:0], [0], ValueError, r"with m >= 1, got \(0, 14\)"),
        (MASKS[:, 1:], [0], ValueError, r"masks must be \(m, 14\) with m >= 1, got \(5, 13\)"),
        (torch.zeros(2, 14).bool(), [0], ValueError, "subset 0 is empty"),
        (MASKS, [], ValueError, r"seeds must be distinct and at least one, got \[\]"),
        (MASKS, [4, 1, 4], ValueError, r"seeds must be distinct and at least one, got \[4, 1, 4\]"),
        (MASKS, [-3], ValueError, r"seeds must be whole numbers in .* got -3"),
        (torch.cat([MASKS, ~MASKS[:1] | MASKS[:1]]), [0], ValueError, "equally large, got sizes 7 to 14"),
    ],
)
def test_impossible_designs_are_refused(masks, seeds, error, message):
    with pytest.raises(error, match=message):
        retrain(RECIPE, TRAIN, masks, seeds, ASKED, **QUIET)


def test_unequal_subsets_are_noticed_across_blocks(small_blocks):
    masks = torch.ones(8, 14, dtype=torch.bool)
    masks[4:, 0] = False  # each block by itself is in order
    with pytest.raises(ValueError, match="subsets must be equally large, got sizes 13 to 14"):
        retrain(RECIPE, TRAIN, masks, [0], ASKED, **QUIET)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([14], r"indices must lie in 0..13, got 14"),
        ([-1], r"indices must lie in 0..13, got -1"),
        ([2, 2], "indices must not repeat, but 2 occurs"),
        ([], "indices must be a non-empty list"),
        ([0.5], "indices must be whole numbers, got torch.float32"),
    ],
)
def test_impossible_removals_are_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        leave_one_out(RECIPE, TRAIN, indices, [0], ASKED, **QUIET)
    with pytest.raises(ValueError, match=message):
        leave_one_out_warm(RECIPE, train(RECIPE, TRAIN, 0), indices, ASKED, **QUIET)


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_impossible_seeds_of_leave_one_out_are_refused(seeds):
    with pytest.raises(ValueError, match="seeds must be distinct and at least one, got"):
        leave_one_out(RECIPE, TRAIN, [0], seeds, ASKED, **QUIET)


def test_other_impossible_calls_are_refused():
    problem = train(RECIPE, TRAIN, 0)
    with pytest.raises(TypeError, match="unknown option 'jobs', expected store, n_jobs or progress"):
        retrain(RECIPE, TRAIN, MASKS, [0], ASKED, jobs=2)
    with pytest.raises(ValueError, match="the recipe has 31 parameters, the problem 43"):
        leave_one_out_warm(RECIPES["squared_error"], problem, [0], ASKED)
    with pytest.raises(ValueError, match="epochs and batch_size must be >= 1, got 0"):
        leave_one_out_warm(RECIPE, problem, [0], ASKED, steps=0, **QUIET)
    with pytest.raises(ValueError, match="inputs have 5 features but the recipe's first layer takes 4"):
        retrain(RECIPE, TRAIN, MASKS, [0], labelled(6, d=5), **QUIET)
    with pytest.raises(ValueError, match="label 3 is out of range for 3 outputs"):
        retrain(RECIPE, TRAIN, MASKS, [0], labelled(20, classes=4), **QUIET)


def test_a_diverged_run_is_never_stored(tmp_path):
    recipe = replace(RECIPES["squared_error"], learning_rate=1e6, epochs=10)
    with pytest.raises(FloatingPointError, match=r"lower learning_rate=1000000.0"):
        retrain(recipe, DATA["squared_error"], MASKS, [0], QUERIES["squared_error"], store=Store(tmp_path), **QUIET)
    assert list(tmp_path.iterdir()) == []


def test_blocks_and_evaluation_agree_with_training_directly():
    """What a block stores is `evaluate` of `train_many`, nothing more."""
    block = module._train_block(RECIPE, TRAIN, MASKS[:2], [0, 4], ASKED, None)
    expected = evaluate(RECIPE, train_many(RECIPE, TRAIN, MASKS[:2], [0, 4]), ASKED)
    assert set(block) == {"losses", "margins"}
    for name, value in expected.items():
        close(block[name], value)
    assert block["losses"].dtype == FLOAT64


def test_warm_leave_one_out_of_a_saturated_model_is_refused():
    recipe = replace(RECIPE, weight_decay=0.0)
    problem = train(recipe, TRAIN, 0)
    flat = problem.at(torch.zeros_like(problem.theta))
    flat = replace(flat, loss=lambda outputs, targets: 0 * outputs[:, 0])
    with pytest.raises(ValueError, match="curvature at the trained parameters is 0"):
        leave_one_out_warm(recipe, flat, [0], ASKED, **QUIET)
