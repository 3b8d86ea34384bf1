"""A bank of ground truths of language models: one small file a retrained model, which is never trained twice.

    bank = TruthBank("banks/help_topics", training, examples, queries)
    truth = bank.measure(random_subsets(n, 64, 0.3, seed=0), seeds=[0, 1]).last    # trains what the bank lacks
    truth = bank.measure(random_subsets(n, 96, 0.3, seed=0), seeds=range(4)).last  # more: the new ones only

A bank is a folder: copy it to share it, `merge` those of several machines. Its header says what it was made with; a
bank of another recipe, other documents or other queries is refused. A model is trained as if it were alone, so a bank
that grew equals one that was made at once: bit for bit on one machine's CPU where documents are equally long, else up
to rounding (a block's batches are as wide as its longest document).
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.examples import Examples
from tda_core.files import atomic_write, source_fingerprint
from tda_core.ground_truth import GroundTruth
from tda_core.pretraining import LMTraining, evaluate, pretrain_steps
from tda_core.store import CorruptFile, canonical, fingerprint, load_tensors, save_tensors
from tda_core.threads import one_thread

log = logging.getLogger(__name__)
HEADER, ENDING = "bank.json", ".safetensors"
MODELS = f"[0-9a-f]*{ENDING}"  # and not what a killed writer has left
# Of each model's own documents, how many its training loss is measured on
OWN = 128


@dataclass(frozen=True, eq=False)
class Measured:
    """Ground truths at each checkpoint and at the end, in order of steps, and what the models cost.

    own: (k, m, s) mean loss of documents that a model was trained on, nats a token. seconds: (m, s) of CPU time; on a
    GPU, of wall-clock time.
    """

    steps: tuple[int, ...]
    truths: tuple[GroundTruth, ...]
    own: Tensor
    seconds: Tensor

    @property
    def last(self) -> GroundTruth:
        return self.truths[-1]


@dataclass(frozen=True, eq=False)
class TruthBank:
    """Losses of `queries` under models trained on subsets of `examples`, kept in a folder.

    checkpoints: numbers of steps after which losses are measured too, on the way to the end of the same run. Raises
    ValueError for a folder that holds a bank of something else, naming what differs, and for checkpoints that do not
    rise within the recipe's steps.
    """

    folder: Path
    training: LMTraining
    examples: Examples
    queries: Examples
    checkpoints: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        object.__setattr__(self, "checkpoints", tuple(self.checkpoints))
        if list(self.steps) != sorted(set(self.steps)) or self.steps[0] < 1:
            last = self.training.recipe.steps
            raise ValueError(f"checkpoints must rise within 1..{last - 1}, got {self.checkpoints}")
        path = self.folder / HEADER
        if path.is_file():
            check_header(path, json.loads(path.read_text(encoding="utf-8")), self.header)
        else:
            atomic_write(path, json.dumps(self.header, indent=1))

    @property
    def steps(self) -> tuple[int, ...]:
        return (*self.checkpoints, self.training.recipe.steps)

    @cached_property
    def header(self) -> dict[str, Any]:
        """What the bank was made with, as JSON has it."""
        parts = {"kind": "TruthBank", "data": self.examples.hash[:16], "queries": self.queries.hash[:16]}
        parts |= {"training": canonical(self.training.identity), "checkpoints": list(self.checkpoints)}
        return parts | {"code": source_fingerprint(["tda_core.pretraining"])}

    def path(self, mask: Tensor, seed: int) -> Path:
        """Where the model of one subset, (n,) bool, and seed lies."""
        return self.folder / f"{fingerprint(mask)}-{seed}{ENDING}"

    @property
    def n_models(self) -> int:
        """How many models the bank holds."""
        return len(list(self.folder.glob(MODELS)))

    def measure(self, masks: Tensor, seeds: Sequence[int], *, n_jobs: int = -1, progress: bool = True) -> Measured:
        """The losses of every subset and seed: those that the bank has, and the others trained, a block at a time.

        masks: (m, n) bool, equally large subsets. n_jobs: processes (joblib: under `parallel_config(backend="dask")`
        blocks go to a cluster); on a GPU blocks follow each other, and `measured_by_process` takes several. Raises
        ValueError for bad masks and repeated seeds.
        """
        found = self._held(masks, seeds)
        missing = [pair for pair, held in found.items() if held is None]
        found |= self.fill(masks, missing, n_jobs=n_jobs, progress=progress)
        return self._gather(masks, seeds, found)

    def missing(self, masks: Tensor, seeds: Sequence[int]) -> list[tuple[int, int]]:
        """What `measure` would train: (row of masks, seed)."""
        return [pair for pair, held in self._held(masks, seeds).items() if held is None]

    def fill(
        self, masks: Tensor, pairs: Sequence[tuple[int, int]], *, n_jobs: int = -1, progress: bool = True
    ) -> dict[tuple[int, int], dict[str, Tensor]]:
        """Train the models of these (row of masks, seed), a block at a time, and keep what they measured."""
        found = {}
        with tqdm(total=len(pairs), desc="pre-training", unit="model", disable=not progress or not pairs) as bar:
            for block, results in self._train(masks, list(pairs), n_jobs):
                for (i, seed), result in zip(block, results, strict=True):
                    save_tensors(self.path(masks[i], seed), result, {"kind": "banked model", "seed": seed})
                    found[i, seed] = result
                bar.update(len(block))
        return found

    def merge(self, folder: Path | str) -> int:
        """Copy what another bank has and this one lacks; how many models. ValueError for a bank of other things."""
        folder = Path(folder)
        path = folder / HEADER
        if not path.is_file():
            raise ValueError(f"{folder} holds no bank: {HEADER} is missing")
        check_header(path, json.loads(path.read_text(encoding="utf-8")), self.header)
        new = [file for file in sorted(folder.glob(MODELS)) if not (self.folder / file.name).exists()]
        for file in new:
            load_tensors(file)  # a damaged file is refused here, by its checksum
            shutil.copyfile(file, self.folder / f"{file.name}.partial")
            (self.folder / f"{file.name}.partial").replace(self.folder / file.name)
        return len(new)

    def _held(self, masks: Tensor, seeds: Sequence[int]) -> dict[tuple[int, int], dict[str, Tensor] | None]:
        """What the bank has of each (row of masks, seed)."""
        if not len(seeds) or len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds must be distinct and at least one, got {list(seeds)}")
        if masks.dtype != torch.bool or masks.ndim != 2 or masks.shape[1] != len(self.examples):
            expected = f"boolean (m, {len(self.examples)})"
            raise ValueError(f"masks must be {expected}, got {masks.dtype} {tuple(masks.shape)}")
        return {(i, int(seed)): self._load(masks[i], int(seed)) for seed in seeds for i in range(len(masks))}

    def _load(self, mask: Tensor, seed: int) -> dict[str, Tensor] | None:
        path = self.path(mask, seed)
        try:
            tensors, _ = load_tensors(path)
        except FileNotFoundError:
            return None
        except CorruptFile as error:
            log.warning("training a model again: %s", error)
            path.unlink(missing_ok=True)
            return None
        return tensors

    def _train(self, masks: Tensor, missing: list[tuple[int, int]], n_jobs: int):
        """Blocks of (row of masks, seed), each with what its models measured."""
        size = self.training.recipe.models_per_block
        blocks = [missing[start : start + size] for start in range(0, len(missing), size)]

        def job(block: list[tuple[int, int]]) -> Callable:
            rows, seeds = zip(*block, strict=True)
            return joblib.delayed(train_block)(self, masks[list(rows)], seeds)

        alone = len(blocks) < 2 or self.training.place.type != "cpu"
        parallel = joblib.Parallel(n_jobs=1 if alone else n_jobs, return_as="generator")
        yield from zip(blocks, parallel(map(job, blocks)), strict=True)

    def _gather(self, masks: Tensor, seeds: Sequence[int], found: dict[tuple[int, int], dict]) -> Measured:
        def stacked(name: str) -> Tensor:
            return torch.stack([torch.stack([found[i, int(seed)][name] for seed in seeds]) for i in range(len(masks))])

        losses = stacked("losses")  # (m, s, k, q)
        kept = torch.tensor([int(seed) for seed in seeds])
        truths = tuple(GroundTruth(masks, kept, losses[:, :, k], None) for k in range(len(self.steps)))
        return Measured(self.steps, truths, stacked("own").permute(2, 0, 1), stacked("seconds"))


def train_block(bank: TruthBank, masks: Tensor, seeds: Sequence[int]) -> list[dict[str, Tensor]]:
    """Train the models of (B, n) masks and B seeds side by side; what the bank keeps of each."""
    with one_thread():
        clock = time.process_time if bank.training.place.type == "cpu" else time.perf_counter
        started = clock()
        own = [bank.examples[mask.nonzero()[:OWN, 0]] for mask in masks]
        measured: dict[str, list[Tensor]] = {"losses": [], "own": []}
        for step, ensemble in pretrain_steps(bank.training, bank.examples, masks, seeds):
            if step in bank.steps:
                measured["losses"].append(evaluate(ensemble, bank.queries))
                measured["own"].append(evaluate(ensemble, own).mean(1))
        seconds = torch.tensor((clock() - started) / len(masks), dtype=torch.float64)
        stacked = {name: torch.stack(values, 1) for name, values in measured.items()}
        return [
            {name: value[i].clone() for name, value in stacked.items()} | {"seconds": seconds}
            for i in range(len(masks))
        ]


def check_header(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ValueError where a bank was made with other things, naming the first; other code is a warning."""
    for name in ("kind", "data", "queries", "training", "checkpoints"):
        if found.get(name) != expected[name]:
            raise ValueError(f"{path} was made with {name} {found.get(name)}, but expected {expected[name]}")
    if found.get("code") != expected["code"]:
        log.warning("%s was filled by another version of the training code: its numbers may differ a little", path)
