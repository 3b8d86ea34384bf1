"""Many language models of one recipe at once: the forward pass of transformers' Llama and GPT-2 on stacked weights.

Weights (M, ...), states (M, N, d) for N = B T positions: a layer of all models is one batched product, and what Python
and torch spend on each call is spent once for M models. Checked against transformers' own models in the tests.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from tda_core.examples import IGNORED
from tda_core.lm_recipes import LMRecipe

# Logits that are computed at a time (1 MB): they stay in the cache between softmax and products.
HELD_LOGITS = 2**18


class Ensemble:
    """M models of one recipe. weights: by the names of transformers' state dict, each (M, *shape), contiguous."""

    def __init__(self, recipe: LMRecipe, weights: Mapping[str, Tensor]) -> None:
        self.recipe = recipe
        # views into one stacked tensor have gaps, around which batched products copy, and optimisers go astray
        self.weights = {name: value.detach().clone().contiguous() for name, value in weights.items()}
        self.body = _llama if recipe.architecture == "llama" else _gpt2
        embedding = "model.embed_tokens.weight" if recipe.architecture == "llama" else "transformer.wte.weight"
        self.head_name = embedding if recipe.tied else "lm_head.weight"

    @classmethod
    def of(cls, recipe: LMRecipe, models: Sequence[PreTrainedModel]) -> "Ensemble":
        """An ensemble with the weights of models of this recipe. ValueError for models of other shapes."""
        states = [dict(model.named_parameters()) for model in models]
        for state in states[1:]:
            if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in states[0].items()}:
                raise ValueError("models of an ensemble must have parameters of the same names and shapes")
        return cls(recipe, {name: torch.stack([state[name].detach() for state in states]) for name in states[0]})

    def __len__(self) -> int:
        return len(self.weights[self.head_name])

    def copy_to(self, i: int, model: PreTrainedModel) -> PreTrainedModel:
        """Put the weights of model i into a transformers model of this recipe."""
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(self.weights[name][i])
        return model.eval()

    def states(self, tokens: Tensor) -> Tensor:
        """What the output embedding takes: tokens (M, B, T), or (B, T) for all models, -> (M, B T, d)."""
        if tokens.ndim == 2:
            tokens = tokens.expand(len(self), *tokens.shape)
        return self.body(self.recipe, self.weights, tokens)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Each model's mean cross-entropy over its labelled positions, differentiable: (M,).

        targets: as tokens, (M, B, T), the token that follows or `IGNORED`.
        """
        return _HeadLoss.apply(self.states(tokens), self.weights[self.head_name], targets.flatten(1))

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Loss of each position in nats, 0 where there is no label, without gradient: (M, B, T)."""
        with torch.no_grad():
            states, head = self.states(tokens), self.weights[self.head_name]
            flat = targets.expand(len(self), *targets.shape[-2:]).flatten(1)
            found = torch.zeros(flat.shape, dtype=states.dtype)
            for i, rows in _pieces(states, head.shape[1]):
                logits = states[i, rows] @ head[i].T
                found[i, rows] = F.cross_entropy(logits, flat[i, rows], ignore_index=IGNORED, reduction="none")
        return found.view(len(self), *targets.shape[-2:])


def _pieces(states: Tensor, n_tokens: int):
    """Models and runs of positions whose logits are held at a time."""
    size = max(1, HELD_LOGITS // n_tokens)
    for i in range(len(states)):
        for start in range(0, states.shape[1], size):
            yield i, slice(start, start + size)


class _HeadLoss(torch.autograd.Function):
    """Output embedding and cross-entropy in one, piece by piece: logits are never whole, nor read twice from memory."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        labelled = (targets != IGNORED).to(states.dtype)
        shares = labelled / labelled.sum(1, keepdim=True)
        index = targets.clamp_min(0)
        picked = _embed(head, index)
        total = -(shares * (states * picked).sum(2)).sum(1)
        to_states = torch.empty_like(states)
        across = head.transpose(1, 2).contiguous()  # both products are faster this way round
        to_across = torch.zeros_like(across)
        for i, rows in _pieces(states, head.shape[1]):
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


def _embed(table: Tensor, tokens: Tensor) -> Tensor:
    """Rows of each model's own table: (M, V, d), (M, B, T) -> (M, B T, d)."""
    m, v, d = table.shape
    shifted = tokens.flatten(1) + torch.arange(m)[:, None] * v
    return F.embedding(shifted, table.view(m * v, d))


def _attend(qkv: Tensor, shape: torch.Size, heads: int, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """Causal self-attention: qkv (M, B T, 3 d) of batches `shape` (M, B, T) -> (M, B T, d)."""
    m, b, t = shape
    q, k, v = qkv.view(m * b, t, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if rotation is not None:
        cosine, sine = rotation
        q, k = (cosine * x + sine * _turned(x) for x in (q, k))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(1, 2).reshape(m, b * t, -1)


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def _rotation(t: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (t, width), theta = 10,000, as transformers' Llama has them."""
    frequencies = 1 / 10_000 ** (torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(t).float(), frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _llama(recipe: LMRecipe, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    rotation = _rotation(tokens.shape[2], recipe.width // recipe.heads, weights["model.norm.weight"].dtype)

    def normed(h: Tensor, name: str) -> Tensor:
        return F.rms_norm(h, h.shape[-1:], eps=1e-6) * weights[name][:, None]

    def joined(h: Tensor, *names: str) -> Tensor:
        return torch.bmm(h, torch.cat([weights[name] for name in names], 1).transpose(1, 2))

    h = _embed(weights["model.embed_tokens.weight"], tokens)
    for i in range(recipe.layers):
        at = f"model.layers.{i}."
        qkv = joined(normed(h, f"{at}input_layernorm.weight"), *(f"{at}self_attn.{part}_proj.weight" for part in "qkv"))
        mixed = _attend(qkv, tokens.shape, recipe.heads, rotation)
        h = h + torch.bmm(mixed, weights[f"{at}self_attn.o_proj.weight"].transpose(1, 2))
        x = normed(h, f"{at}post_attention_layernorm.weight")
        gate, up = joined(x, f"{at}mlp.gate_proj.weight", f"{at}mlp.up_proj.weight").chunk(2, -1)
        h = h + torch.bmm(F.silu(gate) * up, weights[f"{at}mlp.down_proj.weight"].transpose(1, 2))
    return normed(h, "model.norm.weight")


def _gpt2(recipe: LMRecipe, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    m, b, t = tokens.shape

    def normed(h: Tensor, name: str) -> Tensor:
        plain = F.layer_norm(h, h.shape[-1:], eps=1e-5)
        return plain * weights[f"{name}.weight"][:, None] + weights[f"{name}.bias"][:, None]

    def linear(h: Tensor, name: str) -> Tensor:  # GPT-2 keeps its weights transposed
        return torch.baddbmm(weights[f"{name}.bias"][:, None], h, weights[f"{name}.weight"])

    places = weights["transformer.wpe.weight"][:, None, :t].expand(m, b, t, recipe.width).reshape(m, b * t, -1)
    h = _embed(weights["transformer.wte.weight"], tokens) + places
    for i in range(recipe.layers):
        at = f"transformer.h.{i}."
        mixed = _attend(linear(normed(h, f"{at}ln_1"), f"{at}attn.c_attn"), tokens.shape, recipe.heads, None)
        h = h + linear(mixed, f"{at}attn.c_proj")
        h = h + linear(F.gelu(linear(normed(h, f"{at}ln_2"), f"{at}mlp.c_fc"), approximate="tanh"), f"{at}mlp.c_proj")
    return normed(h, "transformer.ln_f")
