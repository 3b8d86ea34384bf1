"""Products of what a linear map before the output embedding would learn."""

import copy

import pytest
import torch

from tda_core.adapter_products import AdapterProducts
from tda_core.corpora import documents_of
from tda_core.language import LanguageModel
from tda_core.lm_recipes import LMRecipe
from tda_core.synonym_facts import SynonymWorld, WorldSpec
from tda_core.text_pairs import TextPairs
from tda_core.token_products import TokenProducts

WORLD = SynonymWorld(WorldSpec(4, 3, 2))
TRAIN = documents_of(WORLD.practice(7, 2, seed=0))
QUERIES = TextPairs(*zip(*(WORLD.question(fact, (0, 1, 0)) for fact in WORLD.facts[:3]), strict=True))


@pytest.fixture(scope="module")
def model():
    recipe = LMRecipe(width=16, layers=1, heads=2, length=32, embedding_scale=10.0)
    tokenizer = WORLD.tokenizer(32)
    return LanguageModel(recipe.untrained(len(tokenizer), seed=0), tokenizer)


def adapted_loss(model, examples, adapter, row, reduction):
    """The loss of one example where h + A h goes into the output embedding."""
    hidden = model.model.base_model(input_ids=examples.inputs[row : row + 1], use_cache=False).last_hidden_state
    logits = (hidden + hidden @ adapter.T) @ model.model.get_output_embeddings().weight.T
    return torch.nn.functional.cross_entropy(logits[0], examples.targets[row], ignore_index=-100, reduction=reduction)


def test_the_models_own_products_are_those_of_autograd(model):
    train, queries = model.examples(TRAIN), model.examples(QUERIES)

    def gradients(examples, reduction):
        found = []
        for row in range(len(examples)):
            adapter = torch.zeros(16, 16, requires_grad=True)
            (gradient,) = torch.autograd.grad(adapted_loss(model, examples, adapter, row, reduction), adapter)
            found.append(gradient.flatten())
        return torch.stack(found).double()

    asked, own = gradients(queries, "mean"), gradients(train, "sum")
    found = AdapterProducts(model, train, "model").scores(queries)
    torch.testing.assert_close(found.double(), asked @ own.T, rtol=1e-4, atol=1e-7)
    cosine = torch.nn.functional.normalize(asked, dim=1) @ torch.nn.functional.normalize(own, dim=1).T
    angles = AdapterProducts(model, train, "model", "cosine").scores(queries)
    torch.testing.assert_close(angles.double(), cosine, rtol=1e-4, atol=1e-6)


def test_frequencies_are_a_head_that_knows_nothing_but_them(model):
    """With p_t the shares of tokens, a plain loop over pairs of positions."""
    train, queries = model.examples(TRAIN), model.examples(QUERIES)
    weight = model.model.get_output_embeddings().weight.detach()
    targets = train.targets[train.targets >= 0]
    shares = (torch.bincount(targets, minlength=len(weight)) + 0.5) / (len(targets) + 0.5 * len(weight))
    with torch.no_grad():
        states = [model.model.base_model(input_ids=part.inputs).last_hidden_state for part in (queries, train)]
    expected = torch.zeros(len(queries), len(train))
    for q in range(len(queries)):
        for i in range(len(train)):
            for t in (queries.targets[q] >= 0).nonzero().flatten():
                for u in (train.targets[i] >= 0).nonzero().flatten():
                    moves = (
                        weight[queries.targets[q, t]] - shares @ weight,
                        weight[train.targets[i, u]] - shares @ weight,
                    )
                    expected[q, i] += (moves[0] @ moves[1]) * (states[0][q, t] @ states[1][i, u])
    torch.testing.assert_close(AdapterProducts(model, train).scores(queries), expected, rtol=1e-4, atol=1e-5)


def test_one_step_of_the_map_lowers_the_loss_of_what_it_is_fitted_to(model):
    """The sign: a document is a proponent of itself, and a step along its gradient lowers its loss by the score."""
    train = model.examples(TRAIN)
    scores = AdapterProducts(model, train, "model").scores(train)
    assert (scores.diagonal() > 0).all()
    adapter = torch.zeros(16, 16, requires_grad=True)
    before = adapted_loss(model, train, adapter, 2, "sum")
    (gradient,) = torch.autograd.grad(before, adapter)
    with torch.no_grad():
        start, after = (
            torch.stack([adapted_loss(model, train, moved, row, "mean") for row in range(len(train))])
            for moved in (adapter, -1e-4 * gradient)
        )
    fallen = (start - after) / 1e-4
    torch.testing.assert_close(fallen, scores[:, 2], rtol=0.05, atol=0.05 * float(scores[:, 2].abs().max()))


def test_words_of_like_embeddings_meet(model):
    """Two tokens with one output embedding are one to it; to the output embedding's own gradients they are not."""
    twin = copy.deepcopy(model.model)
    first, second = model.tokenizer.convert_tokens_to_ids(list(WORLD.values[0][0]))
    with torch.no_grad():
        for embedding in (twin.get_input_embeddings(), twin.get_output_embeddings()):
            embedding.weight[second] = embedding.weight[first]
    same = LanguageModel(twin, model.tokenizer)
    pairs = [TextPairs(("a",), (f" {word}",)) for word in WORLD.values[0][0]]
    train = same.examples(TRAIN)
    one, other = (AdapterProducts(same, train).scores(same.examples(pair)) for pair in pairs)
    torch.testing.assert_close(one, other)
    of_head = TokenProducts(same, train, reduction="sum")
    one, other = (of_head.scores(same.examples(pair)) for pair in pairs)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(("name", "value"), [("start", "flat"), ("kind", "damped")])
def test_unknown_names(model, name, value):
    with pytest.raises(ValueError, match=f"unknown {name} '{value}', expected one of"):
        AdapterProducts(model, model.examples(TRAIN), **{name: value})
