"""Steps of stacked language models in one, with gradients by hand: what autograd would write out and read again.

Products of matrices are half of a training step on a CPU; the rest is memory, which these read and write less often.
States (M, N, d) for M models and N positions. The tests compare each with what torch computes step by step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tda_core.examples import IGNORED
from tda_core.memory import cached_logits


def embed(table: Tensor, tokens: Tensor) -> Tensor:
    """Rows of each model's own table: (M, V, d), (M, B, T) -> (M, B T, d)."""
    m, v, d = table.shape
    shifted = tokens.flatten(1) + torch.arange(m, device=table.device)[:, None] * v
    return F.embedding(shifted, table.view(m * v, d))


def pieces(states: Tensor, n_tokens: int):
    """Models and runs of positions whose logits are held at a time."""
    size = max(1, cached_logits(states.device) // n_tokens)
    for i in range(len(states)):
        for start in range(0, states.shape[1], size):
            yield i, slice(start, start + size)


class HeadLoss(torch.autograd.Function):
    """Output embedding and cross-entropy in one, piece by piece: logits are never whole, nor read twice from memory."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        labelled = (targets != IGNORED).to(states.dtype)
        shares = labelled / labelled.sum(1, keepdim=True)
        index = targets.clamp_min(0)
        picked = embed(head, index)
        total = -(shares * (states * picked).sum(2)).sum(1)
        to_states = torch.empty_like(states)
        across = head.transpose(1, 2).contiguous()  # both products are faster this way round
        to_across = torch.zeros_like(across)
        for i, rows in pieces(states, head.shape[1]):
            h, share = states[i, rows], shares[i, rows, None]
            logits = h @ across[i]
            top = logits.amax(1, keepdim=True)
            powers = logits.sub_(top).exp_()  # the one pass of exponentials
            norm = powers.sum(1, keepdim=True)
            total[i] += (share * (norm.log() + top)).sum()
            # p - y in two parts: p = powers / norm, whose scale moves to the narrow factors, and the one-hot y below
            torch.mm(powers, head[i], out=to_states[i, rows]).mul_(share / norm)
            to_across[i].addmm_((h * (share / norm)).T, powers)
        to_states -= shares[..., None] * picked
        to_head = to_across.transpose(1, 2).contiguous()
        for i, rows in enumerate(index):
            to_head[i].index_add_(0, rows, shares[i, :, None] * states[i], alpha=-1)
        ctx.save_for_backward(to_states, to_head)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        to_states, to_head = ctx.saved_tensors
        return to_states * upstream[:, None, None], to_head * upstream[:, None, None], None


class RMSNorm(torch.autograd.Function):
    """h / sqrt(mean h^2 + eps) times each model's weight: states (M, N, d), weight (M, d) -> (M, N, d)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_().div_(states.shape[-1])
        scale.add_(eps).rsqrt_()
        normed = states * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight[:, None]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        along = upstream * normed
        to_weight = along.sum(1)
        # sums, not products of matrices: what a model becomes must not depend on how many are beside it
        radial = along.mul_(weight[:, None]).mean(2, keepdim=True)
        to_states = (upstream * weight[:, None]).addcmul_(normed, radial, value=-1).mul_(scale)
        return to_states, to_weight, None


class Rotated(torch.autograd.Function):
    """Rotary positions of queries and keys: (B, T, 3, heads, width) of q, k and v, which stays -> the same shape.

    cosine, sine: (T, width / 2), of which the second half of each head is turned like the first.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turned(qkv, cosine, sine)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turned(upstream, cosine, -sine), None, None  # a rotation's transpose turns back


def _turned(qkv: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    found = qkv.new_empty(qkv.shape)  # contiguous, whatever the strides of the argument
    cosine, sine = cosine[:, None, None], sine[:, None, None]
    first, second = qkv[:, :, :2].chunk(2, -1)
    to_first, to_second = found[:, :, :2].chunk(2, -1)
    torch.mul(first, cosine, out=to_first).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=to_second).addcmul_(first, sine)
    found[:, :, 2] = qkv[:, :, 2]
    return found
