"""lambda by held-out subsets and by the noise: against plain references, blind to nothing but the fit's own rows."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from test_recovery import left_regular, planted, problem

from tda_core.recovery import Penalty, lam_scale, recover
from tda_core.recovery_choice import Folds, choose_lambda, held_out, universal


def noisy(noise: float, q: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    members = left_regular(120, 150, 6, seed)
    weights, y = planted(members, q, 6, noise, seed)
    return members, weights, y


def test_held_out_errors_are_those_of_plain_fits():
    members, _, y = noisy(0.3)
    folds = Folds(4, (0.5, 0.1, 0.03), seed=3)
    choice = held_out(members, y, folds=folds, pooled=False)
    scale = lam_scale(members, y)
    for row in range(2):
        for number, share in enumerate((0.5, 0.1, 0.03)):
            error = 0.0
            for part in folds.parts(120):
                rest = np.setdiff1d(np.arange(120), part)
                # scikit-learn's objective is over the number of rows: its alpha is the same for each fold
                model = Lasso(share * float(scale[row]) / 120, fit_intercept=False, tol=1e-9, max_iter=10**5)
                model.fit(members.numpy()[rest], y[row, rest].numpy())
                error += float(((y[row, part].numpy() - model.predict(members.numpy()[part])) ** 2).sum())
            variance = float(((y[row] - y[row].mean()) ** 2).sum())
            # fits stop at a gap of a hundredth
            assert math.isclose(choice.errors[number, row], error / variance, rel_tol=0.1)
    assert torch.equal(choice.index, choice.errors.argmin(0))
    assert torch.allclose(choice.lam, choice.shares[choice.index] * scale)
    pooled = held_out(members, y, folds=folds)
    assert (pooled.index == pooled.errors.mean(1).argmin()).all()


def test_shares_far_below_the_best_are_not_tried():
    members, _, y = noisy(3.0)
    shares = (0.9, 0.8, 0.5, 0.2, 0.1, 0.05, 0.02)
    choice = held_out(members, y, folds=Folds(shares=shares))
    best = int(choice.index[0])
    assert len(choice.shares) == best + 3 < len(shares) and (choice.errors[best].mean() <= choice.errors.mean(1)).all()
    each = held_out(members, y, folds=Folds(shares=shares), pooled=False)
    assert torch.equal(each.errors[: best + 3], choice.errors[: len(each.shares)])


def test_every_subset_is_held_out_once():
    parts = Folds(5, seed=1).parts(23)
    assert sorted(np.concatenate(parts).tolist()) == list(range(23))
    assert not np.array_equal(parts[0], Folds(5, seed=2).parts(23)[0])
    with pytest.raises(ValueError, match=r"folds must lie in 2\.\.11 for K = 23, got 12"):
        Folds(12).parts(23)
    with pytest.raises(ValueError, match="got 1"):
        Folds(1).parts(23)


@pytest.mark.parametrize("rule", ["pooled", "per_query", "universal"])
def test_more_noise_asks_for_a_larger_share(rule):
    shares = []
    for noise in (0.05, 2.0):
        members, _, y = noisy(noise, q=12)
        lam = choose_lambda(members, y, rule, Penalty(intercept=True))
        shares.append(float((lam / lam_scale(members, y, Penalty(intercept=True))).median()))
    assert shares[1] > 2 * shares[0]


@pytest.mark.parametrize("rule", ["pooled", "per_query", "universal"])
def test_the_chosen_lam_recovers_nearly_as_well_as_the_best(rule):
    members, weights, y = noisy(0.3, q=10)
    scale = lam_scale(members, y)

    def error(lam: torch.Tensor) -> float:
        return float(((recover(members, y, lam).weights - weights) ** 2).sum() / (weights**2).sum())

    best = min(error(share * scale) for share in (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.01))
    assert error(choose_lambda(members, y, rule)) < 4 * best < 0.5


def test_ridge_is_chosen_too():
    members, _, y = noisy(0.5)
    choice = held_out(members, y, Penalty(kind="ridge", intercept=True))
    assert not choice.at_edge.any() and (choice.lam == choice.lam[0]).all()


def test_the_universal_threshold_is_its_formula_and_kills_pure_noise():
    members = left_regular(120, 150, 6, 0)
    y = torch.randn(200, 120, generator=torch.Generator().manual_seed(0)).double()
    lam = universal(members, y, sigma=1.0)
    norm = float((members**2).sum(0).mean().sqrt())
    assert torch.allclose(lam, torch.full((200,), norm * math.sqrt(2 * math.log(150))).double())
    # above the largest of 150 correlations in 9 of 10 draws (Bonferroni: 1 - 1/sqrt(pi log n))
    assert (recover(members, y, lam).weights == 0).all(1).double().mean() > 0.8
    centred = universal(members, y, Penalty(intercept=True), sigma=1.0)
    assert (centred < lam).all()


def test_the_scaled_lasso_is_a_fixed_point_and_finds_the_noise():
    members, _, y = noisy(0.3)
    lam = universal(members, y)
    fit = recover(members, y, lam, tolerance=1e-8)
    sigma = (y - fit.predict(members)).square().mean(1).sqrt()
    factor = float((members**2).sum(0).mean().sqrt()) * math.sqrt(2 * math.log(150))
    assert torch.allclose(lam, factor * sigma, rtol=0.05)


def test_types_and_unknown_rules():
    members, y = problem()
    assert choose_lambda(members, y.float()).dtype == torch.float32
    assert torch.equal(choose_lambda(members, y, seed=4), choose_lambda(members, y, seed=4))
    with pytest.raises(ValueError, match=r"unknown rule 'aic', expected one of \['pooled'"):
        choose_lambda(members, y, "aic")
    with pytest.raises(ValueError, match="'correlation' has no lam to choose"):
        held_out(members, y, Penalty(kind="correlation"))
    with pytest.raises(ValueError, match="universal threshold is for the lasso, got 'ridge'"):
        universal(members, y, Penalty(kind="ridge"))
    with pytest.raises(ValueError, match="shares must be one positive number or more"):
        held_out(members, y, folds=Folds(shares=(0.1, 0)))
    with pytest.raises(ValueError, match=r"sigma must be finite and > 0, got 0"):
        universal(members, y, sigma=0.0)
    with pytest.raises(ValueError, match="is nan"):
        choose_lambda(members, y * torch.nan)


def test_a_query_whose_measurements_are_all_alike_decides_nothing():
    members, _, y = noisy(0.3)
    folds = Folds(4, (0.5, 0.1, 0.03), seed=3)
    alone = held_out(members, y, folds=folds)
    among = held_out(members, torch.cat([y, torch.full_like(y[:1], 7.0)]), folds=folds)
    assert bool((among.index[:-1] == alone.index).all())
    torch.testing.assert_close(among.errors[:, :-1], alone.errors, rtol=1e-6, atol=0)
    assert bool((among.errors[:, -1] == 1).all())
