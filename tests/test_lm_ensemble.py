"""Stacked language models against transformers' own, in values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from tda_core.examples import IGNORED
from tda_core.lm_ensemble import Ensemble
from tda_core.lm_fused import HeadLoss, RMSNorm, Rotated
from tda_core.lm_recipes import LMRecipe
from tda_core.memory import CACHED_LOGITS

N_TOKENS = 40
TINY = {"width": 16, "layers": 2, "heads": 2, "length": 12}


def models(architecture="llama", tied=True, n=3):
    recipe = LMRecipe(architecture, **TINY, tied=tied, embedding_scale=5)
    made = [recipe.untrained(N_TOKENS, seed=seed) for seed in range(n)]
    generator = torch.Generator().manual_seed(0)
    for model in made:
        for value in model.parameters():  # norms and biases too, which all start alike
            value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return recipe, made


def batch(n=3, b=4, t=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, N_TOKENS, (n, b, t), generator=generator)  # no <pad>, whose embedding Llama never trains
    targets = torch.randint(0, N_TOKENS, (n, b, t), generator=generator)
    targets[:, 0, 7:] = IGNORED
    targets[1, 2, :3] = IGNORED
    return tokens, targets


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_losses_and_gradients_are_those_of_transformers(architecture, tied, monkeypatch):
    monkeypatch.setitem(CACHED_LOGITS, "cpu", 7 * N_TOKENS)  # several pieces, the last one shorter
    recipe, made = models(architecture, tied)
    ensemble = Ensemble.of(recipe, made)
    for value in ensemble.weights.values():
        value.requires_grad_(True)
    tokens, targets = batch()
    losses = ensemble.loss(tokens, targets)
    (losses * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    for i, model in enumerate(made):
        logits = model(input_ids=tokens[i], use_cache=False).logits.flatten(0, 1)
        expected = F.cross_entropy(logits, targets[i].flatten(), ignore_index=IGNORED)
        assert float(losses[i].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        ((i + 1) * expected).backward()
        for name, value in model.named_parameters():
            torch.testing.assert_close(ensemble.weights[name].grad[i], value.grad, rtol=1e-3, atol=3e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_token_losses_are_those_of_transformers_and_zero_without_a_label(architecture):
    recipe, made = models(architecture, tied=False)
    tokens, targets = batch()
    found = Ensemble.of(recipe, made).token_losses(tokens, targets)
    assert found.shape == targets.shape and bool((found[targets == IGNORED] == 0).all())
    for i, model in enumerate(made):
        logits = model(input_ids=tokens[i], use_cache=False).logits.flatten(0, 1)
        expected = F.cross_entropy(logits, targets[i].flatten(), ignore_index=IGNORED, reduction="none")
        torch.testing.assert_close(found[i].flatten(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", ["head", "norm", "rotation"])
def test_steps_in_one_have_the_gradients_of_their_values(step):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(True)

    if step == "head":
        targets = torch.tensor([[1, 4, IGNORED, 0], [2, 2, 3, IGNORED]])
        assert torch.autograd.gradcheck(lambda h, w: HeadLoss.apply(h, w, targets), (normal(2, 4, 3), normal(2, 5, 3)))
    elif step == "norm":
        states, weight = normal(2, 4, 6), normal(2, 6)
        assert torch.autograd.gradcheck(lambda h, w: RMSNorm.apply(h, w, 1e-6), (states, weight))
        expected = F.rms_norm(states, (6,), eps=1e-6) * weight[:, None]
        torch.testing.assert_close(RMSNorm.apply(states, weight, 1e-6), expected, rtol=1e-10, atol=1e-12)
    else:
        qkv, angle = normal(2, 3, 3, 2, 4), normal(3, 2).detach()
        turned = Rotated.apply(qkv, angle.cos(), angle.sin())
        assert torch.autograd.gradcheck(lambda x: Rotated.apply(x, angle.cos(), angle.sin()), (qkv,))
        torch.testing.assert_close(turned.norm(dim=-1), qkv.norm(dim=-1))
        assert torch.equal(turned[:, :, 2], qkv[:, :, 2]), "values stay"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_everything_is_made_on_the_device_of_the_weights(architecture):
    recipe, made = models(architecture)
    ensemble = Ensemble.of(recipe, made, "meta")  # a device that computes nothing, and refuses tensors of another
    assert ensemble.device.type == "meta"
    for value in ensemble.weights.values():
        value.requires_grad_(True)
    tokens, targets = (x.to("meta") for x in batch())
    ensemble.loss(tokens, targets).sum().backward()
    assert all(value.grad.device.type == "meta" for value in ensemble.weights.values())
    assert ensemble.token_losses(tokens, targets).device.type == "meta"


def test_batches_shared_by_all_models_are_those_given_to_each():
    recipe, made = models()
    ensemble = Ensemble.of(recipe, made)
    tokens, targets = batch()
    shared = ensemble.token_losses(tokens[0], targets[0])
    each = ensemble.token_losses(tokens[:1].expand(3, -1, -1), targets[:1].expand(3, -1, -1))
    assert torch.equal(shared, each)


def test_weights_go_back_into_a_transformers_model_bit_for_bit():
    recipe, made = models("gpt2", tied=False)
    ensemble = Ensemble.of(recipe, made)
    assert len(ensemble) == 3 and all(value.is_contiguous() for value in ensemble.weights.values())
    restored = ensemble.copy_to(2, recipe.untrained(N_TOKENS, seed=9))
    for name, value in restored.named_parameters():
        assert torch.equal(value, made[2].get_parameter(name))


def test_an_ensemble_leaves_the_models_it_was_made_of_alone():
    recipe, made = models()
    before = made[0].get_input_embeddings().weight.detach().clone()
    ensemble = Ensemble.of(recipe, made)
    for value in ensemble.weights.values():
        value.zero_()
    assert torch.equal(made[0].get_input_embeddings().weight, before)


def test_models_of_different_shapes_are_refused():
    recipe, made = models()
    with pytest.raises(ValueError, match="same names and shapes"):
        Ensemble.of(recipe, [made[0], recipe.untrained(N_TOKENS + 1, seed=0)])
