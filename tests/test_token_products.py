"""Products in closed form against autograd's gradients of the output embedding, and against the dense solve."""

import pytest
import torch
from language_toys import language_model, text_pairs
from torch import Tensor
from torch.nn import functional as F

from tda_core import token_gradients
from tda_core.examples import IGNORED
from tda_core.language import LanguageModel
from tda_core.token_gradients import head_of
from tda_core.token_products import KINDS, TokenProducts

TRAIN, QUERIES = text_pairs(9), text_pairs(4, seed=1)


def untied(kind: str, *, bias: bool = False) -> LanguageModel:
    """A model whose output embedding is a parameter of its own."""
    model = language_model(kind)
    n, width = head_of(model)[0].shape
    torch.manual_seed(3)
    head = torch.nn.Linear(width, n, bias=bias)
    model.model.set_output_embeddings(head)
    if bias:
        torch.nn.init.normal_(head.bias)
    return LanguageModel(model.model, model.tokenizer)


def by_autograd(model: LanguageModel, pairs, reduction: str) -> Tensor:
    """Each document's gradient in the output embedding, (n, V d) float64."""
    examples, weight, rows = model.examples(pairs), model.model.get_output_embeddings().weight, []
    for tokens, labels in zip(examples.inputs, examples.targets, strict=True):
        logits = model.model(input_ids=tokens[None]).logits[0]
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction=reduction)
        rows.append(torch.autograd.grad(loss, weight)[0].flatten())
    return torch.stack(rows).double()


def expected(goals: Tensor, own: Tensor, damping: float) -> dict[str, Tensor]:
    n = len(own)
    fisher = own.T @ own / n
    damped = fisher + damping * own.square().sum(1).mean() / n * torch.eye(own.shape[1], dtype=own.dtype)
    return {
        "dot": goals @ own.T,
        "cosine": F.normalize(goals, dim=1) @ F.normalize(own, dim=1).T,
        "adam_dot": goals @ (own / (own.square().mean(0).sqrt() + 1e-8)).T,
        "damped": goals @ torch.linalg.solve(damped, own.T),
    }


def close(found: Tensor, true: Tensor) -> None:
    assert float((found.double() - true).norm()) < 1e-4 * float(true.norm())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("kind", "bias"), [("llama", False), ("gpt2", False), ("neox", True)])
def test_products_are_those_of_autograd(kind, bias, reduction):
    model = untied(kind, bias=bias)
    found = TokenProducts(model, model.examples(TRAIN), reduction, 0.3).all_scores(model.examples(QUERIES))
    true = expected(by_autograd(model, QUERIES, reduction), by_autograd(model, TRAIN, reduction), 0.3)
    assert set(found) == set(KINDS)
    for name, values in found.items():
        assert values.dtype == torch.float32
        close(values, true[name])


@pytest.mark.parametrize("held", [1, 9 * 16 * 7])
def test_slices_of_the_vocabulary_add_up(monkeypatch, held):
    model = language_model()
    whole = TokenProducts(model, model.examples(TRAIN)).all_scores(model.examples(QUERIES))
    monkeypatch.setattr(token_gradients, "HELD", held)
    monkeypatch.setattr(token_gradients, "PROBABILITIES", 50)
    products = TokenProducts(model, model.examples(TRAIN))
    assert len(list(products._slices())) in (6, 40)
    for kind, values in products.all_scores(model.examples(QUERIES)).items():
        close(values, whole[kind].double())


def test_a_document_is_its_own_best_proponent():
    model = language_model()
    examples = model.examples(TRAIN)
    products = TokenProducts(model, examples)
    cosines = products.scores(examples, "cosine")
    torch.testing.assert_close(cosines.diagonal(), torch.ones(9))
    assert float(cosines.max()) < 1 + 1e-5
    torch.testing.assert_close(products.scores(examples).double(), products.kernel, rtol=1e-5, atol=1e-7)


def test_saved_and_read_again(tmp_path):
    model = language_model()
    examples, queries = model.examples(TRAIN), model.examples(QUERIES)
    products = TokenProducts(model, examples, "sum", 0.7)
    products.save(tmp_path / "products")
    again = TokenProducts.load(tmp_path / "products", model, examples)
    assert "kernel" in again.__dict__
    assert torch.equal(again.scores(queries, "damped"), products.scores(queries, "damped"))
    with pytest.raises(ValueError, match=r"was made for data .* but this data is"):
        TokenProducts.load(tmp_path / "products", model, queries)
    with pytest.raises(ValueError, match=r"was made for model .* but this model is"):
        TokenProducts.load(tmp_path / "products", language_model(seed=1), examples)


def test_bad_input_is_refused():
    model = language_model()
    examples = model.examples(TRAIN)
    with pytest.raises(ValueError, match="unknown reduction 'max'"):
        TokenProducts(model, examples, "max")
    with pytest.raises(ValueError, match="damping must be finite and > 0, got 0"):
        TokenProducts(model, examples, damping=0)
    with pytest.raises(ValueError, match=r"kinds must be some of .* got \('less',\)"):
        TokenProducts(model, examples).scores(examples, "less")
