"""Training K steering operators together: all of them in every step, the model frozen."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from tqdm.auto import tqdm

from tda_core import steering_losses
from tda_core.curvature import largest_eigenvalue
from tda_core.feature_maps import FeatureMap
from tda_core.problem import Problem
from tda_core.steering import Operators, Site, gain, make_basis, site_of, steer, steer_own

# What training is watched by: a number of the operators so far, the higher the better
Monitor = Callable[[Operators], float]


@dataclass(frozen=True)
class Steering:
    """How operators are trained. The defaults did well on the validation queries of digits, with input features; what
    the paper says of its own is in notebooks/stride/04_lds.

    placement: "logits", or the layer whose output is shifted. basis: one of `steering.BASES`, of `rank` where it is
    learned. fidelity, stability, linearity: weights of the losses; `sketch` and `gamma` belong to the last.
    steps: of gradient descent with momentum .9. rate: step size in units of 1 / the largest curvature at the start
    (a quadratic would be stable below 3.8). members, outside: examples drawn for a subset's fidelity, and for the
    stability of all, in each step. None: all, which makes it full-batch; all members hold K x the largest subset's
    size copies of the features, so give a number for large training sets. check_every, patience: with a monitor, it
    is asked every so many steps, and training ends when it has not improved for so many checks.
    """

    placement: str = "logits"
    basis: str = "identity"
    rank: int = 32
    fidelity: float = 1.0
    stability: float = 3.0
    linearity: float = 0.0
    sketch: int = 64
    gamma: float = 1.0
    steps: int = 100
    rate: float = 0.1
    members: int | None = None
    outside: int | None = 256
    check_every: int = 10
    patience: int = 3

    def __post_init__(self) -> None:
        for name in ("fidelity", "stability", "linearity"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and >= 0, got {value}")
        if not self.fidelity + self.stability > 0:
            raise ValueError("fidelity and stability must not both be 0: operators would have nothing to learn")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate must be finite and > 0, got {self.rate}")
        for name in ("rank", "steps", "sketch", "check_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("members", "outside"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be None (all) or >= 1, got {getattr(self, name)}")

    def but(self, **changes: object) -> "Steering":
        """The same settings with some changed: `steering.but(steps=50)`."""
        return replace(self, **changes)


@dataclass(frozen=True, eq=False)
class Course:
    """What training did. losses: (steps, 3), fidelity, stability and linearity before weighting, the first two as
    means over subsets. checks: {step: what the monitor said}. kept: the step whose operators were kept."""

    losses: Tensor
    checks: dict[int, float]
    kept: int


def fit_operators(
    problem: Problem,
    membership: sparse.csc_array,
    features: FeatureMap,
    settings: Steering,
    *,
    seed: int,
    monitor: Monitor | None = None,
) -> tuple[Operators, Course]:
    """Train one operator for every row of membership (K, n), all together.

    monitor: keeps the operators that it rates highest, for early stopping (None: those of the last step).
    Raises ValueError for a layer that cannot be steered, and FloatingPointError where training diverged.
    """
    site, train = site_of(problem, settings.placement), problem.train
    phi = features(train.inputs).to(problem.theta.dtype)
    residual = None
    if settings.linearity:
        sketch = (settings.sketch, settings.gamma)
        residual = steering_losses.linearity_residual(membership, *sketch, seed=seed, dtype=phi.dtype)
    outputs = problem.outputs(train.inputs).detach()
    subsets = _Subsets.of(membership, phi.dtype)
    training = _Training(problem, site, settings, phi, site.anchors(train.inputs), outputs, subsets, residual)
    basis = make_basis(settings.basis, phi.shape[1], settings.rank, seed=seed, dtype=phi.dtype)

    def operators(matrices: Tensor) -> Operators:
        return Operators(problem, features, site, copy.deepcopy(basis).requires_grad_(False), matrices.detach().clone())

    return _descend(training, basis, operators, monitor, seed)


def _descend(
    training: "_Training",
    basis: nn.Module,
    operators: Callable[[Tensor], Operators],
    monitor: Monitor | None,
    seed: int,
) -> tuple[Operators, Course]:
    settings, phi = training.settings, training.phi
    generator = torch.Generator().manual_seed(seed)
    start = basis(phi).detach()
    k = len(training.subsets.index)
    matrices = torch.zeros(k, start.shape[1], training.site.width, dtype=phi.dtype, requires_grad=True)
    rate = settings.rate / training.largest_curvature(start)
    learned = list(basis.parameters())
    # the basis is shared, and its gradient a sum over all operators
    groups = [{"params": [matrices]}, *([{"params": learned, "lr": rate / k}] if learned else [])]
    optimiser = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    history, checks, best = [], {}, None
    for step in tqdm(range(1, settings.steps + 1), desc="steering", leave=False):
        losses = training.losses(basis(phi), matrices, generator)
        optimiser.zero_grad()
        training.weighted(losses).backward()
        optimiser.step()
        history.append((losses / losses.new_tensor([k, k, 1])).detach())
        if monitor is not None and (step % settings.check_every == 0 or step == settings.steps):
            found = operators(matrices)
            checks[step] = float(monitor(found))
            if best is None or checks[step] > checks[best[0]]:
                best = (step, found)
            if step - best[0] >= settings.patience * settings.check_every:
                break
    if not torch.isfinite(matrices).all():
        raise FloatingPointError(f"steering diverged: lower rate={settings.rate}")
    step, found = best or (settings.steps, operators(matrices))
    return found, Course(torch.stack(history), checks, step)


# -- what stays as it is while operators are trained ------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Subsets:
    """columns: (K, n) membership. index, weights: (K, m) members of each subset and their shares, padded with zeros."""

    columns: sparse.csc_array
    index: Tensor
    weights: Tensor

    @classmethod
    def of(cls, membership: sparse.csc_array, dtype: torch.dtype) -> "_Subsets":
        rows = membership.tocsr()
        k, _ = rows.shape
        sizes = np.diff(rows.indptr)
        index = torch.zeros(k, int(sizes.max()), dtype=torch.long)
        weights = torch.zeros(index.shape, dtype=dtype)
        for i, size in enumerate(sizes.tolist()):
            members = torch.from_numpy(rows.indices[rows.indptr[i] : rows.indptr[i + 1]].astype(np.int64))
            index[i, :size], weights[i, :size] = members, 1 / size
        return cls(membership, index, weights)

    def outside(self, examples: Tensor) -> Tensor:
        """(K, b): 1 where a subset does not hold the example. Never for all of a large training set at once."""
        return 1 - torch.from_numpy(self.columns[:, examples.numpy()].toarray()).to(self.weights.dtype)


@dataclass(frozen=True, eq=False)
class _Training:
    """phi (n, f), anchors (n, width), base (n, C): features, anchors and outputs of the training examples.
    residual: (K, K) of the linearity loss, or None."""

    problem: Problem
    site: Site
    settings: Steering
    phi: Tensor
    anchors: Tensor
    base: Tensor
    subsets: _Subsets
    residual: Tensor | None

    def losses(self, basis: Tensor, matrices: Tensor, generator: torch.Generator) -> Tensor:
        """Fidelity and stability, both summed over operators, and linearity: (3,)."""
        settings, train = self.settings, self.problem.train
        fidelity = self._fidelity(basis, matrices, generator)
        if not settings.stability and not settings.linearity:
            return torch.stack([fidelity, fidelity.new_zeros(()), fidelity.new_zeros(())])
        n, size = len(basis), settings.outside
        rows = torch.arange(n) if size is None or size >= n else torch.randperm(n, generator=generator)[:size]
        common = steer(self.site, basis[rows], self.anchors[rows], matrices)
        share = self.subsets.outside(rows)
        share = share / share.sum(1, keepdim=True).clamp_min(1)
        stability = steering_losses.stability(self.base[rows], common, share, classifies=train.is_classification)
        if self.residual is None:
            return torch.stack([fidelity, stability, stability.new_zeros(())])
        measured = measured_gains(self.problem, self.base[rows], common, train.targets[rows])
        return torch.stack([fidelity, stability, steering_losses.linearity(measured, self.residual)])

    def _fidelity(self, basis: Tensor, matrices: Tensor, generator: torch.Generator) -> Tensor:
        index, weights, drawn = self.subsets.index, self.subsets.weights, self.settings.members
        if drawn is not None and drawn < index.shape[1]:
            chosen = torch.multinomial(weights, drawn, replacement=True, generator=generator)
            index, weights = index.gather(1, chosen), torch.full_like(chosen, 1 / drawn, dtype=weights.dtype)
        own = steer_own(self.site, basis[index], self.anchors[index], matrices)
        return steering_losses.fidelity(self.problem.loss, own, self.problem.train.targets[index], weights)

    def weighted(self, losses: Tensor) -> Tensor:
        settings = self.settings
        return settings.fidelity * losses[0] + settings.stability * losses[1] + settings.linearity * losses[2]

    def largest_curvature(self, basis: Tensor) -> float:
        """Largest eigenvalue of the weighted losses in an operator at zero, were all examples members and outside.

        Linearity couples operators, by a residual whose norm is at most 1: it counts as if it were the identity.
        """
        train = self.problem.train
        n, size = len(basis), basis.shape[1] * self.site.width
        share = torch.full((1, n), 1 / n, dtype=basis.dtype)
        zero = torch.zeros(size, dtype=basis.dtype, requires_grad=True)
        common = steer(self.site, basis, self.anchors, zero.view(1, basis.shape[1], -1))
        fidelity = steering_losses.fidelity(self.problem.loss, common, train.targets[None], share)
        stability = steering_losses.stability(self.base, common, share, classifies=train.is_classification)
        measured = measured_gains(self.problem, self.base, common, train.targets)
        objective = self.weighted(torch.stack([fidelity, stability, measured.square().sum(1).mean()]))
        gradient = torch.autograd.grad(objective, zero, create_graph=True)[0]

        def product(vectors: Tensor) -> Tensor:
            return torch.stack([torch.autograd.grad(gradient, zero, v, retain_graph=True)[0] for v in vectors])

        largest = largest_eigenvalue(product, size, dtype=basis.dtype)
        if not largest > 0:
            raise ValueError("the losses are flat in the operators: are all features zero?")
        return largest


def measured_gains(problem: Problem, base: Tensor, steered: Tensor, targets: Tensor) -> Tensor:
    """y = Loss(o) - Loss(o~_k), differentiable: base (b, C), steered (K, b, C), targets (b,) -> (b, K)."""
    value = gain(problem, "loss")
    k, b, _ = steered.shape
    after = value(steered.flatten(0, 1), targets.expand(k, b).reshape(-1)).view(k, b)
    return (after - value(base, targets)).T
