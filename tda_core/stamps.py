"""What is up to date: each finished run's stamp holds the hash of all that it was made from, and its outputs.

A run is made from its notebook's cells, its parameters, the tda_core modules that its cells reach by import,
the pinned packages and the runs below it (lower-numbered notebooks of the same paper and variant). An equal
hash with all outputs intact means that there is nothing to do. A run that is redone because an output was
damaged keeps its hash, so the runs above it stay: everything is seeded, and gives the same again.
"""

import datetime
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tda_core import paths
from tda_core.files import TEMPORARY, atomic_write, file_hash, reachable_modules, source_fingerprint
from tda_core.jobs import Job, cell_source, read_notebook

HASH_UP_TO = 64 * 2**20  # bytes; larger outputs are compared by size and time of change
CACHE_KEY = ".made-from"  # names what a cache folder was computed from
# they draw, show and record, and compute no cached result
DISPLAY_ONLY = frozenset({"tda_core.plots", "tda_core.claims", "tda_core.gallery"})


@dataclass(frozen=True)
class MadeFrom:
    """Hashes of what a run is made from: `parts` by the word that explains them, `whole`, and `cache`.

    cache: the hash of those parts that cached results depend on (no prose, no drawing).
    """

    parts: Mapping[str, str]
    cache: str

    @property
    def whole(self) -> str:
        return _hash(self.parts)


def fingerprints(jobs: Sequence[Job]) -> dict[paths.Run, MadeFrom]:
    """What each of these jobs is made from; give whole papers, in order, because runs stand on each other.

    Raises ValueError naming a notebook's cell that is not Python.
    """
    lock = _hash(re.findall(r"^\s*[^#\s].*", paths.LOCK.read_text(encoding="utf-8"), re.MULTILINE))
    found: dict[paths.Run, MadeFrom] = {}
    for job in jobs:
        cells = read_notebook(job.notebook)["cells"]
        code = [cell_source(cell) for cell in cells if cell["cell_type"] == "code"]
        prose = [cell_source(cell) for cell in cells if cell["cell_type"] != "code"]
        modules = set().union(*(_imports(source, i, job) for i, source in enumerate(code, 1)))
        below = [found[run] for run in found if (run.slug, run.variant) == (job.run.slug, job.run.variant)]
        parts = {
            "text": _hash(prose),
            "code": _hash(code),
            "parameters": _hash(sorted(job.parameters.items())),
            "modules": source_fingerprint(modules),
            "requirements.txt": lock,
            "notebooks below": _hash([made.whole for made in below]),
        }
        numbers = [parts["code"], parts["parameters"], source_fingerprint(modules, DISPLAY_ONLY), lock]
        found[job.run] = MadeFrom(parts, _hash([*numbers, *(made.cache for made in below)]))
    return found


def why_run(run: paths.Run, made: MadeFrom) -> str:
    """The reason to run a job, "" where it is up to date."""
    if not run.stamp.exists():
        return "it did not finish last time" if partial(run).exists() else "not run yet"
    stamp = read_stamp(run)
    if stamp is None:
        return f"{run.stamp.name} is damaged"
    if stamp["hash"] != made.whole:
        changed = [name for name, value in made.parts.items() if stamp["parts"].get(name) != value]
        return f"changed: {', '.join(changed)}"
    for name, expected in stamp["outputs"].items():
        path = run.root / name
        if not path.is_file():
            return f"{name} is missing"
        if _describe(path) != expected:
            return f"{name} is damaged or was changed"
    return ""


def read_stamp(run: paths.Run) -> dict[str, Any] | None:
    """A finished run's stamp: hash, parts, seconds, date, outputs; None where there is no whole one."""
    try:
        stamp = json.loads(run.stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(stamp, dict) and {"hash", "parts", "seconds", "date", "outputs"} <= set(stamp)
    return stamp if whole else None


def write_stamp(run: paths.Run, made: MadeFrom, seconds: float) -> None:
    """Declare a run finished. The last thing that is written: without it the run counts as not done."""
    stamp = {
        "hash": made.whole,
        "parts": dict(made.parts),
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "outputs": {path.relative_to(run.root).as_posix(): _describe(path) for path in outputs(run)},
    }
    atomic_write(run.stamp, json.dumps(stamp, indent=1) + "\n")


def outputs(run: paths.Run) -> list[Path]:
    """All files of a run: the executed notebook, its part of the metrics, gallery, figures, tables and cache."""
    files = [run.executed, run.metrics_part, run.gallery]
    for folder in (run.figures, run.tables, run.cache):
        files += sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(TEMPORARY))
    return [path for path in files if path.is_file()]


def partial(run: paths.Run) -> Path:
    """The executed notebook while it runs, and after a failure."""
    return run.executed.with_name(f"{run.stem}.partial.ipynb")


def prepare(run: paths.Run, made: MadeFrom, *, drop_cache: bool = False) -> None:
    """Clear a run's outputs before it runs again, the stamp first.

    The cache stays where it was made from the same code and parameters, so that an interrupted or damaged run
    goes on where it stopped; results of other code are dropped, as is everything with `drop_cache`.
    """
    for path in (run.stamp, run.executed, partial(run), run.metrics_part, run.gallery):
        path.unlink(missing_ok=True)
    for folder in (run.figures, run.tables):
        _remove(folder)
    key = run.cache / CACHE_KEY
    if drop_cache or not key.is_file() or key.read_text(encoding="utf-8") != made.cache:
        key.unlink(missing_ok=True)  # first, so that a removal cut short leaves nothing that looks valid
        _remove(run.cache)
    for leftover in run.cache.rglob(f"{TEMPORARY}*"):
        leftover.unlink()
    for folder in (run.executed.parent, run.gallery.parent, run.figures, run.tables, run.cache):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write(key, made.cache)


def _remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _imports(source: str, number: int, job: Job) -> set[str]:
    """Modules that a code cell reaches; lines of IPython's own (%magic, !command) are no Python."""
    lines = [re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in source.splitlines()]
    try:
        return reachable_modules("\n".join(lines))
    except SyntaxError as error:
        raise ValueError(f"{job.notebook}, code cell {number}, line {error.lineno}: {error.msg}") from error


def _describe(path: Path) -> dict[str, Any]:
    status = path.stat()
    if status.st_size > HASH_UP_TO:
        return {"size": status.st_size, "changed": status.st_mtime}
    return {"size": status.st_size, "sha256": file_hash(path)}


def _hash(value: Mapping[str, Any] | Iterable[Any]) -> str:
    """16 hex digits over plain data."""
    data = dict(value) if isinstance(value, Mapping) else list(value)
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
