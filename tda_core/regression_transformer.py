"""A transformer that learns linear regression in its context, trained from scratch on tasks that are drawn anew.

Token i holds (x_i, x_{i-1}, y_{i-1}), the previous pair being 0 in the first, and is to predict y_i: an example is
whole in one token, where the interleaved layout x_1, y_1, x_2, ... has to learn first which y belongs to which x.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import joblib
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from tda_core.regression_tasks import Family, Pairs, check_queries, draw_pairs
from tda_core.store import Store
from tda_core.threads import one_thread
from tda_core.transformer import Block

NAME = "regression-transformer"
# Steps between two states that a stopped training goes on from
KEPT_EVERY = 500


@dataclass(frozen=True)
class Settings:
    """Shape and training of a transformer: its length is the most examples that a context holds, plus the query.

    steps: of AdamW, each on `batch` new tasks; the rate rises over a tenth of them and falls to 0 as a cosine.
    Raises ValueError for numbers below 1 (rate: not above 0), and heads that do not divide the width.
    """

    width: int = 64
    blocks: int = 4
    heads: int = 4
    length: int = 12
    steps: int = 4000
    batch: int = 64
    rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "heads", "length", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")
        if not self.rate > 0:
            raise ValueError(f"rate must be above 0, got {self.rate}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width, got {self.heads} heads and width {self.width}")


class RegressionTransformer(nn.Module):
    """Pairs (t, n) -> a prediction of each target from the pairs before it (t, n)."""

    def __init__(self, dimension: int, settings: Settings) -> None:
        super().__init__()
        self.embedding = nn.Linear(2 * dimension + 1, settings.width, bias=False)
        self.position = nn.Parameter(torch.randn(settings.length, settings.width) / settings.width**0.5)
        self.blocks = nn.ModuleList(Block(settings.width, settings.heads) for _ in range(settings.blocks))
        self.head = nn.Linear(settings.width, 1, bias=False)

    def forward(self, pairs: Pairs) -> Tensor:
        """Raises ValueError for another dimension of inputs, and for more pairs than the model's length."""
        self._check(pairs, len(pairs))
        previous = F.pad(torch.cat([pairs.inputs, pairs.targets[:, :, None]], 2)[:, :-1], (0, 0, 1, 0))
        x = self.embedding(torch.cat([pairs.inputs, previous], 2)) + self.position[: len(pairs)]
        return self._output(x, None)

    def after(self, context: Pairs, inputs: Tensor) -> Tensor:
        """Predictions for queries (t, m, d), each alone behind the same context of k pairs: (t, m).

        The context is read once: all queries stand behind it at position k, and see it and themselves only.
        Raises ValueError as `forward` does, and for queries that do not fit the context or are not finite.
        """
        k, m = len(context), inputs.shape[1]
        self._check(context, k + 1)
        check_queries(context, inputs)
        past = torch.cat([context.inputs, context.targets[:, :, None]], 2)
        previous = F.pad(past, (0, 0, 1, 0))  # (t, k + 1, d + 1)
        tokens = torch.cat([context.inputs, previous[:, :k]], 2)
        asked = torch.cat([inputs, previous[:, k:].expand(-1, m, -1)], 2)
        place = torch.arange(k + m).clamp(max=k)
        x = self.embedding(torch.cat([tokens, asked], 1)) + self.position[place]
        allowed = torch.ones(k + m, k + m, dtype=torch.bool).tril() & (torch.arange(k + m) < k)
        return self._output(x, allowed | torch.eye(k + m, dtype=torch.bool))[:, k:]

    def _output(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, allowed=allowed)
        return self.head(F.rms_norm(x, x.shape[-1:]))[:, :, 0]

    def _check(self, pairs: Pairs, length: int) -> None:
        dimension, longest = (self.embedding.in_features - 1) // 2, len(self.position)
        if pairs.inputs.shape[2] != dimension:
            raise ValueError(f"inputs must have {dimension} dimensions, got {pairs.inputs.shape[2]}")
        if length > longest:
            raise ValueError(f"the model reads at most {longest} tokens, got {length}")


