"""A small causal transformer in plain linear layers, and its last blocks as a module of their own.

Pre-norm without norm parameters, so that all trained parameters of a block lie in four `nn.Linear` layers. Attention
is written out: forward-mode derivatives do not go through the fused kernels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each added to its input: (n, T, d) -> (n, T, d).

    With `last` only the last position is computed, which sees all others: (n, T, d) -> (n, 1, d). allowed: (T, T)
    bool, which positions (columns) each position sees, instead of itself and all before it.
    Raises ValueError where heads do not divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide the width, got {heads} heads and width {width}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, *, last: bool = False, allowed: Tensor | None = None) -> Tensor:
        mixed = self.mix(self._attend(self.qkv(_normalised(x)), last, allowed))
        x = (x[:, -1:] if last else x) + mixed
        return x + self.down(F.gelu(self.up(_normalised(x))))

    def _attend(self, qkv: Tensor, last: bool = False, allowed: Tensor | None = None) -> Tensor:
        n, length, _ = qkv.shape
        q, k, v = qkv.view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (n, heads, T, d / heads) each
        if allowed is None:
            allowed = torch.ones(length, length, dtype=torch.bool, device=qkv.device).tril()
        if last:
            q, allowed = q[:, :, -1:], allowed[-1:]
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


class Transformer(nn.Module):
    """A causal language model: tokens (n, T) int64 -> logits of the next token at every position (n, T, V)."""

    def __init__(self, vocabulary: int, width: int, blocks: int, heads: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(length, width) / width**0.5)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def hidden(self, tokens: Tensor, blocks: int) -> Tensor:
        """What the first `blocks` blocks make of the tokens: (n, T) -> (n, T, d)."""
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks[:blocks]:
            x = block(x)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(_normalised(self.hidden(tokens, len(self.blocks))))


class LastBlocks(nn.Module):
    """A transformer's last blocks and frozen head: hidden states (n, T, d) -> the last position's logits (n, V).

    Attribution to these blocks alone takes the hidden states that flow into them as inputs, computed once.
    Raises ValueError for a number of blocks that the model does not have.
    """

    def __init__(self, model: Transformer, n_blocks: int) -> None:
        super().__init__()
        if not 1 <= n_blocks <= len(model.blocks):
            raise ValueError(f"n_blocks must lie in 1..{len(model.blocks)}, got {n_blocks}")
        self.blocks = model.blocks[len(model.blocks) - n_blocks :]
        self.head = model.head.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks[:-1]:
            hidden = block(hidden)
        return self.head(_normalised(self.blocks[-1](hidden, last=True)[:, 0]))


def train_transformer(
    model: Transformer, tokens: Tensor, *, steps: int, batch_size: int = 32, rate: float = 1e-3, seed: int = 0
) -> list[float]:
    """Train in place to predict every next token of random windows (n, T + 1) by AdamW; the loss (nats) of each step.

    The rate rises over the first tenth of the steps and falls to zero linearly. Raises ValueError for steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), rate)
    rise = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    losses = []
    for _ in tqdm(range(steps), desc="training the transformer", leave=False):
        batch = tokens[torch.randint(0, len(tokens), (batch_size,), generator=generator)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def hidden_states(model: Transformer, tokens: Tensor, blocks: int, *, batch_size: int = 100) -> Tensor:
    """What flows into the block after the first `blocks`, with no gradient kept: (n, T) -> (n, T, d)."""
    parts = tqdm(tokens.split(batch_size), desc="hidden states", leave=False)
    with torch.no_grad():
        return torch.cat([model.hidden(part, blocks) for part in parts])


def _normalised(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])
