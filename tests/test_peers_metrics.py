"""Our LDS against dattri's, on the same arrays (`pip install -e ".[peers]"`)."""

import numpy as np
import pytest
import torch

from tda_core.diagnostics import noisy_label_auc
from tda_core.metrics import lds, lds_per_query
from tda_core.subsets import random_subsets

pytestmark = pytest.mark.peers
peer = pytest.importorskip("dattri.metric")


@pytest.mark.parametrize("ties", [False, True])
def test_lds_agrees_with_dattri(ties):
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(size=(12, 80)))
    masks = random_subsets(80, 40, 0.5, seed=0)
    outcomes = masks.double() @ scores.T + 3 * torch.from_numpy(rng.normal(size=(40, 12)))
    if ties:  # whole numbers, so that sums tie exactly for both
        scores, outcomes = scores.sign(), outcomes.round()
    indices = torch.stack(
        [mask.nonzero()[:, 0] for mask in masks]
    )  # dattri names members and scores (n_train, n_query)
    theirs, _ = peer.lds(scores.T, (outcomes, indices))
    np.testing.assert_allclose(lds_per_query(scores, masks, outcomes), theirs.numpy(), atol=1e-6)
    assert abs(lds(scores, masks, outcomes, n_bootstrap=10).value - theirs.mean().item()) < 1e-6


def test_noisy_label_auc_agrees_with_dattri():
    rng = np.random.default_rng(1)
    noisy = torch.from_numpy(rng.random(150) < 0.2)
    influence = torch.from_numpy(rng.normal(size=150)) + noisy
    theirs, _ = peer.mislabel_detection_auc(influence, noisy)
    assert noisy_label_auc(influence, noisy).value == pytest.approx(theirs.item(), abs=1e-6)
