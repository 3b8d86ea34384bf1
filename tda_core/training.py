"""Training from a recipe: one model, or hundreds stacked in one vectorised loop.

The stacked loop holds M models' weights as (M, out, in) tensors and runs forward and backward by
hand with batched matrix products, momentum fused into the gradient product. `train_loop` is its plain
reference: one model, autograd, `torch.optim.SGD`, same random numbers.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from tda_core.examples import Examples
from tda_core.models import LOSSES, margin, mlp
from tda_core.problem import Problem
from tda_core.recipes import PRECISIONS, Recipe, epoch_orders, initial_parameters
from tda_core.threads import one_thread

# -- the plain reference ----------------------------------------------------------------------------


# A weight beyond this has diverged, though it may never reach infinity: a softmax's gradient is bounded.
LARGEST_WEIGHT = 1e4


def train_loop(recipe: Recipe, examples: Examples, weights: Tensor, seed: int, initial: Tensor | None = None) -> Tensor:
    """One model, one batch at a time, by autograd and `torch.optim.SGD`: (p,). weights: (n,)."""
    weights, _ = _check(recipe, examples, weights[None], [seed])
    targets = examples.targets if examples.is_classification else examples.targets.to(recipe.dtype)
    model = mlp(recipe.layers, recipe.activation).to(recipe.dtype)
    start = initial_parameters(recipe, seed) if initial is None else initial
    torch.nn.utils.vector_to_parameters(start.clone(), model.parameters())
    optimiser = torch.optim.SGD(
        model.parameters(), recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    orders, factors = _visits(recipe, weights, [seed])
    n_steps = recipe.epochs * math.ceil(orders[0].shape[1] / recipe.batch_size)
    step = 0
    for order in orders:
        for rows in order[0].split(recipe.batch_size):
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step, n_steps)
            batch_loss = LOSSES[recipe.loss](model(examples.inputs[rows].to(recipe.dtype)), targets[rows])
            optimiser.zero_grad()
            (batch_loss * factors[0, rows]).mean().backward()
            optimiser.step()
            step += 1
    return _check_finite(torch.nn.utils.parameters_to_vector(model.parameters()).detach()[None], recipe)[0]


# -- the stacked ensemble ---------------------------------------------------------------------------


def train_many(
    recipe: Recipe, examples: Examples, weights: Tensor, seeds: list[int], initial: Tensor | None = None
) -> Tensor:
    """Train M models together: (M, p) parameters, in the order of `nn.Module.parameters()`.

    weights: (M, n). A boolean row is a subset: the others are never visited, and every row must hold
    equally many. A float row visits every example in its seed's order and multiplies its loss, the batch
    mean still dividing by the batch size: removing an example that way disturbs nothing else. seeds: M
    integers for initialisation and order. initial: (p,) or (M, p) to start from instead.
    Raises ValueError for wrong shapes, an empty subset, NaN, labels out of range, and divergence.
    """
    *_, last = train_epochs(recipe, examples, weights, seeds, initial)
    return _check_finite(last, recipe)


def train_epochs(
    recipe: Recipe, examples: Examples, weights: Tensor, seeds: list[int], initial: Tensor | None = None
) -> Iterator[Tensor]:
    """The parameters (M, p) after each epoch of `train_many` (a view that the next epoch overwrites)."""
    weights, seeds = _check(recipe, examples, weights, seeds)
    theta = torch.stack([initial_parameters(recipe, seed) for seed in seeds]) if initial is None else initial
    p = recipe.n_parameters
    if theta.shape not in ((p,), (len(seeds), p)):
        raise ValueError(f"initial must be ({p},) or ({len(seeds)}, {p}), got {tuple(theta.shape)}")
    theta = theta.to(recipe.dtype).expand(len(seeds), -1).clone()
    ensemble = _Ensemble(recipe, theta)
    orders, factors = _visits(recipe, weights, seeds)
    # Models that visit the same examples share one copy of each batch and one wide matrix product.
    shared = all(bool((order == order[:1]).all()) for order in orders)
    product_type = PRECISIONS[recipe.precision]
    inputs = examples.inputs.flatten(1).to(product_type).contiguous()
    targets = examples.targets if examples.is_classification else examples.targets.to(recipe.dtype)
    weighted = weights.is_floating_point()
    n_visited = orders[0].shape[1]
    n_steps = recipe.epochs * math.ceil(n_visited / recipe.batch_size)
    step = 0
    for order in orders:
        for start in range(0, n_visited, recipe.batch_size):
            rows = order[:, start : start + recipe.batch_size]
            if shared:
                x = inputs[rows[0]]
            else:
                x = inputs.index_select(0, rows.reshape(-1)).view(*rows.shape, -1)
            factor = factors.gather(1, rows)[:, None] if weighted else None
            ensemble.step(x, targets[rows][:, None], factor, recipe.rate(step, n_steps))
            step += 1
        yield ensemble.theta


class _Ensemble:
    """M multi-layer perceptrons with weights (M, out, in), activations (M, width, batch).

    Widths before batch: softmax over the classes then runs over a long contiguous axis, 5 times faster
    than over ten adjacent logits.
    """

    def __init__(self, recipe: Recipe, theta: Tensor) -> None:
        self.recipe = recipe
        n_models = len(theta)
        shapes = [(b, a) for a, b in pairwise(recipe.layers)]
        # One contiguous tensor per weight: views into (M, p) have gaps that the batched products copy around.
        parts = theta.split([size for b, a in shapes for size in (a * b, b)], dim=1)
        self.weights = [part.reshape(n_models, *s).clone() for part, s in zip(parts[::2], shapes, strict=True)]
        self.biases = [part.reshape(n_models, -1, 1).clone() for part in parts[1::2]]
        self.velocities = [torch.zeros_like(p) for p in (*self.weights, *self.biases)]

    @property
    def theta(self) -> Tensor:
        pairs = zip(self.weights, self.biases, strict=True)
        return torch.cat([p.flatten(1) for pair in pairs for p in pair], dim=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x: (B, d) shared by all models or (M, B, d) -> activations of each layer, logits (M, C, B) last."""
        activations: list[Tensor] = []
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i > 0:
                z = torch.baddbmm(b, w, activations[-1])
            elif x.ndim == 2:
                z = (w.to(x.dtype).flatten(0, 1) @ x.T).view(*w.shape[:2], -1).to(w.dtype).add_(b)
            elif x.dtype == w.dtype:
                z = torch.baddbmm(b, w, x.transpose(1, 2))
            else:
                z = torch.bmm(w.to(x.dtype), x.transpose(1, 2)).to(w.dtype).add_(b)
            if i < len(self.weights) - 1:
                z = z.relu_() if self.recipe.activation == "relu" else z.tanh_()
            activations.append(z)
        return activations

    def step(self, x: Tensor, targets: Tensor, factor: Tensor | None, rate: float) -> None:
        """One SGD step. targets: (M, 1, B). factor: (M, 1, B) example weights, or None for all ones."""
        activations = self.forward(x)
        error = self._output_error(activations[-1], targets)
        error.div_(error.shape[2]) if factor is None else error.mul_(factor / error.shape[2])
        n_layers = len(self.weights)
        for i in reversed(range(n_layers)):
            below = x if i == 0 else activations[i - 1].transpose(1, 2)
            if i > 0:
                passed = torch.bmm(self.weights[i].transpose(1, 2), error)
            self._accumulate(i, error, below)
            if i > 0:
                error = self._through_activation(passed, activations[i - 1])
        for parameter, velocity in zip((*self.weights, *self.biases), self.velocities, strict=True):
            parameter.add_(velocity, alpha=-rate)

    def _output_error(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Derivative of each example's loss in its outputs: (M, C, B)."""
        if self.recipe.loss == "squared_error":
            return outputs - targets
        error = outputs.softmax(1)
        return error.scatter_add_(1, targets, torch.full_like(error[:, :1], -1.0))

    def _through_activation(self, error: Tensor, activation: Tensor) -> Tensor:
        if self.recipe.activation == "relu":
            return torch.ops.aten.threshold_backward(error, activation, 0)
        return error * (1 - activation * activation)

    def _accumulate(self, i: int, error: Tensor, below: Tensor) -> None:
        """velocity = momentum * velocity + gradient + weight_decay * parameter, for layer i."""
        momentum, decay = self.recipe.momentum, self.recipe.weight_decay
        weight_velocity, bias_velocity = self.velocities[i], self.velocities[len(self.weights) + i]
        if below.dtype != error.dtype:
            rounded = error.to(below.dtype)
            product = rounded.flatten(0, 1) @ below if below.ndim == 2 else torch.bmm(rounded, below)
            weight_velocity.mul_(momentum).add_(product.view_as(weight_velocity))
        elif below.ndim == 2:
            weight_velocity.flatten(0, 1).addmm_(error.flatten(0, 1), below, beta=momentum)
        else:
            weight_velocity.baddbmm_(error, below, beta=momentum)
        bias_velocity.mul_(momentum).add_(error.sum(2, keepdim=True))
        if decay:
            weight_velocity.add_(self.weights[i], alpha=decay)
            bias_velocity.add_(self.biases[i], alpha=decay)


def train(recipe: Recipe, examples: Examples, seed: int, *, mask: Tensor | None = None) -> Problem:
    """Train one model and give it as a Problem. mask: (n,) bool subset to train on (default: all)."""
    return train_checkpoints(recipe, examples, seed, [recipe.epochs], mask=mask)[0]


def train_checkpoints(
    recipe: Recipe, examples: Examples, seed: int, epochs: list[int], *, mask: Tensor | None = None
) -> list[Problem]:
    """One training run as Problems at the ends of the given epochs, counted from 1 (for TracIn)."""
    unknown = [epoch for epoch in epochs if not 1 <= epoch <= recipe.epochs]
    if unknown or not epochs:
        raise ValueError(f"checkpoint epochs must lie in 1..{recipe.epochs}, got {epochs}")
    mask = torch.ones(len(examples), dtype=torch.bool) if mask is None else mask
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean (n,), got {mask.dtype}")
    kept = {}
    with one_thread():  # what is saved for a model on two cores is found again on any number of them
        for epoch, theta in enumerate(train_epochs(recipe, examples, mask[None], [seed]), start=1):
            if epoch in epochs:
                kept[epoch] = _check_finite(theta, recipe)[0]
    module = mlp(recipe.layers, recipe.activation).to(recipe.dtype).eval()
    subset = examples[mask]
    return [Problem(module, kept[e], LOSSES[recipe.loss], subset, recipe.weight_decay) for e in epochs]


def evaluate(recipe: Recipe, theta: Tensor, queries: Examples) -> dict[str, Tensor]:
    """Losses (M, q), and for classifiers margins (M, q), of M models at once. theta: (M, p).

    Raises ValueError for wrong shapes and FloatingPointError for a loss that is NaN or infinite.
    """
    _check_examples(recipe, queries)
    if theta.ndim != 2 or theta.shape[1] != recipe.n_parameters:
        raise ValueError(f"theta must be (M, {recipe.n_parameters}) for this recipe, got {tuple(theta.shape)}")
    logits = _Ensemble(recipe, theta).forward(queries.inputs.flatten(1).to(theta.dtype))[-1]
    m, c, q = logits.shape
    flat = logits.transpose(1, 2).reshape(m * q, c)
    targets = queries.targets.expand(m, q).reshape(-1)
    measured = {"losses": LOSSES[recipe.loss](flat, targets).view(m, q)}
    bad = (~torch.isfinite(measured["losses"])).nonzero()
    if len(bad):
        model, query = bad[0].tolist()
        raise FloatingPointError(
            f"the loss of query {query} under model {model} is {float(measured['losses'][model, query])}: "
            f"training diverged, lower learning_rate={recipe.learning_rate} or momentum={recipe.momentum}"
        )
    if queries.is_classification:
        measured["margins"] = margin(flat, targets).view(m, q)
    return measured


# -- checks -----------------------------------------------------------------------------------------


def _visits(recipe: Recipe, weights: Tensor, seeds: list[int]) -> tuple[list[Tensor], Tensor]:
    """The visiting order of each epoch, (M, n_visited) indices, and the examples' loss factors (M, n)."""
    m, n = weights.shape
    of_seed = {seed: epoch_orders(recipe, n, seed) for seed in set(seeds)}
    subset = not weights.is_floating_point()
    orders = []
    for epoch in range(recipe.epochs):
        order = torch.stack([of_seed[seed][epoch] for seed in seeds])
        orders.append(order[weights.gather(1, order)].view(m, -1) if subset else order)
    return orders, weights.to(recipe.dtype)


def _check(recipe: Recipe, examples: Examples, weights: Tensor, seeds: list[int]) -> tuple[Tensor, list[int]]:
    _check_examples(recipe, examples)
    bad = [seed for seed in seeds if int(seed) != seed or not 0 <= seed < 2**32]
    if bad:
        raise ValueError(f"seeds must be whole numbers in 0..2^32-1, got {bad[0]}")
    seeds = [int(seed) for seed in seeds]
    if weights.ndim != 2 or weights.shape != (len(seeds), len(examples)) or not seeds:
        expected = f"({len(seeds)} seeds, {len(examples)} examples), 1 seed or more"
        raise ValueError(f"weights must be {expected}, got {tuple(weights.shape)}")
    if weights.dtype == torch.bool:
        sizes = weights.sum(1)
        if int(sizes.min()) == 0:
            raise ValueError(f"subset {int(sizes.argmin())} is empty: every subset needs at least one example")
        if int(sizes.min()) != int(sizes.max()):
            raise ValueError(f"subsets must be equally large, got sizes {int(sizes.min())} to {int(sizes.max())}")
    elif not weights.is_floating_point():
        raise ValueError(f"weights must be boolean or finite floats, got {weights.dtype}")
    elif not torch.isfinite(weights).all():
        model, example = (~torch.isfinite(weights)).nonzero()[0].tolist()
        raise ValueError(f"weights must be finite, got {float(weights[model, example])} at [{model}, {example}]")
    return weights, seeds


def _check_examples(recipe: Recipe, examples: Examples) -> None:
    width = examples.inputs.flatten(1).shape[1]
    if width != recipe.layers[0]:
        raise ValueError(f"inputs have {width} features but the recipe's first layer takes {recipe.layers[0]}")
    if examples.is_classification != (recipe.loss == "cross_entropy"):
        raise ValueError(f"loss {recipe.loss!r} does not fit targets of type {examples.targets.dtype}")
    if examples.is_classification and int(examples.targets.max()) >= recipe.layers[-1]:
        raise ValueError(f"label {int(examples.targets.max())} is out of range for {recipe.layers[-1]} outputs")


def _check_finite(theta: Tensor, recipe: Recipe) -> Tensor:
    # NaN compares false, so it counts as too large as well
    bad = (~(theta.abs() <= LARGEST_WEIGHT)).any(1).nonzero()
    if len(bad):
        raise FloatingPointError(
            f"training diverged (model {int(bad[0])} of {len(theta)} holds NaN or a weight beyond {LARGEST_WEIGHT:g}): "
            f"lower learning_rate={recipe.learning_rate} or momentum={recipe.momentum}, or standardise the data"
        )
    return theta
