"""The folder that an index lies in: tensor files named by their contents, and a manifest that says which count.

    index.json                  the manifest; replaced as a whole, after all files that it names
    basis-<hash>.safetensors
    shard-<hash>.safetensors    one for each shard; never changed, so readers map it
    .lock                       held by the one process that writes

Whatever stops a writer, the manifest names whole files: those of before, or those of after. Its generation is the
number of the save and a hash of the manifest, so a writer notices when another has saved since it read.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from tda_core.files import TEMPORARY, atomic_write
from tda_core.store import CorruptFile, checksum, fingerprint, map_tensors, save_tensors

FORMAT = 2
MANIFEST, LOCK = "index.json", ".lock"
TENSOR_FILE = re.compile(r"(basis|shard)-[0-9a-f]{16}\.safetensors")


class IndexConflict(RuntimeError):
    """Another process is writing to the index on disk, or has since it was read here."""


@dataclass(frozen=True)
class Part:
    """One tensor file. kind: "basis" or "shard". sha256: checksum of the tensors. metadata: what else it says."""

    kind: str
    tensors: Mapping[str, Tensor]
    sha256: str
    metadata: Mapping[str, Any]

    @property
    def file(self) -> str:
        return f"{self.kind}-{fingerprint([self.sha256, self.metadata])}.safetensors"


def shard_metadata(basis_file: str, dtype: str, units: str) -> dict[str, str]:
    """What each shard's file says of the index that it belongs to."""
    return {"basis": basis_file, "dtype": dtype, "units": units}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an index.

    Raises FileNotFoundError where there is none, CorruptFile where it is damaged, and ValueError for another
    format, naming both.
    """
    path = folder / MANIFEST
    if folder.is_file():
        raise ValueError(f"{folder} is a file, but an index of format {FORMAT} is a folder")
    try:
        manifest = json.loads(path.read_bytes())
        found, generation = manifest["format"], manifest["generation"]
        intact = found != FORMAT or generation == _generation(_number(generation), manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{path} is not the manifest of an index ({error})") from error
    if found != FORMAT:
        raise ValueError(f"{folder} has index format {found}, but this code reads {FORMAT}")
    if not intact:
        raise CorruptFile(f"{path} is damaged: its contents do not match its generation {generation}")
    return manifest


def read_folder(
    folder: Path, check: Callable[[dict[str, Any]], None], *, verify: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor], list[dict[str, Tensor]]]:
    """The manifest, the basis' tensors in memory, and those of each shard, mapped from their files.

    check: called with the manifest first, to raise where it does not fit. verify: read all files and compare
    their checksums. Raises what `read_manifest` raises, and CorruptFile naming a file that is absent, of
    another length or of other contents than the manifest says.
    """
    while True:
        manifest = read_manifest(folder)
        check(manifest)
        try:
            said = shard_metadata(manifest["basis"]["file"], manifest["dtype"], manifest["units"])
            shards = [_mapped(folder, entry, verify, said) for entry in manifest["shards"]]
            basis = _mapped(folder, manifest["basis"], verify)
            return manifest, {name: tensor.clone() for name, tensor in basis.items()}, shards
        except FileNotFoundError as error:
            # a writer may have replaced the manifest meanwhile, and deleted what only the old one named
            if read_manifest(folder)["generation"] == manifest["generation"]:
                raise CorruptFile(f"{folder} lacks a file that its manifest names ({error})") from error


def write_folder(
    folder: Path, described: Mapping[str, Any], parts: Sequence[Part], *, known: str | None, overwrite: bool
) -> str:
    """Write a manifest of `described` and of parts, the basis first, with the files that are not there yet.

    known: the generation that this index was last read or written as, None for a new one. Returns the new
    generation. Raises IndexConflict where another process is writing; unless `overwrite`, IndexConflict where
    the folder has another generation and FileExistsError for a new index where there is one; and OSError where
    writing fails. The index on disk is then as it was.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, but an index is saved as a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        number = _next_number(folder, known, overwrite)
        try:
            basis, *shards = (_written(folder, part, not overwrite) for part in parts)
            manifest = {"format": FORMAT, **described, "basis": basis, "shards": shards}
            manifest["generation"] = _generation(number, manifest)
            atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        finally:
            _delete_unnamed(folder)
    return manifest["generation"]