def untrained(family: Family, settings: Settings, *, seed: int) -> RegressionTransformer:
    """The model as training finds it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RegressionTransformer(family.dimension, settings).eval()


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model and the CPU seconds that its training took, all stretches of a stopped one together."""

    model: RegressionTransformer
    seconds: float


def trained(family: Family, settings: Settings, store: Store, *, seeds: Sequence[int]) -> list[Trained]:
    """Models of these seeds, trained side by side on tasks of a family, and kept in the store.

    A training that was stopped goes on from its last kept state, and ends with the same parameters bit for bit: each
    step's tasks follow from the seed and the step alone. Raises FloatingPointError where the loss is not finite.
    """
    models = [untrained(family, settings, seed=seed) for seed in seeds]  # in turn: they share torch's random state

    def finished(model: RegressionTransformer, seed: int) -> Trained:
        params = {"family": family, "settings": settings, "seed": seed}
        found = store.load(NAME, params)
        if found is None:
            found = _train(model, family, settings, (store, params))
            store.save(NAME, params, found)
            store.path(f"{NAME}-part", params).unlink(missing_ok=True)
        seconds = float(found.pop("seconds"))
        model.load_state_dict(found)
        return Trained(model, seconds)

    with one_thread():  # more threads would change the sums' last bits, and the matrices are small
        jobs = (joblib.delayed(finished)(model, seed) for model, seed in zip(models, seeds, strict=True))
        return joblib.Parallel(-1, backend="threading")(jobs)


def _train(
    model: RegressionTransformer, family: Family, settings: Settings, keep: tuple[Store, dict]
) -> dict[str, Tensor]:
    store, params = keep
    optimiser = torch.optim.AdamW(model.parameters(), settings.rate, betas=(0.9, 0.98), weight_decay=0.0)
    start, before = _restore(store.load(f"{NAME}-part", params), model, optimiser)
    begun = time.thread_time()
    steps = range(start, settings.steps)
    for step in tqdm(steps, desc=f"training, seed {params['seed']}", initial=start, total=settings.steps, leave=False):
        pairs = draw_pairs(family, settings.batch, settings.length, seed=_seed_of(params["seed"], step))
        loss = (model(pairs) - pairs.targets).square().mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}: lower the rate of {settings.rate}")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * _share_of_rate(step, settings.steps)
        optimiser.step()
        if (step + 1) % KEPT_EVERY == 0:
            so_far = {"step": torch.tensor(step + 1), "seconds": torch.tensor(before + time.thread_time() - begun)}
            store.save(f"{NAME}-part", params, _state(model, optimiser) | so_far)
    return model.state_dict() | {"seconds": torch.tensor(before + time.thread_time() - begun)}


def _share_of_rate(step: int, steps: int) -> float:
    rise = max(1, steps // 10)
    return min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise)))


def _seed_of(seed: int, step: int) -> int:
    """Of the tasks of a step: no two seeds share any before a million steps."""
    return (seed + 1) * 1_000_000 + step


def _state(model: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and the optimiser's tensors by name."""
    found = {f"model/{name}": value for name, value in model.state_dict().items()}
    for i, of_parameter in optimiser.state_dict()["state"].items():
        found |= {f"optimiser/{i}/{name}": value for name, value in of_parameter.items()}
    return found


def _restore(found: dict[str, Tensor] | None, model: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[int, float]:
    """Put a kept state back; the step that comes next and the seconds so far, 0 where there is none."""
    if found is None:
        return 0, 0.0
    model.load_state_dict({name: found[f"model/{name}"] for name in model.state_dict()})
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in found.items():
        if name.startswith("optimiser/"):
            _, i, field = name.split("/")
            state.setdefault(int(i), {})[field] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(found["step"]), float(found["seconds"])
