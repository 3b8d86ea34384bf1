"""Scores of any method in one documented format: a matrix, what it is of, and what a reader needs to look at it.

    file = ScoreFile(scores, About("stride", target="loss"), Items.of_texts(train), Items.of_texts(queries))
    file.save("stride.safetensors")             # or save_blocks("stride", blocks), a folder of consecutive queries
    ScoreFile.load("stride.safetensors").scores  # (n_query, n_train), positive for proponents
    python -m tda_core.score_file stride.safetensors

**The format, version 1.** A safetensors file. Tensors: `scores`, float32 (rows, n_train); for `train` and `query` each,
`<part>_ids`, and where there are any `<part>_texts`, `<part>_sources` and `<part>_images`. Lists of texts are two
tensors: `<name>.bytes`, uint8, their UTF-8 one after the other, and `<name>.ends`, int64, where each ends. Images are
uint8, (n, height, width) or (n, height, width, 3). The header's metadata holds `sha256`, over all tensors, and `tda`,
JSON with `kind` "scores", `version`, `sign` "proponents_positive" (the only one), `rows` [first, end, of all queries],
and the fields of `About`. A folder of files `block-*.safetensors` with consecutive rows is one matrix; the first block
alone holds what is of the training examples.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tda_core.store import CorruptFile, load_tensors, save_tensors
from tda_core.text_pairs import TextPairs

VERSION, SIGN = 1, "proponents_positive"
LISTS, BLOCKS = ("ids", "texts", "sources"), "block-*.safetensors"


@dataclass(frozen=True)
class About:
    """What scores are of. method: a name of the table in the README, or a package's. target: the function of the
    parameters that is attributed, such as "loss", "margin" or "log_likelihood". damping: where the method has one.
    parameters: its other settings. model, data, code: hashes, "" where they are not known. Raises ValueError for an
    empty method or target, and what JSON cannot hold."""

    method: str
    target: str
    damping: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    data: str = ""
    code: str = ""

    def __post_init__(self) -> None:
        for name in ("method", "target"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ValueError(f"{name} must be a name, got {getattr(self, name)!r}")
        try:
            json.dumps(self.parameters, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"parameters must be what JSON can hold, got {self.parameters!r}") from error


@dataclass(frozen=True, eq=False)
class Items:
    """Training examples or queries. ids: one each, different. texts: what to show. sources: where each comes from, for
    filters. images: uint8 (n, height, width) or (n, height, width, 3). Raises ValueError for none, repeated ids, other
    lengths and other images."""

    ids: tuple[str, ...]
    texts: tuple[str, ...] | None = None
    sources: tuple[str, ...] | None = None
    images: Tensor | None = None

    def __post_init__(self) -> None:
        for name in LISTS:
            given = getattr(self, name)
            if given is None:
                continue
            object.__setattr__(self, name, tuple(given))
            wrong = next((text for text in given if not isinstance(text, str)), None)
            if wrong is not None or isinstance(given, str):
                raise ValueError(f"{name} must be a list of texts, got {wrong if wrong is not None else given!r}")
            if len(given) != len(self.ids):
                raise ValueError(f"{len(self.ids)} ids, but {len(given)} {name}")
        if not self.ids:
            raise ValueError("there must be at least one id, got none")
        if len(self.index) < len(self.ids):
            raise ValueError(f"ids must differ, got {next(i for i in self.ids if self.ids.count(i) > 1)!r} twice")
        pictures = self.images
        if pictures is not None:
            form = pictures.ndim == 3 or (pictures.ndim == 4 and pictures.shape[3] == 3)
            if pictures.dtype != torch.uint8 or not form or len(pictures) != len(self.ids):
                got = f"{pictures.dtype} {tuple(pictures.shape)}"
                raise ValueError(f"images must be uint8 ({len(self.ids)}, height, width[, 3]), got {got}")

    @classmethod
    def numbered(cls, n: int, prefix: str = "") -> "Items":
        """n items called by their number."""
        return cls(tuple(f"{prefix}{i}" for i in range(n)))

    @classmethod
    def of_texts(cls, pairs: TextPairs, *, prefix: str = "", sources: Sequence[str] | None = None) -> "Items":
        """Prompts with their responses, called by their number."""
        ids = tuple(f"{prefix}{i}" for i in range(len(pairs)))
        return cls(ids, tuple(map("".join, pairs.pairs)), None if sources is None else tuple(sources))

    @cached_property
    def index(self) -> dict[str, int]:
        """Where each id stands."""
        return {name: i for i, name in enumerate(self.ids)}

    def places(self, ids: Iterable[str], what: str) -> list[int]:
        """Where these ids stand. Raises ValueError for one that is not there."""
        ids = list(ids)
        unknown = [name for name in ids if name not in self.index]
        if unknown:
            some = ", ".join(map(repr, self.ids[:3]))
            raise ValueError(f"unknown {what} {unknown[0]!r} ({len(unknown)} of {len(ids)}); known are {some}, ...")
        return [self.index[name] for name in ids]

    def some(self, places: Sequence[int]) -> "Items":
        """Those at these places."""
        lists = {name: None if (held := getattr(self, name)) is None else [held[i] for i in places] for name in LISTS}
        return Items(**lists, images=None if self.images is None else self.images[list(places)])


@dataclass(frozen=True, eq=False)
class ScoreFile:
    """scores: (n_query, n_train), positive where training on the example lowers the query's loss. Raises ValueError for
    another shape and for scores that are not finite, naming the query and the training example."""

    scores: Tensor
    about: About
    train: Items
    queries: Items

    def __post_init__(self) -> None:
        expected = (len(self.queries.ids), len(self.train.ids))
        if tuple(self.scores.shape) != expected:
            raise ValueError(
                f"scores must be (queries, training examples) = {expected}, got {tuple(self.scores.shape)}"
            )
        object.__setattr__(self, "scores", self.scores.detach().cpu().float())
        bad = (~torch.isfinite(self.scores)).nonzero()
        if len(bad):
            query, example = bad[0].tolist()
            value = float(self.scores[query, example])
            where = f"query {self.queries.ids[query]!r} and training example {self.train.ids[example]!r}"
            raise ValueError(f"the score of {where} is {value}: scores must be finite")

    def select(self, queries: Iterable[str] | None = None, train: Iterable[str] | None = None) -> "ScoreFile":
        """Some of the queries and training examples by their ids, in that order. ValueError for unknown ones."""
        rows = range(len(self.queries.ids)) if queries is None else self.queries.places(queries, "query")
        columns = range(len(self.train.ids)) if train is None else self.train.places(train, "training example")
        scores = self.scores[list(rows)][:, list(columns)]
        return replace(self, scores=scores, train=self.train.some(columns), queries=self.queries.some(rows))

    def save(self, path: Path | str, *, force: bool = False) -> None:
        """Write all to one file. Raises FileExistsError where there is one and force is not given."""
        _refuse_existing(Path(path), force)
        save_tensors(path, self._tensors(with_train=True), self._header(0, len(self.scores)))

    def save_blocks(self, folder: Path | str, rows: int, *, force: bool = False) -> None:
        """Write blocks of so many queries to a folder. Raises as `save` does, and ValueError for rows < 1."""
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        folder, total = Path(folder), len(self.scores)
        _refuse_existing(folder, force)
        for old in folder.glob(BLOCKS):
            old.unlink()
        for k, start in enumerate(range(0, total, rows)):
            part = self.select(self.queries.ids[start : start + rows])
            path = folder / BLOCKS.replace("*", f"{k:05d}")
            save_tensors(path, part._tensors(with_train=k == 0), part._header(start, total))

    @classmethod
    def load(cls, path: Path | str) -> "ScoreFile":
        """Read a file, or a folder of blocks.

        Raises FileNotFoundError; CorruptFile for a truncated or altered file; ValueError for one that holds no scores,
        is of a newer version or another sign, and blocks that are missing or do not belong together.
        """
        path = Path(path)
        paths = sorted(path.glob(BLOCKS)) if path.is_dir() else [path]
        if not paths:
            raise FileNotFoundError(f"no blocks of scores in {path}: expected {BLOCKS}")
        blocks = [_read(one) for one in paths]
        train = _items(blocks[0][0], "train")
        if train is None:
            raise ValueError(f"{paths[0]} names no training examples: is the first block missing?")
        expected, about = 0, blocks[0][1]["about"]
        for one, (_, header) in zip(paths, blocks, strict=True):
            start, expected_start, expected = header["rows"][0], expected, header["rows"][1]
            if start != expected_start:
                raise ValueError(f"{one} begins at query {start}, but expected {expected_start}: a block is missing")
            if header["about"] != about:
                raise ValueError(f"{one} and {paths[0]} are of different runs: {header['about']}, {about}")
        if expected != header["rows"][2]:
            raise ValueError(f"{path} ends at query {expected} of {header['rows'][2]}: a block is missing")
        parts = [_items(tensors, "query") for tensors, _ in blocks]
        scores = torch.cat([tensors["scores"] for tensors, _ in blocks])
        return cls(scores, About(**about), train, _joined(parts))

    def describe(self) -> str:
        """What the file holds, in some lines."""
        (q, n), s = self.scores.shape, self.scores
        lines = [f"{self.about.method}: scores of {q} queries and {n} training examples, positive for proponents"]
        for name in ("target", "damping", "parameters", "model", "data", "code"):
            if getattr(self.about, name) not in (None, "", {}):
                lines.append(f"  {name}: {getattr(self.about, name)}")
        lines.append(
            f"  from {float(s.min()):.4g} to {float(s.max()):.4g}, {float((s > 0).double().mean()):.0%} positive"
        )
        for name, items in (("training examples", self.train), ("queries", self.queries)):
            held = [f.name for f in fields(Items) if getattr(items, f.name) is not None]
            lines.append(f"  {name}: {', '.join(held)}; {items.ids[0]!r} to {items.ids[-1]!r}")
        return "\n".join(lines)

    def _tensors(self, *, with_train: bool) -> dict[str, Tensor]:
        found = {"scores": self.scores}
        for part, items in (("query", self.queries), ("train", self.train)):
            if part == "train" and not with_train:
                continue
            for name in LISTS:
                if getattr(items, name) is not None:
                    found |= _packed(f"{part}_{name}", getattr(items, name))
            if items.images is not None:
                found[f"{part}_images"] = items.images
        return found

    def _header(self, start: int, total: int) -> dict[str, Any]:
        rows = [start, start + len(self.scores), total]
        return {"kind": "scores", "version": VERSION, "sign": SIGN, "rows": rows, "about": asdict(self.about)}


def _refuse_existing(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise FileExistsError(f"{path} is there already: give another name, or force")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, header = load_tensors(path)
    if header.get("kind") != "scores":
        raise ValueError(f"{path} holds no scores, but {header.get('kind') or sorted(tensors)}")
    if header["version"] > VERSION:
        raise ValueError(f"{path} is of version {header['version']}, and this reader knows up to {VERSION}: update it")
    if header["sign"] != SIGN:
        raise ValueError(
            f"{path} has sign {header['sign']!r}, expected {SIGN!r}: import its matrix with its sign instead"
        )
    return tensors, header


def _packed(name: str, texts: Sequence[str]) -> dict[str, Tensor]:
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    ends = torch.tensor([len(part) for part in encoded]).cumsum(0)
    return {
        f"{name}.bytes": torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8),
        f"{name}.ends": ends,
    }


def _unpacked(tensors: dict[str, Tensor], name: str) -> tuple[str, ...] | None:
    if f"{name}.ends" not in tensors:
        return None
    data, ends = tensors[f"{name}.bytes"].numpy().tobytes(), tensors[f"{name}.ends"].tolist()
    return tuple(data[a:b].decode("utf-8", "surrogatepass") for a, b in zip([0, *ends], ends, strict=False))


def _items(tensors: dict[str, Tensor], part: str) -> Items | None:
    lists = {name: _unpacked(tensors, f"{part}_{name}") for name in LISTS}
    return None if lists["ids"] is None else Items(**lists, images=tensors.get(f"{part}_images"))


def _joined(parts: Sequence[Items]) -> Items:
    held = {name: [getattr(part, name) for part in parts] for name in LISTS}
    lists = {name: None if None in lists else tuple(chain(*lists)) for name, lists in held.items()}
    images = None if any(part.images is None for part in parts) else torch.cat([part.images for part in parts])
    return Items(**lists, images=images)


def main(arguments: Sequence[str] | None = None) -> int:
    """Describe score files; 1 where one cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m tda_core.score_file", description="Describe files of scores.")
    parser.add_argument("files", nargs="+", help="files, or folders of blocks")
    parser.add_argument("--json", action="store_true", help="what is in the header, as JSON")
    given, failed = parser.parse_args(arguments), 0
    for path in given.files:
        try:
            file = ScoreFile.load(path)
            print(json.dumps(asdict(file.about)) if given.json else file.describe())
        except (OSError, CorruptFile, ValueError) as error:
            print(error, file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
