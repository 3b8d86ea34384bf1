"""Subset designs: which training examples each retrained model sees, as boolean membership matrices."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def random_subsets(n: int, m: int, fraction: float, *, seed: int) -> Tensor:
    """Draw `m` independent random subsets of `n` examples, each of exactly round(fraction * n).

    Every subset of that size is equally likely (the design behind the linear datamodelling score,
    Park et al. 2023, https://arxiv.org/abs/2303.14186). Python's round is used: halves go to the
    even neighbour. Returns a (m, n) bool tensor, True where the example is in the subset.
    Raises ValueError for n < 1, m < 1, a fraction outside (0, 1), and a subset of 0 or all n.
    """
    _at_least_one("n (the number of training examples)", n)
    _at_least_one("m (the number of subsets)", m)
    size = subset_size(n, fraction)
    members = np.zeros((m, n), dtype=bool)
    members[:, :size] = True
    return torch.from_numpy(np.random.default_rng(seed).permuted(members, axis=1))


def subset_size(n: int, fraction: float) -> int:
    """round(fraction * n). Raises ValueError for a fraction outside (0, 1), and a subset of 0 or all n."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie strictly between 0 and 1, got {fraction}")
    size = round(fraction * n)
    if not 0 < size < n:
        raise ValueError(
            f"fraction {fraction} of {n} examples is a subset of {size}; expected at least 1 and at most {n - 1}"
        )
    return size


def leave_one_out_masks(n: int, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """Membership of the training sets that lack one example each.

    indices: the examples to remove, each in 0..n-1 and named once. Returns a (len(indices), n) bool
    tensor; row i is False at indices[i] only. Raises ValueError for n < 2 (nothing would be left),
    and for no, repeated, fractional or out-of-range indices.
    """
    if n < 2:
        raise ValueError(f"leaving one example out needs at least 2 training examples, got n={n}")
    index = torch.as_tensor(indices)
    if index.ndim != 1 or len(index) == 0:
        raise ValueError(f"indices must be a non-empty list, got shape {tuple(index.shape)}")
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"indices must be whole numbers, got {index.dtype}")
    index = index.long()
    outside = (index < 0) | (index >= n)
    if outside.any():
        raise ValueError(f"indices must lie in 0..{n - 1}, got {int(index[outside][0])}")
    values, counts = index.unique(return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"indices must not repeat, but {int(values[counts > 1][0])} occurs more than once")
    masks = torch.ones(len(index), n, dtype=torch.bool)
    masks[torch.arange(len(index)), index] = False
    return masks


def removal_masks(scores: Tensor | np.ndarray, k: int) -> Tensor:
    """Membership of the training sets that lack each query's `k` strongest proponents.

    scores: (n_query, n_train), positive = proponent; equal scores go by the lower index. Returns a
    (n_query, n_train) bool tensor with exactly n_train - k True a row. Random removal of as many is
    `random_subsets(n_train, n_query, (n_train - k) / n_train, seed=...)`.
    Raises ValueError for other shapes, scores that are not finite, and k outside 1..n_train-1.
    """
    scores = torch.as_tensor(scores).detach().cpu()
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores must be (n_query, n_train), got shape {tuple(scores.shape)}")
    if not torch.isfinite(scores).all():
        row, column = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise ValueError(f"scores must be finite, but [{row}, {column}] is {scores[row, column].item()}")
    n_train = scores.shape[1]
    if not 1 <= k < n_train:
        raise ValueError(f"k must lie in 1..{n_train - 1} for {n_train} training examples, got {k}")
    top = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :k]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, top, False)


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
