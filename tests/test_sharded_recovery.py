"""Recovery by shards of examples: against the recovery that holds everything, whatever the cut; stores and workers."""

import joblib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from tda_core import sharded_recovery
from tda_core.designs import balanced
from tda_core.recovery import Penalty, lam_scale, recover
from tda_core.sharded_membership import BLOCK, DrawnMembership, HeldMembership
from tda_core.sharded_recovery import ShardedRecovery, recover_sharded
from tda_core.store import Store

N, K, Q = 700, 60, 9
MEMBERSHIP = balanced(N, K, 5, seed=0)
TIGHT = ShardedRecovery(lam=0.1, tolerance=1e-9, candidates=7, shard=100)


def planted(membership=MEMBERSHIP, q=Q, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    weights = np.zeros((q, membership.shape[1]))
    for row in weights:
        row[rng.choice(len(row), 4, replace=False)] = rng.normal(size=4) + 1
    y = (membership @ weights.T).T + 0.1 * rng.normal(size=(q, membership.shape[0])) + shift
    return torch.from_numpy(y)


def same_as_recover(membership, y, settings):
    found = recover_sharded(membership, y, settings, progress=False)
    lam = settings.lam * lam_scale(membership, y, settings.penalty)
    expected = recover(membership, y, lam, settings.penalty, tolerance=settings.tolerance)
    torch.testing.assert_close(found.lam, expected.lam, rtol=1e-12, atol=0)
    scale = float(expected.weights.abs().max())
    torch.testing.assert_close(torch.from_numpy(found.weights.toarray()), expected.weights, rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(found.intercepts, expected.intercepts, rtol=0, atol=1e-4 * scale)
    assert bool((found.gaps <= settings.tolerance).all())
    return found


@pytest.mark.parametrize(
    "penalty",
    [
        Penalty(),
        Penalty(nonnegative=True),
        Penalty(intercept=True),
        Penalty(ridge=0.5),
        Penalty(nonnegative=True, intercept=True, ridge=0.1),
        Penalty(debias=True),
    ],
)
def test_it_is_the_recovery_of_small_sets(penalty):
    found = same_as_recover(MEMBERSHIP, planted(shift=2.0 * penalty.intercept), TIGHT.but(penalty=penalty))
    assert 0 < found.weights.nnz < Q * K


@pytest.mark.parametrize("cut", [{"shard": 1000}, {"shard": 13}, {"candidates": 700}, {"candidates": 1}, {"budget": 1}])
def test_the_cut_changes_nothing(cut):
    same_as_recover(MEMBERSHIP, planted(), TIGHT.but(**cut))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.9), st.integers(1, 60), st.booleans())
def test_any_problem_is_solved_to_its_gap(seed, lam, candidates, nonnegative):
    membership = balanced(90, 20, 3, seed=seed)
    penalty = Penalty(nonnegative=nonnegative)
    y = planted(membership, q=3, seed=seed)
    asked = ShardedRecovery(lam=lam, penalty=penalty, tolerance=1e-6, candidates=candidates, shard=32)
    found = recover_sharded(membership, y, asked, progress=False)
    expected = recover(membership, y, found.lam, penalty, tolerance=1e-6)
    weights = torch.from_numpy(found.weights.toarray())

    def objective(w):
        left = y - torch.from_numpy((membership @ w.numpy().T).T)
        return left.square().sum(1) / 2 + found.lam * w.abs().sum(1)

    torch.testing.assert_close(objective(weights), objective(expected.weights), rtol=2e-6, atol=0)


def test_more_candidates_than_are_kept_in_between(monkeypatch):
    """Lists that must be pruned after every shard, and floors that rise."""
    monkeypatch.setattr(sharded_recovery, "ROOM", 1)
    same_as_recover(MEMBERSHIP, planted(), TIGHT.but(candidates=5, shard=20))


def test_ties_are_taken_in_order():
    strongest = sharded_recovery._Strongest(torch.zeros(2, dtype=torch.float64), 3)
    for start in (0, 40, 80):
        strengths = torch.ones(40, 2, dtype=torch.float64)
        strengths[5, 1] = 2
        strongest.offer(strengths, start)
    strongest.prune()
    assert strongest.examples.tolist() == [0, 1, 2, 5, 45, 85]
    assert strongest.queries.tolist() == [0, 0, 0, 1, 1, 1]


def test_columns_do_not_depend_on_shards():
    n = 2 * BLOCK + 100
    drawn = DrawnMembership(n, 50, 4, seed=3)
    whole = drawn.shard(0, n)
    parts = [drawn.shard(start, min(start + 3000, n)) for start in range(0, n, 3000)]
    assert (sparse.hstack(parts) != whole).nnz == 0
    some = np.array([0, 7, BLOCK - 1, BLOCK, 2 * BLOCK + 99])
    assert (drawn.columns(some) != whole[:, some]).nnz == 0
    assert (DrawnMembership(n, 50, 4, seed=4).shard(0, 9) != whole[:, :9]).nnz
    assert set(np.diff(whole.indptr)) == {4}
    assert whole.nnz == whole.sum() and whole.max() == 1
    # blocks are drawn apart, so none repeats another
    assert (whole[:, :100] != whole[:, BLOCK : BLOCK + 100]).nnz
    sizes = whole.sum(axis=1)
    assert abs(sizes / sizes.mean() - 1).max() < 0.15


