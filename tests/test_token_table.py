"""Tables of a language model's frozen states against its own forward pass."""

import pytest
import torch
from language_toys import NEAR_SIGHTED, language_model
from torch.nn import functional as F

from tda_core.examples import IGNORED
from tda_core.text_pairs import TextPairs
from tda_core.token_table import logits_of, token_table

PAIRS = TextPairs(("w2 w3", "", "w4"), ("w5 w6 w7", "w8 w9 w10 w11", "w12"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_rows_are_what_the_model_has_at_its_labelled_positions(kind):
    model = language_model(kind)
    examples = model.examples(PAIRS)
    table = token_table(model, examples, layer=1, n_context=3)
    assert len(table) == 3 + 4 + 1 and table.lengths.tolist() == [3, 4, 1] and table.n_documents == 3
    losses = F.cross_entropy(logits_of(model, table.last), table.targets, reduction="none")
    torch.testing.assert_close(table.sums(losses), model.token_losses(examples).sum(1), rtol=1e-5, atol=1e-5)
    row = 0
    for i in range(3):  # one document at a time, without padding
        n = int((examples.targets[i] != IGNORED).nonzero().max()) + 1
        with torch.no_grad():
            states = model.model(input_ids=examples.inputs[i : i + 1, :n], output_hidden_states=True).hidden_states[1]
        for t in (examples.targets[i] != IGNORED).nonzero()[:, 0].tolist():
            torch.testing.assert_close(table.hidden[row], states[0, t], rtol=1e-4, atol=1e-5)
            before = [int(examples.inputs[i, t - k]) if t >= k else -1 for k in range(3)]
            assert table.context[row].tolist() == before and int(table.documents[row]) == i
            assert int(table.targets[row]) == int(examples.targets[i, t])
            row += 1


def test_layers_by_number_by_share_and_by_default():
    model = language_model("llama")
    examples = model.examples(PAIRS)
    by_share, by_number, default = (token_table(model, examples, layer=layer) for layer in (0.6, 1, None))
    assert torch.equal(by_share.hidden, by_number.hidden) and torch.equal(default.hidden, default.last)
    embedded = token_table(model, examples, layer=0)
    expected = model.model.get_input_embeddings().weight[embedded.context[:, 0]]
    torch.testing.assert_close(embedded.hidden, expected.detach())


def test_some_documents_are_a_table_of_their_own():
    model = language_model("llama")
    table = token_table(model, model.examples(PAIRS))
    some = table.of(torch.tensor([2, 0]))
    alone = token_table(model, model.examples(PAIRS[[2, 0]]))
    assert some.documents.tolist() == alone.documents.tolist() == [0, 1, 1, 1]
    assert torch.equal(some.targets, alone.targets) and torch.equal(some.context, alone.context)
    torch.testing.assert_close(some.last, alone.last, rtol=1e-4, atol=1e-5)
    assert table.starts.tolist() == [0, 3, 7, 8]


def test_bad_input_is_refused():
    model = language_model("llama")
    examples = model.examples(PAIRS)
    for layer in (3, -1, 1.7):
        with pytest.raises(ValueError, match=f"layer must lie in 0..2, or be a share of the depth, got {layer}"):
            token_table(model, examples, layer=layer)
    assert "gemma2" in NEAR_SIGHTED  # which squashes its logits
    with pytest.raises(ValueError, match="does more to its last states than embed them"):
        token_table(language_model("gemma2"), examples)
