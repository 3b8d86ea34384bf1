"""Other solvers answer the same question: their weights agree with ours, and their gaps are measured alike."""

import numpy as np
import pytest
import torch
from test_recovery import problem

from tda_core import recovery_descent
from tda_core.designs import left_regular
from tda_core.recovery import lam_scale, recover
from tda_core.recovery_design import Design
from tda_core.recovery_speed import available, compare, peer


@pytest.mark.parametrize("name", ["sklearn", pytest.param("celer", marks=pytest.mark.peers)])
def test_peers_find_the_same_weights(name):
    if name not in available():
        pytest.skip(f"{name} is not installed")
    members, y = problem()
    lam = 0.1 * lam_scale(members, y)
    expected = recover(members, y, lam, tolerance=1e-11).weights
    assert (peer(name, members.numpy(), 1e-10)(y, lam) - expected).abs().max() < 1e-5


def test_all_are_compared_at_one_gap(monkeypatch):
    monkeypatch.setattr("tda_core.recovery_speed.PEERS", ("sklearn",))
    members, y = problem()
    found = compare(members, y, 0.1 * lam_scale(members, y), tolerance=1e-5, rounds=2)
    assert list(found) == ["batched", "sklearn"]
    assert all(speed.gap <= 1e-5 and speed.seconds > 0 for speed in found.values())


def test_unknown_peers_are_named():
    with pytest.raises(ValueError, match=r"unknown solver 'glmnet', expected one of \['sklearn'"):
        peer("glmnet", torch.ones(2, 2).numpy(), 1e-4)


def test_sparse_designs_are_recovered_by_descent_and_dense_ones_all_together(monkeypatch):
    """Both solve the same problem; which one runs is decided by how M comes."""
    calls = []
    of_descent = recovery_descent.solve
    monkeypatch.setattr(recovery_descent, "solve", lambda *a, **o: calls.append(a) or of_descent(*a, **o))
    matrix = left_regular(60, 40, 4, seed=0)
    y = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 40)))
    lam = 0.1 * lam_scale(matrix, y)
    sparse_fit = recover(matrix, y, lam, tolerance=1e-9)
    assert len(calls) == 1 and Design.of(matrix).rows(np.arange(30)).thin is not None
    dense_fit = recover(matrix.toarray(), y, lam, tolerance=1e-9)
    assert len(calls) == 1 and Design.of(matrix.toarray()).thin is None
    torch.testing.assert_close(sparse_fit.predict(matrix), dense_fit.predict(matrix), rtol=0, atol=1e-6)
    assert float(sparse_fit.gaps.max()) <= 1e-9


def test_descent_is_tightened_until_the_gap_holds(monkeypatch):
    monkeypatch.setattr(recovery_descent, "FIRST", 1e4)  # so loose that the first round cannot do
    matrix = left_regular(60, 40, 4, seed=0)
    y = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 40)))
    fit = recover(matrix, y, 0.05 * lam_scale(matrix, y), tolerance=1e-5)
    assert float(fit.gaps.max()) <= 1e-5
