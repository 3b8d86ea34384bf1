"""Training small language models: one by transformers and torch alone, as a reference, and many at once.

Both visit the same documents in the same order, with AdamW, warm-up and a cosine, and gradients clipped to norm 1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from tda_core.examples import IGNORED, Examples, hash_of
from tda_core.lm_ensemble import Ensemble
from tda_core.lm_recipes import LMRecipe
from tda_core.token_rows import lengths_of

BETAS, CLIP = (0.9, 0.98), 1.0
# What the shapes of weights do not tell of a Llama's or GPT-2's computation
SHAPE = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
    "head_dim",
    "hidden_act",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "rope_parameters",
    "tie_word_embeddings",
)
# Positions of one evaluation pass, all models together
EVALUATED = 2**15


@dataclass(frozen=True, eq=False)
class LMTraining:
    """What models are trained by: a recipe, the vocabulary's size, and a model to start from (None: from scratch).

    The initial model is one of the recipe's shape; it is left as it is. device: "cpu", "cuda", "cuda:1", ...; numbers
    of different devices agree up to rounding.
    """

    recipe: LMRecipe
    n_tokens: int
    initial: PreTrainedModel | None = None
    device: str = "cpu"

    @property
    def place(self) -> torch.device:
        """Where models are trained."""
        return torch.device(self.device)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What results are keyed by."""
        state = None if self.initial is None else hash_of(self.initial.state_dict().values())[:16]
        return {"recipe": asdict(self.recipe), "n_tokens": self.n_tokens, "initial": state}

    def start(self, seed: int) -> PreTrainedModel:
        """A model before its training. ValueError where the initial model does not have the recipe's shape."""
        model = self.recipe.untrained(self.n_tokens, seed=seed)
        if self.initial is not None:
            own, given = (of.config.to_dict() for of in (model, self.initial))
            for name in SHAPE:
                if own.get(name) != given.get(name):
                    found, expected = given.get(name), own.get(name)
                    raise ValueError(f"the initial model has {name} = {found}, but the recipe's models {expected}")
            try:
                model.load_state_dict(self.initial.state_dict())
            except RuntimeError as error:
                raise ValueError(f"the initial model does not have the recipe's shape: {error}") from error
        return model


def pretrain_loop(training: LMTraining, examples: Examples, mask: Tensor, seed: int) -> PreTrainedModel:
    """One model, by transformers' forward pass, autograd and torch's AdamW: what `pretrain_many` is checked against.

    mask: (n,) bool. Raises what `pretrain_many` raises.
    """
    _check(training, examples, mask[None], [seed])
    recipe = training.recipe
    model = training.start(seed).to(training.place).train()
    optimiser = torch.optim.AdamW(recipe.groups(model.named_parameters()), lr=recipe.learning_rate, betas=BETAS)
    for step, rows in enumerate(visits(recipe, mask, seed)):
        recipe.set_rates(optimiser, step)
        inputs, targets = _batch(examples, rows, training.place)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
    return model.eval()


def pretrain_many(training: LMTraining, examples: Examples, masks: Tensor, seeds: Sequence[int]) -> Ensemble:
    """Train M models together on their own documents.

    masks: (M, n) bool, equally large subsets. seeds: M, of initialisation and order. What a model becomes does not
    depend on those beside it, but for rounding where their documents are longer, or on a GPU. Raises ValueError for
    wrong shapes, an empty subset, and documents that do not fit the window or the vocabulary; FloatingPointError for
    divergence.
    """
    *_, (_, ensemble) = pretrain_steps(training, examples, masks, seeds)
    return ensemble


def pretrain_steps(
    training: LMTraining, examples: Examples, masks: Tensor, seeds: Sequence[int]
) -> Iterator[tuple[int, Ensemble]]:
    """`pretrain_many` step by step: how many steps were taken, and the models so far (which the next step changes)."""
    seeds = _check(training, examples, masks, seeds)
    recipe = training.recipe
    ensemble = Ensemble.of(recipe, [training.start(seed) for seed in seeds], training.place)
    weights = [value.requires_grad_(True) for value in ensemble.weights.values()]
    groups = recipe.groups(ensemble.weights.items())
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS, fused=True)
    orders = torch.stack([visits(recipe, mask, seed) for mask, seed in zip(masks, seeds, strict=True)], 1)
    for step, rows in enumerate(orders):
        recipe.set_rates(optimiser, step)
        optimiser.zero_grad()
        ensemble.loss(*_batch(examples, rows, training.place)).sum().backward()
        _clip_each(weights)
        optimiser.step()
        yield step + 1, ensemble
    for value in weights:
        if not torch.isfinite(value.requires_grad_(False)).all():
            raise FloatingPointError(f"training diverged: lower learning_rate={recipe.learning_rate}")


