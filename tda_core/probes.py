"""Probes: coordinates in which directions in parameter space are cheap to read off a query.

What a query scores along a direction r is g_q' r. A probe has features phi(q) (f,) of the query and coordinates
rho(r) (f,) of the direction, with g_q' r = phi(q)' rho(r) up to what the probe leaves out.

For a linear layer, g_q is a sum over positions of delta x', with x what flows in and delta the loss' derivative in
what flows out. With factors A (r_in x d_in) and B (r_out x d_out) of orthonormal rows, phi = (B delta) (x' A') costs
two small products, and no tangent of the layer's size is ever formed (the factors of K-FAC, Martens & Grosse 2015,
used for projection as in LoGra, Choe et al. 2024).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from tda_core.examples import Examples
from tda_core.layers import Flows, linear_layers, outer, watched
from tda_core.problem import Problem
from tda_core.recording import Function, record

MODES = ("reverse", "forward")
# Floats that one product holds at a time (64 MB).
CHUNK_FLOATS = 2**24
# A factor that would keep more than this share of its dimensions is not worth its product: the layer's own are kept.
FULL_ABOVE = 0.8


@dataclass(frozen=True, eq=False)
class TangentProbe:
    """The parameters themselves as coordinates: exact for any module, read by forward-mode products.

    phi is the gradient (p,), rho the direction itself.
    """

    problem: Problem

    @property
    def n_features(self) -> int:
        return self.problem.n_parameters

    def features(self, examples: Examples) -> Tensor:
        """Gradients (n, p)."""
        return self.problem.gradients(examples)

    def coordinates(self, directions: Tensor) -> Tensor:
        """Directions (k, p) as they are."""
        return directions

    def read(self, queries: Examples, maps: Tensor, mode: str = "forward") -> Tensor:
        """Derivatives of each query's loss along each direction in `maps` (k, p): (n_query, k); no backward pass."""
        if mode != "forward":
            raise ValueError(f"a TangentProbe reads in mode 'forward' only, got {mode!r}")
        return self.problem.derivatives_along(queries, maps)

    def recorded(self, sizes: Sequence[int] = (1,)) -> "TangentProbe":
        """Raises ValueError: forward-mode products cannot be recorded."""
        raise ValueError("only probes of linear layers can be recorded, and this module has other parameters")

    def tensors(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, eq=False)
