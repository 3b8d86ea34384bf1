"""Weights of terms whose sum is to predict retraining: chosen on validation queries, checked on subsets left out.

Each term scores every training example for every query. Non-negative least squares fits its predictions, sums over the
examples of a subset, to what retraining did to the queries: few numbers from many outcomes, the same for all queries.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from tda_core.metrics import lds_per_query


@dataclass(frozen=True, eq=False)
class TermWeights:
    """values: (F,) >= 0, fitted to all subsets. held_out: mean LDS, on the other half of the subsets, of weights that
    are fitted to one half, over n_splits random halves. alone: (F,), each term's own LDS there."""

    values: Tensor
    held_out: float
    alone: Tensor


def fit_term_weights(
    terms: Tensor, masks: Tensor, outcomes: Tensor, *, n_splits: int = 10, seed: int = 0
) -> TermWeights:
    """Weights of terms (F, q, n) for subsets, masks (m, n) bool, and outcomes (m, q), higher = better.

    Every query counts alike: its outcomes, less their mean over subsets, are scaled to the same spread. Where the score
    is compared across queries (centred LDS), give terms and outcomes without their means over queries.
    Raises ValueError for shapes that do not fit, fewer than 6 subsets, and values that are not finite.
    """
    _check(terms, masks, outcomes)
    predicted = torch.einsum("mn,fqn->fmq", masks.double(), terms.double())
    halves, generator = [], torch.Generator().manual_seed(seed)
    for _ in range(n_splits):
        first, second = torch.randperm(len(masks), generator=generator).tensor_split(2)
        halves += [(first, second), (second, first)]
    found = [_lds(_fit(predicted[:, a], outcomes[a]), terms, masks[b], outcomes[b]) for a, b in halves]
    unit = torch.eye(len(terms), dtype=torch.float64)
    alone = [np.mean([_lds(one, terms, masks[b], outcomes[b]) for _, b in halves]) for one in unit]
    return TermWeights(_fit(predicted, outcomes).float(), float(np.mean(found)), torch.tensor(alone).float())


def _fit(predicted: Tensor, outcomes: Tensor) -> Tensor:
    """(F, m, q), (m, q) -> (F,) float64."""
    outcomes = outcomes.double() - outcomes.double().mean(0)
    predicted = predicted - predicted.mean(1, keepdim=True)
    spread = outcomes.std(0, correction=0)
    spread = torch.where(spread > 0, spread, torch.inf)  # a query that retraining never moved says nothing
    columns, sizes = (predicted / spread).flatten(1), (predicted / spread).flatten(1).norm(dim=1)
    sizes = torch.where(sizes > 0, sizes, 1.0)
    found, _ = nnls((columns / sizes[:, None]).T.numpy(), (outcomes / spread).flatten().numpy())
    return torch.from_numpy(found) / sizes


def _lds(weights: Tensor, terms: Tensor, masks: Tensor, outcomes: Tensor) -> float:
    return float(lds_per_query(torch.einsum("f,fqn->qn", weights, terms.double()), masks, outcomes).mean())


def _check(terms: Tensor, masks: Tensor, outcomes: Tensor) -> None:
    if terms.ndim != 3 or masks.shape != (len(outcomes), terms.shape[2]) or outcomes.shape[1:] != terms.shape[1:2]:
        shapes = ", ".join(str(tuple(value.shape)) for value in (terms, masks, outcomes))
        raise ValueError(f"expected terms (F, q, n), masks (m, n) and outcomes (m, q), got {shapes}")
    if masks.dtype != torch.bool:
        raise ValueError(f"masks must be boolean, got {masks.dtype}")
    if len(masks) < 6:
        raise ValueError(f"halves of at least 3 subsets are compared: give 6 or more, got {len(masks)}")
    for name, value in (("terms", terms), ("outcomes", outcomes)):
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} must be finite, but hold NaN or infinity")
