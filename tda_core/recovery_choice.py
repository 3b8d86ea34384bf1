"""How strong the penalty should be: chosen by subsets held out of the fit, or by the size of the noise.

Neither rule sees a ground truth: they read the measurements that recovery reads, and nothing else.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tda_core.recovery import Penalty, follow_path, lam_scale, recover
from tda_core.recovery_design import Design, Membership

RULES = ("pooled", "per_query", "universal")
# Shares of `lam_scale` that are tried: of the largest useful lam for the Lasso, of the mean eigenvalue for ridge
SHARES = {"lasso": tuple(np.geomspace(0.7, 0.01, 12)), "ridge": tuple(np.geomspace(100, 1e-3, 12))}
# A choice among a dozen shares does not need the fits' last digits, nor shares far below the best one.
TOLERANCE, PATIENCE = 1e-2, 2
SIGMA_STEPS, SIGMA_CHANGE, LEAST_SHARE = 30, 1e-2, 1e-3
# Share of the squares of a query's measurements that varies, below which they are all alike but for rounding
FLAT = 1e-12


@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen lam of every query, and what it was chosen by.

    lam: (q,). shares: (s,) of `lam_scale` that were tried, falling; index: (q,) the chosen one. errors: (s, q) mean
    squared error of the held-out measurements over their variance: 1 or more means that nothing was foretold, and 1
    stands for a query whose measurements are all alike.
    """

    lam: Tensor
    shares: Tensor
    index: Tensor
    errors: Tensor

    @property
    def at_edge(self) -> Tensor:
        """Whether each query's share is the largest or smallest tried, so that one beyond may be better: (q,)."""
        return (self.index == 0) | (self.index == len(self.shares) - 1)


