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
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tda_core.files import TEMPORARY, atomic_write, source_fingerprint
from tda_core.store import canonical, fingerprint
from tda_core.task_corpus import CorpusSpec, TaskCorpus
from tda_core.threads import one_thread

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
INDEX = "models.json"  # which checkpoints a folder holds, and of which corpus
NOTES = "training.json"  # beside the checkpoint: what it was trained with and how it went
ARCHITECTURES = ("llama", "gpt2")
BLOCK = 400  # documents made at a time
NOTED = 20  # how often a training run notes its losses
SHORTEST = 8  # words that an example with its separator has at least


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


def word_tokenizer(words: Sequence[str], *, length: int) -> PreTrainedTokenizerFast:
    """One token a word, after <pad>, <bos>, <eos> and <unk>; texts are split at spaces, and a line break is a word.

    A text's tokens begin with <bos>, unless `add_special_tokens=False`. length: the model's largest number of tokens.
    Raises ValueError for a repeated word, and one that holds a space.
    """
    tokens = [*SPECIAL.values(), *words]
    for word in tokens:
        if tokens.count(word) > 1 or " " in word or not word:
            raise ValueError(f"words must differ, be no special token and hold no space, got {word!r}")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(tokens)}, SPECIAL["unk_token"]))
    breaks = pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(" +"), "removed"), breaks])
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokens.index(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, padding_side="right", **SPECIAL)


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
    optimiser = torch.optim.AdamW(_groups(model, recipe), lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    curve: dict[str, Any] = {"steps": [], "train_loss": [], "heldout_loss": []}
    since: list[float] = []
    batches = _batches(corpus, tokenizer, recipe.length, recipe.batch_size, seed=seed)
    for step, batch in zip(range(recipe.steps), batches, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
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


def _groups(model: PreTrainedModel, recipe: LMRecipe) -> list[dict[str, Any]]:
    """Parameters for AdamW: matrices decay, norms and biases do not."""
    matrices, rest = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
    return [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]


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
