"""An index of all training examples that answers queries at the cost of a few directions and one product.

    score(q, b) = z_q . c_b    (z_q: reading of the query, c_b: coefficients of the example; `tda_core.basis`)

Coefficients are kept as float32, float16 or int8. int8 rounds each c_b to steps of scale_b = max|c_b| / 127, so
a score is off by at most sum_j |z_qj| scale_b / 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tda_core.basis import Basis, BasisSettings
from tda_core.basis_fit import fit_basis
from tda_core.dynamics import Dynamics
from tda_core.examples import Examples
from tda_core.files import source_fingerprint
from tda_core.problem import Problem
from tda_core.simulation import sum_groups
from tda_core.store import load_tensors, save_tensors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
FORMAT = 1
# Floats that a block of rows has once it is back in float32 (4 MB): it stays in the cache until it is multiplied.
BLOCK_FLOATS = 2**20


@dataclass(frozen=True, eq=False)
class Top:
    """The strongest units of each query, ids and scores (n_query, k), strongest first."""

    proponents: Tensor
    proponent_scores: Tensor
    opponents: Tensor
    opponent_scores: Tensor


@dataclass(frozen=True, eq=False)
class Index:
    """Coefficients of n units (training examples, or groups of them) and the basis that queries are read along.

    codes: (L, n, k) in the storage type. scales: (L, n), ones but for int8. ids: (n,) int64. units: "examples"
    or "groups". All methods that change something give a new index.
    """

    basis: Basis
    codes: Tensor
    scales: Tensor
    ids: Tensor
    dtype: str = "float32"
    units: str = "examples"

    @classmethod
    def from_coefficients(
        cls, basis: Basis, coefficients: Tensor, *, ids: Tensor | None = None, dtype: str = "float32"
    ) -> "Index":
        """An index of coefficients (L, n, k) that exist already. Raises ValueError for ids that are not n different."""
        n = coefficients.shape[1]
        if coefficients.ndim != 3 or coefficients.shape != (basis.n_strata, n, basis.rank):
            expected = f"({basis.n_strata}, n, {basis.rank})"
            raise ValueError(f"coefficients must be {expected}, got {tuple(coefficients.shape)}")
        ids = torch.arange(n) if ids is None else ids
        if ids.shape != (n,) or ids.dtype != torch.int64:
            raise ValueError(f"ids must be {n} int64 numbers, got {ids.dtype} of shape {tuple(ids.shape)}")
        _expect_different(ids)
        return cls(basis, *_encoded(coefficients, dtype), ids, dtype)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_bytes(self) -> int:
        """Size of what is kept of the units."""
        scales = self.scales.nbytes if self.dtype == "int8" else 0
        return self.codes.nbytes + scales + self.ids.nbytes

    def scores(self, queries: Examples) -> Tensor:
        """Scores (n_query, n), positive for proponents, columns in the order of `ids`; streamed in blocks."""
        z, strata = self._read(queries)
        found = torch.empty(len(z), len(self), dtype=z.dtype)
        for stratum, rows in _by_stratum(strata, self.basis.n_strata):
            for start, block in self._blocks(stratum):
                found[rows, start : start + len(block)] = z[rows] @ block.T
        return found

    def top(self, queries: Examples, k: int) -> Top:
        """The k strongest proponents and opponents of each query, without the whole score matrix.

        Raises ValueError for k outside 1..n.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"k must lie in 1..{len(self)}, the units of this index, got {k}")
        z, strata = self._read(queries)
        ends = [(torch.empty(len(z), k, dtype=z.dtype), torch.empty(len(z), k, dtype=torch.int64)) for _ in range(2)]
        for stratum, rows in _by_stratum(strata, self.basis.n_strata):
            best: list[tuple[Tensor, Tensor] | None] = [None, None]
            for start, block in self._blocks(stratum):
                scores = z[rows] @ block.T
                positions = torch.arange(start, start + len(block)).expand_as(scores)
                for side, sign in enumerate((1, -1)):
                    best[side] = _merged(best[side], sign * scores, positions, k)
            for (values, where), found in zip(ends, best, strict=True):
                values[rows], where[rows] = found
        (high, first), (low, last) = ends
        return Top(self.ids[first], high, self.ids[last], -low)

    def append(self, examples: Examples, ids: Tensor | None = None) -> "Index":
        """The index with further examples, whose coefficients alone are computed; ids go on after the largest."""
        if self.units != "examples":
            raise ValueError("examples cannot be appended to an index of groups: append first, then group")
        if ids is None:
            ids = torch.arange(len(examples)) + (int(self.ids.max()) + 1 if len(self) else 0)
        added = Index.from_coefficients(self.basis, self.basis.coefficients(examples), ids=ids, dtype=self.dtype)
        return Index.merge([self, added])

    def remove(self, ids: Tensor) -> "Index":
        """The index without these units. Raises ValueError for an id that is not there, naming it."""
        missing = ids[~torch.isin(ids, self.ids)]
        if len(missing):
            raise ValueError(f"no unit of this index has id {int(missing[0])}")
        kept = ~torch.isin(self.ids, ids)
        return replace(self, codes=self.codes[:, kept], scales=self.scales[:, kept], ids=self.ids[kept])

    @classmethod
    def merge(cls, shards: Sequence["Index"]) -> "Index":
        """One index of shards that separate workers built on the same basis. Raises ValueError where they differ."""
        if not shards:
            raise ValueError("merge needs at least one index, got none")
        first = shards[0]
        for other in shards[1:]:
            for name in ("dtype", "units"):
                if getattr(other, name) != getattr(first, name):
                    raise ValueError(f"cannot merge {name} {getattr(first, name)!r} with {getattr(other, name)!r}")
            if other.basis is not first.basis and other.basis.fingerprint != first.basis.fingerprint:
                prints = f"{first.basis.fingerprint} and {other.basis.fingerprint}"
                raise ValueError(f"cannot merge indexes of different bases, {prints}")
        ids = torch.cat([shard.ids for shard in shards])
        _expect_different(ids)
        codes, scales = (torch.cat([getattr(shard, name) for shard in shards], 1) for name in ("codes", "scales"))
        return replace(first, codes=codes, scales=scales, ids=ids)

    def grouped(self, groups: Tensor) -> "Index":
        """The index whose units are groups: groups (n,) int64, 0 to the highest, in the order of `ids`."""
        whole = self.codes.float() * self.scales[..., None]
        summed = torch.stack([sum_groups(of_stratum, groups) for of_stratum in whole])
        grouped = Index.from_coefficients(self.basis, summed, dtype=self.dtype)
        return replace(grouped, units="groups")

    def astype(self, dtype: str) -> "Index":
        """The same index in another storage type."""
        codes, scales = _encoded(self.codes.float() * self.scales[..., None], dtype)
        return replace(self, codes=codes, scales=scales, dtype=dtype)

    def save(self, path: Path | str) -> None:
        """Write one file, whole or not at all, with the hashes of model, data and code."""
        tensors = {"codes": self.codes, "scales": self.scales, "ids": self.ids}
        tensors |= {f"basis/{name}": tensor for name, tensor in self.basis.tensors().items()}
        described = {"format": FORMAT, "code": _code(), "dtype": self.dtype, "units": self.units}
        save_tensors(path, tensors, described | self.basis.problem.identity | {"basis": self.basis.settings()})

    @classmethod
    def load(cls, path: Path | str, problem: Problem, *, any_code: bool = False) -> "Index":
        """Read what `save` wrote.

        any_code: accept a file that other code wrote. Raises FileNotFoundError, CorruptFile for a damaged
        file, and ValueError naming both values for another format, model, data or code.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} has index format {metadata.get('format')}, but this code reads {FORMAT}")
        problem.check_identity(path, metadata)
        if metadata["code"] != _code() and not any_code:
            raise ValueError(f"{path} was written by code {metadata['code']}, but this is code {_code()}")
        of_basis = {name.removeprefix("basis/"): t for name, t in tensors.items() if name.startswith("basis/")}
        basis = Basis.restore(problem, of_basis, metadata["basis"])
        stored = (tensors[name] for name in ("codes", "scales", "ids"))
        return cls(basis, *stored, metadata["dtype"], metadata["units"])

    def _read(self, queries: Examples) -> tuple[Tensor, Tensor]:
        z, strata = self.basis.read(queries)
        return z.float(), strata  # as the coefficients are, at most

    @cached_property
    def _block_rows(self) -> int:
        whole = self.dtype == "float32"  # needs no conversion: one product is fastest
        return max(1, len(self) if whole else BLOCK_FLOATS // self.basis.rank)

    def _blocks(self, stratum: int):
        """(start, coefficients (rows, k) in float32) of a stratum, block by block."""
        codes, scales = self.codes[stratum], self.scales[stratum]
        for start in range(0, len(self), self._block_rows):
            block = codes[start : start + self._block_rows]
            if self.dtype != "float32":
                block = block.float() * scales[start : start + self._block_rows, None]
            yield start, block


def build_index(
    problem: Problem,
    dynamics: Dynamics,
    held_out: Examples,
    setting: BasisSettings | None = None,
    *,
    dtype: str = "float32",
) -> Index:
    """Fit a basis and index the whole training set, in memory that does not grow with n x p.

    held_out: validation queries that the rank is chosen on. Raises what `fit_basis` raises.
    """
    fitted = fit_basis(problem, dynamics, held_out, setting)
    shards = [Index.from_coefficients(fitted.basis, fitted.coefficients, ids=fitted.rows, dtype=dtype)]
    rest = torch.ones(len(problem.train), dtype=torch.bool)
    rest[fitted.rows] = False
    if rest.any():
        ids = rest.nonzero()[:, 0]
        coefficients = fitted.basis.coefficients(problem.train[ids])
        shards.append(Index.from_coefficients(fitted.basis, coefficients, ids=ids, dtype=dtype))
    whole = Index.merge(shards)
    order = whole.ids.argsort()
    return replace(whole, codes=whole.codes[:, order], scales=whole.scales[:, order], ids=whole.ids[order])


def _encoded(coefficients: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """codes (L, n, k) and scales (L, n)."""
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}, expected one of {sorted(DTYPES)}")
    if not torch.isfinite(coefficients).all():
        raise ValueError("coefficients must be finite: they hold NaN or infinity")
    coefficients = coefficients.float()
    if dtype != "int8":
        return coefficients.to(DTYPES[dtype]).contiguous(), torch.ones(coefficients.shape[:2])
    scales = coefficients.abs().amax(2) / 127 if coefficients.shape[1] else coefficients.new_zeros(len(coefficients), 0)
    steps = coefficients / scales.clamp_min(torch.finfo(scales.dtype).tiny)[..., None]
    return steps.round().to(torch.int8).contiguous(), scales


def _by_stratum(strata: Tensor, n_strata: int) -> list[tuple[int, slice | Tensor]]:
    """Each stratum that occurs, with the rows of its queries."""
    if n_strata == 1 or len(strata) == 1:
        return [(int(strata[0]), slice(None))]
    return [(int(stratum), (strata == stratum).nonzero()[:, 0]) for stratum in strata.unique()]


def _merged(best: tuple[Tensor, Tensor] | None, scores: Tensor, positions: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of what was best so far and of new scores; equal scores go by the lower position."""
    if best is not None:
        scores, positions = torch.cat([best[0], scores], 1), torch.cat([best[1], positions], 1)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), positions.gather(1, order)


def _expect_different(ids: Tensor) -> None:
    values, counts = ids.unique(return_counts=True)
    if len(values) < len(ids):
        raise ValueError(f"ids must differ, but {int(values[counts > 1][0])} occurs twice")


def _code() -> str:
    return source_fingerprint({"tda_core.index"})
