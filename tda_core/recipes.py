"""Recipes: how a model comes to be, and the random numbers that a seed stands for."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from tda_core.models import LOSSES, check_layers

SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """How a model comes to be, with nothing random in it.

    layers: widths from input to output. schedule: "constant", or "linear"/"cosine" decay to zero over
    the run. weight_decay: lambda of lambda/2 ||theta||^2, on all parameters. precision: "float32";
    "float64"; or "bfloat16", which rounds the first (widest) layer's matrix products only and keeps
    float32 weights, momentum and everything else.
    """

    layers: tuple[int, ...]
    activation: str = "relu"
    loss: str = "cross_entropy"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    epochs: int = 30
    batch_size: int = 50
    schedule: str = "constant"
    precision: str = "float32"

    def __post_init__(self) -> None:
        check_layers(self.layers, self.activation)
        for name, known in (("loss", LOSSES), ("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, expected one of {sorted(known)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be finite and > 0, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be finite and >= 0, got {self.weight_decay}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be >= 1, got {self.epochs} and {self.batch_size}")
        if self.loss == "squared_error" and self.layers[-1] != 1:
            raise ValueError(f"squared_error needs one output, got layers {self.layers}")

    def but(self, **changes: object) -> "Recipe":
        """The same recipe with some fields changed: `recipe.but(epochs=5)`."""
        return replace(self, **changes)

    @property
    def n_parameters(self) -> int:
        return sum((a + 1) * b for a, b in pairwise(self.layers))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters (bfloat16 applies to matrix products only)."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def models_per_block(self) -> int:
        """Models that are trained together: more of the small ones, so that a block stays in cache."""
        return 32 if self.n_parameters <= 20_000 else 8

    def rate(self, step: int, n_steps: int) -> float:
        """Learning rate of a step, counted from 0."""
        share = step / n_steps
        if self.schedule == "linear":
            return self.learning_rate * (1 - share)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
        return self.learning_rate


def initial_parameters(recipe: Recipe, seed: int) -> Tensor:
    """PyTorch's default initialisation, U(-1/sqrt(in), 1/sqrt(in)), from this seed alone: (p,)."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for width_in, width_out in pairwise(recipe.layers):
        uniform = torch.rand((width_in + 1) * width_out, generator=generator, dtype=torch.float64)
        parts.append((2 * uniform - 1) / math.sqrt(width_in))
    return torch.cat(parts).to(recipe.dtype)


def epoch_orders(recipe: Recipe, n: int, seed: int) -> Tensor:
    """The order in which a seed visits n examples: (epochs, n) indices.

    Drawn for all n examples; a subset keeps the relative order of its members, so that two subsets
    with one seed see their common examples in the same order.
    """
    generator = torch.Generator().manual_seed(seed + 2**32)
    return torch.rand(recipe.epochs, n, generator=generator, dtype=torch.float64).argsort(1)


# -- recipes of the data sets -----------------------------------------------------------------------

# Chosen by the loss of validation queries over learning rates and weight decays (for parkinsons .003 to .03, 0 to
# .03, after 10 and 30 epochs); forward_only/01_ground_truth shows the grid of the others.
_DIGITS = Recipe(layers=(64, 64, 10), learning_rate=0.1, weight_decay=1e-3)
STANDARD = {
    "digits": _DIGITS,
    "mnist": replace(_DIGITS, layers=(784, 64, 10), weight_decay=3e-3),
    "parkinsons": replace(_DIGITS, layers=(19, 64, 1), loss="squared_error", learning_rate=0.03, weight_decay=1e-2),
}


def standard_recipe(dataset: str, hidden: int = 64) -> Recipe:
    """The recipe that the notebooks use for a data set; hidden 0 gives logistic regression, which is convex.

    Raises ValueError for a data set without one.
    """
    if dataset not in STANDARD:
        raise ValueError(f"no standard recipe for dataset {dataset!r}, expected one of {sorted(STANDARD)}")
    recipe = STANDARD[dataset]
    width_in, width_out = recipe.layers[0], recipe.layers[-1]
    return replace(recipe, layers=(width_in, hidden, width_out) if hidden else (width_in, width_out))
