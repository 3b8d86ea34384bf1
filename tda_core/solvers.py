"""Linear systems with a symmetric positive definite curvature, for many right-hand sides at once."""

from collections.abc import Callable, Iterator

import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor


def conjugate_gradients(product: Callable[[Tensor], Tensor], goals: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterates of A x = goal for every row of `goals` (k, p), from zero (Hestenes & Stiefel 1952).

    product: (j, p) -> A applied to each row. Yields after each step the iterate (k, p), which the next step
    overwrites, and the relative residuals (k,). A row that is solved to rounding is left alone.
    Raises ValueError on negative curvature, which A > 0 excludes.
    """
    x, residual, direction = torch.zeros_like(goals), goals.clone(), goals.clone()
    squared = (goals**2).sum(1)
    scale = squared.clone()
    floor = (10 * torch.finfo(goals.dtype).eps) ** 2 * scale
    while True:
        rows = (squared > floor).nonzero()[:, 0]
        if len(rows) == 0:
            yield x, torch.zeros_like(scale)
            continue
        rows = slice(None) if len(rows) == len(goals) else rows  # a full index would copy everything
        along = direction[rows]
        curved = product(along)
        bent = (along * curved).sum(1)
        if bool((bent <= 0).any()):
            raise ValueError(f"negative curvature {float(bent.min()):.3g} met: the damped curvature must be positive")
        step = (squared[rows] / bent)[:, None]
        x[rows] += step * along
        residual[rows] -= step * curved
        after = (residual[rows] ** 2).sum(1)
        direction[rows] = residual[rows] + (after / squared[rows])[:, None] * along
        squared[rows] = after
        yield x, (squared / scale.clamp_min(torch.finfo(scale.dtype).tiny)).sqrt()


def solve_dense(curvature: Tensor, goals: Tensor, damping: float) -> Tensor:
    """Rows x_i with (curvature + damping I) x_i = goals_i by Cholesky: (p, p), (k, p) -> (k, p).

    Raises ValueError where the damped curvature is not positive definite, or singular to rounding, naming
    the damping it needs.
    """
    damped = curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype)
    factor, info = torch.linalg.cholesky_ex(damped)
    eps = torch.finfo(damped.dtype).eps
    # A pivot that cancelled to the rounding error of its diagonal entry holds no correct digit, whatever its sign.
    if int(info) or bool((factor.diagonal() ** 2 <= 4 * eps * damped.diagonal()).any()):
        smallest, largest = _extreme_eigenvalues(damped)
        rounding = len(damped) * eps * largest
        raise ValueError(
            f"curvature + damping {damping} is not positive definite (smallest eigenvalue {smallest:.3g}): "
            f"use a damping above {damping - min(smallest, 0.0) + rounding:.3g}"
        )
    return torch.cholesky_solve(goals.T, factor).T


def _extreme_eigenvalues(matrix: Tensor) -> tuple[float, float]:
    """Smallest and largest eigenvalue; by Lanczos steps for a large matrix, in a fraction of the time of all."""
    exact = matrix.double()
    if len(exact) <= 200 or not exact.any():
        values = torch.linalg.eigvalsh(exact)
        return float(values[0]), float(values[-1])
    # A random start: all ones is a null vector of a linear classifier's curvature, which shifts all logits alike.
    start = torch.randn(len(exact), generator=torch.Generator().manual_seed(0), dtype=exact.dtype).numpy()
    options = {"k": 1, "which": "LM", "return_eigenvectors": False, "tol": 1e-6, "v0": start}
    one = float(eigsh(exact.numpy(), **options)[0])
    # The other end is the farthest from there. Asked for directly, a zero eigenvalue never meets the tolerance.
    other = one + float(eigsh((exact - one * torch.eye(len(exact), dtype=exact.dtype)).numpy(), **options)[0])
    return min(one, other), max(one, other)
