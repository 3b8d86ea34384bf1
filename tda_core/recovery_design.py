"""A membership matrix M (K, n) as recovery uses it: checked once, dense or sparse, never made dense when sparse.

Sparse recovery needs three products only: M'r for residuals, columns of M for the few examples that carry
weight, and M M' (K, K). Centring (an intercept) is done implicitly, so that a sparse M stays sparse.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

Membership = Tensor | np.ndarray | scipy.sparse.sparray | scipy.sparse.spmatrix
# Largest dense M that products use as it is; a larger one is kept sparse (bytes are 8 times this).
DENSE_FLOATS = 2**22
# Share of entries that are not 0, up to which coordinate descent on the sparse M is the faster solver.
THIN = 0.2


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense M made ready once for the solver.

    matrix: M (K, n) float64. rows: M' (n, K), of single precision where Gram matrices then have no error. sums: of
    every column (n,).
    """

    matrix: Tensor
    rows: Tensor
    sums: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> "Dense":
        exact = bool((matrix == matrix.round()).all()) and len(matrix) * float(matrix.abs().max()) ** 2 < 2**24
        return cls(matrix, matrix.T.to(torch.float32 if exact else matrix.dtype).contiguous(), matrix.sum(0))

    def gram(self, index: Tensor, *, centred: bool) -> Tensor:
        """Products of the named columns (q, s) with each other, of the centred ones if asked: (q, s, s) float64."""
        picked = self.rows[index]
        gram = (picked @ picked.mT).to(self.sums.dtype)
        if centred:
            sums = self.sums[index]
            gram -= sums[:, :, None] * sums[:, None, :] / self.rows.shape[1]
        return gram


@dataclass(frozen=True, eq=False)
class Design:
    """M (K, n): row k says which of n examples are in subset k.

    held: float64 M dense on its device, or scipy's csc_array (which stays on the CPU). thin: a sparse copy of a dense M
    on the CPU that came sparse, with few entries: what coordinate descent runs on.
    """

    held: Tensor | scipy.sparse.csc_array
    thin: scipy.sparse.csc_array | None = None

    @classmethod
    def of(cls, membership: "Membership | Design") -> "Design":
        """Checked M. membership: (K, n) bool or number, torch, numpy or scipy.sparse; small sparse ones become dense.

        Raises ValueError for another shape, K < 2, values that are not finite, an empty row (a subset of nobody) or
        column (an example in no subset, about which nothing was measured).
        """
        if isinstance(membership, Design):
            return membership
        shape = tuple(getattr(membership, "shape", ()))
        if len(shape) != 2:
            raise ValueError(f"the membership matrix must be (K, n), got shape {shape}")
        if shape[0] < 2 or shape[1] < 1:
            raise ValueError(f"the membership matrix needs K >= 2 subsets and n >= 1 examples, got {shape}")
        if scipy.sparse.issparse(membership):
            held = scipy.sparse.csc_array(membership, dtype=np.float64, copy=True)
            held.sum_duplicates()
            held.eliminate_zeros()
            values = torch.from_numpy(held.data)
            # counted by index, because a column of M may sum to zero without being empty
            in_row, in_column = np.bincount(held.indices, minlength=shape[0]), np.diff(held.indptr)
        else:
            held = torch.as_tensor(membership).detach().double().contiguous()
            values, member = held, held != 0
            in_row, in_column = member.sum(1).cpu().numpy(), member.sum(0).cpu().numpy()
        if not torch.isfinite(values).all():
            raise ValueError("the membership matrix must be finite, but holds NaN or infinity")
        if not in_row.all():
            raise ValueError(f"every subset needs a member, but row {int(np.argmin(in_row))} of M is empty")
        if not in_column.all():
            column = int(np.argmin(in_column))
            raise ValueError(f"every example must be in a subset, but column {column} of M is empty")
        if scipy.sparse.issparse(held) and held.shape[0] * held.shape[1] <= DENSE_FLOATS:
            thin = held if held.nnz <= THIN * shape[0] * shape[1] else None
            return cls(torch.from_numpy(held.toarray(order="C")), thin)
        return cls(held)

    @property
    def n_subsets(self) -> int:
        return self.held.shape[0]

    @property
    def n_examples(self) -> int:
        return self.held.shape[1]

    @property
    def is_sparse(self) -> bool:
        return not isinstance(self.held, Tensor)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.is_sparse else self.held.device

    def measurements(self, y: Tensor | np.ndarray) -> Tensor:
        """Checked measurements, one row a query: (q, K) float64 on M's device.

        Raises ValueError for another shape and for values that are not finite, naming the first.
        """
        y = torch.as_tensor(y).detach()
        if y.ndim != 2 or y.shape[1] != self.n_subsets or not len(y):
            raise ValueError(f"measurements must be (q, K) with K = {self.n_subsets}, got shape {tuple(y.shape)}")
        if not torch.isfinite(y).all():
            query, k = (~torch.isfinite(y)).nonzero()[0].tolist()
            raise ValueError(f"measurements must be finite, but [{query}, {k}] is {y[query, k].item()}")
        return y.to(device=self.device, dtype=torch.float64)

    def correlate(self, residuals: Tensor) -> Tensor:
        """Each row r of residuals (q, K) as M'r: (q, n)."""
        if not self.is_sparse:
            return residuals @ self.held
        return torch.from_numpy(self._transposed @ residuals.numpy().T).T

    def predict(self, weights: Tensor) -> Tensor:
        """Each row w of weights (q, n) as M w: (q, K). Costs little for weights with few nonzero columns."""
        if not self.is_sparse:
            return weights @ self.held.T
        used = (weights != 0).any(0).nonzero()[:, 0]
        return weights[:, used] @ self.columns(used).T

    def columns(self, index: Tensor) -> Tensor:
        """The named columns, dense: (K, len(index))."""
        if not self.is_sparse:
            return self.held[:, index]
        return torch.from_numpy(self.held[:, index.numpy()].toarray())

    def rows(self, index: np.ndarray) -> "Design":
        """The design of the named subsets alone, not checked for examples that are in none of them."""
        if self.is_sparse:
            return Design(self.held.tocsr()[index].tocsc())
        thin = None if self.thin is None else self.thin.tocsr()[index].tocsc()
        return Design(self.held[torch.from_numpy(index)], thin)

    @cached_property
    def dense(self) -> Dense:
        """What the solver takes, of an M that is dense."""
        return Dense.of(self.held)

    @cached_property
    def means(self) -> Tensor:
        """Mean of every column: (n,)."""
        ones = torch.ones(1, self.n_subsets, dtype=torch.float64, device=self.device)
        return self.correlate(ones)[0] / self.n_subsets

    def squared_norms(self, *, centred: bool = False) -> Tensor:
        """Squared length of every column, of the centred one if asked: (n,)."""
        if self.is_sparse:
            squared = torch.from_numpy(np.asarray(self.held.power(2).sum(axis=0)))
        else:
            squared = (self.held**2).sum(0)
        return (squared - self.n_subsets * self.means**2).clamp_min(0) if centred else squared

    def kernel(self) -> Tensor:
        """M M' (K, K), dense."""
        return torch.from_numpy((self.held @ self.held.T).toarray()) if self.is_sparse else self.held @ self.held.T

    @cached_property
    def _transposed(self) -> scipy.sparse.csr_array:
        return self.held.T.tocsr()
