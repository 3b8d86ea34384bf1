"""Recipes and training: the stacked ensemble against the plain loop, and the loop against hand-made steps."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import FLOAT64, continuous, labelled

from tda_core.data import load_dataset
from tda_core.examples import Examples
from tda_core.recipes import Recipe, epoch_orders, initial_parameters, standard_recipe
from tda_core.threads import one_thread
from tda_core.training import evaluate, train, train_checkpoints, train_epochs, train_loop, train_many

N = 17  # not a multiple of the batch size: the last batch is a partial one
SEEDS = [3, 0, 11]
HIDDEN = [(), (5,), (6, 5)]


def recipe_for(loss: str, hidden: tuple[int, ...] = (5,), **changes) -> Recipe:
    outputs = 3 if loss == "cross_entropy" else 1
    given = {"learning_rate": 0.1, "epochs": 3, "batch_size": 5, "precision": "float64"} | changes
    return Recipe((4, *hidden, outputs), loss=loss, **given)


def data_for(loss: str, dtype: torch.dtype = FLOAT64) -> Examples:
    return labelled(N, dtype=dtype) if loss == "cross_entropy" else continuous(N, dtype=dtype)


def weights_of(kind: str, m: int = len(SEEDS)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if kind == "all":
        return torch.ones(m, N, dtype=torch.bool)
    if kind == "subset":  # 11 of 17 each: batches of 5, 5 and 1
        return torch.rand(m, N, generator=generator).argsort(1).argsort(1) < 11
    return 2 * torch.rand(m, N, generator=generator) - 0.2


def by_loop(recipe, data, weights, seeds, initial=None):
    return torch.stack([train_loop(recipe, data, row, seed, initial) for row, seed in zip(weights, seeds, strict=True)])


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# -- the recipe -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (4,)}, r"layers must be at least two widths of 1 or more, got \(4,\)"),
        ({"layers": (4, 0, 3)}, r"got \(4, 0, 3\)"),
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
        ({"loss": "hinge"}, r"unknown loss 'hinge', expected one of \['cross_entropy', 'squared_error'\]"),
        ({"schedule": "step"}, r"unknown schedule 'step', expected one of \['constant', 'cosine', 'linear'\]"),
        ({"precision": "float16"}, "unknown precision 'float16'"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and > 0, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be finite and > 0, got nan"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, "got -0.1"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and >= 0, got -1.0"),
        ({"weight_decay": math.inf}, "weight_decay must be finite and >= 0, got inf"),
        ({"epochs": 0}, "epochs and batch_size must be >= 1, got 0 and 50"),
        ({"batch_size": 0}, "epochs and batch_size must be >= 1, got 30 and 0"),
        ({"loss": "squared_error"}, r"squared_error needs one output, got layers \(4, 5, 3\)"),
    ],
)
def test_impossible_recipes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"layers": (4, 5, 3)} | changes)


def test_n_parameters_and_types():
    recipe = Recipe((4, 5, 3))
    assert recipe.but(epochs=2) == replace(recipe, epochs=2)
    assert recipe.n_parameters == 5 * 5 + 6 * 3
    assert recipe.dtype == torch.float32
    assert replace(recipe, precision="float64").dtype == FLOAT64
    assert replace(recipe, precision="bfloat16").dtype == torch.float32
    assert recipe.models_per_block == 32
    assert Recipe((784, 64, 10)).models_per_block == 8


def test_learning_rate_schedules():
    rates = {s: [Recipe((4, 3), learning_rate=2.0, schedule=s).rate(step, 4) for step in range(4)] for s in
             ("constant", "linear", "cosine")}  # fmt: skip
    assert rates["constant"] == [2, 2, 2, 2]
    assert rates["linear"] == pytest.approx([2, 1.5, 1, 0.5])
    assert rates["cosine"] == pytest.approx([2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5)])


def test_initialisation_is_pytorchs_default_from_the_seed_alone():
    recipe = Recipe((25, 400, 3), precision="float64")
    theta = initial_parameters(recipe, 5)
    assert torch.equal(theta, initial_parameters(replace(recipe, epochs=1, batch_size=2), 5))
    assert not torch.equal(theta, initial_parameters(recipe, 6))
    assert torch.equal(theta.float(), initial_parameters(replace(recipe, precision="float32"), 5))
    first, second = theta.split([26 * 400, 401 * 3])
    for part, bound in ((first, 1 / 5), (second, 1 / 20)):
        assert float(part.abs().max()) <= bound
        assert float(part.abs().max()) > 0.99 * bound
        assert abs(float(part.mean())) < 0.1 * bound
        assert float(part.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 3))
def test_every_epoch_visits_every_example_once(seed, n, epochs):
    orders = epoch_orders(Recipe((4, 3), epochs=epochs), n, seed)
    assert orders.shape == (epochs, n)
    assert torch.equal(orders.sort(1).values, torch.arange(n).expand(epochs, n))


def test_orders_differ_by_seed_and_epoch_and_longer_runs_start_alike():
    recipe = Recipe((4, 3), epochs=4)
    orders = epoch_orders(recipe, 30, 0)
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], epoch_orders(recipe, 30, 1)[0])
    assert torch.equal(orders[:2], epoch_orders(replace(recipe, epochs=2), 30, 0))


def test_standard_recipes():
    assert standard_recipe("digits").layers == (64, 64, 10)
    assert standard_recipe("mnist", hidden=0).layers == (784, 10)
    with pytest.raises(ValueError, match=r"no standard recipe for dataset 'cifar'.*digits"):
        standard_recipe("cifar")


# -- the plain loop against hand-made steps ---------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_two_full_batch_steps_with_momentum_and_weight_decay(loss):
    recipe = recipe_for(loss, epochs=2, batch_size=N, momentum=0.6, weight_decay=0.2, schedule="linear")
    data, weights = data_for(loss), weights_of("float")[0]
    problem = train(replace(recipe, epochs=1), data, 0)  # any problem of this architecture
    theta, velocity = initial_parameters(recipe, 3), 0
    for rate in (0.1, 0.05):
        gradients = problem.at(theta).gradients(data)
        velocity = 0.6 * velocity + weights.double() @ gradients / N + 0.2 * theta
        theta = theta - rate * velocity
    close(train_loop(recipe, data, weights, 3), theta)
    close(train_many(recipe, data, weights[None], [3])[0], theta)


def test_one_epoch_visits_the_batches_of_the_seeds_order():
    recipe = recipe_for("cross_entropy", epochs=1, momentum=0.0)
    data, mask = data_for("cross_entropy"), weights_of("subset")[0]
    order = epoch_orders(recipe, N, 9)[0]
    members = [int(i) for i in order if mask[i]]
    problem = train(recipe, data, 0)
    theta = initial_parameters(recipe, 9)
    for batch in (members[:5], members[5:10], members[10:]):
        theta = theta - 0.1 * problem.at(theta).gradients(data[torch.tensor(batch)]).mean(0)
    assert len(members) == 11
    close(train_loop(recipe, data, mask, 9), theta)


# -- the ensemble against the loop ------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_ensemble_equals_the_loop_in_float64(loss, activation, hidden, schedule):
    base = recipe_for(loss, hidden, activation=activation, schedule=schedule)
    data = data_for(loss)
    for kind in ("all", "subset", "float"):
        weights = weights_of(kind)
        for momentum, decay in ((0.0, 0.0), (0.9, 0.01)):
            recipe = replace(base, momentum=momentum, weight_decay=decay)
            close(train_many(recipe, data, weights, SEEDS), by_loop(recipe, data, weights, SEEDS))


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("kind", ["all", "subset", "float"])
def test_models_that_share_their_batches_equal_the_loop(loss, hidden, kind):
    recipe = recipe_for(loss, hidden, momentum=0.9, weight_decay=0.01, schedule="cosine")
    weights = weights_of(kind)
    weights = weights[:1].expand(3, -1) if kind == "subset" else weights  # equal subsets are visited alike
    initial = torch.stack([initial_parameters(recipe, seed) for seed in SEEDS])
    found = train_many(recipe, data_for(loss), weights, [4, 4, 4], initial)
    expected = [train_loop(recipe, data_for(loss), row, 4, start) for row, start in zip(weights, initial, strict=True)]
    close(found, torch.stack(expected))


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("kind", ["all", "subset", "float"])
def test_ensemble_equals_the_loop_to_1e_5_in_float32(loss, activation, kind):
    recipe = recipe_for(
        loss, (8,), activation=activation, precision="float32", epochs=10, momentum=0.9, weight_decay=1e-3
    )
    recipe = replace(recipe, learning_rate=0.1 if loss == "cross_entropy" else 0.02)  # both converge
    data, weights = data_for(loss, torch.float32), weights_of(kind)
    found = train_many(recipe, data, weights, SEEDS)
    assert found.dtype == torch.float32
    assert float((found - by_loop(recipe, data, weights, SEEDS)).abs().max()) < 1e-5


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_data_of_another_float_type_is_converted(precision, loss, dtype):
    recipe, data = recipe_for(loss, precision=precision), data_for(loss, dtype)
    same = Examples(data.inputs.to(recipe.dtype), data.targets if loss == "cross_entropy" else
                    data.targets.to(recipe.dtype))  # fmt: skip
    found = train_many(recipe, data, weights_of("subset"), SEEDS)
    assert torch.equal(found, train_many(recipe, same, weights_of("subset"), SEEDS))
    if precision != "bfloat16":
        close(found, by_loop(recipe, data, weights_of("subset"), SEEDS), 1e-5)
    assert torch.isfinite(train(recipe, data, 0).losses(data)).all()


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("kind", ["all", "subset", "float"])
@pytest.mark.parametrize("shared", [False, True])
def test_bfloat16_rounds_the_first_layers_products_and_little_else(hidden, kind, shared):
    recipe = recipe_for("cross_entropy", hidden, precision="float32", momentum=0.9, schedule="linear")
    data = data_for("cross_entropy", torch.float32)
    seeds = [5] * 3 if shared else SEEDS
    weights = weights_of(kind)[:1].expand(3, -1) if shared and kind == "subset" else weights_of(kind)
    exact = train_many(recipe, data, weights, seeds)
    rounded = train_many(replace(recipe, precision="bfloat16"), data, weights, seeds)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).norm() / exact.norm()) < 0.02
    assert not torch.equal(rounded, rounded.bfloat16().float())  # the weights themselves keep their digits


def test_one_bfloat16_step_is_the_rounded_product():
    recipe = recipe_for("cross_entropy", (), precision="bfloat16", epochs=1, batch_size=N, momentum=0.0)
    data = data_for("cross_entropy", torch.float32)
    x = data.inputs.bfloat16()
    theta = initial_parameters(recipe, 0)
    weight, bias = theta[:12].view(3, 4), theta[12:]
    order = epoch_orders(recipe, N, 0)[0]
    logits = (x[order] @ weight.bfloat16().T).float() + bias
    error = (logits.softmax(1) - torch.nn.functional.one_hot(data.targets[order], 3)) / N
    expected = torch.cat([
        (weight - 0.1 * (error.bfloat16().T @ x[order]).float()).flatten(), bias - 0.1 * error.sum(0)
    ])  # fmt: skip
    found = train_many(recipe, data, torch.ones(1, N, dtype=torch.bool), [0])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_images_are_flattened():
    data = labelled(N)
    images = Examples(data.inputs.view(N, 2, 2), data.targets)
    recipe = recipe_for("cross_entropy")
    ones = torch.ones(1, N, dtype=torch.bool)
    assert torch.equal(train_many(recipe, images, ones, [0]), train_many(recipe, data, ones, [0]))


# -- what weights mean ------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_float_ones_equal_a_full_subset(momentum):
    recipe, data = recipe_for("cross_entropy", momentum=momentum), data_for("cross_entropy")
    ones = torch.ones(2, N)
    close(train_many(recipe, data, ones, [0, 1]), train_many(recipe, data, ones.bool(), [0, 1]))


def test_an_example_of_weight_zero_is_without_effect_but_keeps_its_place_in_the_batch():
    recipe, data = recipe_for("cross_entropy"), data_for("cross_entropy")
    weights = torch.ones(1, N)
    weights[0, 6] = 0
    inputs, targets = data.inputs.clone(), data.targets.clone()
    inputs[6], targets[6] = 100.0, (targets[6] + 1) % 3
    found = train_many(recipe, data, weights, [1])
    assert torch.equal(found, train_many(recipe, Examples(inputs, targets), weights, [1]))
    subset = weights.bool()
    assert not torch.allclose(found, train_many(recipe, data, subset, [1]), atol=1e-4)


def test_a_subset_never_sees_the_others():
    recipe, data, mask = recipe_for("cross_entropy"), data_for("cross_entropy"), weights_of("subset")
    inputs = data.inputs.clone()
    inputs[~mask[0]] = 100.0
    expected = train_many(recipe, data, mask, SEEDS)
    found = train_many(recipe, Examples(inputs, data.targets), mask, SEEDS)
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[1], expected[1])


# -- reproducibility --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_the_same_call_gives_the_same_bits_and_the_global_generator_is_left_alone(precision):
    recipe, data = recipe_for("cross_entropy", (8,), precision=precision), data_for("cross_entropy", torch.float32)
    weights = weights_of("subset")
    torch.manual_seed(0)
    first = train_many(recipe, data, weights, SEEDS)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(first, train_many(recipe, data, weights, SEEDS))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first[0], train_many(recipe, data, weights[:1], [4])[0])


def test_a_model_is_the_same_on_any_number_of_cores():
    data = load_dataset("digits", n_train=200)
    recipe, before, found = replace(standard_recipe("digits"), epochs=2), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(train(recipe, data.train, 0).theta)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("kind", ["all", "subset", "float"])
def test_a_model_comes_out_alike_alone_and_in_a_block(precision, tolerance, kind):
    recipe, data = recipe_for("cross_entropy", (8,), precision=precision), data_for("cross_entropy", torch.float32)
    weights = weights_of(kind)
    together = train_many(recipe, data, weights, SEEDS)
    for i in range(3):
        close(train_many(recipe, data, weights[i : i + 1], SEEDS[i : i + 1])[0], together[i], tolerance)
    order = [2, 0, 1]
    close(train_many(recipe, data, weights[order], [SEEDS[i] for i in order]), together[order], tolerance)


def test_inputs_are_left_as_they_were():
    recipe, data, weights = recipe_for("squared_error"), data_for("squared_error"), weights_of("float")
    initial = torch.randn(recipe.n_parameters, dtype=FLOAT64)
    before = (data.hash, weights.clone(), initial.clone())
    train_many(recipe, data, weights, SEEDS, initial)
    train_loop(recipe, data, weights[0], 0, initial)
    assert (data.hash, True, True) == (before[0], torch.equal(weights, before[1]), torch.equal(initial, before[2]))


def test_one_thread_is_put_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError, match="stop"), one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError("stop")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


# -- starting points, epochs and checkpoints --------------------------------------------------------


def test_training_starts_where_it_is_told():
    recipe, data, weights = recipe_for("cross_entropy"), data_for("cross_entropy"), weights_of("all")
    starts = torch.randn(3, recipe.n_parameters, dtype=FLOAT64)
    expected = [train_loop(recipe, data, row, s, t) for row, s, t in zip(weights, SEEDS, starts, strict=True)]
    close(train_many(recipe, data, weights, SEEDS, starts), torch.stack(expected))
    alike = train_many(recipe, data, weights, SEEDS, starts[0])
    close(alike, by_loop(recipe, data, weights, SEEDS, starts[0]))


def test_epochs_are_the_prefixes_of_a_run():
    recipe, data, weights = recipe_for("cross_entropy"), data_for("cross_entropy"), weights_of("subset")
    after = [theta.clone() for theta in train_epochs(recipe, data, weights, SEEDS)]
    assert len(after) == 3
    for epochs, theta in enumerate(after, start=1):
        assert torch.equal(theta, train_many(replace(recipe, epochs=epochs), data, weights, SEEDS))


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_train_gives_a_problem_on_the_examples_seen(loss):
    recipe, data, mask = recipe_for(loss, weight_decay=0.1), data_for(loss), weights_of("subset")[0]
    problem = train(recipe, data, 2, mask=mask)
    close(problem.theta, train_loop(recipe, data, mask, 2))
    assert problem.train.hash == data[mask].hash
    assert problem.weight_decay == 0.1
    assert len(train(recipe, data, 2).train) == N
    measured = evaluate(recipe, problem.theta[None], data)
    close(problem.losses(data), measured["losses"][0])


def test_checkpoints_end_with_the_trained_model():
    recipe, data = recipe_for("cross_entropy", epochs=4, schedule="cosine"), data_for("cross_entropy")
    last, first, again = train_checkpoints(recipe, data, 0, [4, 1, 1])
    assert torch.equal(last.theta, train(recipe, data, 0).theta)
    assert torch.equal(first.theta, next(train_epochs(recipe, data, torch.ones(1, N).bool(), [0]))[0])
    assert torch.equal(first.theta, again.theta)
    assert not torch.equal(first.theta, last.theta)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_evaluate_measures_what_each_problem_measures(loss, hidden, activation):
    recipe, queries = recipe_for(loss, hidden, activation=activation), data_for(loss)[torch.arange(6)]
    theta = train_many(recipe, data_for(loss), weights_of("all"), SEEDS)
    measured = evaluate(recipe, theta, queries)
    problem = train(recipe, data_for(loss), 0)
    close(measured["losses"], torch.stack([problem.at(t).losses(queries) for t in theta]))
    assert ("margins" in measured) == (loss == "cross_entropy")
    if "margins" in measured:
        close(measured["margins"], torch.stack([problem.at(t).margins(queries) for t in theta]))


def test_training_lowers_the_loss():
    recipe, data = recipe_for("cross_entropy", (16,), epochs=30), data_for("cross_entropy")
    start = evaluate(recipe, initial_parameters(recipe, 0)[None], data)["losses"].mean()
    assert float(train(recipe, data, 0).losses(data).mean()) < 0.3 * float(start)


# -- bad input --------------------------------------------------------------------------------------

ALL = torch.ones(1, N, dtype=torch.bool)


@pytest.mark.parametrize("function", ["train_many", "train_loop"])
@pytest.mark.parametrize(
    ("weights", "seed", "message"),
    [
        (torch.ones(N - 1), 0, r"weights must be \(1 seeds, 17 examples\), 1 seed or more, got \(1, 16\)"),
        (torch.ones(N, dtype=torch.int64), 0, "weights must be boolean or finite floats, got torch.int64"),
        (torch.full((N,), torch.nan), 0, r"weights must be finite, got nan at \[0, 0\]"),
        (torch.ones(N).index_fill(0, torch.tensor(4), torch.inf), 0, r"weights must be finite, got inf at \[0, 4\]"),
        (torch.zeros(N, dtype=torch.bool), 0, "subset 0 is empty"),
        (torch.ones(N), -1, r"seeds must be whole numbers in 0..2\^32-1, got -1"),
        (torch.ones(N), 2**32, "got 4294967296"),
        (torch.ones(N), 1.5, r"whole numbers in 0..2\^32-1, got 1.5"),
    ],
)
def test_impossible_weights_and_seeds_are_refused(function, weights, seed, message):
    recipe, data = recipe_for("cross_entropy"), data_for("cross_entropy")
    with pytest.raises(ValueError, match=message):
        if function == "train_many":
            train_many(recipe, data, weights[None], [seed])
        else:
            train_loop(recipe, data, weights, seed)


def test_blocks_that_do_not_fit_together_are_refused():
    recipe, data = recipe_for("cross_entropy"), data_for("cross_entropy")
    with pytest.raises(ValueError, match=r"\(2 seeds, 17 examples\).*got \(1, 17\)"):
        train_many(recipe, data, ALL, [0, 1])
    with pytest.raises(ValueError, match=r"1 seed or more, got \(0, 17\)"):
        train_many(recipe, data, ALL[:0], [])
    with pytest.raises(ValueError, match=r"got \(17,\)"):
        train_many(recipe, data, ALL[0], [0])
    unequal = ALL.repeat(3, 1)
    unequal[1, :4] = False
    with pytest.raises(ValueError, match="subsets must be equally large, got sizes 13 to 17"):
        train_many(recipe, data, unequal, [0, 1, 2])
    unequal[1] = False
    with pytest.raises(ValueError, match="subset 1 is empty"):
        train_many(recipe, data, unequal, [0, 1, 2])
    with pytest.raises(ValueError, match=r"initial must be \(43,\) or \(1, 43\), got \(42,\)"):
        train_many(recipe, data, ALL, [0], torch.zeros(42))


@pytest.mark.parametrize(
    ("recipe", "data", "message"),
    [
        (Recipe((5, 3)), labelled(), "inputs have 4 features but the recipe's first layer takes 5"),
        (Recipe((4, 2)), labelled(), "label 2 is out of range for 2 outputs"),
        (Recipe((4, 3)), continuous(), "loss 'cross_entropy' does not fit targets of type torch.float64"),
        (
            Recipe((4, 1), loss="squared_error"),
            labelled(),
            "loss 'squared_error' does not fit targets of type torch.int",
        ),
    ],
)
def test_data_that_does_not_fit_the_recipe_is_refused(recipe, data, message):
    ones = torch.ones(1, len(data), dtype=torch.bool)
    for call in (
        lambda: train(recipe, data, 0),
        lambda: train_many(recipe, data, ones, [0]),
        lambda: train_loop(recipe, data, ones[0], 0),
        lambda: evaluate(recipe, torch.zeros(1, recipe.n_parameters), data),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(("mask", "error", "message"), [
    (torch.ones(N), TypeError, r"mask must be boolean \(n,\), got torch.float32"),
    (torch.ones(N, dtype=torch.int64), TypeError, "got torch.int64"),
    (torch.ones(N - 2, dtype=torch.bool), ValueError, r"got \(1, 15\)"),
    (torch.zeros(N, dtype=torch.bool), ValueError, "subset 0 is empty"),
])  # fmt: skip
def test_masks_that_are_no_subset_are_refused(mask, error, message):
    with pytest.raises(error, match=message):
        train(recipe_for("cross_entropy"), data_for("cross_entropy"), 0, mask=mask)


@pytest.mark.parametrize("epochs", [[], [0], [1, 4]])
def test_checkpoints_outside_the_run_are_refused(epochs):
    with pytest.raises(ValueError, match=rf"checkpoint epochs must lie in 1\.\.3, got \{epochs}"):
        train_checkpoints(recipe_for("cross_entropy"), data_for("cross_entropy"), 0, epochs)


@pytest.mark.parametrize("function", ["train_many", "train_loop"])
def test_divergence_names_the_learning_rate(function):
    recipe = recipe_for("squared_error", learning_rate=1e6, epochs=10)
    data = data_for("squared_error")
    with pytest.raises(FloatingPointError, match=r"diverged \(model 0 of 1 .*lower learning_rate=1000000.0 or mom"):
        train_many(recipe, data, ALL, [0]) if function == "train_many" else train_loop(recipe, data, ALL[0], 0)


def test_one_model_that_diverges_is_named():
    recipe, data = recipe_for("squared_error", ()), data_for("squared_error")
    initial = torch.zeros(3, recipe.n_parameters, dtype=FLOAT64)
    initial[1] = 1e308
    with pytest.raises(FloatingPointError, match="model 1 of 3 holds NaN or a weight beyond"):
        train_many(replace(recipe, learning_rate=0.01), data, ALL.repeat(3, 1), [0, 1, 2], initial)


def test_divergence_that_stays_finite_is_noticed():
    """A softmax's gradient is bounded, so its weights grow and never reach infinity."""
    recipe = recipe_for("cross_entropy", learning_rate=1e6)
    with pytest.raises(FloatingPointError, match=r"a weight beyond 10000\): lower learning_rate=1000000.0"):
        train_many(recipe, data_for("cross_entropy"), ALL, [0])


def test_a_loss_that_is_not_finite_is_never_a_result():
    recipe = recipe_for("squared_error")
    theta = torch.ones(2, recipe.n_parameters, dtype=FLOAT64)
    theta[1] *= 1e200
    with pytest.raises(FloatingPointError, match=r"the loss of query 0 under model 1 is inf.*learning_rate=0.1"):
        evaluate(recipe, theta, data_for("squared_error"))
    with pytest.raises(ValueError, match=r"theta must be \(M, 31\) for this recipe, got \(2, 30\)"):
        evaluate(recipe, theta[:, 1:], data_for("squared_error"))
