"""Linear systems with a symmetric positive definite curvature, for many right-hand sides at once."""

import math
from collections.abc import Callable, Iterator, Sequence

import scipy.linalg
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor


class NotPositiveDefinite(ValueError):
    """A damped curvature is not positive definite. needed: the damping above which it is, None where not known."""

    def __init__(self, message: str, needed: float | None = None) -> None:
        super().__init__(message)
        self.needed = needed


def conjugate_gradients(product: Callable[[Tensor], Tensor], goals: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterates of A x = goal for every row of `goals` (k, p), from zero (Hestenes & Stiefel 1952).

    product: (j, p) -> A applied to each row. Yields after each step the iterate (k, p), which the next step
    overwrites, and the relative residuals (k,). A row that is solved to rounding is left alone.
    Raises NotPositiveDefinite on negative curvature, which A > 0 excludes.
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
        step = (squared[rows] / _positive((along * curved).sum(1)))[:, None]
        x[rows] += step * along
        residual[rows] -= step * curved
        after = (residual[rows] ** 2).sum(1)
        direction[rows] = residual[rows] + (after / squared[rows])[:, None] * along
        squared[rows] = after
        yield x, (squared / scale.clamp_min(torch.finfo(scale.dtype).tiny)).sqrt()


def shifted_conjugate_gradients(
    product: Callable[[Tensor], Tensor], goals: Tensor, shifts: Sequence[float], *, tolerance: float = 1e-3
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterates of (A + shift I) x = goal for every shift and row of `goals` (k, p), from zero and one Krylov space.

    The smallest shift is solved by conjugate gradients. The residuals of the others are multiples of its own, so
    they cost no product with A (Jegerlehner 1996, hep-lat/9612014, section 2.4; Frommer & Maass 1999), and they
    are smaller: a row is left when the smallest shift has met the tolerance on it, a shift when all its rows have.
    product: (j, p) -> A applied to each row. tolerance: relative residual. Yields after each step the iterates
    (s, k, p), which the next step overwrites, and the relative residuals (s, k). Holds (2 s + 4) k p floats.
    Raises ValueError for no shifts or one that is not finite and for tolerance <= 0, NotPositiveDefinite on
    negative curvature.
    """
    if not len(shifts) or not all(math.isfinite(shift) for shift in shifts):
        raise ValueError(f"shifts must be one finite number or more, got {list(shifts)}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance}")
    lowest = min(range(len(shifts)), key=shifts.__getitem__)
    lifts = torch.tensor([shift - shifts[lowest] for shift in shifts], dtype=goals.dtype)[:, None]
    x, direction = goals.new_zeros(len(shifts), *goals.shape), goals.repeat(len(shifts), 1, 1)
    residual, squared = goals.clone(), (goals**2).sum(1)
    scale = squared.sqrt().clamp_min(torch.finfo(goals.dtype).tiny)
    reached = (squared.sqrt() / scale).repeat(len(shifts), 1)  # 0 for a goal of 0
    # each shift's residual as a multiple of the smallest shift's, and what the last step changed that by
    ratio, change = torch.ones_like(reached), torch.ones_like(reached)
    last_step, growth = torch.ones_like(squared), torch.zeros_like(squared)
    while True:
        rows = (reached[lowest] > tolerance).nonzero()[:, 0]
        if len(rows):
            every = slice(None) if len(rows) == len(goals) else rows  # a full index would copy everything
            along = direction[lowest, every]
            curved = product(along) + shifts[lowest] * along
            step = squared[rows] / _positive((along * curved).sum(1))
            change[:, rows] = 1 / (1 + step * (lifts + growth[rows] / last_step[rows] * (1 - change[:, rows])))
            ratio[:, rows] *= change[:, rows]
            residual[every] -= step[:, None] * curved
            after = (residual[every] ** 2).sum(1)
            last_step[rows], growth[rows], squared[rows] = step, after / squared[rows], after
            for i in (reached > tolerance).any(1).nonzero()[:, 0].tolist():
                x[i, every] += (step * change[i, rows])[:, None] * direction[i, every]
                direction[i, every] *= (growth[rows] * change[i, rows] ** 2)[:, None]
                direction[i, every] += ratio[i, rows][:, None] * residual[every]
                reached[i, rows] = ratio[i, rows] * squared[rows].sqrt() / scale[rows]
        yield x, reached


def solve_dense(curvature: Tensor, goals: Tensor, damping: float) -> Tensor:
    """Rows x_i with (curvature + damping I) x_i = goals_i by Cholesky: (p, p), (k, p) -> (k, p).

    Raises NotPositiveDefinite as `factor_dense` does.
    """
    return torch.cholesky_solve(goals.T, factor_dense(curvature, damping)).T


def factor_dense(curvature: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor (p, p) of curvature + damping I.

    Raises NotPositiveDefinite where the damped curvature is not, or is singular to rounding, naming the
    damping it needs.
    """
    factor = sound_factor(curvature, damping)
    if factor is None:
        smallest, largest = _extreme_eigenvalues(_damped(curvature, damping))
        needed = damping - min(smallest, 0.0) + len(curvature) * torch.finfo(curvature.dtype).eps * largest
        raise NotPositiveDefinite(
            f"curvature + damping {damping} is not positive definite (smallest eigenvalue {smallest:.3g}): "
            f"use a damping above {needed:.3g}",
            needed,
        )
    return factor


def sound_factor(curvature: Tensor, damping: float) -> Tensor | None:
    """`factor_dense`, or None where it would raise, at no further cost."""
    damped = _damped(curvature, damping)
    factor, info = torch.linalg.cholesky_ex(damped)
    # A pivot that cancelled to the rounding error of its diagonal entry holds no correct digit, whatever its sign.
    lost = factor.diagonal() ** 2 <= 4 * torch.finfo(damped.dtype).eps * damped.diagonal()
    return None if int(info) or bool(lost.any()) else factor


def _damped(curvature: Tensor, damping: float) -> Tensor:
    return curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype)


def by_damping(solve: Callable[[list[float]], Sequence[Tensor]], dampings: Sequence[float]) -> dict[float, Tensor]:
    """{damping: solution} from solve(dampings, rising), without those too small for a positive definite system."""
    if not len(dampings):
        raise ValueError("give at least one damping, got none")
    for damping in dampings:
        check_damping(damping)
    rising = sorted(set(dampings))
    while True:
        try:
            return dict(zip(rising, solve(rising), strict=True))
        except NotPositiveDefinite as error:
            larger = [damping for damping in rising[1:] if error.needed is None or damping > error.needed]
            if not larger:
                raise
            rising = larger


def check_damping(damping: float) -> None:
    """Raise ValueError for a damping that is negative or not finite."""
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping must be finite and >= 0, got {damping}")


def leading_eigenvectors(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues (k,) of a symmetric matrix, falling, and their vectors (m, k): half the cost of all."""
    m = len(matrix)
    values, vectors = scipy.linalg.eigh(matrix.numpy(), subset_by_index=[m - k, m - 1])
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy())


def _positive(bent: Tensor) -> Tensor:
    """The curvatures along each direction (k,), or NotPositiveDefinite where one is not positive."""
    if bool((bent <= 0).any()):
        raise NotPositiveDefinite(
            f"negative curvature {float(bent.min()):.3g} met: the damped curvature must be positive"
        )
    return bent


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
