"""Subset memberships of more training examples than one wants to hold: read a shard of examples at a time."""

import abc
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from tda_core.designs import check_membership, distinct
from tda_core.store import fingerprint

# Examples whose subsets are drawn together, from a seed of their own: what a shard holds does not depend on its size.
BLOCK = 2**13


class ShardedMembership(abc.ABC):
    """A membership matrix M (K, n) by shards of its columns. identity: what results of it are keyed by."""

    n_subsets: int
    n_examples: int

    @property
    @abc.abstractmethod
    def identity(self) -> str: ...

    @abc.abstractmethod
    def shard(self, start: int, stop: int) -> sparse.csc_array:
        """Columns start..stop - 1: (K, stop - start) float64."""

    @abc.abstractmethod
    def columns(self, examples: np.ndarray) -> sparse.csc_array:
        """The columns of at least one example (m,), rising: (K, m) float64."""


@dataclass(frozen=True)
class DrawnMembership(ShardedMembership):
    """Each of n examples joins `degree` distinct subsets, all such choices equally likely, drawn anew when asked for.

    The design of `designs.left_regular`, of which nothing is held. Raises ValueError for no examples, fewer than 2
    subsets and a degree outside 1..n_subsets.
    """

    n_examples: int
    n_subsets: int
    degree: int
    seed: int

    def __post_init__(self) -> None:
        if self.n_examples < 1:
            raise ValueError(f"n_examples must be at least 1, got {self.n_examples}")
        if self.n_subsets < 2:
            raise ValueError(f"n_subsets must be at least 2, got {self.n_subsets}")
        if not 1 <= self.degree <= self.n_subsets:
            raise ValueError(f"degree must lie in 1..{self.n_subsets}, the number of subsets, got {self.degree}")

    @property
    def identity(self) -> str:
        return fingerprint([self, BLOCK])

    def shard(self, start: int, stop: int) -> sparse.csc_array:
        if not 0 <= start < stop <= self.n_examples:
            raise ValueError(f"a shard must lie in 0..{self.n_examples}, got {start}..{stop}")
        blocks = range(start // BLOCK, (stop - 1) // BLOCK + 1)
        drawn = np.concatenate([self._block(i) for i in blocks])
        first = blocks[0] * BLOCK
        return self._matrix(drawn[start - first : stop - first])

    def columns(self, examples: np.ndarray) -> sparse.csc_array:
        blocks, starts = np.unique(examples // BLOCK, return_index=True)
        parts = np.split(examples, starts[1:])
        found = [self._block(int(i))[part - i * BLOCK] for i, part in zip(blocks, parts, strict=True)]
        return self._matrix(np.concatenate(found))

    def _block(self, i: int) -> np.ndarray:
        """Subsets, sorted, that each example of a block joins: (BLOCK or fewer, degree)."""
        size = min(BLOCK, self.n_examples - i * BLOCK)
        return distinct(size, self.n_subsets, self.degree, np.random.default_rng([self.seed, i]))

    def _matrix(self, chosen: np.ndarray) -> sparse.csc_array:
        starts = np.arange(0, chosen.size + 1, self.degree, dtype=np.int32)
        return sparse.csc_array((np.ones(chosen.size), chosen.reshape(-1), starts), shape=(self.n_subsets, len(chosen)))


@dataclass(frozen=True, eq=False)
class HeldMembership(ShardedMembership):
    """A membership that is in memory, (K, n), checked."""

    matrix: sparse.csc_array

    def __post_init__(self) -> None:
        check_membership(self.matrix)

    @property
    def n_subsets(self) -> int:
        return self.matrix.shape[0]

    @property
    def n_examples(self) -> int:
        return self.matrix.shape[1]

    @property
    def identity(self) -> str:
        return fingerprint([self.n_subsets, self.matrix.indices, self.matrix.indptr])

    def shard(self, start: int, stop: int) -> sparse.csc_array:
        return self.matrix[:, start:stop].astype(np.float64)

    def columns(self, examples: np.ndarray) -> sparse.csc_array:
        return self.matrix[:, examples].astype(np.float64)