class LayerProbe:
    """Per-layer factors for modules whose parameters all lie in `nn.Linear` layers, each used once.

    factors: for each layer by name, A (r_in, d_in [+ 1 with a bias]) and B (r_out, d_out) of orthonormal
    rows; None stands for the identity. With identities everywhere the probe is exact. recordings: see `recorded`.
    """

    problem: Problem
    factors: dict[str, tuple[Tensor | None, Tensor | None]]
    recordings: dict[int, Function] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.problem.linear_layers is None:
            raise ValueError("a LayerProbe needs parameters that all lie in nn.Linear layers, each run once")
        if set(self.factors) != set(self.layers):
            raise ValueError(f"factors must be of the layers {sorted(self.layers)}, got {sorted(self.factors)}")

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """The linear layers by name, in the order of their parameters in theta."""
        return self.problem.linear_layers

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each layer's features lie in phi."""
        found, start = {}, 0
        for name, layer in self.layers.items():
            a, b = self.factors[name]
            width = layer.in_features + (layer.bias is not None) if a is None else len(a)
            width *= layer.out_features if b is None else len(b)
            found[name] = slice(start, start + width)
            start += width
        return found

    @property
    def n_features(self) -> int:
        return sum(part.stop - part.start for part in self.slices.values())

    def features(self, examples: Examples, mode: str = "reverse") -> Tensor:
        """phi of each example: (n, f), in the order of `slices`.

        mode: "reverse" takes one backward pass to what flows out of the layers, and forms no parameter
        gradient; "forward" none at all, but a forward-mode product for each row of each B (examples whose layers
        see one position only). Raises ValueError for other modes, and for sequences in forward mode.
        """
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}, expected one of {MODES}")
        self.problem.check(examples)
        if mode == "forward":
            return self._projected(self._forward(examples), of_rows=True)
        if play := self.recordings.get(len(examples)):
            return play(examples.inputs.to(self.problem.theta.dtype), examples.targets)
        return self._projected(self.problem.flows(examples.inputs, examples.targets))

    def _projected(self, flowed: Flows, *, of_rows: bool = False) -> Tensor:
        """phi from what flows; of_rows: the derivatives are along B's rows already."""
        parts = []
        for name, layer in self.layers.items():  # not as they run, which may be in another order
            (x, delta), (a, b) = flowed[name], self.factors[name]
            if b is not None and not of_rows:
                delta = delta @ b.T
            if layer.bias is not None:
                x = x @ a[:, :-1].T + a[:, -1] if a is not None else F.pad(x, (0, 1), value=1.0)
            elif a is not None:
                x = x @ a.T
            parts.append(outer(delta, x))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def recorded(self, sizes: Sequence[int] = (1,)) -> "LayerProbe":
        """The same probe, whose features in mode "reverse" come from a recording for batches of these sizes.

        Raises what `recording.record` raises.
        """

        def function(inputs: Tensor, targets: Tensor) -> Tensor:
            return self._projected(self.problem.flows(inputs, targets))

        train = self.problem.train.inputs.to(self.problem.theta.dtype), self.problem.train.targets
        copied = replace(self)
        copied.recordings.update(self.recordings | {size: record(function, *train, size) for size in sizes})
        return copied

    def __getstate__(self) -> dict:
        return {**self.__dict__, "recordings": {}}  # which cannot be pickled

    def coordinates(self, directions: Tensor) -> Tensor:
        """rho of directions in parameter space: (k, p) -> (k, f); B R A' of each layer."""
        parts = []
        for name, layer in self.layers.items():
            weight = directions[:, self._theta_slice(name, "weight")].unflatten(1, layer.weight.shape)
            if layer.bias is not None:
                weight = torch.cat([weight, directions[:, self._theta_slice(name, "bias"), None]], 2)
            a, b = self.factors[name]
            weight = weight if a is None else weight @ a.T
            weight = weight if b is None else b @ weight
            parts.append(weight.flatten(1))
        return torch.cat(parts, 1)

    def read(self, queries: Examples, maps: Tensor, mode: str = "reverse") -> Tensor:
        """Derivative of each query's loss along the directions whose coordinates are `maps` (k, f): (n_query, k)."""
        return self.features(queries, mode) @ maps.T

    def tensors(self) -> dict[str, Tensor]:
        """The factors by layer and side, identities left out."""
        named = {f"{name}/{side}": t for name, pair in self.factors.items() for side, t in zip("AB", pair, strict=True)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def restore(cls, problem: Problem, tensors: dict[str, Tensor]) -> "LayerProbe":
        """The probe whose `tensors()` these are."""
        names = linear_layers(problem.module)
        return cls(problem, {name: (tensors.get(f"{name}/A"), tensors.get(f"{name}/B")) for name in names})

    def _theta_slice(self, layer: str, parameter: str) -> slice:
        return self.problem.offsets[f"{layer}.{parameter}".lstrip(".")]

    def _forward(self, examples: Examples) -> dict[str, tuple[Tensor, Tensor]]:
        """The same with derivatives along B's rows (n, r_out), by dual numbers: each query once a tangent."""
        rows = {name: self._rows(name) for name in self.layers}
        total = sum(len(b) for b in rows.values())
        chunk = max(1, CHUNK_FLOATS // (total * max(layer.out_features for layer in self.layers.values())))
        parts = [self._forward_chunk(examples[i : i + chunk], rows, total) for i in range(0, len(examples), chunk)]
        return {
            name: tuple(torch.cat(pair) for pair in zip(*(part[name] for part in parts), strict=True)) for name in rows
        }

    def _forward_chunk(
        self, examples: Examples, rows: dict[str, Tensor], total: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        n, seen, spans, start = len(examples), {}, {}, 0
        for name, b in rows.items():
            spans[name] = slice(start, start + len(b))
            start += len(b)

        def watch(name: str, x: Tensor, out: Tensor) -> Tensor:
            if out.ndim != 2:
                raise ValueError(f"forward mode is for one position an example, but layer {name!r} gives {out.shape}")
            primal = forward_ad.unpack_dual(x).primal
            seen[name] = primal.view(n, total, -1)[:, 0]
            tangent = out.new_zeros(n, total, out.shape[1])
            tangent[:, spans[name]] = rows[name]
            return out + forward_ad.make_dual(torch.zeros_like(out), tangent.flatten(0, 1))

        with torch.no_grad(), forward_ad.dual_level(), watched(self.layers, watch):
            inputs = examples.inputs.to(self.problem.theta.dtype).repeat_interleave(total, 0)
            losses = self.problem.loss(self.problem.placed(inputs), examples.targets.repeat_interleave(total))
            along = forward_ad.unpack_dual(losses).tangent.view(n, total)
        return {name: (seen[name], along[:, spans[name]]) for name in rows}

    def _rows(self, name: str) -> Tensor:
        b = self.factors[name][1]
        return torch.eye(self.layers[name].out_features, dtype=self.problem.theta.dtype) if b is None else b


def layer_probe(
    problem: Problem, examples: Examples, energy: float = 0.99, *, max_rank: int | None = None
) -> LayerProbe:
    """A `LayerProbe` whose factors keep this share of the second moments of x and delta over `examples`.

    energy 1 keeps all: identities, an exact probe. max_rank: most rows that a factor has, whatever it then keeps.
    Raises ValueError for energy outside (0, 1] and max_rank < 1.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank must be >= 1, or None, got {max_rank}")
    whole = LayerProbe(problem, {name: (None, None) for name in linear_layers(problem.module)})
    if energy == 1 and max_rank is None:
        return whole
    moments: dict[str, list[Tensor]] = {}
    for start in range(0, len(examples), 256):
        part = examples[start : start + 256]
        for name, (x, delta) in problem.flows(part.inputs, part.targets).items():
            x = F.pad(x, (0, 1), value=1.0) if whole.layers[name].bias is not None else x
            # as long for a confident example as for an uncertain one: each is a query of its own
            size = torch.linalg.vector_norm(delta.flatten(1), dim=1, dtype=torch.float64)  # single squares underflow
            size = size.clamp_min(torch.finfo(delta.dtype).tiny).to(delta.dtype)
            delta = delta / size.view(-1, *[1] * (delta.ndim - 1))
            flat = [part.flatten(0, -2) for part in (x, delta)]
            added = [part.T @ part for part in flat]
            moments[name] = [a + b for a, b in zip(moments[name], added, strict=True)] if name in moments else added
    factors = {name: tuple(_leading(moment, energy, max_rank) for moment in pair) for name, pair in moments.items()}
    return LayerProbe(problem, factors)


def _leading(moment: Tensor, energy: float, max_rank: int | None) -> Tensor | None:
    """Leading eigenvectors as rows (r, d) that keep a share of the trace; None where nearly all are needed."""
    values, vectors = torch.linalg.eigh(moment.double())
    kept = values.flip(0).clamp_min(0).cumsum(0)
    r = min(int((kept < energy * kept[-1]).sum()) + 1, max_rank or len(moment))
    return None if r > FULL_ABOVE * len(moment) else vectors.flip(1)[:, :r].T.contiguous().to(moment.dtype)
