"""A test bench for language models: a corpus, a model to attribute, and models retrained on random subsets of it.

Notebooks build it once and load it in those that follow. Two checkpoints of the same training runs are kept, "half" of
the steps and the "end", each with a model and a ground truth of its own: how a method fares may depend on how long a
model was trained. Settings are chosen on validation queries; what is reported is judged on test queries.

Of language models, LDS is centred unless it is called raw: each run's mean over queries is removed from outcomes and
predictions alike, because how well a run trained at all is common to all queries and says nothing of attribution.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tda_core.corpora import Corpus
from tda_core.examples import Examples
from tda_core.files import atomic_write
from tda_core.ground_truth import GroundTruth
from tda_core.language import LanguageModel
from tda_core.lm_recipes import LMRecipe
from tda_core.metrics import (
    Ceiling,
    Estimate,
    centred,
    lds_ceiling,
    lds_of_predictions,
    lds_of_predictions_difference,
    predictions_of,
)
from tda_core.pretraining import LMTraining, pretrain_steps
from tda_core.ranks import spearman_columns
from tda_core.store import load_tensors, save_tensors
from tda_core.subsets import random_subsets
from tda_core.text_pairs import TextPairs
from tda_core.truth_bank import Measured, TruthBank

# Seed of the attributed model; those of the ground truth start at 0: no model is judged by itself.
MODEL_SEED = 1000
STATES = ("half", "end")
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class LMGoal:
    """What is retrained. epochs: visits to each document of a subset. fraction: of the documents in a subset."""

    recipe: LMRecipe
    epochs: float = 4.0
    fraction: float = 0.3
    n_subsets: int = 64
    n_seeds: int = 2

    def training(self, n: int, n_tokens: int, initial: PreTrainedModel | None = None) -> LMTraining:
        """The training of a model on n documents."""
        return LMTraining(self.recipe.for_epochs(self.epochs, n), n_tokens, initial)


@dataclass(frozen=True, eq=False)
class Subject:
    """What methods attribute: a model, and the corpus whose training documents it was trained on."""

    corpus: Corpus
    model: LanguageModel

    def examples(self, part: str) -> Examples:
        """The documents of "train", "validation" or "test" as sequences."""
        return self._examples[part]

    @cached_property
    def _examples(self) -> dict[str, Examples]:
        return {part: self.model.examples(getattr(self.corpus, part)) for part in PARTS}


@dataclass(frozen=True, eq=False)
class LMBench(Subject):
    """One checkpoint of a bench. validation, test: ground truths of those queries. own: (m, s) training losses.

    model: trained on all documents, to the same checkpoint. seconds: of a retraining, to the end, as in `Measured`.
    """

    validation: GroundTruth
    test: GroundTruth
    own: Tensor
    seconds: float

    @property
    def masks(self) -> Tensor:
        """(m, n) bool."""
        return self.test.masks

    def asking(self, rows: slice | Tensor) -> "LMBench":
        """The same bench with some of the test queries alone: a family, or few for methods that are slow to ask."""
        return replace(self, corpus=replace(self.corpus, test=self.corpus.test[rows]), test=self.test.queries(rows))

    def lds(self, found: Tensor, *, raw: bool = False, part: str = "test") -> Estimate:
        """LDS on test (or validation) queries of scores (q, n), or of predictions (m, q) of what is not additive."""
        return lds_of_predictions(*self._sides(found, raw=raw, part=part))

    def difference(self, first: Tensor, second: Tensor, *, raw: bool = False) -> Estimate:
        """LDS of the first less that of the second on test queries, paired."""
        (one, true), (two, _) = (self._sides(found, raw=raw, part="test") for found in (first, second))
        return lds_of_predictions_difference(one, two, true)

    def ceiling(self, *, raw: bool = False, part: str = "test") -> Ceiling:
        """What noise in the ground truth leaves to the best method."""
        outcomes = getattr(self, part).outcomes
        return lds_ceiling(outcomes if raw else centred(outcomes))

    def choose(self, scores: Callable[[Any], Tensor], settings: Sequence[Any]) -> tuple[Any, dict[Any, float]]:
        """The setting whose scores of validation queries, scores(setting) (q, n), have the highest LDS; and all LDS.

        Raises ValueError for no settings.
        """
        if not len(settings):
            raise ValueError("choose needs at least one setting, got none")
        table = {}
        for setting in settings:  # values alone: their intervals would take longer than most methods
            sides = self._sides(scores(setting), raw=False, part="validation")
            table[setting] = float(spearman_columns(*map(np.asarray, sides)).mean())
        return max(table, key=table.__getitem__), table

    def _sides(self, found: Tensor, *, raw: bool, part: str) -> tuple[Any, Any]:
        """Predictions and outcomes of each subset and query, (m, q) both."""
        true = getattr(self, part).outcomes.mean(1)
        (m, q), n = true.shape, self.masks.shape[1]
        if tuple(found.shape) not in ((q, n), (m, q)):
            raise ValueError(
                f"expected scores of {part} queries, ({q}, {n}), or predictions, ({m}, {q}), got {tuple(found.shape)}"
            )
        predicted = predictions_of(found, self.masks) if tuple(found.shape) == (q, n) else found
        return (predicted, true) if raw else (centred(predicted), centred(true))

    @classmethod
    def load(cls, folder: Path | str, state: str = "end") -> "LMBench":
        """Read what `build_bench` wrote. Raises FileNotFoundError where there is nothing, ValueError for a state."""
        folder = Path(folder)
        if state not in STATES:
            raise ValueError(f"unknown state {state!r}, expected one of {STATES}")
        path = folder / f"truth_{state}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"no bench in {folder}: run the notebook that builds it first")
        tensors, metadata = load_tensors(path)
        model = LanguageModel.load(folder / f"model_{state}", device="cpu")
        parts = {part: TextPairs(*pairs) for part, pairs in json.loads((folder / "corpus.json").read_text()).items()}
        corpus = Corpus(metadata["corpus"], metadata["source"], model.tokenizer, **parts)
        truth = GroundTruth(tensors["masks"], tensors["seeds"], tensors["losses"], None)
        n = len(corpus.validation)
        split = truth.queries(slice(0, n)), truth.queries(slice(n, None))
        return cls(corpus, model, *split, tensors["own"], metadata["seconds"])


def bank_of(
    corpus: Corpus,
    goal: LMGoal,
    folder: Path | str,
    initial: PreTrainedModel | None = None,
    device: str | None = None,
) -> TruthBank:
    """The bank of a goal's retrainings; validation queries come first, then those of the test.

    initial: a model that training starts from. device: where models are trained, default a GPU if there is one.
    """
    untrained = initial or goal.recipe.untrained(len(corpus.tokenizer), seed=0)
    model = LanguageModel(untrained, corpus.tokenizer)
    n = round(goal.fraction * len(corpus.train))
    training = goal.training(n, len(corpus.tokenizer), initial)
    training = replace(training, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    queries = model.examples(corpus.validation + corpus.test)
    half = max(1, training.recipe.steps // 2)
    return TruthBank(Path(folder), training, model.examples(corpus.train), queries, (half,))


def build_bench(corpus: Corpus, goal: LMGoal, folder: Path | str, bank: TruthBank, *, n_jobs: int = -1) -> Measured:
    """Train the attributed model and everything that the bank lacks, and write benches of both states to a folder.

    bank: from `bank_of`, in a folder of its own, which other runs may share.
    """
    folder = Path(folder)
    masks = random_subsets(len(corpus.train), goal.n_subsets, goal.fraction, seed=0)
    measured = bank.measure(masks, range(goal.n_seeds), n_jobs=n_jobs)
    _train_attributed(corpus, goal, folder, bank)
    texts = {part: [getattr(corpus, part).prompts, getattr(corpus, part).responses] for part in PARTS}
    atomic_write(folder / "corpus.json", json.dumps(texts))
    for k, state in enumerate(STATES):
        truth = measured.truths[k]
        tensors = {"masks": truth.masks, "seeds": truth.seeds, "losses": truth.losses, "own": measured.own[k]}
        metadata = {"corpus": corpus.name, "source": corpus.source, "seconds": float(measured.seconds.mean())}
        save_tensors(folder / f"truth_{state}.safetensors", tensors, metadata)
    return measured


def _train_attributed(corpus: Corpus, goal: LMGoal, folder: Path, bank: TruthBank) -> None:
    """Write the models of both states, unless they are there; those of another goal or corpus are replaced."""
    n = len(bank.examples)
    training = goal.training(n, bank.training.n_tokens, bank.training.initial)
    training = replace(training, device=bank.training.device)
    made_of = json.dumps({"training": training.identity, "data": bank.examples.hash, "seed": MODEL_SEED})
    marker, places = folder / "models.json", {state: folder / f"model_{state}" for state in STATES}
    if not marker.is_file() or marker.read_text() != made_of:
        for place in places.values():
            shutil.rmtree(place, ignore_errors=True)
        atomic_write(marker, made_of)
    if all(place.is_dir() for place in places.values()):
        return
    at = dict(zip((max(1, training.recipe.steps // 2), training.recipe.steps), STATES, strict=True))
    everything = torch.ones(1, n, dtype=torch.bool)
    for step, ensemble in pretrain_steps(training, bank.examples, everything, [MODEL_SEED]):
        if step in at and not places[at[step]].is_dir():
            model = ensemble.copy_to(0, training.start(MODEL_SEED))
            LanguageModel(model, corpus.tokenizer).save(folder / "model.partial")
            (folder / "model.partial").replace(places[at[step]])  # whole, or not there
