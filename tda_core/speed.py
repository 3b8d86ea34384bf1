"""Wall-clock measurements that compare implementations in one run, on one core."""

import importlib.util
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tda_core.examples import Examples
from tda_core.models import LOSSES, mlp
from tda_core.problem import Problem
from tda_core.recipes import Recipe
from tda_core.simulation import ForwardOnly
from tda_core.subsets import random_subsets
from tda_core.threads import one_thread
from tda_core.training import train_loop, train_many


def seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """Shortest wall-clock seconds of a call, of `repeats`: what it takes when nothing else interferes."""
    if repeats < 1:
        raise ValueError(f"repeats must be >= 1, got {repeats}")
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def query_costs(
    methods: Mapping[str, Any], queries: Examples, batches: Sequence[int], *, budget: float = 0.05
) -> dict[str, dict[int, float]]:
    """Milliseconds per query of each method's scores(queries), by batch size, on one thread.

    The first queries are asked, again and again until `budget` seconds have passed (3 times at least, but no longer
    than ten budgets), and the shortest call counts: what it takes when nothing else interferes. Raises ValueError for
    a batch that is larger than the queries, or below 1.
    """
    for batch in batches:
        if not 1 <= batch <= len(queries):
            raise ValueError(f"a batch must lie in 1..{len(queries)}, the queries there are, got {batch}")
    costs: dict[str, dict[int, float]] = {}
    with one_thread():
        for name, method in methods.items():
            costs[name] = {}
            for batch in batches:
                few, times = queries[:batch], []
                while sum(times) < budget or (len(times) < 3 and sum(times) < 10 * budget):
                    times.append(seconds(lambda method=method, few=few: method.scores(few), 1))
                costs[name][batch] = 1e3 * min(times) / batch
    return costs


@dataclass(frozen=True)
class ForwardPass:
    """A plain forward pass behind the door of a method: the least that reading a query can cost."""

    problem: Problem

    def scores(self, queries: Examples) -> Tensor:
        """The losses, in place of scores: (n_query, 1)."""
        return self.problem.losses(queries)[:, None]


@dataclass(frozen=True)
class Readout:
    """A forward-only method with another of its readouts."""

    method: ForwardOnly
    readout: str

    def scores(self, queries: Examples) -> Tensor:
        """Scores (n_query, n_train)."""
        return self.method.scores(queries, self.readout)


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # the high-water mark of this program, where getrusage's begins with what its parent held
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return 1024 * int(lines["VmHWM"].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def retraining_rates(recipe: Recipe, data: Examples, *, n_loop: int = 2) -> dict[str, float]:
    """Models a second on one core, retrained on random halves of the data, by each implementation.

    "ensemble" trains one block of stacked models, "loop" n_loop models one by one, "dattri" as many through
    dattri's retraining helper (left out where dattri is not installed: it is in the `peers` extra).
    """
    m = recipe.models_per_block
    masks = random_subsets(len(data), m, 0.5, seed=0)
    with one_thread():
        rates = {
            "ensemble": m / seconds(lambda: train_many(recipe, data, masks, list(range(m)))),
            "loop": n_loop / seconds(lambda: [train_loop(recipe, data, masks[i], i) for i in range(n_loop)], 2),
        }
        if importlib.util.find_spec("dattri"):
            rates["dattri"] = n_loop / seconds(lambda: _retrain_with_dattri(recipe, data, n_loop), 1)
    return rates


def _retrain_with_dattri(recipe: Recipe, data: Examples, n: int) -> None:
    """n retrainings on random halves by dattri.model_util.retrain.retrain_lds, the same recipe otherwise."""
    from dattri.model_util.retrain import retrain_lds

    def train(loader: torch.utils.data.DataLoader, seed: int | None = None) -> torch.nn.Module:
        torch.manual_seed(seed or 0)
        model = mlp(recipe.layers, recipe.activation)
        decay = recipe.weight_decay
        optimiser = torch.optim.SGD(model.parameters(), recipe.learning_rate, recipe.momentum, weight_decay=decay)
        for _ in range(recipe.epochs):
            for inputs, targets in loader:
                optimiser.zero_grad()
                LOSSES[recipe.loss](model(inputs), targets).mean().backward()
                optimiser.step()
        return model

    dataset = torch.utils.data.TensorDataset(data.inputs, data.targets)
    loader = torch.utils.data.DataLoader(dataset, batch_size=recipe.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        retrain_lds(train, loader, folder, num_subsets=n, subset_ratio=0.5, seed=0)


@dataclass(frozen=True)
class Watched:
    """What a call gave and took. cpu, wall: seconds. megabytes: the most that it held beyond what was held before, None
    where the system does not tell."""

    value: Any
    cpu: float
    wall: float
    megabytes: float | None


def watched(function: Callable[[], Any]) -> Watched:
    """Call the function once and watch time and memory of this process, on one torch thread.

    The memory is a high-water mark that is reset before the call; what a call keeps is part of it. Allocators hold on
    to what was freed, so a call after a larger one may seem to take less than it would by itself.
    """
    reset = Path("/proc/self/clear_refs")
    try:
        reset.write_text("5")  # the peak is what is resident from now on
        before = peak_memory()
    except OSError:  # not Linux, or not allowed
        before = None
    with one_thread():
        cpu, wall = time.process_time(), time.perf_counter()
        value = function()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Watched(value, cpu, wall, None if before is None else (peak_memory() - before) / 1e6)
