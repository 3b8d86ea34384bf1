"""What flows through a module's linear layers: their inputs and, backwards, a loss' derivatives in their outputs.

For a linear layer, an example's gradient is a sum over positions of delta x', with x what flows in and delta the
loss' derivative in what flows out: one backward pass to the outputs serves a whole batch of examples, one by one.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tda_core.problem import Problem

# Rounding of so many steps of the type may separate gradients by layers from plain ones, and 1e-3 in any type.
ROUNDING_STEPS = 10

Watch = Callable[[str, Tensor, Tensor], Tensor | None]
Flows = dict[str, tuple[Tensor, Tensor]]
TESTED = 8  # training examples, spread over all, whose gradients by layers are compared with plain ones


def linear_types() -> tuple[type[nn.Module], ...]:
    """`nn.Linear`, and the layer of GPT-2 that holds its weight transposed where transformers is in use."""
    transposed = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return (nn.Linear,) if transposed is None else (nn.Linear, transposed)


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers that are not frozen, by name."""
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, linear_types())}
    return {name: layer for name, layer in found.items() if any(value.requires_grad for value in layer.parameters())}


def own_parameters(layer: nn.Module) -> list[str]:
    """Which of "weight" and "bias" a layer has as parameters of its own."""
    return [kind for kind, _ in layer.named_parameters(recurse=False) if kind in ("weight", "bias")]


def trained(
    module: nn.Module, placed: nn.Module, names: tuple[str, ...], inputs: Tensor
) -> dict[str, nn.Module] | None:
    """The linear layers of `placed` by name, if parameters of these names are theirs and each runs once on inputs.

    placed: a frozen copy of `module`. inputs: (1, ...). None where other parameters are trained as well, or layers
    run more than once, or are not ordinary.
    """
    found = {name: placed.get_submodule(name) for name in linear_layers(module)}
    named = {f"{name}.{kind}".lstrip(".") for name, layer in found.items() for kind in own_parameters(layer)}
    ordinary = [kind.forward for kind in linear_types()]
    if not set(names) <= named or any(type(layer).forward not in ordinary for layer in found.values()):
        return None
    runs: list[tuple[str, int]] = []
    with watched(found, lambda name, _, out: runs.append((name, len(out)))), torch.no_grad():
        placed(inputs)
    return found if sorted(runs) == sorted((name, 1) for name in found) else None


def tested(problem: "Problem") -> dict[str, nn.Module] | None:
    """`trained` layers of a problem, if training examples' gradients by layers are their gradients; else None."""
    rows = torch.linspace(0, len(problem.train) - 1, TESTED).round().long().unique()
    inputs, targets = problem.typed(problem.train.inputs[rows]), problem.train.targets[rows]
    found = trained(problem.module, problem.placed, problem.names, inputs[:1])
    if found is None:
        return None
    # a weight may be used outside of its layer as well, which no hook sees, or examples may depend on each other
    by_layer = gradients(flows(found, lambda: problem.loss(problem.placed(inputs), targets)), problem.offsets, found)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # of fused attention under vmap
        plain = problem.gradients_one_by_one(inputs, targets)
    off, size = (by_layer - plain).norm(dim=1), plain.norm(dim=1)
    tolerance = max(1e-3, ROUNDING_STEPS * torch.finfo(size.dtype).eps)
    return found if bool((off <= tolerance * size + torch.finfo(size.dtype).tiny).all()) else None


@contextmanager
def watched(layers: Mapping[str, nn.Module], watch: Watch) -> Iterator[None]:
    """Call watch(layer name, input, output) -> output, None for the same, at each of the layers of a forward pass.

    Passes of other threads, which may share the module, go unwatched.
    """
    thread = threading.get_ident()

    def hook(name: str) -> Callable:
        return lambda _, args, out: watch(name, args[0], out) if threading.get_ident() == thread else None

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def flows(layers: Mapping[str, nn.Module], losses: Callable[[], Tensor]) -> Flows:
    """By layer: what flows in (n, ..., d_in), and the losses' derivatives in what flows out (n, ..., d_out).

    losses: () -> (n,), runs the module whose layers these are, each once; an example's loss must not depend on the
    other examples.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str, x: Tensor, out: Tensor) -> Tensor:
        out = out if out.requires_grad else out.requires_grad_()
        seen[name] = (x.detach(), out)
        return out.clone()  # what follows may overwrite it

    with torch.enable_grad(), watched(layers, watch):
        total = losses().sum()
        deltas = torch.autograd.grad(total, [out for _, out in seen.values()], materialize_grads=True)
    return {name: (x, delta) for (name, (x, _)), delta in zip(seen.items(), deltas, strict=True)}


def outer(delta: Tensor, x: Tensor) -> Tensor:
    """Sums over positions of delta x', flattened: (n, ..., d_out), (n, ..., d_in) -> (n, d_out d_in)."""
    if x.ndim > 2:
        return (delta.flatten(1, -2).transpose(1, 2) @ x.flatten(1, -2)).flatten(1)
    return (delta[:, :, None] * x[:, None, :]).flatten(1)


def gradients(flowed: Flows, offsets: Mapping[str, slice], layers: Mapping[str, nn.Module]) -> Tensor:
    """Each example's gradient in the layers' weights and biases: (n, p), in the order of the offsets."""
    parts = []
    for parameter in offsets:
        name, _, kind = parameter.rpartition(".")
        x, delta = flowed[name]
        if kind == "weight":
            parts.append(outer(delta, x) if isinstance(layers[name], nn.Linear) else outer(x, delta))
        else:
            parts.append(delta.flatten(1, -2).sum(1) if delta.ndim > 2 else delta)
    return torch.cat(parts, 1)
