"""In-context linear regression: tasks, and demonstrations for them that are shifted on purpose.

A task is a vector w ~ N(0, I_d); its examples are x ~ N(0, I_d), y = w'x + noise e. A task comes with a background of
such examples (what is in the context already), candidates (possible further demonstrations, which a shift changes) and
queries (examples of the task, on which the loss is taken).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """How tasks are drawn: the dimension d of inputs, and the standard deviation of the noise in targets."""

    dimension: int = 5
    noise: float = 0.5

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise ValueError(f"dimension must be at least 1, got {self.dimension}")
        _check_factor("noise", self.noise)

    @property
    def ridge(self) -> float:
        """The penalty with which ridge regression is the posterior mean: noise^2, as w has variance 1."""
        return self.noise**2


@dataclass(frozen=True)
class Shift:
    """How candidates differ from the task's own examples; the defaults change nothing.

    rotation: angle in degrees between the task's vector and the one, as long, that labels the candidates. scale: factor
    of that vector's length. spread: standard deviations of the inputs along random orthogonal axes run geometrically
    from 1/spread to spread. noise: factor of the noise in targets. Raises ValueError for what is no such number.
    """

    rotation: float = 0.0
    scale: float = 1.0
    spread: float = 1.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rotation) and 0 <= self.rotation <= 180):
            raise ValueError(f"rotation must lie in 0..180 degrees, got {self.rotation}")
        for name in ("scale", "spread", "noise"):
            _check_factor(name, getattr(self, name))
        if self.spread < 1:
            raise ValueError(f"spread must be at least 1, got {self.spread}")


@dataclass(frozen=True)
class Sizes:
    """Numbers of tasks, and of each task's background examples, candidates and queries."""

    tasks: int
    background: int = 0
    candidates: int = 40
    queries: int = 30

    def __post_init__(self) -> None:
        for name, least in (("tasks", 1), ("background", 0), ("candidates", 1), ("queries", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Pairs:
    """n examples of each of t tasks; n may be 0.

    inputs: (t, n, d), targets: (t, n), floating point and finite. Raises ValueError for other shapes, NaN and infinity.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if self.inputs.ndim != 3 or self.targets.shape != self.inputs.shape[:2]:
            shapes = f"{tuple(self.inputs.shape)} and {tuple(self.targets.shape)}"
            raise ValueError(f"inputs and targets must be (t, n, d) and (t, n), got {shapes}")
        for name in ("inputs", "targets"):
            if not torch.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} must be finite, but hold NaN or infinity")

    def __len__(self) -> int:
        """The number of examples of each task."""
        return self.inputs.shape[1]

    def first(self, n: int) -> "Pairs":
        """The first n examples of each task. Raises ValueError where there are fewer."""
        if not 0 <= n <= len(self):
            raise ValueError(f"n must lie in 0..{len(self)}, got {n}")
        return Pairs(self.inputs[:, :n], self.targets[:, :n])

    def to(self, dtype: torch.dtype) -> "Pairs":
        return Pairs(self.inputs.to(dtype), self.targets.to(dtype))


# Predictions (t, m) for the inputs (t, m, d) of queries, given the examples of a context (t, k)
Predictor = Callable[[Pairs, Tensor], Tensor]


def check_queries(context: Pairs, inputs: Tensor) -> None:
    """Raise ValueError where queries' inputs are not (t, m, d) as the context's, or not finite."""
    t, _, d = context.inputs.shape
    if inputs.ndim != 3 or (inputs.shape[0], inputs.shape[2]) != (t, d):
        raise ValueError(f"inputs must be ({t}, m, {d}) to fit the context, got {tuple(inputs.shape)}")
    if not torch.isfinite(inputs).all():
        raise ValueError("inputs must be finite, but hold NaN or infinity")


@dataclass(frozen=True, eq=False)
class Tasks:
    """t tasks: vectors (t, d), background (t, k), candidates (t, n) and queries (t, m).

    Raises ValueError where their numbers of tasks or dimensions differ.
    """

    vectors: Tensor
    background: Pairs
    candidates: Pairs
    queries: Pairs

    def __post_init__(self) -> None:
        t, d = self.vectors.shape
        for name in ("background", "candidates", "queries"):
            shape = getattr(self, name).inputs.shape
            if (shape[0], shape[2]) != (t, d):
                raise ValueError(f"{name} must be of {t} tasks in {d} dimensions, got inputs of shape {tuple(shape)}")

    def with_queries(self, n: int) -> "Tasks":
        """The same tasks with the first n queries of each."""
        return Tasks(self.vectors, self.background, self.candidates, self.queries.first(n))

    def with_shuffled_labels(self, *, seed: int) -> "Tasks":
        """Each task's candidates with their targets permuted among them: a control."""
        source = torch.Generator().manual_seed(seed)
        order = torch.rand(self.candidates.targets.shape, generator=source).argsort(1)
        shuffled = Pairs(self.candidates.inputs, self.candidates.targets.gather(1, order))
        return Tasks(self.vectors, self.background, shuffled, self.queries)


def draw_tasks(family: Family, sizes: Sizes, shift: Shift | None = None, *, seed: int) -> Tasks:
    """Tasks in float32, equal bit for bit for equal arguments.

    Tasks of one seed and size differ by their shift alone, so that shifts can be compared in pairs: vectors, background
    and queries are the same, and the candidates come from the same random numbers.
    """
    shift = shift or Shift()
    source, d = torch.Generator().manual_seed(seed), family.dimension

    def normal(*shape: int) -> Tensor:
        return torch.randn(sizes.tasks, *shape, generator=source)

    vectors = normal(d)
    own = [_labelled(vectors, normal(n, d), family.noise * normal(n)) for n in (sizes.background, sizes.queries)]
    inputs, noise = normal(sizes.candidates, d), family.noise * normal(sizes.candidates)
    labelling = shift.scale * _rotated(vectors, normal(d), shift.rotation)
    axes = torch.linalg.qr(normal(d, d)).Q
    if shift.spread > 1:
        deviations = shift.spread ** torch.linspace(-1, 1, d)
        inputs = inputs @ (deviations[:, None] * axes.mT)
    return Tasks(vectors, own[0], _labelled(labelling, inputs, shift.noise * noise), own[1])


def draw_pairs(family: Family, tasks: int, n: int, *, seed: int) -> Pairs:
    """n examples of each of a number of new tasks, such as a transformer is trained on."""
    source = torch.Generator().manual_seed(seed)
    vectors = torch.randn(tasks, family.dimension, generator=source)
    inputs = torch.randn(tasks, n, family.dimension, generator=source)
    return _labelled(vectors, inputs, family.noise * torch.randn(tasks, n, generator=source))


def _labelled(vectors: Tensor, inputs: Tensor, noise: Tensor) -> Pairs:
    return Pairs(inputs, (inputs * vectors[:, None]).sum(2) + noise)


def _rotated(vectors: Tensor, directions: Tensor, degrees: float) -> Tensor:
    """Vectors turned by an angle towards the part of `directions` that is orthogonal to them; in 1-d, as given."""
    length = vectors.norm(dim=1, keepdim=True)
    along = vectors / length
    if not degrees:
        return vectors
    if vectors.shape[1] == 1:
        raise ValueError(f"a vector in one dimension has no direction to turn to, got rotation {degrees}")
    across = directions - (directions * along).sum(1, keepdim=True) * along
    across = across / across.norm(dim=1, keepdim=True)
    angle = math.radians(degrees)
    return length * (math.cos(angle) * along + math.sin(angle) * across)


def _check_factor(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and >= 0, got {value}")
