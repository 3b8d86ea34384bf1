"""The bench: one ground truth split in validation and test queries, saved, loaded, tuned on the right half."""

import dataclasses

import pytest
import torch

from tda_core.bench import MODEL_SEED, Bench
from tda_core.data import load_dataset
from tda_core.gradients import gradient_dot
from tda_core.ground_truth import retrain
from tda_core.metrics import SignError, lds
from tda_core.recipes import Recipe
from tda_core.training import train

RECIPE = Recipe(layers=(64, 8, 10), epochs=3, batch_size=25, weight_decay=1e-3)


@pytest.fixture(scope="module")
def bench():
    data = load_dataset("digits", n_train=80, n_validation=12, n_test=20)
    return Bench.build(data, RECIPE, n_subsets=12, n_seeds=2)


class Fixed:
    """A method whose scores are given."""

    def __init__(self, scores):
        self.given = scores

    def scores(self, queries):
        return self.given


def test_ground_truths_are_those_of_their_queries(bench):
    for truth, queries in ((bench.validation, bench.data.validation), (bench.test, bench.data.test)):
        direct = retrain(RECIPE, bench.data.train, truth.masks, [0, 1], queries, n_jobs=1, progress=False)
        torch.testing.assert_close(truth.losses, direct.losses)
        torch.testing.assert_close(truth.margins, direct.margins)
    assert bench.validation.masks.sum(1).tolist() == [40] * 12


def test_save_and_load(bench, tmp_path):
    bench.save(tmp_path)
    loaded = Bench.load(tmp_path)
    assert loaded.recipe == bench.recipe
    assert torch.equal(loaded.test.margins, bench.test.margins)
    assert loaded.data.train.hash == bench.data.train.hash
    assert loaded.data.validation.hash == bench.data.validation.hash


def test_load_names_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no bench in .*run the notebook that builds it first"):
        Bench.load(tmp_path / "nothing")


def test_problems_are_trained_apart_from_the_ground_truth(bench):
    first, second = bench.problems(2)
    assert torch.equal(first.theta, train(RECIPE, bench.data.train, MODEL_SEED).theta)
    assert not torch.equal(first.theta, second.theta)
    assert MODEL_SEED > int(bench.test.seeds.max())


def test_lds_is_on_test_queries_and_refuses_a_reversed_sign(bench):
    scores = gradient_dot(bench.problems()[0]).scores(bench.data.test)
    assert bench.lds(scores) == lds(scores, bench.test.masks, bench.test.outcomes)
    assert bench.lds(scores).value > 0.1
    with pytest.raises(SignError, match="a positive score means that training on the example lowers"):
        bench.lds(-scores)


def test_tune_chooses_on_validation_queries(bench):
    good = gradient_dot(bench.problems()[0]).scores(bench.data.validation)
    candidates = {1.0: -good, 2.0: good, 3.0: torch.zeros_like(good)}
    tuned = bench.tune(lambda setting: Fixed(candidates[setting]), [1.0, 2.0, 3.0])
    assert tuned.setting == 2.0 and tuned.method.given is good
    expected = lds(good, bench.validation.masks, bench.validation.outcomes)
    assert tuned.validation[2.0] == expected and set(tuned.validation) == {1.0, 2.0, 3.0}
    # test queries do not matter: other outcomes there, the same choice
    other = dataclasses.replace(bench, test=dataclasses.replace(bench.test, margins=-bench.test.margins))
    assert other.tune(lambda setting: Fixed(candidates[setting]), [1.0, 2.0, 3.0]).setting == 2.0


def test_tune_leaves_out_what_fails(bench):
    good = gradient_dot(bench.problems()[0]).scores(bench.data.validation)

    def fit(setting):
        if setting == 0.0:
            raise ValueError("singular with damping 0.0")
        return Fixed(good)

    tuned = bench.tune(fit, [0.0, 1.0])
    assert tuned.setting == 1.0 and set(tuned.validation) == {1.0}
    with pytest.raises(ValueError, match=r"singular with damping 0\.0"):
        bench.tune(fit, [0.0])
    with pytest.raises(ValueError, match="at least one setting"):
        bench.tune(fit, [])


def test_only_numbers_have_an_edge():
    from tda_core.bench import Tuned

    with pytest.raises(TypeError, match=r"only numbers have an edge, got settings such as \('input', 0.1\)"):
        _ = Tuned(("input", 0.1), {}, None, (("input", 0.1), ("kernel", 0.1))).at_edge
