"""Many language models of one recipe at once: the forward pass of transformers' Llama and GPT-2 on stacked weights.

Weights (M, ...), states (M, N, d) for N = B T positions: a layer of all models is one batched product, and what Python
and torch spend on each call is spent once for M models. Checked against transformers' own models in the tests.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from tda_core.examples import IGNORED
from tda_core.lm_fused import HeadLoss, RMSNorm, Rotated, embed, pieces
from tda_core.lm_recipes import LMRecipe


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
    def of(cls, recipe: LMRecipe, models: Sequence[PreTrainedModel], device: torch.device | str = "cpu") -> "Ensemble":
        """The weights of models of this recipe on a device. ValueError for models of other shapes."""
        states = [dict(model.named_parameters()) for model in models]
        for state in states[1:]:
            if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in states[0].items()}:
                raise ValueError("models of an ensemble must have parameters of the same names and shapes")
        stacked = {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
        return cls(recipe, {name: value.to(device) for name, value in stacked.items()})

    def __len__(self) -> int:
        return len(self.weights[self.head_name])

    @property
    def device(self) -> torch.device:
        return self.weights[self.head_name].device

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

        targets: as tokens, (M, B, T), the token that follows or `IGNORED`; both on the weights' device.
        """
        return HeadLoss.apply(self.states(tokens), self.weights[self.head_name], targets.flatten(1))

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Loss of each position in nats, 0 where there is no label, without gradient: (M, B, T)."""
        with torch.no_grad():
            states, head = self.states(tokens), self.weights[self.head_name]
            flat = targets.expand(len(self), *targets.shape[-2:]).flatten(1)
            found = states.new_zeros(flat.shape)
            for i, rows in pieces(states, head.shape[1]):
                logits = states[i, rows] @ head[i].T
                found[i, rows] = F.cross_entropy(logits, flat[i, rows], ignore_index=IGNORED, reduction="none")
        return found.view(len(self), *targets.shape[-2:])


def _attend(qkv: Tensor, shape: torch.Size, heads: int, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """Causal self-attention: qkv (M, B T, 3 d) of batches `shape` (M, B, T) -> (M, B T, d)."""
    m, b, t = shape
    split = qkv.view(m * b, t, 3, heads, -1)
    if rotation is not None:
        split = Rotated.apply(split, *rotation)
    q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(1, 2).reshape(m, b * t, -1)


def _rotation(t: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (t, width / 2), theta = 10,000, as transformers' Llama has them."""
    frequencies = 1 / 10_000 ** (torch.arange(0, width, 2).float() / width)
    angles = torch.outer(torch.arange(t).float(), frequencies)
    return angles.cos().to(like), angles.sin().to(like)


def _llama(recipe: LMRecipe, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    rotation = _rotation(tokens.shape[2], recipe.width // recipe.heads, weights["model.norm.weight"])

    def normed(h: Tensor, name: str) -> Tensor:
        return RMSNorm.apply(h, weights[name], 1e-6)

    def joined(h: Tensor, *names: str) -> Tensor:
        return torch.bmm(h, torch.cat([weights[name] for name in names], 1).transpose(1, 2))

    h = embed(weights["model.embed_tokens.weight"], tokens)
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
    h = embed(weights["transformer.wte.weight"], tokens) + places
    for i in range(recipe.layers):
        at = f"transformer.h.{i}."
        mixed = _attend(linear(normed(h, f"{at}ln_1"), f"{at}attn.c_attn"), tokens.shape, recipe.heads, None)
        h = h + linear(mixed, f"{at}attn.c_proj")
        h = h + linear(F.gelu(linear(normed(h, f"{at}ln_2"), f"{at}mlp.c_fc"), approximate="tanh"), f"{at}mlp.c_proj")
    return normed(h, "transformer.ln_f")