def choose_lambda(
    membership: Membership,
    measurements: Tensor,
    rule: str = "pooled",
    penalty: Penalty | None = None,
    *,
    seed: int = 0,
) -> Tensor:
    """lam of every query (q,), for `recover`.

    rule: "pooled" takes the share of `lam_scale` with the smallest held-out error over all queries, "per_query" each
    query's own (`held_out`); "universal" goes by the noise (`universal`). Raises ValueError for an unknown rule, and
    what these raise.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}, expected one of {list(RULES)}")
    if rule == "universal":
        return universal(membership, measurements, penalty)
    return held_out(membership, measurements, penalty, pooled=rule == "pooled", folds=Folds(seed=seed)).lam


@dataclass(frozen=True)
class Folds:
    """How subsets are held out: n parts at random, each once; the shares to try (None: `SHARES`)."""

    n: int = 5
    shares: Sequence[float] | None = None
    seed: int = 0

    def parts(self, n_subsets: int) -> list[np.ndarray]:
        """Row numbers of each part. Raises ValueError for n outside 2..K/2: what is left must be a design."""
        if not 2 <= self.n <= n_subsets // 2:
            raise ValueError(f"the number of folds must lie in 2..{n_subsets // 2} for K = {n_subsets}, got {self.n}")
        return np.array_split(np.random.default_rng(self.seed).permutation(n_subsets), self.n)


def held_out(
    membership: Membership,
    measurements: Tensor,
    penalty: Penalty | None = None,
    folds: Folds | None = None,
    *,
    pooled: bool = True,
) -> Choice:
    """Choose lam by how well fits to most of the K measurements foretell the others.

    lam grows with the number of rows that are fitted, and so do the fits' lams. pooled: one share for all queries.
    Shares are tried in falling order until `PATIENCE` of them have brought nothing better, for any query if not pooled.
    Raises ValueError for a kind without a lam, for shares that are not positive, and what `recover` raises.
    """
    penalty, folds = penalty or Penalty(), folds or Folds()
    if penalty.kind not in SHARES:
        raise ValueError(f"{penalty.kind!r} has no lam to choose, expected one of {sorted(SHARES)}")
    shares = torch.tensor(sorted(SHARES[penalty.kind] if folds.shares is None else folds.shares, reverse=True))
    if not len(shares) or not bool((shares > 0).all() & torch.isfinite(shares).all()):
        raise ValueError(f"shares must be one positive number or more, got {folds.shares}")
    design = Design.of(membership)
    y = design.measurements(measurements)
    scale = lam_scale(design, y, penalty)
    shares = shares.to(y)
    lams = [share * scale for share in shares]
    total = ((y - y.mean(1, keepdim=True)) ** 2).sum(1)
    varies = total > FLAT * (y**2).sum(1)  # in others there is nothing to foretell, and they decide nothing
    errors: list[Tensor] = []
    for error in _errors(design, y, lams, penalty, folds.parts(design.n_subsets)):
        errors.append(torch.where(varies, error / torch.where(varies, total, 1), 1.0))
        best = _best(torch.stack(errors), pooled)
        if len(errors) > int(best.max()) + PATIENCE:
            break
    return Choice((shares[best] * scale).to(_dtype(measurements)), shares[: len(errors)], best, torch.stack(errors))


def _best(errors: Tensor, pooled: bool) -> Tensor:
    """Which of the errors (s, q) is smallest, for each query or for their mean: (q,)."""
    return errors.mean(1).argmin().expand(errors.shape[1]) if pooled else errors.argmin(0)


def _errors(
    design: Design, y: Tensor, lams: Sequence[Tensor], penalty: Penalty, parts: list[np.ndarray]
) -> Iterator[Tensor]:
    """Squared errors of the held-out measurements, summed over the parts, lam by lam: (q,) each."""
    paths, held = [], []
    for part in parts:
        rest = np.setdiff1d(np.arange(design.n_subsets), part)
        fewer = [lam * (len(rest) / design.n_subsets) for lam in lams]
        rows = y[:, torch.from_numpy(rest)]
        paths.append(follow_path(design.rows(rest), rows, fewer, penalty, tolerance=TOLERANCE))
        held.append((design.rows(part), y[:, torch.from_numpy(part)]))
    for fits in zip(*paths, strict=True):
        pairs = zip(fits, held, strict=True)
        yield sum(((goal - fit.predict(design)) ** 2).sum(1) for fit, (design, goal) in pairs)


def universal(
    membership: Membership, measurements: Tensor, penalty: Penalty | None = None, sigma: Tensor | float | None = None
) -> Tensor:
    """lam = sigma ||m|| sqrt(2 log n), above what noise alone correlates with any column m (Donoho & Johnstone 1994).

    ||m||: root mean square length of M's columns, centred with an intercept. sigma: standard deviation of the noise
    in y, one or one a query; None estimates it together with the fit, as the residual's (the scaled Lasso, Sun & Zhang
    2012, section 2), never below the one that gives `LEAST_SHARE` of lam_max. Returns (q,). Raises ValueError for
    sigma <= 0 and for another kind than the Lasso, whose threshold this is.
    """
    penalty = penalty or Penalty()
    if penalty.kind != "lasso":
        raise ValueError(f"the universal threshold is for the lasso, got {penalty.kind!r}")
    design = Design.of(membership)
    y = design.measurements(measurements)
    length = float(design.squared_norms(centred=penalty.intercept).mean()) ** 0.5
    factor = length * math.sqrt(2 * math.log(max(design.n_examples, 2)))
    if sigma is not None:
        given = torch.as_tensor(sigma, dtype=y.dtype, device=y.device).expand(len(y))
        if not (torch.isfinite(given) & (given > 0)).all():
            raise ValueError(f"sigma must be finite and > 0, got {sigma}")
        return (factor * given).to(_dtype(measurements))
    least = LEAST_SHARE * lam_scale(design, y, penalty)
    centre = y.mean(1, keepdim=True) if penalty.intercept else 0
    lam = torch.maximum(factor * (y - centre).square().mean(1).sqrt(), least)
    for _ in range(SIGMA_STEPS):
        fit = recover(design, y, lam, penalty, tolerance=TOLERANCE)
        residual = y - fit.predict(design)
        following = torch.maximum(factor * residual.square().mean(1).sqrt(), least)
        done = bool(((following - lam).abs() <= SIGMA_CHANGE * lam).all())
        lam = following
        if done:
            break
    return lam.to(_dtype(measurements))


def _dtype(measurements: Tensor) -> torch.dtype:
    return measurements.dtype if measurements.is_floating_point() else torch.float32
