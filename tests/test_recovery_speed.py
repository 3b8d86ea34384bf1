"""Other solvers answer the same question: their weights agree with ours, and their gaps are measured alike."""

import pytest
import torch
from test_recovery import problem

from tda_core.recovery import lam_scale, recover
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
