"""The plain trainer of any module: against the trainer of perceptrons, by seed, and named errors."""

from functools import partial

import pytest
import torch
from torch import nn

from tda_core.models import mlp, small_convolutional
from tda_core.module_training import ModuleRecipe, retrain_modules, train_module
from tda_core.recipes import Recipe
from tda_core.training import train_loop
from tests.toys import continuous, labelled

RECIPE = ModuleRecipe(partial(mlp, (4, 5, 3)), epochs=3, batch_size=8)


def data(n=20, seed=0):
    return labelled(n, seed=seed, dtype=torch.float32)


def test_it_trains_as_the_trainer_of_perceptrons_does():
    examples = data()
    mask = torch.arange(20) % 3 > 0
    with torch.random.fork_rng():
        torch.manual_seed(5)
        start = nn.utils.parameters_to_vector(mlp((4, 5, 3)).parameters()).detach()
    recipe = Recipe((4, 5, 3), learning_rate=0.05, weight_decay=1e-3, epochs=3, batch_size=8)
    expected = train_loop(recipe, examples, mask, 5, start)
    torch.testing.assert_close(train_module(RECIPE, examples, 5, mask=mask).theta, expected, rtol=1e-5, atol=1e-6)


def test_the_seed_decides_everything_and_the_global_state_is_left_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second, other = (train_module(RECIPE, data(), seed).theta for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_retraining_measures_each_subset_and_seed():
    masks, queries = torch.arange(20) % torch.tensor([[2], [3]]) > 0, data(4, seed=1)
    truth = retrain_modules(RECIPE, data(), masks, [0, 4], queries)
    assert truth.losses.shape == truth.outcomes.shape == (2, 2, 4)
    problem = train_module(RECIPE, data(), 4, mask=masks[1])
    assert torch.equal(truth.losses[1, 1], problem.losses(queries))
    assert torch.equal(truth.margins[1, 1], problem.margins(queries))


def test_regressions_have_no_margins():
    recipe = ModuleRecipe(partial(mlp, (4, 5, 1)), "squared_error", epochs=2)
    examples = continuous(dtype=torch.float32)
    truth = retrain_modules(recipe, examples, torch.ones(3, 20, dtype=torch.bool), [0], examples)
    assert truth.margins is None and truth.outcomes.shape == (3, 1, 20)


@pytest.mark.parametrize(("height", "width"), [(9, 9), (12, 17), (28, 28)])
def test_small_convolutional_networks_take_flat_images(height, width):
    assert small_convolutional(height, width, 2, 4)(torch.randn(3, height * width)).shape == (3, 4)


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match=r"9 x 9 or larger, .* got 8 x 28"):
        small_convolutional(8)
    with pytest.raises(ValueError, match="unknown loss 'hinge'"):
        ModuleRecipe(mlp, "hinge")
    with pytest.raises(ValueError, match="learning_rate must be finite and > 0, got nan"):
        ModuleRecipe(mlp, learning_rate=float("nan"))
    with pytest.raises(ValueError, match="epochs and batch_size must be >= 1, got 0 and 50"):
        ModuleRecipe(mlp, epochs=0)
    for mask in (torch.zeros(20, dtype=torch.bool), torch.ones(19, dtype=torch.bool), torch.ones(20)):
        with pytest.raises(ValueError, match=r"mask must be \(20,\) bool with a True"):
            train_module(RECIPE, data(), 0, mask=mask)
    with pytest.raises(ValueError, match=r"masks must be \(m, 20\), m >= 1, for 1 seed or more, got \(2, 19\)"):
        retrain_modules(RECIPE, data(), torch.ones(2, 19, dtype=torch.bool), [0], data())
    with pytest.raises(FloatingPointError, match="training diverged: lower learning_rate"):
        train_module(
            ModuleRecipe(partial(mlp, (4, 5, 1)), "squared_error", learning_rate=1e8),
            continuous(dtype=torch.float32),
            0,
        )
