"""The long notebooks of language models, killed at some moment: what was finished is not done again.

Their cells run in IPython, as a kernel has it, but in processes that are forked from one that has imported everything:
importing what they need took four times as long as what they do. That kernels and runners die and are replaced is shown
in test_reproduce.
"""

import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest

from tda_core.jobs import cell_source, read_notebook
from tda_core.paths import NOTEBOOKS

IMPORTED = ("IPython.core.interactiveshell", "pandas", "tda_core.lm_methods", "tda_core.lm_judging", "tda_core.plots")
IMPORTED += ("tda_core.pretraining_speed", "tda_core.share_plots", "tda_core.fact_corpus", "tda_core.token_closed_form")
SIZES = {"n_train": 60, "n_subsets": 16, "n_seeds": 2, "epochs": 4}


# notebook, files of finished blocks, how many there are when it is killed and in the end, parameters
CASES = [
    ("09_pretraining", "bank/[0-9a-f]*.safetensors", 9, 32, SIZES),
    ("10_language_models", "judged*.safetensors", 21, 50, {"n_operators": 16, "n_probed": 3}),
]


def execute(path: Path, parameters: dict[str, int], log: Path) -> None:
    """All code cells in order, in a process of its own; the parameters come after their cell."""
    stream = log.open("w")
    os.dup2(stream.fileno(), 1), os.dup2(stream.fileno(), 2)
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    shell, failed = (
        InteractiveShell.instance(config=Config(HistoryManager={"enabled": False})),
        0,
    )  # not the user's home
    try:
        for cell in read_notebook(path)["cells"]:
            if cell["cell_type"] == "code":
                shell.run_cell(cell_source(cell)).raise_error()
            if "parameters" in cell["metadata"].get("tags", []):
                shell.push(parameters)
    except BaseException:
        traceback.print_exc()
        failed = 1
    stream.flush(), sys.stdout.flush(), sys.stderr.flush()
    for worker in psutil.Process().children(recursive=True):
        worker.kill()  # joblib's, which a leaving process would wait for until they have been idle for five minutes
    os._exit(failed)


def start(results: Path, notebook: str, **parameters: int) -> multiprocessing.Process:
    place, log = NOTEBOOKS / "stride" / f"{notebook}.ipynb", results / "log.txt"
    results.mkdir(exist_ok=True)
    process = multiprocessing.get_context("forkserver").Process(target=execute, args=(place, parameters, log))
    process.start()
    return process


def kill(process: multiprocessing.Process) -> None:
    """The notebook's process and its workers, at once."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.kill()
    process.join()
    psutil.wait_procs(family[1:], timeout=10)


@pytest.fixture
def imported(monkeypatch, results):
    """A server of processes that have imported what the notebooks need, and write below `results`."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("TDA_BANK_DIR", raising=False)
    forkserver._forkserver._stop()  # one that other tests left knows another environment
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(IMPORTED))
    yield results
    forkserver._forkserver._stop()


def kept(folder: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """Finished files, and when they were written."""
    found = {}
    for path in folder.rglob(pattern):
        found[str(path.relative_to(folder))] = (path.stat().st_mtime_ns, path.stat().st_size)
    return found


@pytest.mark.slow
def test_killed_notebooks_go_on_where_they_were(imported):
    for case in CASES:  # the second reads what the first has left
        check(imported, *case)


def check(results, notebook, pattern, after, total, parameters):
    cache = results / "smoke" / "stride" / "cache" / f"{notebook}.microlm"
    process, end = start(results, notebook, **parameters), time.monotonic() + 120
    while len(kept(cache, pattern)) < after:
        assert process.is_alive(), (results / "log.txt").read_text()[-2000:]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    kill(process)
    before = kept(cache, pattern)
    assert after <= len(before) < total, "killed in the middle of it"
    again = start(results, notebook, **parameters)
    again.join(240)
    assert again.exitcode == 0, (results / "log.txt").read_text()[-2000:]
    finished = kept(cache, pattern)
    assert len(finished) == total and finished.items() >= before.items(), "nothing old was written again"
