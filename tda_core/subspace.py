"""A problem restricted to a subspace of its parameters, small enough for a dense curvature matrix.

Each linear layer y = W x + b becomes y = W x + b + B' C A x (A's last column, where it has one, belongs to the bias),
and only the core C (r_out, r_in), zero at the trained parameters, is left to attribute to. With the orthonormal factors
A and B of a `LayerProbe`, the gradients in the cores are the probe's features phi: training examples are then compared
as in LoGra (Choe et al. 2024, arXiv 2405.13954), and responses simulated in it are those of the tangent dynamics whose
parameters may move in the subspace alone.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tda_core.probes import LayerProbe
from tda_core.problem import Problem


class Restricted(nn.Module):
    """A frozen linear layer that moves by B' C A alone: (n, ..., d_in) -> (n, ..., d_out).

    a: (r_in, d_in [+ 1 with a bias]), b: (r_out, d_out); None stands for the identity.
    """

    def __init__(self, layer: nn.Linear, a: Tensor | None, b: Tensor | None) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("a", a)
        self.register_buffer("b", b)
        widths = layer.in_features + (layer.bias is not None), layer.out_features
        r_in, r_out = (width if factor is None else len(factor) for factor, width in zip((a, b), widths, strict=True))
        self.core = nn.Linear(r_in, r_out, bias=False, dtype=layer.weight.dtype)
        nn.init.zeros_(self.core.weight)

    def forward(self, x: Tensor) -> Tensor:
        low = x if self.layer.bias is None else F.pad(x, (0, 1), value=1.0)
        low = low if self.a is None else low @ self.a.T
        moved = self.core(low)
        return self.layer(x) + (moved if self.b is None else moved @ self.b)


def restrict(problem: Problem, probe: LayerProbe) -> Problem:
    """The problem whose parameters are the cores of the probe's layers, in its order: p = probe.n_features.

    Its outputs and losses are those of the problem, its gradients the probe's features. Raises ValueError for a
    probe of another problem.
    """
    problem.check_identity("the probe", probe.problem.identity)
    module = copy.deepcopy(problem.placed)
    for name, (a, b) in probe.factors.items():
        own = Restricted(module.get_submodule(name), a, b)
        if not name:
            module = own
        else:
            module.set_submodule(name, own)
    theta = torch.zeros(probe.n_features, dtype=problem.theta.dtype)
    return Problem(module, theta, problem.loss, problem.train, problem.weight_decay)
