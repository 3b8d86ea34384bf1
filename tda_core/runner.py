"""Runs one notebook in a fresh kernel, whole or not at all (the only importer of papermill)."""

import contextlib
import fcntl
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tda_core import paths
from tda_core.jobs import Job, cell_source, read_notebook, without_iri_grammar
from tda_core.references import load_part
from tda_core.stamps import MadeFrom, partial, prepare, write_stamp


class NotebookFailed(RuntimeError):
    """A notebook that did not finish; the message names it, the cell and the error."""


class AlreadyRunning(RuntimeError):
    """Another runner works in the same results folder."""


def run_notebook(job: Job, made: MadeFrom, *, fresh: bool = False, bar: str = "") -> float:
    """Execute a job, check its outputs, stamp it, and return its seconds.

    fresh: drop its cached results first. bar: text of a progress bar, shown on a terminal only.
    Raises NotebookFailed for a failing cell, a dead kernel, missing outputs and files that cannot be written;
    then no stamp is left, and the unfinished notebook stays for reading as `<name>.partial.ipynb`.
    """
    start = time.perf_counter()
    try:
        prepare(job.run, made, drop_cache=fresh)
        _execute(job, bar)
        _check(job)
        os.replace(partial(job.run), job.run.executed)
        seconds = time.perf_counter() - start
        write_stamp(job.run, made, seconds)
    except OSError as error:
        raise NotebookFailed(f"{job.label} could not write its results: {error}") from error
    return seconds


@contextlib.contextmanager
def only_runner() -> Iterator[None]:
    """Hold the results folder for this process. Raises AlreadyRunning naming the process that holds it."""
    root = paths.results_root()
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process ends, however
        except BlockingIOError as error:
            lock.seek(0)
            message = f"{root} is in use by another run (process {lock.read().strip() or 'unknown'}): wait for its end"
            raise AlreadyRunning(message) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _execute(job: Job, bar: str) -> None:
    with without_iri_grammar():
        import papermill  # here, because it takes a second and a run with nothing to do needs none
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    try:
        with _environment(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the Jupyter packages about each other; a cell's own appear below it
            papermill.execute_notebook(
                job.notebook,
                partial(job.run),
                parameters=dict(job.parameters),
                kernel_name="python3",
                cwd=job.notebook.parent,
                progress_bar={"desc": bar, "leave": False, "disable": None} if bar else False,
            )
    except PapermillExecutionError as error:
        raise NotebookFailed(f"{_where(job, 'failed')}: {error.ename}: {error.evalue}") from error
    except DeadKernelError as error:
        reason = "its kernel died (killed from outside, or out of memory)"
        raise NotebookFailed(f"{_where(job, 'failed')}: {reason}") from error
    except RuntimeError as error:
        raise NotebookFailed(f"{job.label} could not be run: {error}") from error


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """For the kernel: this very interpreter, this checkout, and absolute folders (its working one differs)."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="tda-kernel-") as folder:
        # a kernel called python3 in the user's home would win over this interpreter's own
        spec = Path(folder) / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True)
        # on a busy machine a kernel logs the interrupt of its own orderly end as an error, in the middle of our lines
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"]
        spec.write_text(json.dumps({"argv": command, "display_name": "Python 3", "language": "python"}))
        os.environ["JUPYTER_PATH"] = _joined(folder, before.get("JUPYTER_PATH"))
        os.environ["PYTHONPATH"] = _joined(str(paths.ROOT), before.get("PYTHONPATH"))
        os.environ["TDA_RESULTS_DIR"] = str(paths.results_root().resolve())
        if before.get("TDA_DATA_DIR"):
            os.environ["TDA_DATA_DIR"] = str(Path(before["TDA_DATA_DIR"]).resolve())
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _joined(first: str, rest: str | None) -> str:
    return first + (os.pathsep + rest if rest else "")


def _check(job: Job) -> None:
    """Refuse a silent success: cells left out, no metrics, no figure."""
    notebook = read_notebook(partial(job.run))
    if any(cell["cell_type"] == "code" and not _started(cell) for cell in notebook["cells"]):
        raise NotebookFailed(f"{_where(job, 'stopped')}: it ended early, without an error")
    if not job.run.metrics_part.is_file():
        raise NotebookFailed(f"{job.label} ran to its end but recorded no metrics: expected {job.run.metrics_part}")
    try:
        load_part(job.run.metrics_part)
    except ValueError as error:
        raise NotebookFailed(f"{job.label}: {error}") from error
    wants_figure = notebook["metadata"].get("tda", {}).get("figures", True)
    if wants_figure and not any(path.is_file() for path in job.run.figures.rglob("*")):
        raise NotebookFailed(
            f"{job.label} ran to its end but saved no figure in {job.run.figures} "
            '(a notebook that draws none says so in its metadata: "tda": {"figures": false})'
        )


def _started(cell: dict[str, Any]) -> bool:
    return cell["metadata"].get("papermill", {}).get("start_time") is not None


def _where(job: Job, verb: str) -> str:
    """`forward_only/02_horizon digits failed in cell 5 of 12 (loss = train(...))`, from the unfinished notebook.

    Cells are counted as in the committed notebook; papermill adds cells of its own.
    """
    cells = [
        cell
        for cell in read_notebook(partial(job.run))["cells"]
        if not {"injected-parameters", "papermill-error-cell-tag"} & set(cell["metadata"].get("tags", []))
    ]
    started = [i for i, cell in enumerate(cells, 1) if _started(cell)]
    number = started[-1] if started else 1
    lines = cell_source(cells[number - 1]).strip().splitlines() or [""]
    return f"{job.label} {verb} in cell {number} of {len(cells)} (`{lines[0][:80]}`)"
