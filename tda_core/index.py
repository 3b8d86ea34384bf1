"""An index of all training examples that answers queries at the cost of a few directions and one product.

    score(q, b) = z_q . c_b    (z_q: reading of the query, c_b: coefficients of the example; `tda_core.basis`)

Coefficients are kept as float32, float16 or int8, in shards (`tda_core.shards`). int8 rounds each c_b to steps of
scale_b = max|c_b| / 127, so a score is off by at most sum_j |z_qj| scale_b / 2. On disk an index is a folder
(`tda_core.index_files`) whose shards are mapped, so it may be larger than memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.basis import Basis, BasisSettings
from tda_core.basis_fit import fit_basis
from tda_core.dynamics import Dynamics
from tda_core.examples import Examples
from tda_core.files import source_fingerprint
from tda_core.index_files import Part, check_expected, read_folder, shard_metadata, write_folder
from tda_core.problem import Problem
from tda_core.shards import Shard, Top, different_ids, int64_ids, merged, strongest
from tda_core.simulation import count_groups
from tda_core.store import checksum
from tda_core.threads import one_thread


@dataclass(frozen=True, eq=False)
class Index:
    """Coefficients of n units (training examples, or groups of them) and the basis that queries are read along.

    shards: none of them empty; their units in order are the index's. dtype: their storage type. units:
    "examples" or "groups". code: hash of the code that built it, "" for the code that runs. saved: the
    generation that this index was read or written as, by folder. All methods that change something give a
    new index; `save` notes the generation, and changes nothing else.
    """

    basis: Basis
    shards: tuple[Shard, ...]
    dtype: str = "float32"
    units: str = "examples"
    code: str = ""
    saved: Mapping[Path, str] = field(default_factory=dict)

    @classmethod
    def from_coefficients(
        cls, basis: Basis, coefficients: Tensor, *, ids: Tensor | None = None, dtype: str = "float32"
    ) -> "Index":
        """An index of coefficients (L, n, k) that exist already. Raises ValueError for ids that are not n different."""
        n = coefficients.shape[1] if coefficients.ndim == 3 else 0
        if coefficients.shape != (basis.n_strata, n, basis.rank):
            expected = f"({basis.n_strata}, n, {basis.rank})"
            raise ValueError(f"coefficients must be {expected}, got {tuple(coefficients.shape)}")
        ids = different_ids(torch.arange(n) if ids is None else ids, n)
        shard = Shard.encode(coefficients, ids, dtype)
        return cls(basis, (shard,) if n else (), dtype)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def ids(self) -> Tensor:
        """Of all units, in order: (n,) int64."""
        if len(self.shards) == 1:
            return self.shards[0].ids
        return torch.cat([torch.empty(0, dtype=torch.int64), *(shard.ids for shard in self.shards)])

    @property
    def n_bytes(self) -> int:
        """Size of what is kept of the units."""
        return sum(shard.n_bytes for shard in self.shards)

    def scores(self, queries: Examples) -> Tensor:
        """Scores (n_query, n), positive for proponents, columns in the order of `ids`; streamed in blocks."""
        z, strata = self._read(queries)
        if self.basis.n_strata == 1 and len(self.shards) == 1:
            products = [z @ block for _, block in self._blocks(0, len(z))]
            return products[0] if len(products) == 1 else torch.cat(products, 1)
        found = torch.empty(len(z), len(self), dtype=z.dtype)
        for stratum, rows in _by_stratum(strata, self.basis.n_strata):
            for start, block in self._blocks(stratum, len(z)):
                found[rows, start : start + block.shape[1]] = z[rows] @ block
        return found

    def top(self, queries: Examples, k: int) -> Top:
        """The k strongest proponents and opponents of each query, without the whole score matrix.

        Equal scores go by the order of `ids`. Raises ValueError for k outside 1..n.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"k must lie in 1..{len(self)}, the units of this index, got {k}")
        z, strata = self._read(queries)
        ends = [(torch.empty(len(z), k, dtype=z.dtype), torch.empty(len(z), k, dtype=torch.int64)) for _ in range(2)]
        for stratum, rows in _by_stratum(strata, self.basis.n_strata):
            best: list[tuple[Tensor, Tensor] | None] = [None, None]
            for start, block in self._blocks(stratum, len(z)):
                scores = z[rows] @ block
                for side, signed in enumerate((scores, -scores)):
                    columns = strongest(signed, k)
                    best[side] = merged(best[side], (signed.gather(1, columns), columns + start), k)
            for (values, where), found in zip(ends, best, strict=True):
                values[rows], where[rows] = found
        (high, first), (low, last) = ends
        return Top(self.ids[first], high, self.ids[last], -low)

    def recorded(self, sizes: Sequence[int] = (1,)) -> "Index":
        """The same index, which reads batches of these sizes by a recording (`tda_core.recording`)."""
        return replace(self, basis=self.basis.recorded(sizes))

    def append(self, examples: Examples, ids: Tensor | None = None, *, n_shards: int = 1) -> "Index":
        """The index with further examples, whose coefficients alone are computed; ids go on after the largest.

        n_shards: as in `index_examples`. Raises ValueError for ids that are there already.
        """
        if self.units != "examples":
            raise ValueError("examples cannot be appended to an index of groups: append first, then group")
        if ids is None:
            ids = torch.arange(len(examples)) + (int(self.ids.max()) + 1 if len(self) else 0)
        different_ids(torch.cat([self.ids, different_ids(ids, len(examples))]))
        added = index_examples(self.basis, examples, ids, dtype=self.dtype, n_shards=n_shards)
        return replace(self, shards=self.shards + added.shards)

    def remove(self, ids: Tensor) -> "Index":
        """The index without these units. Raises ValueError for an id that is not there, naming it."""
        ids = int64_ids(ids, len(ids))
        missing = ids[~torch.isin(ids, self.ids)]
        if len(missing):
            raise ValueError(f"no unit of this index has id {int(missing[0])}")
        kept = [(shard, ~torch.isin(shard.ids, ids)) for shard in self.shards]
        return replace(self, shards=tuple(shard if rows.all() else shard[rows] for shard, rows in kept if rows.any()))

    @classmethod
    def merge(cls, indexes: Sequence["Index"]) -> "Index":
        """One index of those that separate workers built on the same basis; it counts as saved where the first is.

        Raises ValueError where they differ in basis, dtype, units or code, or share an id.
        """
        if not indexes:
            raise ValueError("merge needs at least one index, got none")
        first = indexes[0]
        for other in indexes[1:]:
            for name in ("dtype", "units", "code"):
                if getattr(other, name) != getattr(first, name):
                    raise ValueError(f"cannot merge {name} {getattr(first, name)!r} with {getattr(other, name)!r}")
            if other.basis is not first.basis and other.basis.fingerprint != first.basis.fingerprint:
                prints = f"{first.basis.fingerprint} and {other.basis.fingerprint}"
                raise ValueError(f"cannot merge indexes of different bases, {prints}")
        different_ids(torch.cat([index.ids for index in indexes]))
        return replace(first, shards=tuple(shard for index in indexes for shard in index.shards))

    def compacted(self) -> "Index":
        """The same units in the order of their ids, as one shard: after many small changes, queries are faster."""
        order = self.ids.argsort()
        if len(self.shards) == 1 and torch.equal(order, torch.arange(len(order))):
            return self
        return replace(self, shards=(Shard.join(self.shards)[order],) if self.shards else ())

    def grouped(self, groups: Tensor) -> "Index":
        """A new index whose units are groups: groups (n,) int64, 0 to the highest, in the order of `ids`.

        Raises ValueError for groups of another length, or with a gap in their numbers.
        """
        n_groups = count_groups(groups, len(self))
        summed = torch.zeros(self.basis.n_strata, n_groups, self.basis.rank)
        for shard, of_shard in zip(self.shards, groups.split([len(shard) for shard in self.shards]), strict=True):
            summed.index_add_(1, of_shard, shard.coefficients())
        grouped = Index.from_coefficients(self.basis, summed, dtype=self.dtype)
        return replace(grouped, units="groups", code=self.code)

    def astype(self, dtype: str) -> "Index":
        """A new index of the same units in another storage type."""
        shards = tuple(Shard.encode(shard.coefficients(), shard.ids, dtype) for shard in self.shards)
        return replace(self, shards=shards, dtype=dtype, saved={})

    def save(self, folder: Path | str, *, overwrite: bool = False) -> None:
        """Write what a folder lacks of this index, whole or not at all, with the hashes of model, data and code.

        overwrite: replace whatever index is there. Raises IndexConflict where another process is writing, or has
        since this index was read or written here, FileExistsError where it never was but the folder has one, and
        OSError where writing fails; the index on disk is then as it was.
        """
        folder = Path(folder).absolute()
        identity, tensors = self.basis.problem.identity, self.basis.tensors()
        basis = Part("basis", tensors, checksum(tensors), {"basis": self.basis.settings(), **identity})
        metadata = shard_metadata(basis.file, self.dtype, self.units)
        shards = [Part("shard", shard.tensors(), shard.checksum, metadata) for shard in self.shards]
        described = {"code": self.code or _code(), **identity, "dtype": self.dtype, "units": self.units}
        described |= {"rank": self.basis.rank, "settings": self.basis.settings()}
        known = self.saved.get(folder)
        generation = write_folder(folder, described, [basis, *shards], known=known, overwrite=overwrite)
        object.__setattr__(self, "saved", {**self.saved, folder: generation})

    @classmethod
    def load(
        cls, folder: Path | str, problem: Problem, *, any_code: bool = False, verify: bool = False, **expected: Any
    ) -> "Index":
        """Read what `save` wrote; shards stay on disk until they are used.

        any_code: accept an index that other code built. verify: read all files and check their contents, not
        their lengths alone. expected: what the index must have been built with, of dtype, units, rank, kept
        and the settings of `Dynamics`: `damping=0.1`. Raises FileNotFoundError, CorruptFile for a damaged
        index, and ValueError naming both values for another format, model, data, code or expected value.
        """
        folder = Path(folder).absolute()

        def check(manifest: dict[str, Any]) -> None:
            problem.check_identity(folder, manifest)
            if manifest["code"] != _code() and not any_code:
                raise ValueError(f"{folder} was written by code {manifest['code']}, but this is code {_code()}")
            check_expected(folder, manifest, expected)

        manifest, of_basis, of_shards = read_folder(folder, check, verify=verify)
        basis = Basis.restore(problem, of_basis, manifest["settings"])
        entries = zip(of_shards, manifest["shards"], strict=True)
        shards = tuple(Shard.restore(tensors, entry["sha256"]) for tensors, entry in entries)
        code = "" if manifest["code"] == _code() else manifest["code"]
        return cls(basis, shards, manifest["dtype"], manifest["units"], code, {folder: manifest["generation"]})

    def _read(self, queries: Examples) -> tuple[Tensor, Tensor]:
        z, strata = self.basis.read(queries)
        return z.float(), strata  # as the coefficients are, at most

    def _blocks(self, stratum: int, n_query: int) -> Iterator[tuple[int, Tensor]]:
        """(position of the first unit, coefficients (k, m) in float32) of a stratum, block by block."""
        start = 0
        for shard in self.shards:
            for block in shard.blocks(stratum, n_query):
                yield start, block
                start += block.shape[1]


