"""Tiny data sets and problems in float64 for the tests of the methods."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from tda_core.examples import Examples
from tda_core.models import LOSSES, mlp
from tda_core.problem import Problem
from tda_core.recipes import Recipe
from tda_core.training import train

FLOAT64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labelled(n: int = 20, d: int = 4, classes: int = 3, *, seed: int = 0, dtype: torch.dtype = FLOAT64) -> Examples:
    """Gaussian inputs whose label follows the largest of the first coordinates, a quarter of them at random."""
    source = generator(seed)
    inputs = torch.randn(n, d, generator=source, dtype=dtype)
    noise = torch.randint(0, classes, (n,), generator=source)
    targets = torch.where(torch.rand(n, generator=source) < 0.25, noise, inputs[:, :classes].argmax(1))
    return Examples(inputs, targets)


def continuous(n: int = 20, d: int = 4, *, seed: int = 0, dtype: torch.dtype = FLOAT64) -> Examples:
    source = generator(seed)
    inputs = torch.randn(n, d, generator=source, dtype=dtype)
    noise = torch.randn(n, generator=source, dtype=dtype)
    return Examples(inputs, inputs[:, 0] - 0.5 * inputs[:, 1] ** 2 + 0.3 * noise)


def random_problem(
    layers: tuple[int, ...] = (4, 5, 3),
    activation: str = "tanh",
    *,
    n: int = 12,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> Problem:
    """An untrained problem: one output means regression, more mean classification."""
    classifies = layers[-1] > 1
    data = labelled(n, layers[0], layers[-1], seed=seed) if classifies else continuous(n, layers[0], seed=seed)
    module = mlp(layers, activation).to(FLOAT64)
    theta = torch.randn(sum(p.numel() for p in module.parameters()), generator=generator(seed + 1), dtype=FLOAT64)
    return Problem(module, 0.5 * theta, LOSSES["cross_entropy" if classifies else "squared_error"], data, weight_decay)


# A strictly convex objective whose optimum full-batch steps reach to rounding.
CONVEX = Recipe(
    layers=(4, 3),
    learning_rate=0.5,
    momentum=0.9,
    weight_decay=0.05,
    epochs=400,
    batch_size=10**6,
    precision="float64",
)


def converged(n: int = 30, *, seed: int = 0, loss: str = "cross_entropy") -> Problem:
    """A linear model at the minimum of its regularised objective."""
    data = labelled(n, seed=seed) if loss == "cross_entropy" else continuous(n, seed=seed)
    return train(convex_recipe(loss), data, seed=0)


def convex_recipe(loss: str = "cross_entropy", **changes) -> Recipe:
    layers = (4, 3) if loss == "cross_entropy" else (4, 1)
    return replace(CONVEX, **{"loss": loss, "layers": layers, "learning_rate": 0.3} | changes)


def optimum(problem: Problem, weights: Tensor) -> Tensor:
    """Minimiser of sum_i weights_i loss_i / n + weight_decay/2 ||theta||^2 by Newton steps: (p,)."""
    theta, n = problem.theta.clone(), len(problem.train)

    def objective(t: Tensor) -> Tensor:
        losses = problem.value(t, problem.train.inputs, problem.train.targets)
        return (weights * losses).sum() / n + problem.weight_decay / 2 * t @ t

    for _ in range(30):
        step = torch.linalg.solve(torch.func.hessian(objective)(theta), torch.func.grad(objective)(theta))
        theta = theta - step
        if float(step.norm()) < 1e-12:
            return theta
    raise AssertionError(f"Newton's method did not converge: last step {float(step.norm())}")


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort()


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


class Branching(nn.Module):
    """Parameters of several shapes, a layer that never runs, dropout, and an output that is not the last linear's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5, bias=False)
        self.unused = nn.Conv1d(1, 1, 1)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(self.dropout(torch.tanh(self.first(x))))
