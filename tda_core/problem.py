"""A trained model, a per-example loss and its training set, as pure functions of the parameters.

Every attribution method takes a `Problem`. Parameters travel as a vector theta (p,), directions as rows (k, p).
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from tda_core import layers
from tda_core.curvature import curvature_product, drawn_examples, fisher, largest_eigenvalue
from tda_core.examples import Examples, hash_of
from tda_core.models import LOSSES, margin
from tda_core.recording import Function, record

Loss = Callable[[Tensor, Tensor], Tensor]
TARGETS = ("loss", "margin", "output")
# Floats of activations that one vectorised product holds at a time: about what fits the cache (16 MB).
CHUNK_FLOATS = 2**22
# Floats of a sequence model's outputs, one a position and token of the vocabulary, that are held at a time (1 GB).
OUTPUT_FLOATS = 2**28


@dataclass(frozen=True, eq=False)
class Problem:
    """A model at its trained parameters, with the loss and the examples that it was trained on.

    module: evaluated through `torch.func.functional_call`, never changed. theta: (p,) its parameters that require
    a gradient, in order; frozen ones are constants, so the last blocks of a large model can be a problem.
    loss: (outputs (n, C), targets (n,)) -> (n,). train: the training set. weight_decay: the lambda of
    a lambda/2 ||theta||^2 term in the training objective, so that curvature includes it. recordings: see `recorded`.
    Raises ValueError where theta has the wrong length or is not finite, or labels are out of range.
    """

    module: nn.Module
    theta: Tensor
    loss: Loss
    train: Examples
    weight_decay: float = 0.0
    recordings: dict[tuple[int, str], Function] = field(init=False, default_factory=dict, repr=False)
    names: tuple[str, ...] = field(init=False)
    shapes: tuple[torch.Size, ...] = field(init=False)

    def __post_init__(self) -> None:
        named = {name: value for name, value in self.module.named_parameters() if value.requires_grad}
        object.__setattr__(self, "names", tuple(named))
        object.__setattr__(self, "shapes", tuple(value.shape for value in named.values()))
        expected = sum(shape.numel() for shape in self.shapes)
        if self.theta.shape != (expected,):
            raise ValueError(f"theta must be ({expected},) for this module, got {tuple(self.theta.shape)}")
        if not torch.isfinite(self.theta).all():
            raise ValueError("theta must be finite: it holds NaN or infinity (did training diverge?)")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be finite and >= 0, got {self.weight_decay}")
        self.check(self.train)

    @classmethod
    def from_module(
        cls, module: nn.Module, loss: str | Loss, train: Examples, *, weight_decay: float = 0.0
    ) -> "Problem":
        """Any trained `nn.Module` as a Problem; it is copied and put in evaluation mode.

        loss: "cross_entropy", "squared_error", or a function (outputs, targets) -> (n,).
        """
        if isinstance(loss, str):
            if loss not in LOSSES:
                raise ValueError(f"unknown loss {loss!r}, expected one of {sorted(LOSSES)} or a function")
            if train.is_sequence or (loss == "cross_entropy") != train.is_classification:
                raise ValueError(f"loss {loss!r} does not fit targets of type {train.targets.dtype}")
            loss = LOSSES[loss]
        module = copy.deepcopy(module).eval()
        trained = [value.detach().flatten() for value in module.parameters() if value.requires_grad]
        if not trained:
            raise ValueError("no parameter of this module requires a gradient: there is nothing to attribute to")
        theta = torch.cat(trained)
        return cls(module, theta, loss, train, weight_decay)

    def at(self, theta: Tensor) -> "Problem":
        """The same problem at other parameters (another checkpoint or seed)."""
        return replace(self, theta=theta)

    @property
    def n_parameters(self) -> int:
        return len(self.theta)

    @cached_property
    def offsets(self) -> dict[str, slice]:
        """Where each named parameter lies in theta."""
        slices, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            slices[name] = slice(start, start + shape.numel())
            start += shape.numel()
        return slices

    @cached_property
    def identity(self) -> dict[str, str]:
        """Hashes of theta (constants included) and data, and the objective: what files are checked by."""
        constants = [value for name, value in self.module.state_dict().items() if name not in self.offsets]
        objective = f"{getattr(self.loss, '__qualname__', 'loss')}, weight decay {self.weight_decay}"
        return {"theta": hash_of([self.theta, *constants])[:16], "data": self.train.hash[:16], "objective": objective}

    def check_identity(self, path: object, saved: dict[str, str]) -> None:
        """Raise ValueError where a file was made for another model or other data, naming both hashes."""
        for name, found in self.identity.items():
            if saved.get(name) != found:
                raise ValueError(f"{path} was made for {name} {saved.get(name)}, but this problem has {name} {found}")

    def unravel(self, theta: Tensor) -> dict[str, Tensor]:
        return {name: theta[self.offsets[name]].view(s) for name, s in zip(self.names, self.shapes, strict=True)}

    def outputs(self, inputs: Tensor, theta: Tensor | None = None) -> Tensor:
        """Model outputs (logits for a classifier): (n, ...) -> (n, C), in theta's floating-point type."""
        if theta is None:
            return self.placed(self.typed(inputs))
        return functional_call(self.module, self.unravel(theta), (self.typed(inputs),))

    def typed(self, inputs: Tensor) -> Tensor:
        """Inputs in theta's type; tokens stay what they are."""
        return inputs.to(self.theta.dtype) if inputs.is_floating_point() else inputs

    def losses(self, examples: Examples, theta: Tensor | None = None) -> Tensor:
        """Per-example losses (n,)."""
        self.check(examples)
        parts = zip(
            *(of_all.split(self._rows(examples)) for of_all in (examples.inputs, examples.targets)), strict=True
        )
        with torch.no_grad():
            return torch.cat([self.loss(self.outputs(inputs, theta), targets) for inputs, targets in parts])

    def margins(self, examples: Examples, theta: Tensor | None = None) -> Tensor:
        """Per-example margins log(p_y / (1 - p_y)) (n,), for classifiers."""
        self.check(examples)
        with torch.no_grad():
            return margin(self.outputs(examples.inputs, theta), examples.targets)

    def value(self, theta: Tensor, inputs: Tensor, targets: Tensor, target: str = "loss") -> Tensor:
        """The differentiable per-example scalar that methods attribute, (n,).

        target: "loss"; "margin" (classifiers); or "output", the first output (regression).
        """
        _check_target(target)
        return self._scalar(self.outputs(inputs, theta), targets, target)

    def _scalar(self, outputs: Tensor, targets: Tensor, target: str = "loss") -> Tensor:
        if target == "output":
            return outputs[:, 0]
        return self.loss(outputs, targets) if target == "loss" else margin(outputs, targets)

    def features(self, inputs: Tensor, layer: str | None = None) -> Tensor:
        """What flows into the named submodule (default: the last linear layer): (n, f), flattened."""
        layer = self.last_layer if layer is None else layer
        modules = dict(self.placed.named_modules())
        if layer not in modules:
            raise ValueError(f"unknown layer {layer!r}, expected one of {sorted(name for name in modules if name)}")
        seen: list[Tensor] = []
        hook = modules[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(1)))
        try:
            with torch.no_grad():
                self.outputs(inputs)
        finally:
            hook.remove()
        if not seen:
            raise ValueError(f"layer {layer!r} did not run in the forward pass")
        return seen[0]

    @cached_property
    def last_layer(self) -> str:
        """Name of the last linear layer."""
        linear = [name for name, module in self.module.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError("this module has no nn.Linear layer: name a layer")
        return linear[-1]

    def head(self) -> "Problem":
        """The last linear layer as a problem of its own, on the features that flow into it.

        Raises ValueError where that layer's outputs are not the model's outputs.
        """
        return self._head

    @cached_property
    def _head(self) -> "Problem":
        if self.train.is_sequence:
            raise ValueError("the last layer of a sequence model gives an output at each token, not one an example")
        layer = dict(self.module.named_modules())[self.last_layer]
        names = [f"{self.last_layer}.{name}".lstrip(".") for name, v in layer.named_parameters() if v.requires_grad]
        if not names:
            raise ValueError(f"the last linear layer {self.last_layer!r} is frozen: it has nothing to attribute to")
        theta = torch.cat([self.theta[self.offsets[name]] for name in names])
        head = Problem(layer, theta, self.loss, self.featurise(self.train), self.weight_decay)
        with torch.no_grad():
            found, expected = head.outputs(head.train.inputs[:8]), self.outputs(self.train.inputs[:8])
            if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-4):
                raise ValueError(f"the last linear layer {self.last_layer!r} does not give the model's outputs")
        return head

    def featurise(self, examples: Examples) -> Examples:
        """The same examples with the last layer's features as inputs: what `head()` takes."""
        self.check(examples)
        return Examples(self.features(examples.inputs), examples.targets)

    def gradients(self, examples: Examples, target: str = "loss", *, chunk_size: int = 256) -> Tensor:
        """Gradient of each example's loss (or margin) in theta: (n, p).

        One backward pass for a chunk of examples where `flow_layers` hold all parameters, else one for each.
        """
        self.check(examples)
        _check_target(target)
        if play := self.recordings.get((len(examples), target)):
            return play(self.typed(examples.inputs), examples.targets)
        size = min(chunk_size, self._rows(examples))
        parts = zip(examples.inputs.split(size), examples.targets.split(size), strict=True)
        if self.flow_layers is None:
            found = [self.gradients_one_by_one(*part, target) for part in parts]
        else:
            found = [layers.gradients(self.flows(*part, target), self.offsets, self.flow_layers) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def gradients_one_by_one(self, inputs: Tensor, targets: Tensor, target: str = "loss") -> Tensor:
        """`gradients` of any module: (n, p)."""

        def one(x: Tensor, y: Tensor) -> Tensor:
            return grad(lambda theta: self.value(theta, x[None], y[None], target)[0])(self.theta)

        return vmap(one)(inputs, targets).detach()

    def recorded(self, sizes: Sequence[int] = (1,), target: str = "loss") -> "Problem":
        """The same problem, whose gradients for batches of these sizes come from a recording.

        Raises ValueError for modules that have no `flow_layers`, and where `recording.record` does.
        """
        if self.flow_layers is None:
            raise ValueError("only gradients of linear layers can be recorded, and this module has other parameters")

        def function(inputs: Tensor, targets: Tensor) -> Tensor:
            return layers.gradients(self.flows(inputs, targets, target), self.offsets, self.flow_layers)

        train = self.typed(self.train.inputs), self.train.targets
        made = {(size, target): record(function, *train, size) for size in sizes}
        copied = replace(self)
        copied.recordings.update(self.recordings | made)
        return copied

    def __getstate__(self) -> dict:
        return {**self.__dict__, "recordings": {}}  # which cannot be pickled

    def flows(self, inputs: Tensor, targets: Tensor, target: str = "loss") -> layers.Flows:
        """By linear layer: what flows in, and each example's loss' derivatives in what flows out (`layers.flows`)."""
        inputs = self.typed(inputs)
        return layers.flows(self.flow_layers, lambda: self._scalar(self.placed(inputs), targets, target))

    @cached_property
    def placed(self) -> nn.Module:
        """A private copy of the module with theta in place, all of it frozen: evaluated directly, it is faster."""
        module = copy.deepcopy(self.module).eval().requires_grad_(False)
        own = dict(module.named_parameters())
        for name, value in self.unravel(self.theta).items():
            own[name].data = value
        return module

    @cached_property
    def flow_layers(self) -> dict[str, nn.Module] | None:
        """The linear layers of `placed` by name, where all that theta holds are their weights and biases.

        None for other modules. Tested on some training examples: their gradients by layers must be their gradients.
        """
        return layers.tested(self)

    @cached_property
    def linear_layers(self) -> dict[str, nn.Linear] | None:
        """`flow_layers` where theta holds each of them whole and all are `nn.Linear`, else None."""
        found = self.flow_layers or {}
        whole = {f"{name}.{kind}".lstrip(".") for name, layer in found.items() for kind in layers.own_parameters(layer)}
        plain = all(isinstance(layer, nn.Linear) for layer in found.values())
        return found if found and plain and whole == set(self.names) else None

    def derivatives_along(self, examples: Examples, directions: Tensor, target: str = "loss") -> Tensor:
        """Forward-mode derivative of each example's loss along each direction: (k, p) -> (n, k).

        One linearisation serves all directions; no backward pass.
        """
        self.check(examples)
        directions = self._check_directions(directions)

        def value(theta: Tensor) -> Tensor:
            return self.value(theta, examples.inputs, examples.targets, target)

        along = vmap(lambda v: jvp(value, (self.theta,), (v,))[1], chunk_size=self.chunk(len(examples)))
        with torch.no_grad():
            return along(directions).T

    def curvature_product(self, vectors: Tensor, kind: str = "ggn", rows: Tensor | None = None) -> Tensor:
        """(H + weight_decay I) v for every row v: (k, p) -> (k, p); H is a mean over training examples.

        kind: one of `curvature.CURVATURES`. rows: indices of a mini-batch of training examples to average over
        instead of all. Raises ValueError for directions of another shape, and for what the kind cannot do.
        """
        return curvature_product(self, self._check_directions(vectors), kind, rows)

    @cached_property
    def drawn(self) -> Examples:
        """The training examples with labels drawn from the model itself."""
        return drawn_examples(self)

    @cached_property
    def fisher(self) -> Tensor:
        """Mean of g g' over `drawn`: (p, p)."""
        return fisher(self)

    def curvature(self, kind: str = "ggn") -> Tensor:
        """The dense matrix H + weight_decay I (p, p), built column by column once; for small p only."""
        if kind not in self._dense:
            matrix = self.curvature_product(torch.eye(self.n_parameters, dtype=self.theta.dtype), kind)
            self._dense[kind] = (matrix + matrix.T) / 2
        return self._dense[kind]

    @cached_property
    def _dense(self) -> dict[str, Tensor]:
        return {}

    def largest_curvature(self, kind: str = "ggn", *, steps: int = 40, seed: int = 0) -> float:
        """lambda_max of H + weight_decay I by power iteration (a slight underestimate)."""
        product = partial(self.curvature_product, kind=kind)
        return largest_eigenvalue(product, self.n_parameters, steps=steps, seed=seed, dtype=self.theta.dtype)

    def check(self, examples: Examples) -> None:
        """Raise ValueError where the examples do not fit the model: width, task or label range."""
        if not isinstance(examples, Examples):
            raise TypeError(f"expected Examples(inputs, targets), got {type(examples).__name__}")
        examples.expect_like(self.train, self.n_outputs)

    @cached_property
    def n_outputs(self) -> int:
        with torch.no_grad():
            return self.outputs(self.train.inputs[:1]).shape[-1]

    def _rows(self, examples: Examples) -> int:
        """How many examples' outputs are held at a time: all of them, but of a sequence model."""
        if not examples.is_sequence:
            return len(examples)
        return max(1, OUTPUT_FLOATS // (examples.inputs.shape[1] * self.n_outputs))

    def _check_directions(self, directions: Tensor) -> Tensor:
        if directions.ndim != 2 or directions.shape[1] != self.n_parameters or len(directions) == 0:
            raise ValueError(f"directions must be (k, {self.n_parameters}), k >= 1, got {tuple(directions.shape)}")
        if not torch.isfinite(directions).all():
            raise ValueError("directions must be finite: they hold NaN or infinity")
        return directions.to(self.theta.dtype)

    def chunk(self, n_examples: int) -> int:
        """How many directions a vectorised product over so many examples takes at a time."""
        width = sum(shape[0] for shape in self.shapes if len(shape) > 1)
        return max(1, CHUNK_FLOATS // (n_examples * max(width, 1)))


def _check_target(target: str) -> None:
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}, expected one of {TARGETS}")
