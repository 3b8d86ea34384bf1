"""Do scores find the examples that are known to matter: recall among the strongest, and the rank of the first.

Scores are often tied, those of a method that counts shared words most of all: where nothing is shared, everything is.
What is given is the expectation over all orders of what is tied, so that no method gains or loses by how a sort breaks
ties. Intervals are over queries.
"""

import torch
from scipy.special import gammaln
from torch import Tensor

from tda_core.estimates import Estimate, mean_estimate


def recall(scores: Tensor, relevant: Tensor, k: int) -> Estimate:
    """Share of a query's relevant examples that are among its k highest scores, mean over queries.

    scores: (q, n), finite. relevant: (q, n) bool, one or more a query. Raises ValueError for other shapes, scores that
    are not finite, a query without a relevant example, and k outside 1..n.
    """
    return mean_estimate(recalls(scores, relevant, k))


def recalls(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """`recall` of each query: (q,)."""
    _check(scores, relevant)
    return torch.stack([found_shares(row, own, k).mean() for row, own in zip(scores, relevant, strict=True)])


def found_shares(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """For each relevant example the chance that it is among the k highest scores: (r,), 0 or 1 but for ties.

    scores: (n,), finite. relevant: (n,) bool. Raises ValueError as `recall` does.
    """
    _check(scores[None], relevant[None])
    if not 1 <= k <= len(scores):
        raise ValueError(f"k must lie in 1..{len(scores)}, got {k}")
    higher, tied = _places(scores.double(), scores.double()[relevant])
    return ((k - higher) / tied).clamp(0, 1)


def reciprocal_rank(scores: Tensor, relevant: Tensor) -> Estimate:
    """1 / rank of a query's first relevant example, mean over queries (MRR). Arguments and errors as of `recall`."""
    return mean_estimate(reciprocal_ranks(scores, relevant))


def reciprocal_ranks(scores: Tensor, relevant: Tensor) -> Tensor:
    """`reciprocal_rank` of each query: (q,).

    With g examples above the best relevant score, t at it and r of these relevant, the first of the r stands at place j
    among the t with probability C(t - j, r - 1) / C(t, r).
    """
    _check(scores, relevant)
    values = []
    for row, own in zip(scores.double(), relevant, strict=True):
        best = row[own].max()
        higher, tied = (int(x) for x in _places(row, best[None]))
        r = int((row[own] == best).sum())
        j = torch.arange(1, tied - r + 2, dtype=torch.float64)
        log_chance = _log_choose(tied - j, r - 1) - _log_choose(torch.tensor([tied]), r)
        values.append((log_chance.exp() / (higher + j)).sum())
    return torch.stack(values)


def _places(row: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """How many scores are above each of these, and how many equal it."""
    ordered = row.sort().values
    first = torch.searchsorted(ordered, values)
    last = torch.searchsorted(ordered, values, right=True)
    return len(row) - last, last - first


def _log_choose(n: Tensor, k: int) -> Tensor:
    return torch.from_numpy(gammaln(n.numpy() + 1.0) - gammaln(k + 1.0) - gammaln(n.numpy() - k + 1.0))


def _check(scores: Tensor, relevant: Tensor) -> None:
    if scores.ndim != 2 or relevant.shape != scores.shape or relevant.dtype != torch.bool or not scores.numel():
        got = f"{tuple(scores.shape)} and {relevant.dtype} {tuple(relevant.shape)}"
        raise ValueError(f"scores must be (q, n) and relevant boolean of the same shape, got {got}")
    if not torch.isfinite(scores).all():
        query, example = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise ValueError(f"the score of query {query} and example {example} is {float(scores[query, example])}")
    none = (~relevant.any(1)).nonzero()
    if len(none):
        raise ValueError(f"query {int(none[0])} has no relevant example: there is nothing to find")
