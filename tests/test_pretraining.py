"""Training of many language models at once against transformers' own loop."""

from dataclasses import replace

import pytest
import torch

from tda_core.examples import IGNORED, Examples
from tda_core.lm_ensemble import Ensemble
from tda_core.lm_recipes import LMRecipe
from tda_core.pretraining import (
    LMTraining,
    _clip_each,
    evaluate,
    pretrain_loop,
    pretrain_many,
    pretrain_steps,
    visits,
)
from tda_core.subsets import random_subsets

N, T, N_TOKENS = 20, 10, 30
RECIPE = LMRecipe(
    width=16, layers=2, heads=2, length=T, steps=12, batch_size=4, tied=False, quiet=True, embedding_scale=10
)


def documents(n=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(1, N_TOKENS, (n, T), generator=generator)  # no <pad>, whose embedding Llama never trains
    targets = inputs.roll(-1, 1)
    targets[:, -1] = 0
    targets[0, 6:] = IGNORED
    return Examples(inputs, targets)


@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, architecture="gpt2", tied=True, quiet=False)])
def test_many_models_become_what_transformers_loop_makes_of_each(recipe):
    training, data = LMTraining(recipe, N_TOKENS), documents()
    masks = random_subsets(N, 3, 0.5, seed=0)
    ensemble = pretrain_many(training, data, masks, [0, 1, 5])
    for i, seed in enumerate([0, 1, 5]):
        model = pretrain_loop(training, data, masks[i], seed)
        for name, value in model.named_parameters():
            torch.testing.assert_close(ensemble.weights[name][i], value.detach(), rtol=1e-3, atol=1e-4)


def test_what_a_model_becomes_does_not_depend_on_those_beside_it():
    training, data, masks = LMTraining(RECIPE, N_TOKENS), documents(), random_subsets(N, 4, 0.5, seed=0)
    together = pretrain_many(training, data, masks, [0, 0, 1, 1])
    alone = pretrain_many(training, data, masks[2:3], [1])
    for name, value in together.weights.items():
        assert torch.equal(value[2], alone.weights[name][0])


def test_each_models_gradient_is_cut_to_its_own_norm():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 4, 5, requires_grad=True)]
    for value in weights:  # the first model's is long, the second's is short
        value.grad = torch.randn(value.shape, generator=generator) * torch.tensor([9, 1e-3]).view(
            2, *(1,) * (value.ndim - 1)
        )
    expected = []
    for i in range(2):
        alone = [value.detach()[i].clone().requires_grad_(True) for value in weights]
        for one, value in zip(alone, weights, strict=True):
            one.grad = value.grad[i].clone()
        torch.nn.utils.clip_grad_norm_(alone, 1.0)
        expected.append([one.grad for one in alone])
    _clip_each(weights)
    for i, value in enumerate(zip(*expected, strict=True)):
        torch.testing.assert_close(weights[i].grad, torch.stack(value))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_embeddings_have_a_rate_and_vectors_no_decay(architecture):
    recipe = replace(RECIPE, architecture=architecture, tied=False, embedding_rate=5.0, weight_decay=0.2, steps=40)
    named = dict(recipe.untrained(N_TOKENS, seed=0).named_parameters())
    optimiser = torch.optim.AdamW(recipe.groups(named.items()), lr=recipe.learning_rate)
    recipe.set_rates(optimiser, 2)  # the first twentieth is over: the highest rate
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimiser.param_groups for p in g["params"]}
    assert len(found) == len(named)
    for name, value in named.items():
        ends = any(part in name for part in ("embed_tokens", "wte", "wpe", "lm_head"))
        expected = (recipe.learning_rate * (5 if ends else 1), 0.2 if value.ndim > 1 else 0.0)
        assert found[id(value)] == pytest.approx(expected), name


def test_training_lowers_the_loss_of_its_documents_and_not_of_others():
    training = LMTraining(replace(RECIPE, steps=80, learning_rate=1e-2), N_TOKENS)
    data, mask = documents(), random_subsets(N, 1, 0.5, seed=0)
    before = evaluate(Ensemble.of(training.recipe, [training.start(0)]), data)[0]
    after = evaluate(pretrain_many(training, data, mask, [0]), data)[0]
    assert float((before - after)[mask[0]].min()) > 0.5 and float(after[~mask[0]].mean()) > float(after[mask[0]].max())


