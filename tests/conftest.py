"""Shared fixtures: one torch thread, results in a temporary folder, and a small project to run."""

import contextlib
import io
import shutil
from pathlib import Path

import nbformat
import pytest

from tda_core import paths

with contextlib.suppress(ImportError):  # the tests of the runner do without torch
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """An empty results folder."""
    folder = tmp_path / "results"
    monkeypatch.setenv("TDA_RESULTS_DIR", str(folder))
    return folder


FIRST = [
    '# parameters\nprofile = "smoke"\ndataset = "digits"\nn_train = 3\nrate = 0.5',
    "from tda_core.claims import Recorder\nfrom tda_core.paths import Run\nfrom tda_core.helper import double",
    'run = Run("demo", profile, "01_first", dataset)\n'
    "with open(run.root.parent / 'log.txt', 'a') as log:\n    log.write(f'{run.stem} ')",
    "(run.figures / 'plot.png').write_bytes(b'picture')\n(run.cache / 'sum.txt').write_text(str(n_train * rate))\n"
    "run.gallery.write_text(f'<p>{n_train} scores</p>')",
    "recorder = Recorder(run)\nrecorder.record(f'{dataset}/score', double(n_train), 1, 90)\nrecorder.write()",
]
SECOND = [
    FIRST[0],
    "from tda_core.claims import Recorder\nfrom tda_core.paths import Run",
    FIRST[2].replace("01_first", "02_second"),
    "number = float((run.sibling('01_first').cache / 'sum.txt').read_text())\n"
    "(run.figures / 'plot.png').write_bytes(b'picture')",
    "recorder = Recorder(run)\nrecorder.record(f'{dataset}/later', number)\nrecorder.write()",
]
PROFILES = """
title = "Demo"
[variants.digits]
dataset = "digits"
[laptop.digits."01_first"]
n_train = 7
rate = 0.25
"""
CLAIMS = """
[[claim]]
id = "doubles"
text = "It doubles"
published = "2x"
metric = "{dataset}/score"
datasets = ["digits", "mnist"]
direction = "above"
threshold = 5
sign = 2
why = "Because."
"""


class Project:
    """A checkout of its own in a temporary folder, with the real tda_core and two small notebooks."""

    output = ""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copytree(paths.PACKAGE, root / "tda_core", ignore=shutil.ignore_patterns("__pycache__"))
        self.write("tda_core/helper.py", "def double(number):\n    return 2 * number\n")
        self.write("requirements.txt", "one==1\n")
        self.write("papers/demo/profiles.toml", PROFILES)
        self.write("papers/demo/claims.toml", CLAIMS)
        self.notebook("demo/01_first", FIRST)
        self.notebook("demo/02_second", SECOND)

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def notebook(self, name: str, cells: list[str], prose: str = "# A title\n\nWith $x^2$.", **metadata) -> None:
        """Write notebooks/<name>.ipynb from code cells, the first of them the parameters."""
        book = nbformat.v4.new_notebook()
        book.metadata.update(kernelspec={"name": "python3", "display_name": "Python 3", "language": "python"})
        book.metadata.update(metadata)
        book.cells = [nbformat.v4.new_markdown_cell(prose), *(nbformat.v4.new_code_cell(cell) for cell in cells)]
        book.cells[1].metadata["tags"] = ["parameters"]
        self.write(f"notebooks/{name}.ipynb", nbformat.writes(book))

    @property
    def runs(self) -> list[str]:
        """The notebooks that ran so far, by their stems (each of them notes itself)."""
        return [word for log in sorted((self.root / "results").glob("*/log.txt")) for word in log.read_text().split()]


def point_at(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Make every path of tda_core lead into the checkout at `root`, and results into its results/."""
    places = {"ROOT": "", "PACKAGE": "tda_core", "NOTEBOOKS": "notebooks", "PAPERS": "papers"}
    places |= {"README": "README.md", "LOCK": "requirements.txt", "SITE": "site"}
    for name, place in places.items():
        patch.setattr(paths, name, root / place)
    patch.setenv("TDA_RESULTS_DIR", str(root / "results"))


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    """The small project, before anything has run."""
    made = Project(tmp_path)
    point_at(tmp_path, monkeypatch)
    return made


@pytest.fixture(scope="session")
def first_run(tmp_path_factory) -> tuple[Path, str]:
    """The small project after one smoke run, and what that said; for copying only."""
    from tda_core.reproduce import main

    root = tmp_path_factory.mktemp("first_run")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        Project(root)
        point_at(root, patch)
        assert main(["smoke", "demo"]) == 0
    return root, said.getvalue()


@pytest.fixture
def finished(first_run, tmp_path, monkeypatch) -> Project:
    """A copy of the small project after its first run; `output` is what that run said."""
    shutil.copytree(first_run[0], tmp_path, dirs_exist_ok=True)
    made = Project.__new__(Project)
    made.root, made.output = tmp_path, first_run[1]
    point_at(tmp_path, monkeypatch)
    return made
