"""Sparse recovery over more training examples than fit beside their scores: the Lasso, a shard of examples at a time.

The same problem, certificate and inner solvers as `recovery`, which holds M and weights (q, n) of all queries. Here M'r
is formed shard by shard, of which only the largest correlation (for the duality gap) and the strongest candidates are
kept, for each query its own; the Lasso is solved on those, and they grow until the gap holds for all n examples. What
comes out is sparse. Blocks of queries are independent of each other and go through joblib, so that
`joblib.parallel_config(backend="dask")` moves them to a cluster; with a `Store` finished blocks are kept.
"""

import math
from dataclasses import dataclass, field, replace

import joblib
import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from tqdm.auto import tqdm

from tda_core import recovery_descent
from tda_core.examples import hash_of
from tda_core.recovery import Penalty, check_gaps
from tda_core.recovery_design import Dense
from tda_core.recovery_newton import Goal, refit
from tda_core.sharded_membership import HeldMembership, ShardedMembership
from tda_core.store import Store
from tda_core.threads import one_thread

# Numbers held for each query and example of a shard at once: correlations, strengths, a copy of them, and masks
HELD_A_CELL = 4
# Candidates that are collected, as a multiple of those asked for, before the strongest are chosen
ROOM = 4


@dataclass(frozen=True)
class ShardedRecovery:
    """What is solved and how much memory it may take.

    lam: share of each query's largest useful lam. penalty: a Lasso. tolerance: relative duality gap. candidates: new
    examples that a query takes in after each pass over the shards. shard: examples in a shard. budget: bytes that the
    correlations of a shard may take, which sets how many queries are solved together; workers each take as much.
    Raises ValueError for another kind of penalty, and sizes that are not positive.
    """

    lam: float = 0.03
    penalty: Penalty = field(default_factory=Penalty)
    tolerance: float = 1e-4
    candidates: int = 500
    shard: int = 2**15
    budget: int = 2**28

    def __post_init__(self) -> None:
        if self.penalty.kind != "lasso":
            raise ValueError(f"only a lasso has few weights a query, got the penalty {self.penalty.kind!r}")
        for name in ("lam", "tolerance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        for name in ("candidates", "shard", "budget"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")

    @property
    def queries(self) -> int:
        """Queries that are solved together."""
        return max(1, self.budget // (8 * HELD_A_CELL * self.shard))

    def but(self, **changes: object) -> "ShardedRecovery":
        """The same settings with some changed."""
        return replace(self, **changes)


@dataclass(frozen=True, eq=False)
class SparseRecovered:
    """Influences of few examples on each query. weights: (q, n) sparse. intercepts, lam, gaps, steps: (q,), as in
    `recovery.Recovered`; steps counts passes over the shards."""

    weights: sparse.csr_array
    intercepts: Tensor
    lam: Tensor
    gaps: Tensor
    steps: Tensor

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Examples (q, k) and weights (q, k) of the k highest weights of each query, highest first; where it has fewer
        that are not zero, -1 and 0 stand behind them. Negative weights come last. ValueError for k < 1."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        ids = torch.full((self.weights.shape[0], k), -1)
        values = torch.zeros(ids.shape, dtype=torch.float64)
        for i, (start, end) in enumerate(zip(self.weights.indptr, self.weights.indptr[1:], strict=False)):
            held = self.weights.data[start:end]
            best = np.argsort(-held, kind="stable")[:k]
            ids[i, : len(best)] = torch.from_numpy(self.weights.indices[start:end][best].astype(np.int64))
            values[i, : len(best)] = torch.from_numpy(held[best])
        return ids, values


def recover_sharded(
    membership: ShardedMembership | sparse.csc_array,
    measurements: Tensor,
    settings: ShardedRecovery | None = None,
    *,
    store: Store | None = None,
    progress: bool = True,
) -> SparseRecovered:
    """Recover the influences behind measurements (q, K), one row a query, as `recovery.recover` does for small n.

    store: where finished blocks of queries are kept. Raises ValueError for measurements of another shape, NaN or
    infinity, and RuntimeError where rounding keeps a query from the tolerance.
    """
    settings = settings or ShardedRecovery()
    source = membership if isinstance(membership, ShardedMembership) else HeldMembership(membership)
    y = torch.as_tensor(measurements).detach().cpu().double()
    if y.ndim != 2 or y.shape[1] != source.n_subsets or not len(y):
        raise ValueError(f"measurements must be (q, K) with K = {source.n_subsets}, got shape {tuple(y.shape)}")
    if not torch.isfinite(y).all():
        query, k = (~torch.isfinite(y)).nonzero()[0].tolist()
        raise ValueError(f"measurements must be finite, but [{query}, {k}] is {y[query, k].item()}")
    blocks = y.split(settings.queries)
    # how the work is cut changes nothing of the result
    asked = {"membership": source.identity, "lam": settings.lam, "penalty": settings.penalty}
    asked |= {"tolerance": settings.tolerance}
    keys = [asked | {"measurements": hash_of([block])} for block in blocks]
    found = [None if store is None else store.load("sharded_recovery", key) for key in keys]
    missing = [i for i, block in enumerate(found) if block is None]
    results = joblib.Parallel(return_as="generator")(
        joblib.delayed(_solve_block)(source, blocks[i], settings) for i in missing
    )
    with tqdm(total=len(y), desc="recovery", unit="query", disable=not progress) as bar:
        bar.update(len(y) - sum(len(blocks[i]) for i in missing))
        for i, result in zip(missing, results, strict=True):
            found[i] = result
            if store is not None:
                store.save("sharded_recovery", keys[i], result)
            bar.update(len(blocks[i]))
    joined = {name: torch.cat([block[name] for block in found]) for name in found[0]}
    ends = np.concatenate([[0], joined["counts"].cumsum(0).numpy()])
    shape = (len(y), source.n_examples)
    weights = sparse.csr_array((joined["weights"].numpy(), joined["examples"].numpy(), ends), shape=shape)
    return SparseRecovered(weights, *(joined[name] for name in ("intercepts", "lam", "gaps", "steps")))


# -- one block of queries ---------------------------------------------------------------------------


@dataclass(eq=False)
class _Support:
    """What one query is solved on. examples: (c,) rising. columns: (K, c). weights: (c,)."""

    examples: np.ndarray
    columns: sparse.csc_array
    weights: Tensor

    @classmethod
    def empty(cls, n_subsets: int) -> "_Support":
        return cls(np.empty(0, np.int64), sparse.csc_array((n_subsets, 0)), torch.zeros(0, dtype=torch.float64))

    def grow(self, new: np.ndarray, columns: sparse.csc_array) -> None:
        """Take in more examples (m,), with their columns (K, m) and weight zero."""
        order = np.argsort(examples := np.concatenate([self.examples, new]))
        self.columns = sparse.hstack([self.columns, columns], format="csc")[:, order]
        self.weights = torch.cat([self.weights, torch.zeros(len(new), dtype=torch.float64)])[order]
        self.examples = examples[order]

    def predict(self) -> Tensor:
        return torch.from_numpy(self.columns @ self.weights.numpy())

    def within(self, start: int, stop: int) -> slice:
        return slice(*np.searchsorted(self.examples, [start, stop]))


def _solve_block(source: ShardedMembership, y: Tensor, settings: ShardedRecovery) -> dict[str, Tensor]:
    with one_thread():
        return _solved(source, y, settings)


def _solved(source: ShardedMembership, y: Tensor, settings: ShardedRecovery) -> dict[str, Tensor]:
    """Examples and weights of all queries one after the other, how many each has, and what `SparseRecovered` holds."""
    penalty, q = settings.penalty, len(y)
    goal = Goal(y, torch.zeros(q, dtype=y.dtype), penalty.ridge, penalty.nonnegative, penalty.intercept)
    supports = [_Support.empty(source.n_subsets) for _ in range(q)]
    gaps, steps, going = y.new_full((q,), torch.inf), torch.zeros(q, dtype=torch.long), torch.arange(q)
    while True:
        part, own = goal.at(going), [supports[i] for i in going.tolist()]
        residuals = part.centred(part.y - torch.stack([support.predict() for support in own]))
        extremes, best = _pass(source, part, residuals, own, settings)
        if not int(steps.max()):  # nothing has weight yet: this is where lam is a share of
            largest = part.strength(extremes).amax(1)
            goal = replace(goal, lam=settings.lam * largest.clamp_min(torch.finfo(torch.float32).tiny))
            part = goal.at(going)
        weights = torch.nn.utils.rnn.pad_sequence([support.weights for support in own], batch_first=True)
        gaps[going], _ = part.gaps(residuals, extremes, weights)
        steps[going] += 1
        # where nobody else asks for weight, the candidates' own gap is what rounding allows
        asks = (best.strengths > part.lam[best.queries]) & (gaps[going] > settings.tolerance)[best.queries]
        going, examples = going[best.queries[asks]], best.examples[asks]
        if not len(going):
            break
        # columns for all queries together, because each shard may have to be drawn for them
        union = examples.unique().numpy()
        columns = source.columns(union)
        going, counts = going.unique_consecutive(return_counts=True)
        for i, new in zip(going.tolist(), examples.split(counts.tolist()), strict=True):
            support, new = supports[i], new.sort().values.numpy()
            support.grow(new, columns[:, np.searchsorted(union, new)])
            # a smaller gap than asked for, because examples outside can only make it larger
            start, one = support.weights[None], goal.at(torch.tensor([i]))
            inside = recovery_descent.solve(support.columns, one, tolerance=settings.tolerance / 4, start=start)
            support.weights = inside.weights[0]
    check_gaps(gaps, settings.tolerance)
    return _result(goal, supports, penalty) | {"lam": goal.lam, "gaps": gaps, "steps": steps}


def _pass(
    source: ShardedMembership, goal: Goal, residuals: Tensor, supports: list[_Support], settings: ShardedRecovery
) -> tuple[Tensor, "_Strongest"]:
    """The highest and lowest correlation of each query over all shards (q, 2); and the strongest examples that it does
    not work with yet, of those that ask for more than its lam."""
    extremes = torch.tensor([-torch.inf, torch.inf], dtype=goal.y.dtype).repeat(len(residuals), 1)
    best, right = _Strongest(goal.lam, settings.candidates), np.ascontiguousarray(residuals.numpy().T)
    for start in range(0, source.n_examples, settings.shard):
        stop = min(start + settings.shard, source.n_examples)
        correlations = torch.from_numpy(source.shard(start, stop).T @ right)
        held = [(i, support, support.within(start, stop)) for i, support in enumerate(supports)]
        for i, support, place in held:
            correlations[support.examples[place] - start, i] -= goal.ridge * support.weights[place]
        found = torch.stack([correlations.amax(0), correlations.amin(0)], 1)
        extremes = torch.stack([extremes[:, 0].maximum(found[:, 0]), extremes[:, 1].minimum(found[:, 1])], 1)
        for i, support, place in held:
            correlations[support.examples[place] - start, i] = 0
        best.offer(goal.strength(correlations), start)
    best.prune()
    return extremes, best


class _Strongest:
    """Up to `n` examples of each query with the highest strengths above a floor, in the order of queries."""

    def __init__(self, floor: Tensor, n: int) -> None:
        self.floor, self.n = floor.clone(), n
        self.queries = self.examples = torch.zeros(0, dtype=torch.long)
        self.strengths = torch.zeros(0, dtype=floor.dtype)

    def offer(self, strengths: Tensor, start: int) -> None:
        """More examples, from `start` on: (m, q)."""
        above = strengths > self.floor
        most = ROOM * self.n * len(self.floor)
        if len(strengths) > self.n and int(above.sum()) > most:
            least = strengths.T.contiguous().topk(self.n, dim=1).values[:, -1]
            # just below, so that what equals the last of them is offered too
            self.floor = self.floor.maximum(least.nextafter(torch.zeros_like(least)))
            above = strengths > self.floor
        examples, queries = above.nonzero(as_tuple=True)
        self.strengths = torch.cat([self.strengths, strengths[examples, queries]])
        self.queries, self.examples = torch.cat([self.queries, queries]), torch.cat([self.examples, examples + start])
        if len(self.queries) > most:
            self.prune()

    def prune(self) -> None:
        """Keep the strongest `n` of each query; of equal ones those that come first."""
        order = torch.from_numpy(np.lexsort((self.examples, -self.strengths, self.queries)))
        counts = torch.bincount(self.queries, minlength=len(self.floor))
        rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[self.queries[order]]
        order = order[rank < self.n]
        self.queries, self.examples, self.strengths = (
            values[order] for values in (self.queries, self.examples, self.strengths)
        )
        full = (counts >= self.n).nonzero()[:, 0]
        last = counts.clamp_max(self.n).cumsum(0)[full] - 1
        self.floor[full] = self.floor[full].maximum(self.strengths[last])


def _result(goal: Goal, supports: list[_Support], penalty: Penalty) -> dict[str, Tensor]:
    examples, weights, intercepts = [], [], []
    for i, support in enumerate(supports):
        found, used = support.weights, (support.weights != 0).numpy()
        columns, one = support.columns[:, used], goal.at(torch.tensor([i]))
        if penalty.debias and used.any():
            found = found.clone()
            found[used] = refit(Dense.of(torch.from_numpy(columns.toarray())), one, found[None, used])[0]
        shift = 0.0
        if penalty.intercept:
            shift = float(goal.y[i].mean() - (columns @ found[used].numpy()).mean())
        examples.append(torch.from_numpy(support.examples[used]))
        weights.append(found[used])
        intercepts.append(shift)
    counts = torch.tensor([len(own) for own in examples])
    joined = {"examples": torch.cat(examples), "weights": torch.cat(weights), "counts": counts}
    return joined | {"intercepts": torch.tensor(intercepts, dtype=torch.float64)}
