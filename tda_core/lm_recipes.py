"""How small causal language models come to be: an architecture, and a training run of AdamW."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

# Tokens by their place in every tokenizer that is made here.
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
ARCHITECTURES = ("llama", "gpt2")


@dataclass(frozen=True)
class LMRecipe:
    """How a model is made: a shape, and a training run of AdamW with linear warm-up and cosine decay.

    length: tokens of a training row, and the most that the model takes. learning_rate: the highest. Raises ValueError
    for an unknown architecture, sizes below 1, and rates that are not finite and positive.
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

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
        for name in ("width", "layers", "heads", "steps", "batch_size", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be finite and > 0, got {self.learning_rate}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be an even multiple of heads = {self.heads}, got {self.width}")

    def untrained(self, n_tokens: int, *, seed: int) -> PreTrainedModel:
        """The model at its initialisation, on the CPU in float32."""
        shape = {"vocab_size": n_tokens, "tie_word_embeddings": True}
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
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")

    def rate(self, step: int) -> float:
        """Learning rate of a step: up over the first twentieth, then down along a cosine to a twentieth."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * (0.05 + 0.475 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))))

    def groups(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        """Parameters for AdamW: matrices decay, norms and biases do not."""
        matrices, rest = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
        return [{"params": matrices, "weight_decay": self.weight_decay}, {"params": rest, "weight_decay": 0.0}]
