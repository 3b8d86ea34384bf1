"""Token tables whose states lie on disk in half precision, for more documents than fit in memory.

Written once, a block of documents at a time, and mapped: pages come and go as memory allows. A run that was stopped
goes on behind the last whole block.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.examples import IGNORED, Examples
from tda_core.files import atomic_write
from tda_core.language import LanguageModel
from tda_core.token_table import TokenTable, token_table

PROGRESS = "progress.json"
# Documents that are run through the model between two notes of progress
BLOCK = 2048


def mapped_token_table(
    model: LanguageModel, examples: Examples, folder: str | Path, *, layer: int | float | None = None
) -> TokenTable:
    """`token_table` with states in float16, mapped from files in a folder, which are written where they are missing.

    The context is the last token alone. Raises ValueError for a folder that holds the states of another model, other
    documents or another layer, and what `token_table` raises.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    counts = (examples.targets != IGNORED).sum(1).cpu()
    ends = counts.cumsum(0)
    names = ("last",) if layer is None else ("last", "hidden")
    key = {"model": model.identity, "documents": examples.hash, "layer": layer}
    progress = {"key": key, "done": 0}
    if (folder / PROGRESS).is_file():
        progress = json.loads((folder / PROGRESS).read_text())
        if progress["key"] != key:
            raise ValueError(f"{folder} holds states of {progress['key']}, but these are {key}")
    shape, mode = (int(ends[-1]), model.width), "r+" if progress["done"] else "w+"
    files = {name: _mapped(folder / f"{name}.npy", mode, shape) for name in names}
    with tqdm(total=len(examples), initial=progress["done"], desc="states", unit="document", leave=False) as bar:
        while progress["done"] < len(examples):
            start, stop = progress["done"], min(progress["done"] + BLOCK, len(examples))
            table = token_table(model, examples[start:stop], layer=layer, n_context=1)
            rows = slice(int(ends[start] - counts[start]), int(ends[stop - 1]))
            for name, file in files.items():
                file[rows] = getattr(table, name).half().numpy()
                file.flush()
            progress["done"] = stop
            atomic_write(folder / PROGRESS, json.dumps(progress).encode())
            bar.update(stop - start)
    labelled = (examples.targets != IGNORED).cpu()
    states = {name: torch.from_numpy(file) for name, file in files.items()}
    context, targets = examples.inputs.cpu()[labelled][:, None], examples.targets.cpu()[labelled]
    documents = torch.arange(len(examples)).repeat_interleave(counts)
    last: Tensor = states["last"]
    return TokenTable(states.get("hidden", last), last, context, targets, documents, len(examples))


def _mapped(path: Path, mode: str, shape: tuple[int, int]) -> np.memmap:
    if mode == "w+":
        return np.lib.format.open_memmap(path, mode, np.float16, shape)
    return np.lib.format.open_memmap(path, mode)