def evaluate(ensemble: Ensemble, examples: Examples | Sequence[Examples]) -> Tensor:
    """Mean loss of each example's labelled tokens under every model, in nats: (M, q), on the CPU.

    examples: the same for all models, or as many for each model. FloatingPointError for a loss that is not finite.
    """
    shared = isinstance(examples, Examples)
    inputs, targets = (
        (examples.inputs[None], examples.targets[None])
        if shared
        else (torch.stack([getattr(e, name) for e in examples]) for name in ("inputs", "targets"))
    )
    size = max(1, EVALUATED // (inputs.shape[2] * len(ensemble)))
    shape = (len(ensemble), -1, -1)
    parts = [
        ensemble.token_losses(*(x.expand(*shape).to(ensemble.device) for x in (some, labels))).sum(2).cpu()
        for some, labels in zip(inputs.split(size, 1), targets.split(size, 1), strict=True)
    ]
    found = torch.cat(parts, 1) / (targets != IGNORED).sum(2).cpu()
    if not torch.isfinite(found).all():
        model, query = (~torch.isfinite(found)).nonzero()[0].tolist()
        raise FloatingPointError(f"the loss of query {query} under model {model} is NaN or infinite")
    return found


def visits(recipe: LMRecipe, mask: Tensor, seed: int) -> Tensor:
    """The documents of each step: (steps, batch) indices.

    Epoch after epoch in a new order, which is drawn for all documents: two subsets see those that they share in the
    same order. A batch may hold the end of an epoch and the beginning of the next.
    """
    size, total = int(mask.sum()), recipe.steps * recipe.batch_size
    generator = torch.Generator().manual_seed(seed + 2**32)
    orders = torch.rand(math.ceil(total / size), len(mask), generator=generator, dtype=torch.float64).argsort(1)
    return orders[mask[orders]][:total].view(recipe.steps, recipe.batch_size)


def _batch(examples: Examples, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and targets of these documents (..., T) on a device, cut where the longest of them ends."""
    targets = examples.targets[rows]
    longest = int(lengths_of(examples)[rows].max()) if targets.shape[-1] > 1 else 1
    return examples.inputs[rows][..., :longest].to(device), targets[..., :longest].to(device)


def _clip_each(weights: Sequence[Tensor]) -> None:
    """Scale each model's gradient to norm 1 where it is longer."""
    norms = sum(w.grad.flatten(1).square().sum(1) for w in weights).sqrt()
    factors = (CLIP / (norms + 1e-6)).clamp_max(1)  # as torch.nn.utils.clip_grad_norm_ has it
    if bool((factors < 1).any()):
        for w in weights:
            w.grad.mul_(factors.view(-1, *(1,) * (w.ndim - 1)))


def _check(training: "LMTraining", examples: Examples, masks: Tensor, seeds: Sequence[int]) -> list[int]:
    if not examples.is_sequence:
        raise ValueError("language models are trained on sequences with a label each token")
    n, t = examples.targets.shape
    if t > training.recipe.length:
        raise ValueError(f"documents have up to {t} tokens, but the recipe's window is {training.recipe.length}")
    highest = max(int(examples.inputs.max()), int(examples.targets.max()))
    if highest >= training.n_tokens:
        raise ValueError(f"token {highest} is out of range for {training.n_tokens} tokens: is it another tokenizer's?")
    if masks.dtype != torch.bool or masks.ndim != 2 or masks.shape != (len(seeds), n) or not len(seeds):
        expected = f"boolean ({len(seeds)} seeds, {n} documents), 1 seed or more"
        raise ValueError(f"masks must be {expected}, got {masks.dtype} {tuple(masks.shape)}")
    sizes = masks.sum(1)
    if int(sizes.min()) == 0:
        raise ValueError(f"subset {int(sizes.argmin())} is empty: every subset needs at least one document")
    if int(sizes.min()) != int(sizes.max()):
        raise ValueError(f"subsets must be equally large, got sizes {int(sizes.min())} to {int(sizes.max())}")
    bad = [seed for seed in seeds if int(seed) != seed or not 0 <= seed < 2**32]
    if bad:
        raise ValueError(f"seeds must be whole numbers in 0..2^32-1, got {bad[0]}")
    return [int(seed) for seed in seeds]
