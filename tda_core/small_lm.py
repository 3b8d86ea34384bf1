"""A small causal language model of the task corpus: trained from scratch on the CPU, kept as a Hugging Face checkpoint.

Tokens are words (`tokenizers` WordLevel), so the prompt's tokens followed by the response's are those of both together.
Every training row is one document behind a beginning-of-text token, long enough to fill the row: no padding, and no
attention between documents.
"""

import itertools
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tda_core.files import TEMPORARY, atomic_write, source_fingerprint
from tda_core.lm_recipes import LMRecipe
from tda_core.lm_tokenizers import word_tokenizer
from tda_core.store import canonical, fingerprint
from tda_core.task_corpus import CorpusSpec, TaskCorpus
from tda_core.threads import one_thread

INDEX = "models.json"  # which checkpoints a folder holds, and of which corpus
NOTES = "training.json"  # beside the checkpoint: what it was trained with and how it went
BLOCK = 400  # documents made at a time
NOTED = 20  # how often a training run notes its losses
SHORTEST = 8  # words that an example with its separator has at least


@dataclass(frozen=True, eq=False)
class TrainedLM:
    """A trained model with its tokenizer, the folder that holds both, and its learning curve.

    steps: after how many steps the losses were noted; train_loss: mean of the steps since the last note;
    heldout_loss: of documents that are not trained on. Losses are nats a token, over all tokens.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    steps: tuple[int, ...]
    train_loss: tuple[float, ...]
    heldout_loss: tuple[float, ...]
    seconds: float  # of CPU time


def small_lms(
    corpus: TaskCorpus, recipe: LMRecipe, seeds: Sequence[int], *, folder: str | Path, progress: bool = True
) -> list[TrainedLM]:
    """A model for each seed, from `folder` where it was trained before with the same code, else trained, side by side.

    Each trains in a thread of its own with one torch thread: on two cores, two torch threads for one model this small
    take longer than one. A checkpoint is written beside its place and renamed: it is whole, or it is not there.
    Raises ValueError for no seeds or repeated ones.
    """
    if not len(seeds) or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be distinct and at least one, got {list(seeds)}")
    params = {"corpus": [corpus.spec, corpus.seed], "recipe": recipe, "code": source_fingerprint([__name__])}
    places = {seed: Path(folder) / f"lm-{seed}-{fingerprint(params | {'seed': seed})}" for seed in seeds}
    tokenizer = word_tokenizer(corpus.vocabulary, length=recipe.length)
    # made one after another: torch's random state belongs to all threads
    missing = {
        seed: recipe.untrained(len(tokenizer), seed=seed) for seed in seeds if not (places[seed] / NOTES).is_file()
    }
    total = len(missing) * recipe.steps
    with one_thread(), tqdm(total=total, desc="training", unit="step", disable=not (progress and missing)) as bar:
        jobs = (joblib.delayed(_train)(corpus, recipe, model, seed, bar) for seed, model in missing.items())
        parallel = joblib.Parallel(len(missing) or 1, backend="threading", return_as="generator")
        for seed, notes in zip(missing, parallel(jobs), strict=True):
            _save(places[seed], missing[seed], tokenizer, notes | {"params": canonical(params), "seed": seed})
    index = {"spec": asdict(corpus.spec), "seed": corpus.seed, "models": [place.name for place in places.values()]}
    atomic_write(Path(folder) / INDEX, json.dumps(index, indent=1))
    return load_lms(folder)[1]


def load_lms(folder: str | Path) -> tuple[TaskCorpus, list[TrainedLM]]:
    """The corpus and the models of the last `small_lms` in a folder. Raises FileNotFoundError where there was none."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no models were trained in this folder (small_lms writes it)")
    index = json.loads(path.read_text(encoding="utf-8"))
    corpus = TaskCorpus(CorpusSpec(**index["spec"]), index["seed"])
    return corpus, [_load(Path(folder) / name) for name in index["models"]]


def _save(place: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, notes: dict[str, Any]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.parent / f"{TEMPORARY}{uuid.uuid4().hex[:12]}-{place.name}"
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / NOTES).write_text(json.dumps(notes), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)  # a folder without notes, which is not ours to trust
        os.replace(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(place: Path) -> TrainedLM:
    notes = json.loads((place / NOTES).read_text(encoding="utf-8"))
    curve = {name: tuple(notes[name]) for name in ("steps", "train_loss", "heldout_loss")}
    model = AutoModelForCausalLM.from_pretrained(place).eval()
    return TrainedLM(place, model, AutoTokenizer.from_pretrained(place), **curve, seconds=notes["seconds"])


def _train(corpus: TaskCorpus, recipe: LMRecipe, model: PreTrainedModel, seed: int, bar: tqdm) -> dict[str, Any]:
    """Train a model in place; how it went."""
    started = time.thread_time()
    tokenizer = word_tokenizer(corpus.vocabulary, length=recipe.length)  # its own: threads share no tokenizer
    heldout = next(_batches(corpus, tokenizer, recipe.length, 256, seed="held out"))
    optimiser = torch.optim.AdamW(
        recipe.groups(model.named_parameters()), lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True
    )
    curve: dict[str, Any] = {"steps": [], "train_loss": [], "heldout_loss": []}
    since: list[float] = []
    batches = _batches(corpus, tokenizer, recipe.length, recipe.batch_size, seed=seed)
    for step, batch in zip(range(recipe.steps), batches, strict=False):
        recipe.set_rates(optimiser, step)
        loss = _loss(model, batch)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        since.append(float(loss.detach()))
        bar.update()
        if (step + 1) % max(1, recipe.steps // NOTED) == 0 or step + 1 == recipe.steps:
            with torch.no_grad():
                curve["heldout_loss"].append(float(_loss(model, heldout)))
            curve["steps"].append(step + 1)
            curve["train_loss"].append(sum(since) / len(since))
            since.clear()
    return curve | {"seconds": time.thread_time() - started}


def _loss(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it; tokens: (batch, length), no padding."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _batches(
    corpus: TaskCorpus, tokenizer: PreTrainedTokenizerFast, length: int, size: int, *, seed: int | str
) -> Iterator[Tensor]:
    """Endless batches (size, length) of token rows, each the beginning of a document of its own."""
    n_examples = math.ceil(length / SHORTEST)
    for block in itertools.count():
        texts = corpus.documents(size * max(1, BLOCK // size), n_examples, seed=f"{seed} {block}")
        rows = torch.tensor(tokenizer(texts, truncation=True, max_length=length)["input_ids"])
        yield from rows.split(size)
