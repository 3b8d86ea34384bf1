"""Data files: looked for, checked against a checksum, and downloaded only where they are missing."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tda_core import paths

TIMEOUT_SECONDS = 30  # without it a machine that drops packets would wait for minutes


class DataUnavailable(RuntimeError):
    """A data file is neither on this machine nor to be had from its source."""


@dataclass(frozen=True)
class DataFile:
    """One file of a data set: `<folder>/<name>` below a data folder, its SHA-256 and the URL of its source folder.

    remote: the file's name at its source, quoted for a URL, where that is not `name`.
    """

    folder: str
    name: str
    sha256: str
    source: str
    remote: str = ""

    @property
    def url(self) -> str:
        return self.source + (self.remote or self.name)

    def where_to_put(self) -> str:
        """Where the file belongs, what it must be, and where it comes from."""
        return (
            f"put {self.name} (sha256 {self.sha256}, from {self.url}) at "
            f"$TDA_DATA_DIR/{self.folder}/{self.name} or at {paths.ROOT / 'data' / self.folder / self.name}"
        )


def find(file: DataFile) -> Path | None:
    """The first data folder's copy of the file, unread, or None."""
    candidates = [folder / file.folder / file.name for folder in paths.data_dirs()]
    return next((path for path in candidates if path.is_file()), None)


def fetch(file: DataFile) -> Path:
    """Path of the file with the right contents, found or downloaded into the last data folder.

    Raises ValueError for a file of other contents (path, expected and found checksum), and
    DataUnavailable where it is missing and the download fails.
    """
    path = find(file)
    if path is None:
        path = _download(file)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != file.sha256:
        raise ValueError(
            f"{path} is not the expected file: its sha256 is {found}, expected {file.sha256}. "
            f"Remove it, then {file.where_to_put()}"
        )
    return path


def _download(file: DataFile) -> Path:
    import pooch

    target = paths.data_dirs()[-1] / file.folder
    try:
        pooch.retrieve(
            file.url,
            known_hash=f"sha256:{file.sha256}",
            fname=file.name,
            path=target,
            downloader=pooch.HTTPDownloader(timeout=TIMEOUT_SECONDS),
        )
    except (OSError, ValueError) as error:  # offline, refused or not writable; or other contents, which pooch removes
        raise DataUnavailable(f"{file.name} could not be downloaded ({error}); {file.where_to_put()}") from error
    return target / file.name
