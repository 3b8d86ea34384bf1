"""Cached results keyed by their parameters: tensors in safetensors files that name what they hold.

A file is written whole or not at all, carries its parameters and a checksum, and is redone, with a line
in the log, when it is damaged: so a killed run goes on where it stopped and never reads half a result.
"""

import dataclasses
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tda_core.files import atomic_write, reachable_modules, source_fingerprint

__all__ = [
    "CorruptFile",
    "Store",
    "atomic_write",
    "canonical",
    "checksum",
    "fingerprint",
    "load_tensors",
    "map_tensors",
    "reachable_modules",
    "save_tensors",
    "source_fingerprint",
]

log = logging.getLogger(__name__)

# Bytes that the first tensor of a file starts at a multiple of: mapped, it is aligned as one in memory is.
ALIGNMENT = 64
# What reading a file that is not whole, or not ours, can raise
UNREADABLE = (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError)


class CorruptFile(ValueError):
    """A file that is there but truncated, altered, or not one of ours."""


def canonical(value: Any, where: str = "value") -> Any:
    """`value` as plain JSON data, equal for equal parameters only: what fingerprints and file headers use.

    Takes None, bool, int, float, str, Path, Tensor, ndarray, dataclass, and dict, list and tuple of these;
    a list equals a tuple, the order of keys is irrelevant, but 1, 1.0 and True differ. Arrays become a hash
    of type, shape and contents. Raises TypeError for other types and ValueError for NaN, naming `where`.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError(f"{where} is NaN, which equals nothing: expected a number to key a result by")
        return value
    if isinstance(value, Path):
        return {"$path": value.as_posix()}
    if isinstance(value, Tensor | np.ndarray):
        return {"$array": _describe_array(value, where)}
    if isinstance(value, list | tuple):
        return [canonical(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"$dataclass": [type(value).__qualname__, canonical(fields, where)]}
    if isinstance(value, Mapping):
        items = {key: canonical(item, f"{where}[{key!r}]") for key, item in value.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in items):
            return items
        pairs = [[canonical(key, f"a key of {where}"), item] for key, item in items.items()]
        return {"$dict": sorted(pairs, key=lambda pair: json.dumps(pair[0], sort_keys=True))}
    raise TypeError(
        f"{where} is of type {type(value).__name__}; expected None, bool, int, float, str, Path, Tensor, ndarray, "
        "a dataclass, or dict, list or tuple of these"
    )


def fingerprint(value: Any) -> str:
    """16 hex digits that name a value: equal parameters give equal digits, on every machine and in every run.

    Raises what `canonical` raises.
    """
    text = json.dumps(canonical(value), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the names, types, shapes and contents of tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors with JSON metadata and a checksum to a safetensors file, atomically.

    Raises TypeError for anything but tensors (naming the key), or for metadata that JSON cannot hold, and
    OSError naming the path.
    """
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"{path}: expected tensors by name, got {type(tensor).__name__} under {name!r}")
    # cloned, because safetensors refuses tensors that share memory
    held = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    header = {"tda": json.dumps(metadata, sort_keys=True), "sha256": checksum(held)}
    file = memoryview(safetensors.torch.save(held, metadata=header))
    end = 8 + int.from_bytes(file[:8], "little")
    filler = b" " * (-end % ALIGNMENT)  # which a header may end with
    atomic_write(path, (end - 8 + len(filler)).to_bytes(8, "little"), file[8:end], filler, file[end:])


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and metadata that `save_tensors` wrote.

    Raises FileNotFoundError, and CorruptFile naming the path of a truncated, altered or foreign file.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        tensors = safetensors.torch.load(data)
        metadata, expected = json.loads(header["tda"]), header["sha256"]
    except UNREADABLE as error:
        raise CorruptFile(f"{path} is truncated or was not written by tda_core ({error})") from error
    if checksum(tensors) != expected:
        raise CorruptFile(f"{path} is damaged: its contents do not match their checksum")
    return tensors, metadata


def map_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors, metadata and checksum that `save_tensors` wrote, where the tensors stay on disk until they are used.

    Pages of the file come and go as memory allows; writing to a tensor does not reach the file, which must
    not be changed in place meanwhile. The checksum is what the file says: the contents are not read here.
    Raises what `load_tensors` raises, but for damage that leaves the file's length and header as they were.
    """
    path = Path(path)
    if not path.stat().st_size:
        raise CorruptFile(f"{path} is empty")  # which cannot be mapped
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata()
            metadata, recorded = json.loads(header["tda"]), header["sha256"]
            return {name: file.get_tensor(name) for name in file.keys()}, metadata, recorded
    except UNREADABLE as error:
        raise CorruptFile(f"{path} is truncated or was not written by tda_core ({error})") from error


class Store:
    """Results of one run's folder: `Store(run.cache).get("loo", {"epochs": 30, "seed": 0}, compute)`.

    The parameters must name everything that the result depends on, but for the code: the runner empties
    the folder when the code that fills it changes. Hand over large inputs by their hash.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, name: str, params: Any) -> Path:
        """Where the result `name` of these parameters lies. Raises ValueError for a name not of [a-z0-9_-]."""
        if not re.fullmatch(r"[a-z0-9_-]+", name):
            raise ValueError(f"a result's name must be of the characters a-z 0-9 _ -, got {name!r}")
        return self.folder / f"{name}-{fingerprint(params)}.safetensors"

    def load(self, name: str, params: Any) -> dict[str, Tensor] | None:
        """The stored tensors, or None where there are none.

        A damaged file, or one that holds another result's parameters, is logged, deleted and counts as none.
        """
        path = self.path(name, params)
        try:
            tensors, metadata = load_tensors(path)
            expected = _metadata(name, params)
            if json.dumps(metadata, sort_keys=True) != json.dumps(expected, sort_keys=True):  # 1 is not 1.0 here
                raise CorruptFile(f"{path} holds a result of other parameters")
        except FileNotFoundError:
            return None
        except CorruptFile as error:
            log.warning("redoing %s: %s", name, error)
            path.unlink(missing_ok=True)
            return None
        return tensors

    def save(self, name: str, params: Any, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name and parameters. Raises what `save_tensors` and `fingerprint` raise."""
        save_tensors(self.path(name, params), tensors, _metadata(name, params))

    def get(self, name: str, params: Any, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The stored tensors, computed and kept first where there are none."""
        found = self.load(name, params)
        if found is None:
            found = dict(compute())
            self.save(name, params, found)
        return found


def _metadata(name: str, params: Any) -> dict[str, Any]:
    return {"name": name, "params": canonical(params)}


def _describe_array(value: Tensor | np.ndarray, where: str) -> list[Any]:
    """[kind, dtype, shape, hash] of an array; NaN in it is refused as a NaN number is."""
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            raise TypeError(f"{where} is an array of objects; expected numbers or booleans")
        kind, dtype, shape, data = "ndarray", str(value.dtype), value.shape, np.ascontiguousarray(value).tobytes()
        bad = bool(np.isnan(value).any()) if value.dtype.kind in "fc" else False
    else:
        kind, dtype, shape, data = "tensor", str(value.dtype), tuple(value.shape), _bytes(value.detach().cpu())
        bad = bool(torch.isnan(value).any()) if value.is_floating_point() or value.is_complex() else False
    if bad:
        raise ValueError(f"{where} holds NaN, which equals nothing: expected numbers to key a result by")
    return [kind, dtype, list(shape), hashlib.sha256(data).hexdigest()]


def _bytes(tensor: Tensor) -> memoryview:
    """Raw contents of a CPU tensor of any type (numpy knows no bfloat16, so they are viewed as bytes)."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
