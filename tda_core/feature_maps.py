"""Feature maps phi(x): small frozen objects that, called with inputs (n, ...), give features (n, f) in their type.

They are functions of the input alone. `tda_core.features` fits them on training inputs.
"""

import abc
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tda_core.kernels import Kernel, kernel_of, kernel_settings
from tda_core.problem import Problem
from tda_core.store import load_tensors, save_tensors

# Examples whose kernel with all landmarks is held at a time
BLOCK = 4096


class FeatureMap(abc.ABC):
    """A fixed map from inputs to features. shape: of one input. name: of the characters that metrics allow."""

    name: str
    shape: tuple[int, ...]
    n_features: int

    def __call__(self, inputs: Tensor) -> Tensor:
        """Features (n, f) of inputs (n, *shape). Raises ValueError for another shape, NaN or infinity."""
        return self.map(checked(inputs, self.shape))

    @abc.abstractmethod
    def map(self, inputs: Tensor) -> Tensor:
        """`__call__` without its checks."""

    @abc.abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain data that `from_state` makes the same map from."""

    def save(self, path: Path | str) -> None:
        """Write the map to one file. Raises what `store.save_tensors` raises."""
        tensors, settings = self.state()
        save_tensors(path, tensors, {"features": settings})


@dataclass(frozen=True, eq=False)
class Affine(FeatureMap):
    """(x - mean) matrix, for mean (d,) and matrix (d, f): flattened inputs, or their principal components."""

    name: str
    shape: tuple[int, ...]
    mean: Tensor
    matrix: Tensor

    @property
    def n_features(self) -> int:
        return self.matrix.shape[1]

    def map(self, inputs: Tensor) -> Tensor:
        return (inputs.flatten(1) - self.mean.to(inputs.dtype)) @ self.matrix.to(inputs.dtype)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        settings = {"kind": "affine", "name": self.name, "shape": list(self.shape)}
        return {"mean": self.mean, "matrix": self.matrix}, settings


@dataclass(frozen=True, eq=False)
class Hidden(FeatureMap):
    """What flows into a layer of a trained model, flattened."""

    problem: Problem
    layer: str

    @property
    def name(self) -> str:
        return "hidden_" + re.sub("[^a-z0-9_.]", "_", self.layer.lower())

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.problem.train.inputs.shape[1:])

    @property
    def n_features(self) -> int:
        return self.map(self.problem.train.inputs[:1]).shape[1]

    def map(self, inputs: Tensor) -> Tensor:
        blocks = [self.problem.features(block, self.layer) for block in inputs.split(BLOCK)]
        return torch.cat(blocks).to(inputs.dtype)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        settings = {"kind": "hidden", "name": self.name, "shape": list(self.shape)}
        return {}, {**settings, "layer": self.layer, "made_for": self.problem.identity}


@dataclass(frozen=True, eq=False)
class KernelFeatures(FeatureMap):
    """kernel(x, landmarks) matrix, for landmarks (m, d) and matrix (m, f)."""

    name: str
    shape: tuple[int, ...]
    kernel: Kernel
    landmarks: Tensor
    matrix: Tensor

    @property
    def n_features(self) -> int:
        return self.matrix.shape[1]

    def map(self, inputs: Tensor) -> Tensor:
        landmarks, matrix = (value.to(inputs.dtype) for value in (self.landmarks, self.matrix))
        return torch.cat([self.kernel(block, landmarks) @ matrix for block in inputs.flatten(1).split(BLOCK)])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        settings = {"kind": "kernel", "name": self.name, "shape": list(self.shape)}
        return {"landmarks": self.landmarks, "matrix": self.matrix}, {
            **settings,
            "kernel": kernel_settings(self.kernel),
        }


@dataclass(frozen=True, eq=False)
class RandomRelu(FeatureMap):
    """The last hidden layer of an untrained network: weights (out, in + 1), the last column for the bias."""

    name: str
    shape: tuple[int, ...]
    weights: tuple[Tensor, ...]

    @property
    def n_features(self) -> int:
        return len(self.weights[-1])

    def map(self, inputs: Tensor) -> Tensor:
        found = inputs.flatten(1)
        for weight in self.weights:
            w = weight.to(found.dtype)
            found = torch.addmm(w[:, -1], found, w[:, :-1].T).relu_()
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        settings = {"kind": "random_relu", "name": self.name, "shape": list(self.shape), "n_layers": len(self.weights)}
        return {f"weight_{i}": weight for i, weight in enumerate(self.weights)}, settings


@dataclass(frozen=True, eq=False)
class Joined(FeatureMap):
    """Several maps side by side, each times its scale, and with `bias` a constant 1 after them."""

    parts: tuple[FeatureMap, ...]
    scales: tuple[float, ...]
    bias: bool

    @property
    def name(self) -> str:
        return "_and_".join(part.name for part in self.parts) + ("_bias" if self.bias else "")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def n_features(self) -> int:
        return sum(part.n_features for part in self.parts) + self.bias

    def map(self, inputs: Tensor) -> Tensor:
        found = [part.map(inputs) * scale for part, scale in zip(self.parts, self.scales, strict=True)]
        return torch.cat([*found, *([inputs.new_ones(len(inputs), 1)] if self.bias else [])], dim=1)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        states = [part.state() for part in self.parts]
        tensors = {f"{i}/{key}": value for i, (held, _) in enumerate(states) for key, value in held.items()}
        settings = {"kind": "joined", "name": self.name, "shape": list(self.shape)}
        return tensors, {
            **settings,
            "parts": [own for _, own in states],
            "scales": list(self.scales),
            "bias": self.bias,
        }


def load_features(path: Path | str, problem: Problem | None = None) -> FeatureMap:
    """Read what `FeatureMap.save` wrote. problem: for features of a hidden layer, the model that they are of.

    Raises ValueError for a file of something else, and for hidden features without their problem, or of another one.
    """
    tensors, metadata = load_tensors(path)
    if "features" not in metadata:
        raise ValueError(f"{path} does not hold a feature map, but {sorted(metadata)}")
    return from_state(tensors, metadata["features"], problem, path)


def from_state(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], problem: Problem | None, path: object
) -> FeatureMap:
    """The map of `FeatureMap.state`, as read from `path`. Raises what `load_features` raises."""
    kind, name, shape = settings["kind"], settings["name"], tuple(settings["shape"])
    if kind == "affine":
        return Affine(name, shape, tensors["mean"], tensors["matrix"])
    if kind == "kernel":
        return KernelFeatures(name, shape, kernel_of(settings["kernel"]), tensors["landmarks"], tensors["matrix"])
    if kind == "random_relu":
        return RandomRelu(name, shape, tuple(tensors[f"weight_{i}"] for i in range(settings["n_layers"])))
    if kind == "hidden":
        if problem is None:
            raise ValueError(f"{path} holds features of layer {settings['layer']!r}: give the problem that they are of")
        problem.check_identity(path, settings["made_for"])
        return Hidden(problem, settings["layer"])
    if kind == "joined":
        parts = []
        for i, part in enumerate(settings["parts"]):
            parts.append(from_state(tensors_below(tensors, f"{i}/"), part, problem, path))
        return Joined(tuple(parts), tuple(settings["scales"]), settings["bias"])
    raise ValueError(f"{path} holds features of an unknown kind {kind!r}")


def tensors_below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def checked(inputs: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        found = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
        raise TypeError(f"inputs must be a floating point tensor, got {found}")
    if inputs.ndim < 2 or not len(inputs) or tuple(inputs.shape[1:]) != shape:
        raise ValueError(f"inputs must be (n, {', '.join(map(str, shape))}), n >= 1, got {tuple(inputs.shape)}")
    if not torch.isfinite(inputs).all():
        bad = int((~torch.isfinite(inputs.flatten(1))).any(1).nonzero()[0])
        raise ValueError(f"inputs must be finite, but input {bad} holds NaN or infinity")
    return inputs
