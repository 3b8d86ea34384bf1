"""From scores to money: who gets paid for a query's answer, and a stream of queries to be paid for.

Each query pays 1, shared among the units (sources, or examples) in proportion to the positive part of their scores.
What that rule hides: a unit that harms pays nothing back; two units that hold the same are each easily done without,
and both earn little; a query that hardly depends on anyone pays as much as one that does.
"""

import math

import torch
from torch import Tensor

from tda_core.examples import Examples


def payment_shares(scores: Tensor, sizes: Tensor) -> Tensor:
    """Each unit's share of what a query pays: (n_query, n_units), rows sum to 1.

    scores: (n_query, n_units), or effects measured by retraining. Their positive part, over its sum. A query without a
    positive score is paid by head count, sizes (n_units,). Raises ValueError for shapes that do not fit, scores
    that are not finite, and sizes that are negative or all zero.
    """
    _check(scores, sizes)
    positive = scores.double().clamp_min(0)
    highest = positive.amax(1, keepdim=True)
    positive = positive / torch.where(highest > 0, highest, 1)  # sums of tiny scores would round
    total = positive.sum(1, keepdim=True)
    by_head = (sizes.double() / sizes.sum()).expand_as(positive)
    return torch.where(total > 0, positive / total.clamp_min(1), by_head).to(scores.dtype)


def left_out(scores: Tensor, sizes: Tensor) -> Tensor:
    """From scores of a loss that counts zero to scores of examples that training never sees: (n_query, n_units).

    A score is of taking a unit's loss out of a mean that keeps its divisor n. Training on the rest divides by what is
    left, so the rest weighs more against weight decay (and against whatever else keeps the mean gradient from zero):

        left_out_s = (score_s - size_s / n * sum over all units of scores) * n / (n - size_s),

    the response to the exact change of the objective's gradient. For single examples the two hardly differ; for
    sources of different sizes they do. scores: of all units that make up the training set. sizes: (n_units,) examples
    of each. Raises ValueError for shapes that do not fit and for a unit that is the whole training set.
    """
    _check(scores, sizes)
    n, sizes = sizes.sum().to(scores.dtype), sizes.to(scores.dtype)
    if bool((sizes == n).any()):
        raise ValueError(f"without unit {int(sizes.argmax())} no training example would be left")
    return (scores - sizes / n * scores.sum(1, keepdim=True)) * n / (n - sizes)


def misplaced(shares: Tensor, reference: Tensor) -> Tensor:
    """Part of a query's payment that goes to others than the reference pays: (n_query,), 0 to 1.

    shares, reference: (n_query, n_units), rows that sum to 1. Raises ValueError for unequal shapes.
    """
    if shares.shape != reference.shape:
        raise ValueError(f"shares are {tuple(shares.shape)}, but the reference {tuple(reference.shape)}")
    return (shares - reference).abs().sum(1) / 2


def drifting_stream(queries: Examples, n: int, *, noise: float, n_mixes: int = 5, seed: int) -> Examples:
    """n queries drawn with replacement, with pixel noise, from a class mix that drifts.

    n_mixes: class mixes drawn at even distances along the stream (from a Dirichlet distribution of
    concentration 0.5); between them the mix moves in a straight line. noise: standard deviation of what is added to the
    inputs, as a share of the queries' own. Raises ValueError for a regression, n or n_mixes below 1 and noise below 0.
    """
    if not queries.is_classification:
        raise ValueError("the stream drifts between classes, but these targets are numbers")
    if n < 1 or n_mixes < 1:
        raise ValueError(f"n and n_mixes must be >= 1, got {n} and {n_mixes}")
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"noise must be finite and >= 0, got {noise}")
    generator = torch.Generator().manual_seed(seed)
    mix = _drifting_mix(len(queries.targets.unique()), n, n_mixes, generator)
    picked = torch.empty(n, dtype=torch.int64)
    kind = torch.multinomial(mix, 1, generator=generator)[:, 0]
    for i, label in enumerate(queries.targets.unique()):
        members, places = (queries.targets == label).nonzero()[:, 0], (kind == i).nonzero()[:, 0]
        picked[places] = members[torch.randint(len(members), (len(places),), generator=generator)]
    added = torch.randn(n, *queries.inputs.shape[1:], generator=generator).to(queries.inputs.dtype)
    inputs = queries.inputs[picked] + noise * queries.inputs.std() * added
    return Examples(inputs, queries.targets[picked])


def _drifting_mix(n_classes: int, n: int, n_mixes: int, generator: torch.Generator) -> Tensor:
    """Class probabilities of each query of the stream: (n, n_classes)."""
    # a normalised draw of Gamma(1/2) variables, halves of squared normals, is a Dirichlet draw of concentration 1/2
    drawn = torch.randn(n_mixes, n_classes, generator=generator, dtype=torch.float64) ** 2
    mixes = drawn / drawn.sum(1, keepdim=True)
    place = torch.linspace(0, n_mixes - 1, n, dtype=torch.float64)
    before = place.floor().long().clamp_max(max(n_mixes - 2, 0))
    step = (place - before)[:, None]
    return (1 - step) * mixes[before] + step * mixes[(before + 1).clamp_max(n_mixes - 1)]


def _check(scores: Tensor, sizes: Tensor) -> None:
    if scores.ndim != 2 or not scores.is_floating_point() or not torch.isfinite(scores).all():
        raise ValueError(f"scores must be finite floats (n_query, n_units), got {scores.dtype} {tuple(scores.shape)}")
    if sizes.shape != scores.shape[1:]:
        raise ValueError(f"sizes must be ({scores.shape[1]},), one a unit, got {tuple(sizes.shape)}")
    if bool((sizes < 0).any()) or not bool(sizes.sum() > 0):
        raise ValueError(f"sizes must be >= 0 and not all zero, got {sizes.tolist()}")