def build_index(
    problem: Problem,
    dynamics: Dynamics,
    held_out: Examples,
    setting: BasisSettings | None = None,
    *,
    dtype: str = "float32",
    n_shards: int = 1,
) -> Index:
    """Fit a basis and index the whole training set, in memory that does not grow with n x p.

    held_out: validation queries that the rank is chosen on. n_shards: for the examples that the basis is not
    fitted on, as in `index_examples`. Raises what `fit_basis` raises.
    """
    fitted = fit_basis(problem, dynamics, held_out, setting)
    index = Index.from_coefficients(fitted.basis, fitted.coefficients, ids=fitted.rows, dtype=dtype)
    rest = torch.ones(len(problem.train), dtype=torch.bool)
    rest[fitted.rows] = False
    if rest.any():
        ids = rest.nonzero()[:, 0]
        index = index.append(problem.train[ids], ids, n_shards=min(n_shards, len(ids)))
    return index.compacted()


def index_examples(
    basis: Basis, examples: Examples, ids: Tensor | None = None, *, dtype: str = "float32", n_shards: int = 1
) -> Index:
    """An index of examples on a basis that is fitted already.

    n_shards: 1 computes the coefficients here, more in as many jobs of joblib, each in `block_bytes` of memory;
    `joblib.parallel_config(backend="dask")` sends them to a cluster. Raises ValueError for n_shards outside 1..n.
    """
    n = len(examples)
    if not 1 <= n_shards <= n:
        raise ValueError(f"n_shards must lie in 1..{n}, the examples, got {n_shards}")
    basis.problem.check(examples)
    ids = different_ids(torch.arange(n) if ids is None else ids, n)
    if n_shards == 1:
        return Index.from_coefficients(basis, basis.coefficients(examples), ids=ids, dtype=dtype)
    parts = torch.arange(n).tensor_split(n_shards)
    jobs = [joblib.delayed(_encoded)(basis, examples[rows], ids[rows], dtype) for rows in parts]
    results = joblib.Parallel(n_jobs=-1, return_as="generator")(jobs)
    return Index(basis, tuple(tqdm(results, total=n_shards, desc="indexing shards", leave=False)), dtype)


def _encoded(basis: Basis, examples: Examples, ids: Tensor, dtype: str) -> Shard:
    with one_thread():
        return Shard.encode(basis.coefficients(examples), ids, dtype)


def _by_stratum(strata: Tensor, n_strata: int) -> list[tuple[int, slice | Tensor]]:
    """Each stratum that occurs, with the rows of its queries."""
    if n_strata == 1 or len(strata) == 1:
        return [(int(strata[0]), slice(None))]
    return [(int(stratum), (strata == stratum).nonzero()[:, 0]) for stratum in strata.unique()]


@cache
def _code() -> str:
    return source_fingerprint({"tda_core.index"})
