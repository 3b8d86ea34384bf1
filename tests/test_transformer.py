"""The small transformer: causal, and its last blocks give what the whole gives."""

import pytest
import torch
from torch.nn import functional as F
from toys import FLOAT64, generator

from tda_core.transformer import Block, LastBlocks, Transformer, hidden_states, train_transformer


def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(vocabulary=7, width=8, blocks=3, heads=2, length=6).to(FLOAT64)


TOKENS = torch.randint(0, 7, (5, 6), generator=generator(1))


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    block, x = Block(8, 2).to(FLOAT64), torch.randn(4, 6, 8, generator=generator(2), dtype=FLOAT64)
    qkv = block.qkv(x)
    q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in qkv.split(8, 2))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block._attend(qkv), expected)


def test_a_position_sees_nothing_that_comes_later():
    whole, changed = model(), TOKENS.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 7
    first, second = whole(TOKENS), whole(changed)
    assert torch.equal(first[:, :4], second[:, :4])
    assert not torch.allclose(first[:, 4:], second[:, 4:])


def test_positions_see_what_they_are_allowed_to():
    torch.manual_seed(0)
    block, x = Block(8, 2).to(FLOAT64), torch.randn(4, 6, 8, generator=generator(2), dtype=FLOAT64)
    torch.testing.assert_close(block(x, allowed=torch.ones(6, 6, dtype=torch.bool).tril()), block(x))
    alone = block(x.flatten(0, 1)[:, None]).view(4, 6, 8)
    torch.testing.assert_close(block(x, allowed=torch.eye(6, dtype=torch.bool)), alone)


def test_the_last_position_alone_is_the_last_of_all():
    torch.manual_seed(0)
    block, x = Block(8, 2).to(FLOAT64), torch.randn(4, 6, 8, generator=generator(2), dtype=FLOAT64)
    torch.testing.assert_close(block(x, last=True), block(x)[:, -1:])


@pytest.mark.parametrize("n_blocks", [1, 2, 3])
def test_the_last_blocks_finish_what_the_first_began(n_blocks):
    whole = model()
    last = LastBlocks(whole, n_blocks)
    torch.testing.assert_close(last(whole.hidden(TOKENS, 3 - n_blocks)), whole(TOKENS)[:, -1])
    assert not last.head.weight.requires_grad and all(p.requires_grad for p in last.blocks.parameters())


def test_training_learns_a_pattern_and_is_the_same_twice():
    tokens = (torch.arange(40)[:, None] + torch.arange(7)) % 7  # the next token is always one higher
    first, second = model().float(), model().float()
    losses = train_transformer(first, tokens, steps=60, batch_size=16, rate=3e-2)
    assert losses[0] > 1.5 and losses[-1] < 0.1
    assert losses == train_transformer(second, tokens, steps=60, batch_size=16, rate=3e-2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert losses != train_transformer(model().float(), tokens, steps=60, batch_size=16, rate=3e-2, seed=1)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        train_transformer(first, tokens, steps=0)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_hidden_states_are_those_of_the_model(batch_size):
    whole = model()
    found = hidden_states(whole, TOKENS, 2, batch_size=batch_size)
    torch.testing.assert_close(found, whole.hidden(TOKENS, 2))
    assert not found.requires_grad


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="got 3 heads and width 8"):
        Block(8, 3)
    for n_blocks in (0, 4):
        with pytest.raises(ValueError, match=f"n_blocks must lie in 1..3, got {n_blocks}"):
            LastBlocks(model(), n_blocks)
