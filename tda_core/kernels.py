"""Kernels of infinitely wide ReLU networks: what an architecture makes similar before it has seen any data.

For u, v jointly normal with zero mean, variances a and b and angle t between them (cos t = cov / sqrt(a b)),

    E[relu(u) relu(v)]     = sqrt(a b) (sin t + (pi - t) cos t) / (2 pi)      arc-cosine kernel of degree 1
    E[1(u > 0) 1(v > 0)]   = (pi - t) / (2 pi)                                arc-cosine kernel of degree 0

(Cho & Saul 2009). Layer by layer they give the covariance of the outputs over initialisations (NNGP, Lee et al. 2018,
arXiv 1711.00165) and the inner product of the outputs' gradients (NTK, Jacot et al. 2018, arXiv 1806.07572), here for
PyTorch's own initialisation, in which weights and biases of a layer with d inputs have variance 1 / (3 d), and for its
own parametrisation, in which a layer's width decides how much its gradient counts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from tda_core.models import check_layers
from tda_core.problem import Problem

KINDS = ("ntk", "nngp")


@dataclass(frozen=True)
class ReluKernel:
    """Kernel of a multi-layer perceptron with ReLUs: (n, d), (m, d) -> (n, m).

    widths: from input to output, as in `Recipe.layers`; hidden ones count as large, and decide the layers' weights.
    kind: "ntk" or "nngp". With no hidden layer the NTK is x.z + 1. Values are in the inputs' type: in float32, angles
    near 0 are good to 3e-4 only, so that an example's NTK with itself is up to 1e-4 too small.
    Raises ValueError for widths as `models.mlp` does, another kind, and inputs of another width.
    """

    widths: tuple[int, ...]
    kind: str = "ntk"

    def __post_init__(self) -> None:
        check_layers(self.widths, "relu")
        if self.kind not in KINDS:
            raise ValueError(f"unknown kernel kind {self.kind!r}, expected one of {KINDS}")

    @property
    def name(self) -> str:
        return self.kind

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        for inputs in (x, z):
            if inputs.ndim != 2 or inputs.shape[1] != self.widths[0]:
                raise ValueError(f"inputs must be (n, {self.widths[0]}) for this kernel, got {tuple(inputs.shape)}")
        # sums over the units that flow into a layer: of pairs (n, m), and of each input with itself
        flow, own_x, own_z = x @ z.T, (x * x).sum(1), (z * z).sum(1)
        ntk = flow + 1
        for width_in, width in pairwise(self.widths[:-1]):
            covariance, a, b = ((value + 1) / (3 * width_in) for value in (flow, own_x, own_z))
            size = (a[:, None] * b).sqrt()
            cosine = (covariance / size).clamp(-1, 1)
            angle = cosine.acos()
            flow = size * (angle.sin() + (torch.pi - angle) * cosine) * (width / (2 * torch.pi))
            own_x, own_z = a * (width / 2), b * (width / 2)
            # a gradient that passes down through a layer meets width x weights of variance 1 / (3 width)
            ntk = ntk * (torch.pi - angle) / (6 * torch.pi) + flow + 1
        return ntk if self.kind == "ntk" else (flow + 1) / (3 * self.widths[-2])


def relu_kernel(problem: Problem, kind: str = "ntk") -> ReluKernel:
    """The kernel of a problem's own architecture.

    Raises ValueError for anything but an `nn.Sequential` of linear layers with ReLUs between them.
    """
    return ReluKernel(relu_widths(problem.module), kind)


def relu_widths(module: nn.Module) -> tuple[int, ...]:
    """Widths of an `nn.Sequential` of linear layers with ReLUs between them; ValueError for any other module."""
    parts = list(module) if isinstance(module, nn.Sequential) else []
    linear, between = parts[::2], parts[1::2]
    if not (
        len(linear) == len(between) + 1
        and all(isinstance(part, nn.Linear) for part in linear)
        and all(isinstance(part, nn.ReLU) for part in between)
    ):
        names = [type(part).__name__ for part in parts] or type(module).__name__
        raise ValueError(
            f"this architecture's own kernel is known for nn.Linear layers with nn.ReLU between them, got {names}: "
            "give ReluKernel the widths of such a network"
        )
    return (linear[0].in_features, *(layer.out_features for layer in linear))


@dataclass(frozen=True)
class GaussianKernel:
    """exp(-|x - z|^2 / (2 scale^2)): a control that knows no architecture. (n, d), (m, d) -> (n, m)."""

    scale: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be finite and > 0, got {self.scale}")

    @property
    def name(self) -> str:
        return "gaussian"

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.exp(-(torch.cdist(x, z) ** 2) / (2 * self.scale**2))


Kernel = ReluKernel | GaussianKernel


def kernel_settings(kernel: Kernel) -> dict[str, object]:
    """Plain data that `kernel_of` makes the same kernel from."""
    return {"kernel": kernel.name, **vars(kernel)}


def kernel_of(settings: dict[str, object]) -> Kernel:
    """The kernel of `kernel_settings`, as read from a file. Raises ValueError for an unknown one."""
    kind, rest = settings["kernel"], {name: value for name, value in settings.items() if name != "kernel"}
    if kind == "gaussian":
        return GaussianKernel(**rest)
    if kind in KINDS:
        return ReluKernel(_widths(rest["widths"]), str(kind))
    raise ValueError(f"unknown kernel {kind!r}, expected one of {('gaussian', *KINDS)}")


def _widths(value: object) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else ()
