"""How fast language models are pre-trained: many at once, and one by one with transformers' own forward pass."""

from dataclasses import replace

import torch
from torch import Tensor

from tda_core.examples import Examples
from tda_core.pretraining import LMTraining, pretrain_loop, pretrain_many
from tda_core.speed import seconds
from tda_core.threads import one_thread

# Steps that are timed of each training: enough for the first one's preparations not to count
TIMED = 12


def pretraining_rates(training: LMTraining, examples: Examples, masks: Tensor) -> dict[str, float]:
    """Models a second, of a core or a GPU, of "ensemble", a block of stacked models, and "loop", one model at a time.

    masks: (m, n) bool, of which one block is taken. The first steps of a training are timed, twice, and stand for all.
    """
    block = masks[: training.recipe.models_per_block]
    steps = training.recipe.steps
    short = replace(training, recipe=replace(training.recipe, steps=min(TIMED, steps)))
    whole = steps / short.recipe.steps
    with one_thread(), torch.random.fork_rng():
        at_once = seconds(lambda: _finished(short, pretrain_many(short, examples, block, range(len(block)))), 2)
        alone = seconds(lambda: _finished(short, pretrain_loop(short, examples, block[0], 0)), 2)
    return {"ensemble": len(block) / (whole * at_once), "loop": 1 / (whole * alone)}


def _finished(training: LMTraining, model: object) -> object:
    """The model, once a GPU is done with it."""
    if training.place.type == "cuda":
        torch.cuda.synchronize(training.place)
    return model
