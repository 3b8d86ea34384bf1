"""Shards: the rows of an index, in the type that they are stored in, in memory or mapped from a file alike."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from tda_core.store import ALIGNMENT, checksum

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
# Floats of one block, rows in float32 and their scores together (4 MB): what is multiplied is still in the cache.
BLOCK_FLOATS = 2**20


@dataclass(frozen=True, eq=False)
class Shard:
    """Coefficients of n units in L strata.

    codes: (L, k, n) in the storage type. A query's product with them reads whole rows; with (n, k) it takes up to five
    times as long, most where k is a power of two, because columns collide in the cache. ids: (n,) int64. scales: (L, n)
    size of a step, with int8 only. recorded: checksum of the tensors, where the file that they are mapped from says it.
    """

    codes: Tensor
    ids: Tensor
    scales: Tensor | None = None
    recorded: str = ""

    @classmethod
    def encode(cls, coefficients: Tensor, ids: Tensor, dtype: str) -> "Shard":
        """A shard of coefficients (L, n, k) of any floating-point type.

        Raises ValueError for an unknown dtype, and for what is not finite in it.
        """
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}, expected one of {sorted(DTYPES)}")
        coefficients, scales = coefficients.float(), None
        codes = coefficients.to(DTYPES[dtype]).transpose(1, 2)
        if not torch.isfinite(codes if dtype == "float16" else coefficients).all():
            raise ValueError(f"coefficients must be finite as {dtype}: they hold NaN, infinity or too large a number")
        if dtype == "int8":
            scales = coefficients.abs().amax(2) / 127
            steps = coefficients / scales.clamp_min(torch.finfo(scales.dtype).tiny)[..., None]
            codes = steps.round().to(torch.int8).transpose(1, 2)
        return cls(codes.contiguous(), ids, scales)

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], recorded: str) -> "Shard":
        """The shard whose `tensors()` these are, with their checksum."""
        codes = tensors["codes"]
        return cls(codes, tensors["ids"][: codes.shape[2]], tensors.get("scales"), recorded)

    @classmethod
    def join(cls, shards: Sequence["Shard"]) -> "Shard":
        """One shard, in memory, of at least one of the same type and shape."""
        scales = None if shards[0].scales is None else torch.cat([shard.scales for shard in shards], 1)
        return cls(torch.cat([shard.codes for shard in shards], 2), torch.cat([shard.ids for shard in shards]), scales)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor) -> "Shard":
        """Some of the rows, by mask or index, in memory."""
        return Shard(self.codes[..., rows], self.ids[rows], None if self.scales is None else self.scales[:, rows])

    @property
    def n_bytes(self) -> int:
        """Size of codes, ids and scales."""
        return self.codes.nbytes + self.ids.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def tensors(self) -> dict[str, Tensor]:
        """What is to be kept on disk, by name."""
        # a file begins with the ids: codes that start at a multiple of ALIGNMENT are multiplied as those in memory are
        ids = F.pad(self.ids, (0, -len(self) % (ALIGNMENT // self.ids.itemsize)))
        return {"codes": self.codes, "ids": ids} | ({} if self.scales is None else {"scales": self.scales})

    @cached_property
    def checksum(self) -> str:
        """SHA-256 over the tensors."""
        return self.recorded or checksum(self.tensors())

    def coefficients(self) -> Tensor:
        """All coefficients (L, n, k) in float32."""
        decoded = self.codes.transpose(1, 2).float()
        return decoded if self.scales is None else decoded * self.scales[..., None]

    def blocks(self, stratum: int, n_query: int) -> Iterator[Tensor]:
        """The columns (k, m) of a stratum in float32, in blocks that fit the cache with their scores for n queries."""
        codes = self.codes[stratum]
        converted = codes.dtype != torch.float32
        size = max(1, BLOCK_FLOATS // (n_query + converted * len(codes)))
        for start in range(0, codes.shape[1], size):
            block = codes[:, start : start + size]
            if self.scales is not None:
                yield block.float() * self.scales[stratum, start : start + size]
            else:
                yield block.float()  # itself, where nothing needs converting


@dataclass(frozen=True, eq=False)
class Top:
    """The strongest units of each query, ids and scores (n_query, k), strongest first."""

    proponents: Tensor
    proponent_scores: Tensor
    opponents: Tensor
    opponent_scores: Tensor


def strongest(scores: Tensor, k: int) -> Tensor:
    """Columns of the k highest of each row (q, n), or of all n, highest first; equal scores by the lower column."""
    k = min(k, scores.shape[1])
    values, columns = scores.topk(k)
    crowded = (scores >= values[:, -1:]).sum(1) > k  # then topk may have taken any of those that equal the last
    if crowded.any():
        columns[crowded] = scores[crowded].argsort(dim=1, descending=True, stable=True)[:, :k]
    columns = columns.sort(1).values
    return columns.gather(1, scores.gather(1, columns).argsort(dim=1, descending=True, stable=True))


def merged(best: tuple[Tensor, Tensor] | None, more: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k highest (scores, positions) of what was best so far and of the best of later rows."""
    if best is None:
        return more
    scores, positions = (torch.cat(pair, 1) for pair in zip(best, more, strict=True))
    columns = strongest(scores, k)
    return scores.gather(1, columns), positions.gather(1, columns)


def int64_ids(ids: Tensor, n: int) -> Tensor:
    """The ids, if they are n whole numbers; else ValueError."""
    if ids.shape != (n,) or ids.dtype != torch.int64:
        raise ValueError(f"ids must be {n} int64 numbers, got {ids.dtype} of shape {tuple(ids.shape)}")
    return ids


def different_ids(ids: Tensor, n: int | None = None) -> Tensor:
    """The ids, if they are n (any number: None) different ones; else ValueError."""
    values, counts = int64_ids(ids, len(ids) if n is None else n).unique(return_counts=True)
    if len(values) < len(ids):
        raise ValueError(f"ids must differ, but {int(values[counts > 1][0])} occurs twice")
    return ids
