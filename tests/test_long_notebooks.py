"""The long notebooks of language models, killed at some moment: what was finished is not done again."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"n_train": 60, "n_subsets": 24, "n_seeds": 2, "epochs": 6}


# notebook, files of finished blocks, how many there are when it is killed and in the end, parameters
CASES = [
    ("09_pretraining", "bank/[0-9a-f]*.safetensors", 13, 48, SIZES),
    ("10_language_models", "judged*.safetensors", 21, 48, {"n_operators": 16, "n_probed": 3}),
]


def start(results: Path, notebook: str, **parameters: int) -> subprocess.Popen:
    given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar", *given]
    places = [str(ROOT / "notebooks" / "stride" / f"{notebook}.ipynb"), str(results / f"{notebook}.ipynb")]
    environment = {**os.environ, "TDA_RESULTS_DIR": str(results), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TDA_BANK_DIR", None)
    with (results / "log.txt").open("w") as log:  # a pipe that nobody reads fills up
        return subprocess.Popen([*command, *places], cwd=ROOT, env=environment, stderr=log)


def kill(process: subprocess.Popen) -> None:
    """The runner, its kernel and the kernel's workers, at once."""
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=10)


def kept(folder: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """Finished files, and when they were written."""
    found = {}
    for path in folder.rglob(pattern):
        found[str(path.relative_to(folder))] = (path.stat().st_mtime_ns, path.stat().st_size)
    return found


@pytest.mark.slow
def test_killed_notebooks_go_on_where_they_were(tmp_path):
    for case in CASES:  # the second reads what the first has left
        check(tmp_path, *case)


def check(results, notebook, pattern, after, total, parameters):
    cache = results / "smoke" / "stride" / "cache" / f"{notebook}.microlm"
    process, end = start(results, notebook, **parameters), time.monotonic() + 120
    while len(kept(cache, pattern)) < after:
        assert process.poll() is None, (results / "log.txt").read_text()[-2000:]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    kill(process)
    before = kept(cache, pattern)
    assert after <= len(before) < total, "killed in the middle of it"
    again = start(results, notebook, **parameters)
    assert again.wait(timeout=240) == 0, (results / "log.txt").read_text()[-2000:]
    finished = kept(cache, pattern)
    assert len(finished) == total and finished.items() >= before.items(), "nothing old was written again"
