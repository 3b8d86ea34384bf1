"""Small networks, per-example losses, and the margin: the pieces that recipes and problems are made of."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tda_core.examples import IGNORED

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def mlp(layers: tuple[int, ...], activation: str = "relu") -> nn.Sequential:
    """A multi-layer perceptron: `mlp((64, 32, 10))` has one hidden layer; `mlp((64, 10))` is linear.

    Raises ValueError for fewer than two widths, a width below 1, or an unknown activation.
    """
    check_layers(layers, activation)
    modules: list[nn.Module] = []
    for width_in, width_out in pairwise(layers):
        modules += [nn.Linear(width_in, width_out), ACTIVATIONS[activation]()]
    return nn.Sequential(*modules[:-1])


def small_convolutional(height: int = 28, width: int = 28, channels: int = 8, n_classes: int = 10) -> nn.Sequential:
    """Two convolutions with stride 2 and a linear layer, on flattened grey images (n, height * width).

    Raises ValueError for images below 9 x 9, of which the convolutions would leave nothing, and widths below 1.
    """
    if min(height, width) < 9 or channels < 1 or n_classes < 1:
        found = f"{height} x {width}, {channels} channels, {n_classes} classes"
        raise ValueError(f"images must be 9 x 9 or larger, with 1 channel and class or more, got {found}")
    rows, columns = (((size - 3) // 2 - 1) // 2 for size in (height, width))
    return nn.Sequential(
        nn.Unflatten(1, (1, height, width)),
        nn.Conv2d(1, channels, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * rows * columns, n_classes),
    )


def check_layers(layers: tuple[int, ...], activation: str) -> None:
    if len(layers) < 2 or any(not isinstance(width, int) or width < 1 for width in layers):
        raise ValueError(f"layers must be at least two widths of 1 or more, got {layers!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}, expected one of {sorted(ACTIVATIONS)}")


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each example: outputs (n, C) logits, targets (n,) labels -> (n,)."""
    return F.cross_entropy(outputs, targets, reduction="none")


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error of each example: outputs (n, 1), targets (n,) -> (n,).

    The half makes the loss' second derivative in the output 1, so the GGN is J'J. Raises ValueError for
    outputs of another width, all but the first of which would go unseen.
    """
    if outputs.shape[1] != 1:
        raise ValueError(f"squared_error needs outputs of width 1, got width {outputs.shape[1]}")
    return 0.5 * (outputs[:, 0] - targets) ** 2


def sequence_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats summed over each sequence's labelled positions: (n, T, V), (n, T) -> (n,)."""
    return F.cross_entropy(outputs.transpose(1, 2).float(), targets, reduction="none", ignore_index=IGNORED).sum(1)


def mean_sequence_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats a labelled position: (n, T, V), (n, T) -> (n,)."""
    return sequence_cross_entropy(outputs, targets) / (targets != IGNORED).sum(1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": cross_entropy,
    "squared_error": squared_error,
}


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """log(p_y / (1 - p_y)) of each example: outputs (n, C) logits, targets (n,) -> (n,), in nats.

    Equal to -log(exp(loss) - 1), which overflows for uncertain points and loses all digits for
    confident ones; the log-sum-exp over the other classes does neither (TRAK, arXiv 2303.14186, eq. 6).
    """
    if outputs.ndim > 2:
        raise ValueError(f"a margin needs one label an example, got outputs of shape {tuple(outputs.shape)}")
    if outputs.shape[1] < 2:
        raise ValueError(f"a margin needs at least 2 classes, got outputs of width {outputs.shape[1]}")
    correct = outputs.gather(1, targets[:, None])[:, 0]
    is_correct = torch.arange(outputs.shape[1]) == targets[:, None]  # not one_hot, which vmap cannot enter
    others = outputs.masked_fill(is_correct, -torch.inf)
    return correct - others.logsumexp(1)
