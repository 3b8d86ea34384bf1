"""A linear self-attention layer, built so that one forward pass is one step of gradient descent.

Tokens are e_i = (x_i, y_i), the query's is (x_q, 0). The layer adds P sum_i (V e_i) (K e_i)'(Q e_j) to each token e_j:
with K and Q reading x, V reading y, and P = eta, the query's last entry becomes eta sum_i y_i x_i'x_q, the prediction
after one step of size eta from W = 0 on the sum of the losses (W x_i - y_i)^2 / 2 (von Oswald et al. 2023, section 2).

With one demonstration z the query's loss then changes by -eta <g_q, g_z> to first order in eta, where g are the losses'
gradients at W = 0. Gains here are what the loss falls by, so positive for proponents.
"""

import math

import torch
from torch import Tensor, nn

from tda_core.regression_tasks import Pairs, check_queries


class LinearSelfAttention(nn.Module):
    """e_j + P V sum_i e_i (K e_i)'(Q e_j), without a softmax.

    Takes tokens e_i (t, n, d + 1) and queries e_j (t, m, d + 1), gives the latter's new values (t, m, d + 1).
    key, query: (d, d + 1), value: (r, d + 1), projection: (d + 1, r), all kept as buffers.
    """

    def __init__(self, key: Tensor, query: Tensor, value: Tensor, projection: Tensor) -> None:
        super().__init__()
        for name, matrix in (("key", key), ("query", query), ("value", value), ("projection", projection)):
            self.register_buffer(name, matrix)

    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        weights = (queries @ self.query.T) @ (tokens @ self.key.T).mT  # (t, m, n), no softmax
        return queries + weights @ (tokens @ self.value.T) @ self.projection.T

    def predict(self, context: Pairs, inputs: Tensor) -> Tensor:
        """A regression's predictor: what the queries (t, m, d) hold in place of their targets afterwards, (t, m).

        Raises ValueError for a context of another dimension than the layer's, and queries that do not fit it.
        """
        if context.inputs.shape[2] + 1 != self.key.shape[1]:
            raise ValueError(f"inputs must have {self.key.shape[1] - 1} dimensions, got {context.inputs.shape[2]}")
        check_queries(context, inputs)
        tokens = torch.cat([context.inputs, context.targets[:, :, None]], 2)
        asked = torch.cat([inputs, torch.zeros_like(inputs[:, :, :1])], 2)
        return self(tokens, asked)[:, :, -1]


def one_step_layer(dimension: int, eta: float, *, dtype: torch.dtype = torch.float32) -> LinearSelfAttention:
    """The layer whose forward pass is one gradient step of size eta from W = 0.

    Raises ValueError for a dimension below 1, and an eta that is not above 0.
    """
    if dimension < 1:
        raise ValueError(f"dimension must be at least 1, got {dimension}")
    _check_eta(eta)
    identity = torch.eye(dimension + 1, dtype=dtype)
    reads_x, reads_y = identity[:dimension], identity[dimension:]
    return LinearSelfAttention(reads_x, reads_x, reads_y, eta * reads_y.T)


def gradient_products(demonstrations: Pairs, queries: Pairs) -> Tensor:
    """<g_q, g_z> = y_z y_q x_z'x_q, gradients at W = 0: (t, n) demonstrations and (t, m) queries -> (t, n, m)."""
    own, others = (pairs.targets[:, :, None] * pairs.inputs for pairs in (demonstrations, queries))
    return own @ others.mT


def gains_of_one_step(demonstrations: Pairs, queries: Pairs, eta: float) -> Tensor:
    """What each query's loss falls by after a step on one demonstration: eta <g_q, g_z> - (eta y_z x_z'x_q)^2 / 2.

    (t, n, m). The first term is the inner product, the second what it leaves out: the gain has the product's sign
    where eta <g_q, g_z> < 2 y_q^2, and beyond that the step overshoots the query's target by more than it missed.
    """
    _check_eta(eta)
    moved = eta * (demonstrations.targets[:, :, None] * (demonstrations.inputs @ queries.inputs.mT))
    return eta * gradient_products(demonstrations, queries) - moved**2 / 2


def autograd_reference(demonstrations: Pairs, queries: Pairs, eta: float) -> tuple[Tensor, Tensor]:
    """`gradient_products` and `gains_of_one_step` by autograd and one step for each pair, slowly: for tests."""
    _check_eta(eta)
    products, gains = [], []
    for task in range(len(demonstrations.inputs)):
        for i in range(len(demonstrations)):
            weights = torch.zeros(demonstrations.inputs.shape[2], dtype=demonstrations.inputs.dtype, requires_grad=True)
            (step,) = torch.autograd.grad(_loss(weights, demonstrations, (task, i)), weights)
            for j in range(len(queries)):
                before = _loss(weights, queries, (task, j))
                products.append(step @ torch.autograd.grad(before, weights, retain_graph=True)[0])
                gains.append((before - _loss(weights - eta * step, queries, (task, j))).detach())
    shape = (len(demonstrations.inputs), len(demonstrations), len(queries))
    return torch.stack(products).view(shape), torch.stack(gains).view(shape)


def _loss(weights: Tensor, pairs: Pairs, place: tuple[int, int]) -> Tensor:
    return (pairs.inputs[place] @ weights - pairs.targets[place]) ** 2 / 2


def _check_eta(eta: float) -> None:
    if not (math.isfinite(eta) and eta > 0):
        raise ValueError(f"eta must be finite and above 0, got {eta}")
