"""How small causal language models come to be: an architecture, and a training run of AdamW."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

# Tokens by their place in every tokenizer that is made here.
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
ARCHITECTURES = ("llama", "gpt2")
# The matrices of a layer that write to the residual stream
OUTWARD = ("o_proj.weight", "down_proj.weight", "attn.c_proj.weight", "mlp.c_proj.weight", "lm_head.weight")


@dataclass(frozen=True)
class LMRecipe:
    """How a model is made: a shape, and a training run of AdamW with linear warm-up and cosine decay.

    length: tokens of a training row, and the most that the model takes. learning_rate: the highest of the layers;
    embedding_rate: that of the embeddings, in units of it. tied: one embedding for both ends. embedding_scale: standard
    deviation of the initial embeddings in units of transformers' own .02. quiet: what layers write to the residual
    stream begins at zero, and so does an output embedding of its own. Raises ValueError for an unknown architecture,
    sizes below 1, and rates and scales that are not finite and positive.
    """

    architecture: str = "llama"
    width: int = 64
    layers: int = 3
    heads: int = 4
    steps: int = 200
    batch_size: int = 32
    length: int = 48
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    embedding_scale: float = 1.0
    quiet: bool = False
    tied: bool = True
    embedding_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
        for name in ("width", "layers", "heads", "steps", "batch_size", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "embedding_scale", "embedding_rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be an even multiple of heads = {self.heads}, got {self.width}")

    def untrained(self, n_tokens: int, *, seed: int) -> PreTrainedModel:
        """The model at its initialisation, on the CPU in float32."""
        shape = {"vocab_size": n_tokens, "tie_word_embeddings": self.tied}
        shape |= {f"{name[:3]}_token_id": i for i, name in enumerate(SPECIAL) if name != "unk_token"}
        if self.architecture == "llama":
            sizes = {"num_hidden_layers": self.layers, "num_attention_heads": self.heads, "hidden_size": self.width}
            wide = {"intermediate_size": 3 * self.width, "max_position_embeddings": self.length}
            config = LlamaConfig(**shape, **sizes, **wide)
        else:
            sizes = {"n_layer": self.layers, "n_head": self.heads, "n_embd": self.width, "n_positions": self.length}
            off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            config = GPT2Config(**shape, **sizes, **off)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(self.embedding_scale)
            for name, value in model.named_parameters():
                if self.quiet and name.endswith(OUTWARD):
                    value.zero_()
        return model

    def for_epochs(self, epochs: int, n: int) -> "LMRecipe":
        """The same recipe with the steps of so many visits to n examples."""
        return replace(self, steps=max(1, round(epochs * n / self.batch_size)))

    @property
    def models_per_block(self) -> int:
        """Models that are trained together: what Python spends on a step is small beside eight small models."""
        return 8

    def rate(self, step: int) -> float:
        """Learning rate of a step: up over the first twentieth, then down along a cosine to a twentieth."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * (0.05 + 0.475 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))))

    def groups(self, parameters: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
        """Named parameters for AdamW: matrices decay, norms and biases do not; "share" is what scales their rate."""
        found = [
            {"params": [], "weight_decay": decay, "share": share}
            for decay in (self.weight_decay, 0.0)
            for share in (1.0, self.embedding_rate)
        ]
        for name, value in parameters:
            at_end = name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight", "lm_head.weight"))
            small = name.endswith((".bias", "norm.weight")) or ".ln_" in name
            found[2 * small + at_end]["params"].append(value)
        return [group for group in found if group["params"]]

    def set_rates(self, optimiser: torch.optim.Optimizer, step: int) -> None:
        """Learning rates of a step, for an optimiser of `groups`."""
        for group in optimiser.param_groups:
            group["lr"] = group["share"] * self.rate(step)


# Chosen by the loss of validation queries of a 30% subset of the help topics, with one seed: batches of 8, 16 and 32
# documents, rates of layers and of embeddings, scales, tied or not. Layers' rates fall with their width.
_STANDARD = LMRecipe(
    batch_size=16,
    length=64,
    learning_rate=4e-3,
    weight_decay=0.1,
    embedding_scale=10.0,
    embedding_rate=5.0,
    quiet=True,
    tied=False,
)
SIZES = {
    "0.1M": (24, 1, 2),
    "0.4M": (64, 2, 4),
    "1M": (112, 4, 4),
    "4M": (224, 6, 4),
    "30M": (512, 8, 8),
    "120M": (768, 14, 12),
}


def standard_recipe(size: str = "0.4M", architecture: str = "llama") -> LMRecipe:
    """The recipe of a pre-training by its number of parameters with 2,048 tokens, such as "0.4M".

    Raises ValueError for a size that is not one of `SIZES`.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}, expected one of {', '.join(SIZES)}")
    width, layers, heads = SIZES[size]
    rate = _STANDARD.learning_rate * min(1.0, 64 / width)
    shares = {"learning_rate": rate, "embedding_rate": 0.02 / rate}
    return replace(_STANDARD, architecture=architecture, width=width, layers=layers, heads=heads, **shares)