def test_a_training_can_begin_from_a_model_which_stays_as_it_is():
    data, masks = documents(), torch.ones(1, N, dtype=torch.bool)
    first = pretrain_loop(LMTraining(RECIPE, N_TOKENS), data, masks[0], 0)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    tuned = pretrain_many(LMTraining(replace(RECIPE, steps=1, learning_rate=1e-9), N_TOKENS, first), data, masks, [3])
    for name, value in first.state_dict().items():
        assert torch.equal(value, before[name])
        torch.testing.assert_close(tuned.weights[name][0], value, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="does not have the recipe's shape"):
        LMTraining(RECIPE, N_TOKENS + 1, first).start(0)
    with pytest.raises(ValueError, match="num_attention_heads = 2, but the recipe's models 4"):
        LMTraining(replace(RECIPE, heads=4), N_TOKENS, first).start(0)


def test_steps_come_one_by_one():
    training, data, masks = LMTraining(RECIPE, N_TOKENS), documents(), random_subsets(N, 2, 0.5, seed=0)
    seen = {step: evaluate(ensemble, data) for step, ensemble in pretrain_steps(training, data, masks, [0, 1])}
    assert list(seen) == list(range(1, 13))
    assert torch.equal(seen[12], evaluate(pretrain_many(training, data, masks, [0, 1]), data))
    assert not torch.equal(seen[6], seen[12])


def test_losses_are_those_of_the_language_model():
    training, data = LMTraining(RECIPE, N_TOKENS), documents()
    model = training.start(0)
    logits = model(input_ids=data.inputs, use_cache=False).logits
    each = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), data.targets, ignore_index=IGNORED, reduction="none"
    )
    expected = each.sum(1) / (data.targets != IGNORED).sum(1)
    ensemble = Ensemble.of(RECIPE, [model, model])
    torch.testing.assert_close(evaluate(ensemble, data)[1], expected.detach(), rtol=1e-5, atol=1e-6)
    own = evaluate(ensemble, [data[:5], data[5:10]])
    torch.testing.assert_close(own.flatten(), expected.detach()[:10], rtol=1e-5, atol=1e-6)


def test_visits_are_whole_epochs_of_the_subset_in_an_order_that_subsets_share():
    mask = random_subsets(N, 1, 0.5, seed=0)[0]
    order = visits(replace(RECIPE, steps=5, batch_size=4), mask, 0)
    assert order.shape == (5, 4)
    epochs = order.flatten().view(2, 10)
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, mask.nonzero()[:, 0])
    assert not torch.equal(epochs[0], epochs[1])
    whole = visits(replace(RECIPE, steps=5, batch_size=4), torch.ones(N, dtype=torch.bool), 0).flatten()
    assert torch.equal(whole[mask[whole]], epochs[0])


def test_steps_for_epochs_visit_every_document_so_often():
    assert RECIPE.for_epochs(3, 10).steps == 8 and RECIPE.for_epochs(1, 1).steps == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": torch.zeros(1, N, dtype=torch.bool)}, "subset 0 is empty"),
        ({"masks": torch.ones(1, N)}, r"must be boolean \(1 seeds, 20 documents\)"),
        ({"masks": torch.ones(2, N, dtype=torch.bool)}, r"got torch.bool \(2, 20\)"),
        ({"seeds": [-1]}, "whole numbers in 0..2\\^32-1, got -1"),
        ({"training": LMTraining(RECIPE, 10)}, "out of range for 10 tokens: is it another tokenizer's"),
        (
            {"training": LMTraining(replace(RECIPE, length=8), N_TOKENS)},
            "up to 10 tokens, but the recipe's window",
        ),
        ({"examples": Examples(torch.zeros(N, 3), torch.zeros(N, dtype=torch.int64))}, "sequences with a label"),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {"training": LMTraining(RECIPE, N_TOKENS), "examples": documents(), "seeds": [0]}
    good["masks"] = torch.ones(1, N, dtype=torch.bool)
    with pytest.raises(ValueError, match=message):
        pretrain_many(**(good | change))


def test_subsets_of_different_sizes_are_refused():
    masks = torch.ones(2, N, dtype=torch.bool)
    masks[0, 0] = False
    with pytest.raises(ValueError, match="equally large, got sizes 19 to 20"):
        pretrain_many(LMTraining(RECIPE, N_TOKENS), documents(), masks, [0, 1])


def test_divergence_is_an_error():
    training = LMTraining(replace(RECIPE, learning_rate=1e30), N_TOKENS)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        pretrain_many(training, documents(), torch.ones(1, N, dtype=torch.bool), [0])
