"""Feature maps phi(x) fitted on training inputs, for operators that stand on fixed features.

What a steering operator stands on decides what it can say (Dagli et al. 2026, arXiv 2606.05165, use one hidden layer).
Here are the inputs themselves, their principal components, hidden layers, kernel principal components, random ReLU
features, and several of these joined. All give a `FeatureMap` (`tda_core.feature_maps`).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from tda_core.feature_maps import (
    BLOCK,
    Affine,
    FeatureMap,
    Hidden,
    Joined,
    KernelFeatures,
    RandomRelu,
    checked,
    load_features,
)
from tda_core.kernels import Kernel
from tda_core.models import check_layers
from tda_core.problem import Problem
from tda_core.solvers import leading_eigenvectors

__all__ = [
    "FeatureMap",
    "hidden",
    "input_pca",
    "joined",
    "kernel_pca",
    "load_features",
    "random_relu",
    "raw_input",
    "with_bias",
]

# Above this many examples the kernel matrix and its decomposition leave a laptop (n^2 memory, n^3 time)
EXACT_LIMIT = 4000


def raw_input(inputs: Tensor) -> Affine:
    """Inputs as they are, flattened. inputs: (n, ...) of the training set."""
    checked(inputs, tuple(inputs.shape[1:]))
    d = inputs[0].numel()
    return Affine("input", tuple(inputs.shape[1:]), inputs.new_zeros(d), torch.eye(d, dtype=inputs.dtype))


def input_pca(inputs: Tensor, k: int, *, whiten: float | None = None) -> Affine:
    """Projections on the k leading principal components of the (centred) training inputs.

    whiten: None for the projections as they are, or a floor: component j is divided by
    sqrt(variance_j + whiten * variance_1). Raises ValueError for k outside 1..min(n, d), a floor that is negative or
    not finite, and whitening without a floor of components that have no variance.
    """
    checked(inputs, tuple(inputs.shape[1:]))
    flat = inputs.flatten(1)
    _check_count(k, min(flat.shape))
    mean = flat.mean(0)
    _, values, vectors = torch.linalg.svd((flat - mean).double(), full_matrices=False)
    matrix, variances = _signed(vectors[:k].T), values**2 / len(flat)
    if whiten is not None:
        if not 0 <= whiten < float("inf"):
            raise ValueError(f"whiten must be None or a finite floor >= 0, got {whiten}")
        floored = variances[:k] + whiten * variances[0]
        if float(floored[-1]) <= 1e-12 * float(variances[0]):
            rank = int((variances > 1e-12 * variances[0]).sum())
            raise ValueError(f"component {k} has no variance: use k <= {rank}, or a floor above 0, got whiten={whiten}")
        matrix = matrix / floored.sqrt()
    name = f"input_pca{k}" if whiten is None else f"input_white{k}"
    return Affine(name, tuple(inputs.shape[1:]), mean, matrix.to(inputs.dtype))


def hidden(problem: Problem, layer: str | None = None) -> Hidden:
    """Features of one layer (default: the last linear one). Raises ValueError, which lists them, for an unknown one."""
    made = Hidden(problem, problem.last_layer if layer is None else layer)
    made.map(problem.train.inputs[:1])
    return made


def kernel_pca(
    inputs: Tensor, kernel: Kernel, k: int, *, landmarks: int | None = None, seed: int = 0
) -> KernelFeatures:
    """Projections on the k leading principal directions (uncentred) of the training inputs in the kernel's own space.

    phi(x) . phi(z) is the best rank-k approximation of the kernel on the training set. landmarks: None for all
    training inputs (exact: n^2 memory, n^3 time, up to `EXACT_LIMIT`), or how many of them to draw by `seed` and
    restrict the feature space to (Nystrom; Williams & Seeger 2001), in which the directions are those of all n.
    Raises ValueError for k beyond the numerical rank or the landmarks, and for more examples than `EXACT_LIMIT`
    without landmarks.
    """
    checked(inputs, tuple(inputs.shape[1:]))
    flat, n = inputs.flatten(1), len(inputs)
    if landmarks is None and n > EXACT_LIMIT:
        raise ValueError(f"exact kernel PCA takes up to {EXACT_LIMIT} examples, got {n}: give a number of landmarks")
    if landmarks is not None and not 1 <= landmarks <= n:
        raise ValueError(f"landmarks must lie in 1..{n}, the training examples, got {landmarks}")
    _check_count(k, n if landmarks is None else landmarks)
    name, shape = f"{kernel.name}_pca{k}", tuple(inputs.shape[1:])
    if landmarks is None:
        return KernelFeatures(name, shape, kernel, flat, _kernel_directions(kernel(flat, flat), k, exactly=True))
    chosen = flat[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:landmarks].sort().values]
    matrix = _kernel_directions(kernel(chosen, chosen), landmarks, exactly=False)
    second = sum(phi.T @ phi for phi in (kernel(block, chosen) @ matrix for block in flat.split(BLOCK)))
    if k > matrix.shape[1]:
        raise ValueError(f"the landmarks' kernel has numerical rank {matrix.shape[1]}, below k = {k}: use a smaller k")
    _, vectors = leading_eigenvectors(second, k)
    return KernelFeatures(name, shape, kernel, chosen, matrix @ _signed(vectors))


def random_relu(inputs: Tensor, widths: Sequence[int], *, seed: int = 0) -> RandomRelu:
    """Random ReLU features: the activations of an untrained network in PyTorch's default initialisation.

    widths: of its layers above the input, the last of which is the number of features. As they grow, the features'
    inner products go to the last hidden layer's arc-cosine kernel times its width.
    """
    checked(inputs, tuple(inputs.shape[1:]))
    sizes = (inputs[0].numel(), *widths)
    check_layers(sizes, "relu")
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        (2 * torch.rand(b, a + 1, generator=generator, dtype=torch.float64) - 1) / a**0.5 for a, b in pairwise(sizes)
    ]
    weights = tuple(weight.to(inputs.dtype) for weight in drawn)
    return RandomRelu(f"random_relu{sizes[-1]}", tuple(inputs.shape[1:]), weights)


def joined(parts: Sequence[FeatureMap], inputs: Tensor, *, bias: bool = False) -> Joined:
    """Several maps side by side, each scaled to mean square norm 1 on the training inputs.

    Raises ValueError for no maps, maps of different inputs, and one that is zero on all training inputs.
    """
    if not parts:
        raise ValueError("give at least one feature map to join, got none")
    shapes = list(dict.fromkeys(part.shape for part in parts))
    if len(shapes) > 1:
        raise ValueError(f"the maps must take the same inputs, got shapes {shapes[0]} and {shapes[1]}")
    scales = []
    for part in parts:
        size = float((part(inputs) ** 2).sum(1).mean().sqrt())
        if size == 0:
            raise ValueError(f"features {part.name!r} are zero on all training inputs: they cannot be scaled")
        scales.append(1 / size)
    return Joined(tuple(parts), tuple(scales), bias)


def with_bias(part: FeatureMap) -> Joined:
    """The features as they are, and a constant 1 after them: what a linear layer with a bias sees."""
    return Joined((part,), (1.0,), True)


def _kernel_directions(gram: Tensor, k: int, *, exactly: bool) -> Tensor:
    """The k leading eigenvectors of a kernel matrix over the roots of their eigenvalues: (m, k).

    Those whose eigenvalues are lost in rounding are left out, or with `exactly` refused.
    """
    values, vectors = leading_eigenvectors(gram, k)
    sound = values > 10 * torch.finfo(gram.dtype).eps * values[0]
    if exactly and not bool(sound.all()):
        raise ValueError(f"the kernel matrix has numerical rank {int(sound.sum())}, below k = {k}: use a smaller k")
    return _signed(vectors[:, sound]) / values[sound].sqrt()


def _check_count(k: int, largest: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= largest:
        raise ValueError(f"k must be a whole number in 1..{largest}, got {k!r}")


def _signed(vectors: Tensor) -> Tensor:
    """Columns with the sign that makes their largest entry positive: eigenvectors have none of their own."""
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    return vectors * signs
