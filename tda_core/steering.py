"""Steering operators: K small shifts of a frozen model, one for every subset of its training examples.

Dagli et al. 2026 (arXiv 2606.05165): steered logits o~_k(x) = o_x + B_psi(h_x) a_k, or the same shift added to the
activations of a layer, whose consequences then pass through the rest of the model. B_psi: a basis shared by all
operators, here of any `FeatureMap`; a_k: (r, width) the steering matrix of subset k.
"""

import abc
import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from tda_core.examples import Examples
from tda_core.feature_maps import FeatureMap
from tda_core.models import margin
from tda_core.problem import Problem

BASES = ("identity", "linear", "two_layer")
TARGETS = ("loss", "margin")
# Floats that the steered outputs of one block of queries may hold
BLOCK_FLOATS = 2**25


class Site(abc.ABC):
    """Where operators act: what they are added to, and what becomes of the sum. width: of what is shifted."""

    width: int

    @abc.abstractmethod
    def anchors(self, inputs: Tensor) -> Tensor:
        """What the frozen model has at this place: (n, width)."""

    @abc.abstractmethod
    def outputs(self, shifted: Tensor) -> Tensor:
        """The model's outputs (N, C) with (N, width) in that place; differentiable."""


@dataclass(frozen=True, eq=False)
class LogitSite(Site):
    """Operators on the outputs: logits, or the prediction of a regression."""

    problem: Problem
    width: int

    def anchors(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return self.problem.outputs(inputs)

    def outputs(self, shifted: Tensor) -> Tensor:
        return shifted


@dataclass(frozen=True, eq=False)
class LayerSite(Site):
    """Operators on what flows out of a layer (flattened), for models that reach their outputs through it alone.

    shape: of one example's activations.
    """

    problem: Problem
    layer: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        return torch.Size(self.shape).numel()

    def anchors(self, inputs: Tensor) -> Tensor:
        return _flow(self.problem, self.layer, inputs).flatten(1)

    def outputs(self, shifted: Tensor) -> Tensor:
        # One input runs up to the layer, where its activations are exchanged for all those that go on from there.
        module = dict(self.problem.placed.named_modules())[self.layer]
        replace = module.register_forward_hook(lambda *_: shifted.view(-1, *self.shape))
        try:
            return self.problem.outputs(self.problem.train.inputs[:1])
        finally:
            replace.remove()


def site_of(problem: Problem, placement: str) -> Site:
    """The site named "logits", or that of a layer. Raises ValueError for a layer that does not exist, naming those
    that do, and for one that the outputs do not depend on alone (a skip connection around it)."""
    inputs = problem.train.inputs[:3]
    logits = LogitSite(problem, problem.outputs(inputs).shape[1])
    if placement == "logits":
        return logits
    site = LayerSite(problem, placement, tuple(_flow(problem, placement, inputs).shape[1:]))
    expected = logits.anchors(inputs)
    try:
        with torch.no_grad():
            found = site.outputs(site.anchors(inputs))
    except RuntimeError as error:
        raise ValueError(f"layer {placement!r} cannot be steered: what comes after it failed ({error})") from error
    if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-4):
        raise ValueError(f"layer {placement!r} cannot be steered: the outputs depend on more than its activations")
    return site


def _flow(problem: Problem, layer: str, inputs: Tensor) -> Tensor:
    """What flows out of a layer: (n, ...)."""
    modules = dict(problem.placed.named_modules())
    if layer not in modules or not layer:
        known = sorted(name for name in modules if name)
        raise ValueError(f"unknown layer {layer!r}, expected 'logits' or one of {known}")
    seen: list[Tensor] = []
    # a copy, because a later layer may work in place (a ReLU does)
    keep = modules[layer].register_forward_hook(lambda _, __, out: seen.append(copy.deepcopy(out)))
    try:
        with torch.no_grad():
            problem.outputs(inputs)
    finally:
        keep.remove()
    if len(seen) != 1 or not isinstance(seen[0], Tensor):
        raise ValueError(f"layer {layer!r} must run once and give a tensor, but ran {len(seen)} times")
    return seen[0]


