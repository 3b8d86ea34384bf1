"""The three losses that steering operators are trained on: fidelity, stability and linearity.

Dagli et al. 2026 (arXiv 2606.05165), section 2 of the method. All are sums over operators, so that an operator's own
gradient does not depend on how many others there are.
"""

from collections.abc import Callable

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.nn import functional as F


def fidelity(loss: Callable[[Tensor, Tensor], Tensor], steered: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Loss of the steered outputs on the subset's own examples, weighted: sum over k and i of weights * loss.

    steered: (K, m, C). targets: (K, m). weights: (K, m); rows sum to one for a mean, padding counts zero.
    """
    per_example = loss(steered.flatten(0, 1), targets.flatten()).view_as(weights)
    return (per_example * weights).sum()


def stability(base: Tensor, steered: Tensor, weights: Tensor, *, classifies: bool) -> Tensor:
    """KL(frozen || steered) on examples outside the subset: sum over k and i of weights * KL.

    base: (b, C) frozen outputs. steered: (K, b, C). weights: (K, b), zero for members. For a regression the outputs
    are means of normal distributions of variance 1, whose divergence is half the squared difference.
    """
    if not classifies:
        return (0.5 * (steered - base).square().sum(2) * weights).sum()
    log_base = F.log_softmax(base, 1)
    probabilities = log_base.exp()
    # KL = sum_c p_c log p_c - sum_c p_c o~_c + logsumexp(o~): no second softmax is kept for the backward pass
    constant = (probabilities * log_base).sum(1)
    divergence = constant - (steered * probabilities).sum(2) + steered.logsumexp(2)
    return (divergence * weights).sum()


def linearity(measurements: Tensor, residual: Tensor) -> Tensor:
    """||M~ (M~'M~ + gamma I)^-1 M~' y - y||^2, averaged over the rows of measurements (b, K).

    residual: (K, K), from `linearity_residual`. Its minimum is y = 0: large weights silence the operators.
    """
    return (measurements @ residual.T).square().sum(1).mean()


def linearity_residual(
    membership: scipy.sparse.sparray, dimension: int, gamma: float, *, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """M~ (M~'M~ + gamma I)^-1 M~' - I for the sketch M~ = M R / sqrt(dimension), R (n, dimension) normal: (K, K).

    With n > K, M itself has full row rank and fits any y: it is the sketch (dimension < K) and gamma that leave a
    residual. Raises ValueError for a dimension below 1 and gamma that is not positive and finite.
    """
    if dimension < 1:
        raise ValueError(f"the sketch's dimension must be >= 1, got {dimension}")
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    generator = np.random.default_rng(seed)
    sketch = np.zeros((membership.shape[0], dimension))
    for start in range(0, membership.shape[1], 2**16):  # R is never whole in memory
        columns = membership[:, start : start + 2**16]
        sketch += columns @ generator.standard_normal((columns.shape[1], dimension))
    sketch /= dimension**0.5
    inner = sketch.T @ sketch + gamma * np.eye(dimension)
    projector = sketch @ np.linalg.solve(inner, sketch.T)
    return torch.from_numpy(projector - np.eye(len(sketch))).to(dtype)
