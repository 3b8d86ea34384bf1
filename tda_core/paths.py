"""Every path of the project is built here; no other module joins folder names.

Three environment variables move the roots: `TDA_RESULTS_DIR` (where runs write), `TDA_DATA_DIR` (where data files are
looked for before anything is downloaded) and `TDA_BANK_DIR` (where banks of ground truths are kept across runs).
"""

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tda_core"
NOTEBOOKS = ROOT / "notebooks"
PAPERS = ROOT / "papers"
README = ROOT / "README.md"
LOCK = ROOT / "requirements.txt"
SITE = ROOT / "site"


def results_root() -> Path:
    """Folder that holds every profile's results (`TDA_RESULTS_DIR`, else `results/`)."""
    return Path(os.environ.get("TDA_RESULTS_DIR") or ROOT / "results")


def data_dirs() -> list[Path]:
    """Folders searched for data files, in order: `TDA_DATA_DIR` first, then `data/` here."""
    named = os.environ.get("TDA_DATA_DIR")
    return ([Path(named)] if named else []) + [ROOT / "data"]


@dataclass(frozen=True)
class Run:
    """The folders of one notebook's run: `Run("forward_only", "smoke", "01_ground_truth", "digits")`.

    A notebook writes only below its own folders, so that whoever repairs a damaged file knows which
    notebook made it, and reads only the folders of notebooks with lower numbers.
    """

    slug: str
    profile: str
    notebook: str
    variant: str = ""

    def __post_init__(self) -> None:
        for field in ("slug", "profile", "notebook"):
            if not getattr(self, field):
                raise ValueError(f"Run needs a {field}, got {getattr(self, field)!r}")

    @property
    def stem(self) -> str:
        """Name of the run within its paper: `01_ground_truth.digits`."""
        return f"{self.notebook}.{self.variant}" if self.variant else self.notebook

    @property
    def root(self) -> Path:
        return results_root() / self.profile / self.slug

    @property
    def executed(self) -> Path:
        return self.root / "notebooks" / f"{self.stem}.ipynb"

    @property
    def stamp(self) -> Path:
        return self.root / "notebooks" / f"{self.stem}.stamp.json"

    @property
    def figures(self) -> Path:
        return self.root / "figures" / self.stem

    @property
    def tables(self) -> Path:
        return self.root / "tables" / self.stem

    @property
    def gallery(self) -> Path:
        """The notebook's gallery: `atomic_write(run.gallery, gallery(files))`, with what `tda_core.gallery` makes.

        One self-contained page: data, style and script are inside, nothing is read from beside it or from a network.
        So it may be copied anywhere (the site does), and opens from a disk.
        """
        return self.root / "galleries" / f"{self.stem}.html"

    @property
    def cache(self) -> Path:
        return self.root / "cache" / self.stem

    @property
    def bank(self) -> Path:
        """Where retrained models' losses are kept: in the run's cache, or below `TDA_BANK_DIR`, where they outlive
        changes of the code (a bank knows what it was made with)."""
        named = os.environ.get("TDA_BANK_DIR")
        return Path(named) / self.slug / self.profile / self.stem if named else self.cache / "bank"

    @property
    def metrics_part(self) -> Path:
        """What this notebook measured; the runner merges all parts into `metrics`."""
        return self.root / "metrics" / f"{self.stem}.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.json"

    def sibling(self, notebook: str) -> "Run":
        """The same paper, profile and variant in another (lower-numbered) notebook."""
        return Run(self.slug, self.profile, notebook, self.variant)