def make_basis(kind: str, n_features: int, rank: int, *, seed: int, dtype: torch.dtype) -> nn.Module:
    """B_psi: features (n, f) -> (n, r). "identity" (r = f), "linear", or "two_layer" (hidden width 2 r, tanh).

    Learned ones start as random projections that keep inner products on average (entries N(0, 1/r)).
    Raises ValueError for an unknown kind and a rank below 1.
    """
    if kind not in BASES:
        raise ValueError(f"unknown basis {kind!r}, expected one of {BASES}")
    if kind == "identity":
        return nn.Identity()
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    generator = torch.Generator().manual_seed(seed)
    hidden = (n_features, rank) if kind == "linear" else (n_features, 2 * rank, rank)
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(hidden):
        layer = nn.Linear(width_in, width_out, bias=False, dtype=dtype)
        drawn = torch.randn(width_out, width_in, generator=generator, dtype=torch.float64) / width_out**0.5
        layer.weight.data = drawn.to(dtype)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True, eq=False)
class Operators:
    """K trained operators. matrices: (K, r, width), the a_k."""

    problem: Problem
    features: FeatureMap
    site: Site
    basis: nn.Module
    matrices: Tensor

    @property
    def n_subsets(self) -> int:
        return len(self.matrices)

    def steered(self, inputs: Tensor) -> Tensor:
        """Outputs of the model under every operator: (n, ...) -> (K, n, C)."""
        with torch.no_grad():
            return steer(self.site, self.basis(self.features(inputs)), self.site.anchors(inputs), self.matrices)

    def measurements(self, queries: Examples, target: str = "loss") -> Tensor:
        """y_{x,k} = Loss(o_x) - Loss(o~_k(x)), k = 1..K: (q, K), without gradients, in blocks of queries.

        target: "loss", or "margin" for the rise of log(p_y / (1 - p_y)) instead; positive where an operator helps.
        """
        self.problem.check(queries)
        value = gain(self.problem, target)
        n_outputs = self.problem.outputs(queries.inputs[:1]).shape[1]
        size = max(1, BLOCK_FLOATS // (self.n_subsets * max(self.site.width, n_outputs)))
        found = []
        for rows in torch.arange(len(queries)).split(size):
            block = queries[rows]
            with torch.no_grad():
                before = value(self.problem.outputs(block.inputs), block.targets)
                steered = self.steered(block.inputs)
                targets = block.targets.expand(self.n_subsets, -1).reshape(-1)
                after = value(steered.flatten(0, 1), targets).view(self.n_subsets, -1)
            found.append((after - before).T)
        return torch.cat(found)


def steer(site: Site, basis: Tensor, anchors: Tensor, matrices: Tensor) -> Tensor:
    """Outputs (K, b, C) of K operators on shared examples: basis (b, r), anchors (b, width)."""
    k, r, width = matrices.shape
    shift = (basis @ matrices.transpose(0, 1).reshape(r, k * width)).view(-1, k, width).transpose(0, 1)
    return site.outputs((anchors + shift).reshape(-1, width)).view(k, len(basis), -1)


def steer_own(site: Site, basis: Tensor, anchors: Tensor, matrices: Tensor) -> Tensor:
    """Outputs (K, m, C) of K operators, each on examples of its own: basis (K, m, r), anchors (K, m, width)."""
    shifted = torch.baddbmm(anchors, basis, matrices)
    return site.outputs(shifted.flatten(0, 1)).view(*basis.shape[:2], -1)


def gain(problem: Problem, target: str) -> Callable[[Tensor, Tensor], Tensor]:
    """What rises where a query is served better: minus its loss, or its margin. (outputs, targets) -> (n,)."""
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}, expected one of {TARGETS}")
    if target == "margin":
        if not problem.train.is_classification:
            raise ValueError("target 'margin' is for classifiers, and this problem has continuous targets")
        return margin
    return lambda outputs, targets: -problem.loss(outputs, targets)
