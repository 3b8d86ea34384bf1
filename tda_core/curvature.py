"""Products with the curvature of a training loss, as functions of the parameters alone.

"ggn": the generalised Gauss-Newton matrix J' H_out J (Schraudolph 2002), positive semi-definite. "hessian": the true
one.
"fisher": for the cross-entropy the GGN is the mean over labels that the model itself would draw of g g' (Martens 2020,
section 9); with one such label an example it becomes an estimate that costs one gradient an example, once.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

Product = Callable[[Tensor], Tensor]
CURVATURES = ("ggn", "hessian", "fisher")
# Parameters p up to which the (p, p) matrix of "fisher" is held (600 MB in float32).
FISHER_LIMIT = 12_000


def ggn_product(outputs_at: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor], theta: Tensor) -> Product:
    """v (p,) -> J' H_out J v: the Hessian in the outputs of loss(outputs) between two Jacobian products."""
    outputs, pull_back = vjp(outputs_at, theta)
    output_gradient = grad(loss)

    def product(v: Tensor) -> Tensor:
        pushed = jvp(outputs_at, (theta,), (v,))[1]
        return pull_back(jvp(output_gradient, (outputs,), (pushed,))[1])[0]

    return product


def hessian_product(objective: Callable[[Tensor], Tensor], theta: Tensor) -> Product:
    """v (p,) -> the Hessian of objective(theta) times v."""
    return lambda v: jvp(grad(objective), (theta,), (v,))[1]


def drawn_labels(outputs: Tensor, *, seed: int = 0) -> Tensor:
    """A label for each example, drawn from the model's own probabilities: logits (n, C) -> (n,) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(outputs.detach().double().softmax(1), 1, generator=generator)[:, 0]


def mean_of_squares(blocks: Iterable[Tensor], p: int) -> Tensor:
    """Mean of g g' over the rows g of all blocks (n_i, p): (p, p). Raises ValueError for p past `FISHER_LIMIT`."""
    if p > FISHER_LIMIT:
        raise ValueError(f"curvature 'fisher' holds a (p, p) matrix: at most {FISHER_LIMIT} parameters, got {p}")
    total, n = torch.zeros(()), 0
    for block in blocks:
        total, n = total + block.T @ block, n + len(block)
    return total / n


def largest_eigenvalue(product: Product, p: int, *, steps: int = 40, seed: int = 0, dtype: torch.dtype) -> float:
    """lambda_max by power iteration (a slight underestimate). product: (1, p) -> (1, p), positive semi-definite."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(1, p, generator=generator, dtype=dtype)
    size = torch.tensor(0.0)
    for _ in range(steps):
        v = product(v / v.norm())
        size = v.norm()
        if size == 0:  # every output saturated: nothing to normalise
            break
    return float(size)