def check_expected(folder: Path, manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError where an index was built with another value than expected, naming both.

    Names are dtype, units, rank, kept and the settings of `Dynamics`; TypeError for others.
    """
    settings = manifest["settings"]
    known = {name: manifest[name] for name in ("dtype", "units", "rank")}
    known |= {"kept": settings["kept"], **settings["dynamics"]}
    for name, value in expected.items():
        if name not in known:
            raise TypeError(f"unknown expectation {name!r}, expected one of {sorted(known)}")
        if known[name] != value:
            raise ValueError(f"{folder} was built with {name} {known[name]!r}, but {name} {value!r} was expected")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise IndexConflict(f"another process is writing to the index {folder}: load it again afterwards") from error
    try:
        yield
    finally:
        lock.release()


def _next_number(folder: Path, known: str | None, overwrite: bool) -> int:
    """The number of this save. Raises what `write_folder` says where the folder holds something else."""
    try:
        found = read_manifest(folder)["generation"]
    except FileNotFoundError:
        return 1
    except ValueError:
        if overwrite:
            return 1
        raise
    if not overwrite and known is None:
        raise FileExistsError(f"{folder} holds an index already: load and change that one, or pass overwrite=True")
    if not overwrite and found != known:
        raise IndexConflict(f"{folder} is at generation {found}, but this index is of {known}: load it again")
    return _number(found) + 1


def _number(generation: str) -> int:
    return int(generation.partition("-")[0])


def _generation(number: int, manifest: Mapping[str, Any]) -> str:
    return f"{number}-{fingerprint({name: value for name, value in manifest.items() if name != 'generation'})}"


def _written(folder: Path, part: Part, trusted: bool) -> dict[str, Any]:
    """What the manifest says of a part, once its file is there; one that is not trusted is read and compared."""
    path = folder / part.file
    try:
        tensors, _, recorded = map_tensors(path)
        there = (recorded if trusted else checksum(tensors)) == part.sha256
    except (FileNotFoundError, CorruptFile):
        there = False
    if not there:
        save_tensors(path, part.tensors, part.metadata)
    described = {"file": part.file, "bytes": path.stat().st_size, "sha256": part.sha256}
    return described | ({"rows": part.tensors["codes"].shape[2]} if part.kind == "shard" else {})


def _mapped(
    folder: Path, entry: Mapping[str, Any], verify: bool, said: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """The tensors of a part. Raises CorruptFile where its file is not what the manifest says, or not of `said`."""
    path = folder / entry["file"]
    found = path.stat().st_size
    if found != entry["bytes"]:
        raise CorruptFile(f"{path} is truncated or damaged: it has {found} bytes, but the manifest {entry['bytes']}")
    tensors, metadata, recorded = map_tensors(path)
    recorded = checksum(tensors) if verify else recorded
    if recorded != entry["sha256"]:
        raise CorruptFile(f"{path} is damaged: it has checksum {recorded}, but the manifest {entry['sha256']}")
    if said is not None and metadata != said:
        raise CorruptFile(f"{path} belongs to another index: it is of {metadata}, but the manifest of {said}")
    return tensors


def _delete_unnamed(folder: Path) -> None:
    """Delete tensor files that the manifest does not name, and unfinished ones; nothing where it cannot be read."""
    try:
        manifest = read_manifest(folder)
        named = {entry["file"] for entry in (manifest["basis"], *manifest["shards"])}
    except FileNotFoundError:
        named = set()
    except ValueError:
        return
    for path in folder.iterdir():
        if path.name.startswith(TEMPORARY) or (TENSOR_FILE.fullmatch(path.name) and path.name not in named):
            path.unlink(missing_ok=True)