def test_drawn_and_held_memberships_recover_the_same():
    drawn = DrawnMembership(N, K, 5, seed=1)
    held = drawn.shard(0, N)
    y = planted(held)
    found = recover_sharded(drawn, y, TIGHT, progress=False)
    expected = recover_sharded(held, y, TIGHT, progress=False)
    assert (found.weights != expected.weights).nnz == 0


def test_the_strongest_examples_come_out_in_order():
    found = recover_sharded(MEMBERSHIP, planted(), TIGHT, progress=False)
    ids, values = found.top(6)
    dense = torch.from_numpy(found.weights.toarray())
    for i in range(Q):
        nonzero = dense[i].nonzero()[:, 0]
        order = nonzero[dense[i][nonzero].argsort(descending=True, stable=True)][:6]
        assert ids[i, : len(order)].tolist() == order.tolist()
        torch.testing.assert_close(values[i, : len(order)], dense[i][order], rtol=0, atol=0)
    wide, padded = found.top(N)
    assert bool((wide[:, -1] == -1).all()) and bool((padded[:, -1] == 0).all())
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        found.top(0)


def test_finished_blocks_are_not_solved_again(tmp_path, monkeypatch):
    store, y, few = Store(tmp_path), planted(), TIGHT.but(budget=8 * sharded_recovery.HELD_A_CELL * 100 * 4)
    assert few.queries == 4
    expected = recover_sharded(MEMBERSHIP, y, few, progress=False)
    solve, solved = sharded_recovery._solve_block, []

    def stops(source, block, settings):
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(len(block))
        return solve(source, block, settings)

    monkeypatch.setattr(sharded_recovery, "_solve_block", stops)
    with pytest.raises(KeyboardInterrupt):
        recover_sharded(MEMBERSHIP, y, few, store=store, progress=False)

    def counts(source, block, settings):
        solved.append(len(block))
        return solve(source, block, settings)

    monkeypatch.setattr(sharded_recovery, "_solve_block", counts)
    for _ in range(2):
        found = recover_sharded(MEMBERSHIP, y, few, store=store, progress=False)
        assert (found.weights != expected.weights).nnz == 0
        assert torch.equal(found.steps, expected.steps)
    assert solved == [4, 4, 1]
    recover_sharded(MEMBERSHIP, y, few.but(lam=0.2), store=store, progress=False)
    recover_sharded(balanced(N, K, 5, seed=1), y, few, store=store, progress=False)
    assert len(solved) == 9


def test_blocks_go_to_other_processes():
    y, few = planted(), TIGHT.but(budget=8 * sharded_recovery.HELD_A_CELL * 100 * 5)
    expected = recover_sharded(MEMBERSHIP, y, few, progress=False)
    with joblib.parallel_config(backend="threading", n_jobs=2):
        found = recover_sharded(MEMBERSHIP, y, few, progress=False)
    assert (found.weights != expected.weights).nnz == 0


def test_measurements_that_are_all_alike_recover_nothing():
    found = recover_sharded(MEMBERSHIP, torch.zeros(2, K), TIGHT, progress=False)
    assert found.weights.nnz == 0
    flat = TIGHT.but(penalty=Penalty(intercept=True))
    found = recover_sharded(MEMBERSHIP, torch.full((1, K), 3.0), flat, progress=False)
    assert found.weights.nnz == 0 and found.intercepts.tolist() == [3.0]


def test_single_precision_measurements():
    y = planted()
    found, expected = (recover_sharded(MEMBERSHIP, v, TIGHT, progress=False) for v in (y.float(), y))
    np.testing.assert_allclose(found.weights.toarray(), expected.weights.toarray(), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalty": Penalty("ridge")}, "only a lasso has few weights a query, got the penalty 'ridge'"),
        ({"lam": 0.0}, r"lam must be finite and > 0, got 0\.0"),
        ({"tolerance": float("nan")}, "tolerance must be finite and > 0, got nan"),
        ({"candidates": 0}, "candidates must be >= 1, got 0"),
        ({"shard": 0}, "shard must be >= 1, got 0"),
        ({"budget": -1}, "budget must be >= 1, got -1"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        ShardedRecovery().but(**changes)


def test_bad_input():
    with pytest.raises(ValueError, match=r"measurements must be \(q, K\) with K = 60, got shape \(9, 50\)"):
        recover_sharded(MEMBERSHIP, planted()[:, :50])
    y = planted()
    y[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"measurements must be finite, but \[2, 3\] is nan"):
        recover_sharded(MEMBERSHIP, y)
    with pytest.raises(ValueError, match="0 and 1 only"):
        HeldMembership(2 * MEMBERSHIP)
    with pytest.raises(ValueError, match=r"degree must lie in 1\.\.5, the number of subsets, got 6"):
        DrawnMembership(10, 5, 6, seed=0)
    with pytest.raises(ValueError, match="n_subsets must be at least 2, got 1"):
        DrawnMembership(10, 1, 1, seed=0)
    with pytest.raises(ValueError, match="n_examples must be at least 1, got 0"):
        DrawnMembership(0, 5, 1, seed=0)
    with pytest.raises(ValueError, match=r"a shard must lie in 0\.\.10, got 5\.\.11"):
        DrawnMembership(10, 5, 1, seed=0).shard(5, 11)
    with pytest.raises(RuntimeError, match="rounding allows no more"):
        recover_sharded(MEMBERSHIP, planted(), TIGHT.but(tolerance=1e-18), progress=False)
