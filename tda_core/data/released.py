"""The scores that the authors of in-context probing (ICP) released, checked, with what texts there are.

Jiao, Gao, Raghunathan, Xiong 2025, Findings of NAACL, https://arxiv.org/abs/2407.12259, repository
cxcscmu/InContextDataAttribution (its commit and the checksums stand in tda_core/data/__init__.py). A pool of
52,002 Alpaca instructions was scored against a task of 100 of its k-means centres with pythia-1b-deduped: once by
ICP (the share of the task's examples whose likelihood a demonstration raises), once by the inner product of
gradients (IP: logarithms summed over weight tensors). The files have no licence: they are read, and never copied.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from tda_core.data import RELEASED
from tda_core.data.files import DataFile, fetch

LOW, HIGH = 0.5, 0.9  # the two bins of ICP whose texts were released: at most LOW, and above HIGH
BIN_SEED = 123


@dataclass(frozen=True, eq=False)
class ReleasedScores:
    """icp: (n,) float64, shares of the task's examples. ip: (m, n) float32, task example by pool example.

    prompts: the m task examples as the authors wrote them on one line. index: (k,) int64, increasing, which pool
    examples have a text; demonstrations: those k texts on one line in the same form; lengths: (k,) int64,
    characters of instruction, input and output.
    """

    icp: np.ndarray
    ip: np.ndarray
    prompts: tuple[str, ...]
    index: np.ndarray
    demonstrations: tuple[str, ...]
    lengths: np.ndarray

    def __post_init__(self) -> None:
        n, k = len(self.icp), len(self.index)
        if self.ip.shape != (len(self.prompts), n):
            raise ValueError(
                f"ip must be (task examples, pool) = {(len(self.prompts), n)} to fit {len(self.prompts)} prompts and "
                f"{n} ICP scores, got {self.ip.shape}"
            )
        for name in ("icp", "ip"):
            bad = np.argwhere(~np.isfinite(getattr(self, name)))
            if len(bad):
                raise ValueError(f"{name} must be finite, but {name}{bad[0].tolist()} is not ({len(bad)} in all)")
        outside = np.flatnonzero((self.icp < 0) | (self.icp > 1))
        if len(outside):
            raise ValueError(f"ICP scores are shares in 0..1, but icp[{outside[0]}] is {self.icp[outside[0]]}")
        if len(self.demonstrations) != k or self.lengths.shape != (k,):
            raise ValueError(f"{k} indices, but {len(self.demonstrations)} texts and {self.lengths.shape} lengths")

    @property
    def ip_mean(self) -> np.ndarray:
        """The IP score of each pool example for the whole task: (n,) float64."""
        return self.ip.mean(0, dtype=np.float64)

    def repeated_tasks(self) -> list[tuple[int, int]]:
        """Pairs (task example j, pool example i) with the same text, among the pool examples that have one."""
        places: dict[str, list[int]] = {}
        for j, prompt in enumerate(self.prompts):
            places.setdefault(_squeezed(prompt), []).append(j)
        return [
            (j, int(i))
            for i, text in zip(self.index, self.demonstrations, strict=True)
            for j in places.get(_squeezed(text), [])
        ]


def load_released(files: Sequence[DataFile] | None = None) -> ReleasedScores:
    """The released scores, found in `TDA_DATA_DIR` or `data/`, else downloaded (22 MB) into `data/`.

    files: default the released ones, in the order of `RELEASED["icp_released"]`. Raises ValueError for a file with
    another checksum, shapes that do not fit each other, NaN, gaps in the indices, or a bin of another size than
    the scores say; DataUnavailable, which says where to put which file.

    The two bins' texts carry no indices. They stand in the order that Python's `random.seed(123); random.shuffle`
    gives to the bin's increasing indices. That is not documented: it was found by trying 108 seeds of 5
    generators, forwards and backwards, on three orders, for the rank correlation of length with IP (.68 and .45 in
    the two bins, against .12 for the next best of all tries). Evidence that the search did not look at:
    texts that repeat a task example stand where IP with that task example is the largest of all the pool
    (see notebooks/icp/06_released.ipynb).
    """
    scores, prompts, low, high, *pieces = RELEASED["icp_released"] if files is None else files
    icp = read_icp(fetch(scores))
    texts = {
        **_bin_texts(fetch(low), np.flatnonzero(icp <= LOW)),
        **_bin_texts(fetch(high), np.flatnonzero(icp > HIGH)),
    }
    index = np.array(sorted(texts), dtype=np.int64)
    return ReleasedScores(
        icp=icp,
        ip=read_ip([fetch(piece) for piece in pieces]),
        prompts=tuple(fetch(prompts).read_text(encoding="utf-8").splitlines()[1:]),  # the first line is a header
        index=index,
        demonstrations=tuple(_one_line(texts[i]) for i in index),
        lengths=np.array([_length(texts[i]) for i in index], dtype=np.int64),
    )


def with_pool(released: ReleasedScores, path: str | Path) -> ReleasedScores:
    """The same scores with the texts of the whole pool: a JSON list of n {instruction, input, output} in its order.

    Raises ValueError for another number of texts, and where the pool's texts are not those of the two bins (the
    original Alpaca has the same instructions, but other outputs), naming the first that differs.
    """
    texts = _read_list(Path(path))
    if len(texts) != len(released.icp):
        raise ValueError(f"{path} holds {len(texts)} texts, but {len(released.icp)} examples were scored")
    lines = tuple(_one_line(text) for text in texts)
    for i, known in zip(released.index, released.demonstrations, strict=True):
        if _squeezed(lines[i]) != _squeezed(known):
            raise ValueError(f"{path} is not the pool that was scored: its text {i} is not {known[:60]!r}")
    lengths = np.array([_length(text) for text in texts], dtype=np.int64)
    return replace(released, index=np.arange(len(texts)), demonstrations=lines, lengths=lengths)


def read_icp(path: Path) -> np.ndarray:
    """`{"0": [score], "1": [score], ...}` as (n,) float64. Raises ValueError where an index is missing."""
    table = json.loads(path.read_text(encoding="utf-8"))
    missing = [i for i in range(len(table)) if str(i) not in table]
    if not table or missing:
        raise ValueError(f"{path} must hold the indices 0..{len(table) - 1}, but lacks {missing[:3]}")
    wrong = [i for i in range(len(table)) if np.shape(table[str(i)]) != (1,)]
    if wrong:
        raise ValueError(f"{path} must hold one score an example, but example {wrong[0]} has {table[str(wrong[0])]}")
    return np.array([table[str(i)][0] for i in range(len(table))], dtype=np.float64)


def read_ip(paths: Sequence[Path]) -> np.ndarray:
    """Tensors of (m, n_piece) each, side by side: (m, n) float32. Raises ValueError for anything else in a file."""
    pieces = []
    for path in paths:
        piece = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(piece, torch.Tensor) or piece.ndim != 2:
            raise ValueError(f"{path} must hold one tensor (task examples, pool examples), got {_what(piece)}")
        if pieces and len(piece) != len(pieces[0]):
            raise ValueError(f"{path} has {len(piece)} task examples, the pieces before it {len(pieces[0])}")
        pieces.append(piece.float())
    return torch.cat(pieces, dim=1).numpy()


def _bin_texts(path: Path, index: np.ndarray) -> dict[int, dict[str, str]]:
    """The bin's texts by their indices in the pool; see `load_released` for their order."""
    texts = _read_list(path)
    if len(texts) != len(index):
        raise ValueError(f"{path} holds {len(texts)} texts, but {len(index)} ICP scores lie in its bin")
    order = index.tolist()
    random.Random(BIN_SEED).shuffle(order)
    return dict(zip(order, texts, strict=True))


def _read_list(path: Path) -> list[dict[str, str]]:
    texts = json.loads(path.read_text(encoding="utf-8"))
    fields = ("instruction", "input", "output")
    if not isinstance(texts, list):
        raise ValueError(f"{path} must hold a list of texts, got {type(texts).__name__}")
    for i, text in enumerate(texts):
        if not isinstance(text, dict) or not all(isinstance(text.get(field), str) for field in fields):
            raise ValueError(f"{path}: text {i} must have the fields {', '.join(fields)}, got {str(text)[:80]}")
    return texts


def _one_line(text: dict[str, str]) -> str:
    """As in the authors' prompts, where no colon follows Response after an input."""
    middle = f" Input: {text['input']} Response" if text["input"] else " Response:"
    return f"Instruction: {text['instruction']}{middle} {text['output']}"


def _length(text: dict[str, str]) -> int:
    return sum(len(text[field]) for field in ("instruction", "input", "output"))


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _what(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
