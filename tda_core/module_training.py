"""Training and retraining of any `nn.Module` by a plain loop, for architectures that `training` cannot stack.

Slower by an order of magnitude than the stacked perceptrons, and enough for a hundred small models. The random numbers
are those of `recipes`: a seed's order of visits is drawn for all examples, so subsets of one seed share it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import joblib
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tda_core.examples import Examples
from tda_core.ground_truth import GroundTruth
from tda_core.models import LOSSES
from tda_core.problem import Problem
from tda_core.threads import one_thread


@dataclass(frozen=True)
class ModuleRecipe:
    """How a module comes to be. make: () -> a new module, initialised by torch's own random numbers; picklable.

    The rest as in `recipes.Recipe`: SGD with momentum at a constant learning rate.
    """

    make: Callable[[], nn.Module]
    loss: str = "cross_entropy"
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-3
    epochs: int = 15
    batch_size: int = 50

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"unknown loss {self.loss!r}, expected one of {sorted(LOSSES)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be finite and > 0, got {self.learning_rate}")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be >= 1, got {self.epochs} and {self.batch_size}")


def train_module(recipe: ModuleRecipe, examples: Examples, seed: int, *, mask: Tensor | None = None) -> Problem:
    """Train one module on all examples, or on those of mask (n,) bool, and give it as a Problem.

    The seed decides initialisation and order of visits; torch's global random state is left as it was.
    Raises ValueError for a mask of another type or shape, or without examples, and FloatingPointError on divergence.
    """
    mask = torch.ones(len(examples), dtype=torch.bool) if mask is None else mask
    if mask.dtype != torch.bool or mask.shape != (len(examples),) or not bool(mask.any()):
        raise ValueError(f"mask must be ({len(examples)},) bool with a True, got {mask.dtype} {tuple(mask.shape)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = recipe.make()
    optimiser = torch.optim.SGD(
        module.parameters(), recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    generator = torch.Generator().manual_seed(seed + 2**32)
    for _ in range(recipe.epochs):
        order = torch.rand(len(examples), generator=generator, dtype=torch.float64).argsort()
        for rows in order[mask[order]].split(recipe.batch_size):
            optimiser.zero_grad()
            LOSSES[recipe.loss](module(examples.inputs[rows]), examples.targets[rows]).mean().backward()
            optimiser.step()
    if not all(bool(torch.isfinite(value).all()) for value in module.parameters()):
        raise FloatingPointError(f"training diverged: lower learning_rate={recipe.learning_rate}")
    return Problem.from_module(module, recipe.loss, examples[mask], weight_decay=recipe.weight_decay)


def retrain_modules(
    recipe: ModuleRecipe, data: Examples, masks: Tensor, seeds: Sequence[int], queries: Examples
) -> GroundTruth:
    """`ground_truth.retrain` of any module: one per subset and seed, on all cores, and every query's loss and margin.

    masks: (m, n) bool. Raises ValueError for masks of another shape, and what `train_module` raises.
    """
    if masks.ndim != 2 or masks.shape[1] != len(data) or not len(masks) or not len(seeds):
        expected = f"(m, {len(data)}), m >= 1, for 1 seed or more"
        raise ValueError(f"masks must be {expected}, got {tuple(masks.shape)} for {len(seeds)} seeds")
    pairs = [(mask, seed) for mask in masks for seed in seeds]
    # a few are done here before worker processes have started
    jobs = joblib.Parallel(n_jobs=-1 if len(pairs) > 8 else 1, return_as="generator")(
        joblib.delayed(_measure)(recipe, data, mask, seed, queries) for mask, seed in pairs
    )
    measured = list(tqdm(jobs, total=len(pairs), desc="retraining", unit="model"))
    losses, margins = (torch.stack(part).view(len(masks), len(seeds), -1) for part in zip(*measured, strict=True))
    return GroundTruth(masks, torch.tensor(seeds), losses, margins if data.is_classification else None)


def _measure(recipe: ModuleRecipe, data: Examples, mask: Tensor, seed: int, queries: Examples) -> tuple[Tensor, Tensor]:
    with one_thread():
        problem = train_module(recipe, data, seed, mask=mask)
        losses = problem.losses(queries)
        return losses, problem.margins(queries) if data.is_classification else losses
