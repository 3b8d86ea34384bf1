"""Fine-tuning a language model on chosen examples, all choices with equal steps: what data selection is judged by."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import joblib
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.examples import IGNORED, Examples
from tda_core.language import BATCH_TOKENS, LanguageModel
from tda_core.models import mean_sequence_cross_entropy
from tda_core.store import Store
from tda_core.text_pairs import TextPairs
from tda_core.threads import one_thread
from tda_core.token_rows import batches_of, lengths_of


@dataclass(frozen=True)
class FineTuning:
    """Steps of AdamW on all parameters; the rate rises over the first tenth and falls to zero along a cosine.

    Raises ValueError for sizes below 1 and rates that are not positive and finite.
    """

    steps: int = 40
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = max(1, self.steps // 10)
        if step < rise:
            return self.learning_rate * (step + 1) / rise
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise)))


def fine_tune(model: LanguageModel, train: TextPairs, setting: FineTuning, *, seed: int) -> LanguageModel:
    """A copy of the model, fine-tuned on the responses of these pairs (mean loss a token, mean over a batch).

    The order is shuffled anew in every pass; a set smaller than the steps need is passed over again. In float32, as
    small steps are lost in the rounding of shorter types, and without dropout: the seed decides the order alone.
    """
    module = copy.deepcopy(model.model).float()
    examples = model.examples(train)
    optimiser = torch.optim.AdamW(module.parameters(), setting.learning_rate, weight_decay=setting.weight_decay)
    rows = batch_rows(len(train), setting, seed=seed)
    for step in range(setting.steps):
        for group in optimiser.param_groups:
            group["lr"] = setting.rate(step)
        loss = _batch_loss(module, examples[rows[step]])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return replace(model, model=module)


def batch_rows(n: int, setting: FineTuning, *, seed: int) -> Tensor:
    """Which examples each step takes: (steps, batch_size), passes over all n in an order drawn anew for each."""
    generator = torch.Generator().manual_seed(seed)
    needed = setting.steps * setting.batch_size
    passes = [torch.randperm(n, generator=generator) for _ in range(-(-needed // n))]
    return torch.cat(passes)[:needed].view(setting.steps, setting.batch_size)


def _batch_loss(module: torch.nn.Module, batch: Examples) -> Tensor:
    logits = module(input_ids=batch.inputs, use_cache=False).logits
    return mean_sequence_cross_entropy(logits, batch.targets).mean()


@dataclass(frozen=True, eq=False)
class Selections:
    """Choices of training examples that are compared by what fine-tuning on them does to a held-out set.

    chosen: rows of the pool by name, all of one number. Raises ValueError for none, unequal numbers, repeated rows and
    rows that the pool does not have, naming the choice.
    """

    pool: TextPairs
    chosen: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        sizes = {name: len(rows) for name, rows in self.chosen.items()}
        if len(set(sizes.values())) != 1 or not min(sizes.values()):
            raise ValueError(f"choices must be of one number of examples, at least 1, got {sizes}")
        for name, rows in self.chosen.items():
            if len(rows.unique()) < len(rows):
                raise ValueError(f"choice {name!r} has a row twice")
            if int(rows.min()) < 0 or int(rows.max()) >= len(self.pool):
                raise ValueError(f"choice {name!r} has rows outside of the pool of {len(self.pool)}")

    def losses(
        self,
        model: LanguageModel,
        held_out: TextPairs,
        setting: FineTuning,
        seeds: Sequence[int],
        *,
        store: Store | None = None,
    ) -> dict[str, Tensor]:
        """Mean loss a token (nats) on the held-out pairs after fine-tuning on each choice: name -> (n_seeds,)."""
        found = self.outcomes(model, held_out, setting, seeds, store=store)
        return {name: values["loss"] for name, values in found.items()}

    def outcomes(
        self,
        model: LanguageModel,
        held_out: TextPairs,
        setting: FineTuning,
        seeds: Sequence[int],
        *,
        store: Store | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """What fine-tuning on each choice does to the held-out pairs: name -> "loss", "accuracy", each (n_seeds,).

        loss: mean a token, in nats. accuracy: see `right_tokens`, mean over pairs. Runs go side by side, one thread
        each, on a GPU one by one; with a store, a stopped comparison goes on where it stopped.
        """
        jobs = [(name, seed) for name in self.chosen for seed in seeds]
        key = {"model": model.identity, "held_out": held_out.hash, "setting": setting}

        def run(name: str, seed: int) -> dict[str, Tensor]:
            train = self.pool[self.chosen[name]]

            def compute() -> dict[str, Tensor]:
                tuned = fine_tune(model, train, setting, seed=seed)
                loss, right = tuned.losses(held_out, "mean").mean(), right_tokens(tuned, held_out).mean()
                return {"loss": loss[None], "accuracy": right[None]}

            own = key | {"train": train.hash, "seed": seed}
            return store.get("tuning_outcome", own, compute) if store else compute()

        with one_thread():
            n_jobs = -1 if model.device.type == "cpu" else 1
            parallel = joblib.Parallel(n_jobs, backend="threading", return_as="generator")
            done = parallel(joblib.delayed(run)(*job) for job in jobs)
            found = list(tqdm(done, total=len(jobs), desc="fine-tuning", leave=False))

        def gathered(name: str, what: str) -> Tensor:
            return torch.cat([values[what] for (of, _), values in zip(jobs, found, strict=True) if of == name])

        return {name: {what: gathered(name, what) for what in ("loss", "accuracy")} for name in self.chosen}


def right_tokens(model: LanguageModel, pairs: TextPairs) -> Tensor:
    """Share of each response's tokens that are the likeliest after those before them: (n,), on the CPU.

    It is 1 exactly where greedy decoding gives the response.
    """
    examples = model.examples(pairs)
    lengths, found = lengths_of(examples), torch.zeros(len(examples))
    for rows in batches_of(lengths.tolist(), BATCH_TOKENS):
        inputs, targets = (x[rows, : int(lengths[rows].max())] for x in (examples.inputs, examples.targets))
        with torch.no_grad():
            likeliest = model.model(input_ids=inputs, use_cache=False).logits.argmax(-1)
        found[rows] = ((likeliest == targets).sum(1) / (targets != IGNORED).sum(1)).cpu()  # no token is `IGNORED`
    return found


def top_rows(scores: Tensor, k: int) -> Tensor:
    """The k highest of scores (n,), equal ones in order of rows. Raises ValueError for k outside 1..n and NaN."""
    if not 1 <= k <= len(scores):
        raise ValueError(f"k must lie in 1..{len(scores)}, got {k}")
    if torch.isnan(scores).any():
        raise ValueError("scores must be numbers: they hold NaN")
    return scores.argsort(descending=True, stable=True)[:k]
