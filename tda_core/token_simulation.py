"""Forward-only simulation of a language model's output head, on frozen states, in closed form.

Simulating responses to every training document through all layers takes a curvature product a step and document
(`simulation.simulate`), each with outputs at every token: too much for language models. Of the head alone, a matrix
(V, f) on fixed features phi, the steps need not be taken. With curvature S (x) C, S = diag(share of each token in the
training text) standing for the mean of diag p - p p', C the mean of phi phi', and steps of the response r_i to
removing document i,

    r_i  <-  r_i - rate P [(S (x) C + damping I) r_i - G_i / N],      P = S^-adaptivity,

every token v and eigendirection k of C moves by itself. After T steps its push is multiplied by

    [1 - (1 - rate s_v^-adaptivity h)^T] / h,       h = s_v c_k + damping,

and a query is read out along the response: score(q, i) = <G_q, r_i>. With adaptivity 0 it is plain gradient descent;
with 1 every token learns at its own pace, as under Adam, whose steps are divided by the size of an entry's gradients.

Residuals p - y are those of a state that training starts from. Removing a document from a run that begins at random
weights removes what it taught since then: with `start` "flat" or "frequency" they are of such a beginning, with "model"
of the trained model. No gradient is taken, at build or query time.
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tda_core.examples import Examples
from tda_core.language import LanguageModel
from tda_core.store import load_tensors, save_tensors
from tda_core.token_gradients import HeadGradients, head_of, position_weights, slices_of
from tda_core.token_table import TokenTable, token_table

STARTS = ("flat", "frequency", "model")


@dataclass(frozen=True)
class HeadDynamics:
    """How responses are simulated.

    horizon: steps T, None for the limit. rate: in units of 1 over the largest curvature. adaptivity: from
    0 (gradient descent) to 1. damping: in units of the mean curvature. start: "flat", "frequency" (of the training
    set's tokens) or "model". layer: whose states are the features, as in `token_table`; they are scaled to mean square
    norm 1, and bias is a constant feature beside them. Raises ValueError for values outside their range.
    """

    horizon: int | None = None
    rate: float = 1.0
    adaptivity: float = 1.0
    damping: float = 0.1
    start: str = "model"
    layer: int | float | None = None
    bias: float = 0.1

    def __post_init__(self) -> None:
        if self.horizon is not None and self.horizon < 1:
            raise ValueError(f"horizon must be >= 1 step, or None for the limit, got {self.horizon}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate must lie in (0, 1], past which steps swing to and fro, got {self.rate}")
        if not 0 <= self.adaptivity <= 1:
            raise ValueError(f"adaptivity must lie in [0, 1], got {self.adaptivity}")
        for name in ("damping", "bias"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        if self.start not in STARTS:
            raise ValueError(f"unknown start {self.start!r}, expected one of {STARTS}")

    def filter(self, shares: Tensor, curvatures: Tensor) -> Tensor:
        """What T steps make of a unit push: shares (V,) of the tokens, eigenvalues (f,) of C -> (V, f), float64."""
        shares, curvatures = shares.double(), curvatures.double().clamp_min(0)
        damped = shares[:, None] * curvatures
        tiny = torch.finfo(damped.dtype).tiny
        damped = damped + self.damping * damped.mean() + tiny
        if self.horizon is None:
            return 1 / damped
        steps = shares[:, None] ** -self.adaptivity
        rate = self.rate / float((steps * damped).max())
        # log1p and expm1 keep the digits of directions that have barely moved
        return -torch.expm1(self.horizon * torch.log1p(-(rate * steps * damped).clamp_max(1))) / damped


@dataclass(frozen=True, eq=False)
class SimulatedHead:
    """Responses of a head to removing each training document, kept as what they are made of: (n_train, V, f) of them
    fit no memory, and a query meets them a slice of the vocabulary at a time.

    basis: (f, f) columns, eigenvectors of C. curvatures: (f,). shares: (V,). scale: of the features.
    """

    model: LanguageModel
    train: Examples
    dynamics: HeadDynamics
    basis: Tensor
    curvatures: Tensor
    shares: Tensor
    scale: float

    def scores(self, queries: Examples) -> Tensor:
        """Scores (n_query, n_train): by document, the rise of each query's mean loss when it is removed."""
        goals = self._gradients(token_table(self.model, queries, layer=self.dynamics.layer), "mean")
        found = torch.zeros(len(queries), len(self.train), dtype=torch.float64)
        factors = self.dynamics.filter(self.shares, self.curvatures).float()
        for tokens in slices_of(len(self.shares), len(self.train) * len(self.basis)):
            asked, own = (part.of_tokens(tokens) for part in (goals, self.own))
            found += (asked * factors[tokens]).flatten(1) @ own.flatten(1).T
        return (found / self.own.table.lengths.sum()).float()

    @cached_property
    def own(self) -> HeadGradients:
        return self._gradients(token_table(self.model, self.train, layer=self.dynamics.layer), "sum")

    def _gradients(self, table: TokenTable, reduction: str) -> HeadGradients:
        features = with_bias(table.hidden / self.scale, self.dynamics.bias) @ self.basis
        weights = position_weights(table, reduction)
        if self.dynamics.start == "model":
            return HeadGradients.of(self.model, table, features, weights)
        flat = torch.full_like(self.shares, 1 / len(self.shares))
        return HeadGradients(
            self.model, table, features, weights, flat if self.dynamics.start == "flat" else self.shares
        )

    def save(self, path: Path | str) -> None:
        """Write basis, shares and settings, with the hashes of model and data, to one file."""
        tensors = {"basis": self.basis, "curvatures": self.curvatures, "shares": self.shares}
        settings = {"head_dynamics": asdict(self.dynamics), "scale": self.scale}
        made_for = self.model.made_for(self.train)
        save_tensors(Path(path), tensors, settings | {"made_for": made_for})

    @classmethod
    def load(cls, path: Path | str, model: LanguageModel, train: Examples) -> "SimulatedHead":
        """Read what `save` wrote; ValueError where the model or the data are not the saved ones."""
        tensors, found = load_tensors(Path(path))
        if "head_dynamics" not in found:
            raise ValueError(f"{path} does not hold a simulated head, but {sorted(found)}")
        model.check_made_for(path, found["made_for"], train)
        return cls(model, train, HeadDynamics(**found["head_dynamics"]), scale=found["scale"], **tensors)


def simulate_head(model: LanguageModel, train: Examples, dynamics: HeadDynamics | None = None) -> SimulatedHead:
    """One forward pass over the training documents, and an eigendecomposition of their features' curvature.

    Raises ValueError for a layer that there is not, and a model whose head is not a plain one.
    """
    dynamics = dynamics or HeadDynamics()
    table = token_table(model, train, layer=dynamics.layer)
    scale = float(table.hidden.square().sum(1).mean().sqrt())
    features = with_bias(table.hidden / scale, dynamics.bias).double()
    curvatures, basis = torch.linalg.eigh(features.T @ features / len(features))
    shares = token_shares(table.targets, len(head_of(model)[0]))
    return SimulatedHead(model, train, dynamics, basis.float(), curvatures.float(), shares, scale)


def with_bias(hidden: Tensor, bias: float) -> Tensor:
    """States (N, d) with a constant beside them: (N, d + 1)."""
    return torch.cat([hidden, torch.full_like(hidden[:, :1], bias)], 1)


def token_shares(targets: Tensor, n_tokens: int) -> Tensor:
    """The share of each token among targets (N,), half an occurrence added to all: (V,), float32."""
    counts = torch.bincount(targets, minlength=n_tokens) + 0.5
    return counts / counts.sum()
