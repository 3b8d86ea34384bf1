"""A gallery of predictions and the training examples behind them: one page that opens without a server or a network.

    python -m tda_core.gallery stride.safetensors logra.safetensors -o gallery.html

Reads score files (`tda_core.score_file`), one a method, of the same queries and training examples. The page holds each
query's strongest proponents and opponents by every method, with texts and pictures where the files have them. Its data
are compressed, and become text or pixels alone: a document that holds a script is shown, and never run.
"""

import argparse
import base64
import gzip
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from tda_core.files import atomic_write
from tda_core.score_file import LISTS, Items, ScoreFile
from tda_core.store import CorruptFile

PAGE = Path(__file__).parent / "gallery_page"
STRONGEST = 100


def gallery(files: Sequence[ScoreFile], *, title: str = "", strongest: int = STRONGEST) -> str:
    """The page, as HTML.

    files: one a method, of the same queries and training examples in any order; texts and pictures are the first's.
    strongest: proponents, and opponents, that are kept of each query and method; scores of 0 are neither. Raises
    ValueError for no file, two of one method, other queries or examples (naming one), and strongest < 1.
    """
    if not files:
        raise ValueError("a gallery needs at least one score file, got none")
    if strongest < 1:
        raise ValueError(f"strongest must be at least 1, got {strongest}")
    names = [file.about.method for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two files are of the method {twice!r}: name them apart")
    first = files[0]
    ranked = [_ranked(_aligned(file, first).scores.numpy(), strongest) for file in files]
    used = np.unique(np.concatenate([examples for lists in ranked for examples, _ in lists]).astype(int))
    methods = [
        {
            "name": file.about.method,
            "about": _about(file),
            "examples": [np.searchsorted(used, examples).tolist() for examples, _ in lists],
            "scores": [[float(f"{score:.7g}") for score in scores] for _, scores in lists],
        }
        for file, lists in zip(files, ranked, strict=True)
    ]
    train = _shown(first.train.some(used.tolist())) if len(used) else {"ids": []}  # where all scores are 0
    data = {"queries": _shown(first.queries), "train": train, "methods": methods}
    packed = base64.b64encode(gzip.compress(json.dumps(data).encode(), mtime=0)).decode()
    title = html.escape(title or "Attribution gallery")
    q, n = first.scores.shape
    about = f"{q:,} queries, {n:,} training examples, {len(files)} method{'s' * (len(files) > 1)}; a positive score "
    about += "means that training on the example lowers the query's loss."
    parts = {name: (PAGE / file).read_text(encoding="utf-8") for name, file in _FILES.items()}
    return Template(parts.pop("page")).substitute(title=title, about=about, data=packed, **parts)


_FILES = {"page": "page.html", "style": "style.css", "script": "script.js"}


def _aligned(file: ScoreFile, first: ScoreFile) -> ScoreFile:
    """The file with the queries and training examples of the first, in its order."""
    pairs = {"queries": (file.queries, first.queries), "training examples": (file.train, first.train)}
    for what, (own, expected) in pairs.items():
        apart = sorted(own.index.keys() ^ expected.index.keys())
        if apart:
            both = f"{file.about.method} and {first.about.method}"
            raise ValueError(f"{both} are of different {what}: {apart[0]!r} is in one alone")
    return file.select(first.queries.ids, first.train.ids)


def _ranked(scores: np.ndarray, strongest: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each query the strongest examples and their scores, falling."""
    found = []
    for row in scores:
        order = np.argsort(-row, kind="stable")
        order = order if len(order) <= 2 * strongest else np.concatenate([order[:strongest], order[-strongest:]])
        order = order[row[order] != 0]
        found.append((order, row[order]))
    return found


def _about(file: ScoreFile) -> str:
    about = file.about
    settings = {"damping": about.damping} if about.damping is not None else {}
    said = ", ".join(f"{name} {value}" for name, value in (settings | about.parameters).items())
    return f"of {about.target}{'; ' * bool(said)}{said}"


def _shown(items: Items) -> dict[str, Any]:
    found: dict[str, Any] = {"images": None}
    for name in LISTS:
        given = getattr(items, name)  # half a character, which UTF-8 cannot hold, is shown as a replacement
        found[name] = given and [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in given]
    if items.images is not None:
        _, height, width, *channels = items.images.shape
        pixels = [base64.b64encode(image.numpy().tobytes()).decode() for image in items.images]
        shape = {"height": height, "width": width, "channels": channels[0] if channels else 1}
        found["images"] = {"shape": shape, "pixels": pixels}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a gallery; 1 where it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m tda_core.gallery", description="A page of scores to look through.")
    parser.add_argument("scores", nargs="+", help="score files, or folders of blocks, one a method")
    parser.add_argument("-o", "--output", required=True, help="the page to write")
    parser.add_argument("--title", default="")
    parser.add_argument("--strongest", type=int, default=STRONGEST, help="kept of each query, method and sign")
    parser.add_argument("--force", action="store_true", help="replace a page that is there")
    given = parser.parse_args(arguments)
    try:
        if Path(given.output).exists() and not given.force:
            raise FileExistsError(f"{given.output} is there already: give another name, or --force")
        page = gallery([ScoreFile.load(path) for path in given.scores], title=given.title, strongest=given.strongest)
        atomic_write(given.output, page)
    except (OSError, CorruptFile, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{given.output}: {len(page) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
