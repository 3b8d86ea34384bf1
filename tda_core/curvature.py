"""Products with the curvature of a problem's training loss.

"ggn": the generalised Gauss-Newton matrix J' H_out J (Schraudolph 2002), positive semi-definite. "hessian": the true
one.
"fisher": for the cross-entropy the GGN is the mean over labels that the model itself would draw of g g' (Martens 2020,
section 9); with one such label an example it becomes an estimate that costs one gradient an example, once.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from tda_core.examples import Examples
from tda_core.models import cross_entropy

if TYPE_CHECKING:
    from tda_core.problem import Problem

Product = Callable[[Tensor], Tensor]
CURVATURES = ("ggn", "hessian", "fisher")
# Parameters p up to which the (p, p) matrix of "fisher" is held (600 MB in float32).
FISHER_LIMIT = 12_000
BLOCK = 1024  # examples at a time


def curvature_product(problem: "Problem", vectors: Tensor, kind: str, rows: Tensor | None = None) -> Tensor:
    """(H + weight_decay I) v for every row v: (k, p) -> (k, p), H a mean over training examples, or the given rows.

    "fisher" holds a (p, p) matrix, or the gradients of `rows`. Raises ValueError for an unknown kind, and for
    "fisher" with another loss than cross_entropy or p past `FISHER_LIMIT`.
    """
    if kind not in CURVATURES:
        raise ValueError(f"unknown curvature {kind!r}, expected one of {CURVATURES}")
    batch = problem.train if rows is None else problem.train[rows]
    if kind == "fisher":
        drawn = None if rows is None else problem.gradients(problem.drawn[rows])
        mapped = vectors @ problem.fisher if drawn is None else vectors @ drawn.T @ drawn / len(drawn)
    else:
        product = {"ggn": _ggn_product, "hessian": _hessian_product}[kind](problem, batch)
        with torch.no_grad():
            mapped = vmap(product, chunk_size=problem.chunk(len(batch)))(vectors)
    return mapped + problem.weight_decay * vectors


def _ggn_product(problem: "Problem", batch: Examples) -> Product:
    def outputs_at(theta: Tensor) -> Tensor:
        return problem.outputs(batch.inputs, theta)

    outputs, pull_back = vjp(outputs_at, problem.theta)
    output_gradient = grad(lambda out: problem.loss(out, batch.targets).mean())

    def product(v: Tensor) -> Tensor:
        # J' H_out J v: the loss' Hessian in the outputs between two Jacobian products
        pushed = jvp(outputs_at, (problem.theta,), (v,))[1]
        return pull_back(jvp(output_gradient, (outputs,), (pushed,))[1])[0]

    return product


def _hessian_product(problem: "Problem", batch: Examples) -> Product:
    objective_gradient = grad(lambda theta: problem.value(theta, batch.inputs, batch.targets).mean())
    return lambda v: jvp(objective_gradient, (problem.theta,), (v,))[1]


def drawn_labels(outputs: Tensor, *, seed: int = 0) -> Tensor:
    """A label for each example, drawn from the model's own probabilities: logits (n, C) -> (n,) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(outputs.detach().double().softmax(1), 1, generator=generator)[:, 0]


def drawn_examples(problem: "Problem") -> Examples:
    """The training examples with labels drawn from the model. Raises ValueError for a loss but cross_entropy."""
    if problem.loss is not cross_entropy:
        raise ValueError("curvature 'fisher' draws labels from the model: it needs the loss cross_entropy")
    with torch.no_grad():
        outputs = [problem.outputs(inputs) for inputs in problem.train.inputs.split(BLOCK)]
    return Examples(problem.train.inputs, drawn_labels(torch.cat(outputs)))


def fisher(problem: "Problem") -> Tensor:
    """Mean of g g' over `drawn_examples`: (p, p). Raises ValueError for p past `FISHER_LIMIT`."""
    p, n = problem.n_parameters, len(problem.train)
    if p > FISHER_LIMIT:
        raise ValueError(f"curvature 'fisher' holds a (p, p) matrix: at most {FISHER_LIMIT} parameters, got {p}")
    total = problem.theta.new_zeros(p, p)
    for rows in torch.arange(n).split(BLOCK):
        gradients = problem.gradients(problem.drawn[rows])
        total.addmm_(gradients.T, gradients)
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
