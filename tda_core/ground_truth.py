"""Retraining ground truth: models trained on random subsets, and leave-one-out in two definitions.

Independent blocks of models go through joblib, so `joblib.parallel_config(backend="dask")` moves them
to a cluster. With a `Store`, each finished block is kept: a run that was stopped goes on where it stopped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.examples import Examples
from tda_core.files import source_fingerprint
from tda_core.problem import Problem
from tda_core.recipes import Recipe
from tda_core.store import Store, fingerprint, load_tensors, save_tensors
from tda_core.subsets import leave_one_out_masks
from tda_core.threads import one_thread
from tda_core.training import evaluate, train_many

# Full-batch steps of a warm retraining. Whether it has converged is measured in notebook 01, not assumed.
WARM_STEPS = 400


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Queries' losses under models retrained on subsets.

    masks: (m, n) bool, True where the example was trained on. seeds: (s,). losses: (m, s, q) in nats (or
    half squared units); margins: the same shape in nats, None for regression. `outcomes` is what metrics
    compare with: margins for classifiers, minus losses for regression; higher is better for the query.
    """

    masks: Tensor
    seeds: Tensor
    losses: Tensor
    margins: Tensor | None

    @property
    def outcomes(self) -> Tensor:
        return -self.losses if self.margins is None else self.margins

    def queries(self, index: slice | Tensor) -> "GroundTruth":
        """The same retrainings for some of the queries."""
        margins = None if self.margins is None else self.margins[..., index]
        return replace(self, losses=self.losses[..., index], margins=margins)

    def save(self, path: Path | str) -> None:
        optional = {} if self.margins is None else {"margins": self.margins}
        tensors = {"masks": self.masks, "seeds": self.seeds, "losses": self.losses, **optional}
        save_tensors(Path(path), tensors, {"kind": "GroundTruth"})

    @classmethod
    def load(cls, path: Path | str) -> "GroundTruth":
        tensors, metadata = load_tensors(Path(path))
        if metadata.get("kind") != "GroundTruth":
            raise ValueError(f"{path} does not hold a GroundTruth, but {sorted(metadata)}")
        return cls(tensors["masks"], tensors["seeds"], tensors["losses"], tensors.get("margins"))


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """What removing one example does to queries.

    indices: (k,) examples removed. reference: (s, q) outcomes with all examples; removed: (k, s, q)
    outcomes without one. definition: "scratch" or "warm".
    """

    indices: Tensor
    reference: Tensor
    removed: Tensor
    definition: str

    @property
    def effects(self) -> Tensor:
        """Fall of the outcome when the example is removed: (k, s, q), positive for proponents."""
        return self.reference - self.removed


def retrain(
    recipe: Recipe, data: Examples, masks: Tensor, seeds: Sequence[int], queries: Examples, **options
) -> GroundTruth:
    """Train a model per subset and seed, and record every query's loss and margin.

    masks: (m, n) bool, equally large subsets. options: `store` (a Store that keeps finished blocks),
    `n_jobs` (default: all cores), `progress`. Raises ValueError for bad masks, seeds or examples.
    """
    if masks.dtype != torch.bool:
        raise TypeError(f"masks must be boolean (m, n), got {masks.dtype}")
    if masks.ndim != 2 or masks.shape[1] != len(data) or not len(masks):
        raise ValueError(f"masks must be (m, {len(data)}) with m >= 1, got {tuple(masks.shape)}")
    sizes = masks.sum(1)
    if int(sizes.min()) != int(sizes.max()):  # training sees one block of them at a time
        raise ValueError(f"subsets must be equally large, got sizes {int(sizes.min())} to {int(sizes.max())}")
    _check_seeds(seeds)
    m = len(masks)
    pairs = [(i, seed) for i in range(m) for seed in seeds]
    measured = _measure(recipe, data, masks, pairs, queries, **options)
    shaped = {name: value.view(m, len(seeds), -1) for name, value in measured.items()}
    return GroundTruth(masks, torch.tensor(seeds), shaped["losses"], shaped.get("margins"))


def retrained_right(
    recipe: Recipe, data: Examples, masks: Tensor, seeds: Sequence[int], queries: Examples, **options
) -> Tensor:
    """Whether the models that `retrain` trains classify each query rightly: (m, s, q) bool.

    Arguments and errors as of `retrain`. The lowest of the losses with every label is that of the predicted class.
    """
    n_classes = recipe.layers[-1]
    labels = torch.arange(n_classes).repeat(len(queries))
    asked = Examples(queries.inputs.repeat_interleave(n_classes, 0), labels)
    losses = retrain(recipe, data, masks, seeds, asked, **options).losses
    return losses.view(len(masks), len(seeds), len(queries), n_classes).argmin(-1) == queries.targets


def leave_one_out(
    recipe: Recipe, data: Examples, indices: Tensor, seeds: Sequence[int], queries: Examples, **options
) -> LeaveOneOut:
    """Leave-one-out from scratch, with paired seeds.

    The model without example b has the same initialisation and visits the same batches as the reference
    of its seed; b's loss counts zero. Two such runs differ by the removal and what it sets off, not by
    another shuffle. options: as in `retrain`.
    """
    _check_seeds(seeds)
    indices = torch.as_tensor(indices)
    weights = torch.cat([torch.ones(1, len(data)), leave_one_out_masks(len(data), indices).float()])
    pairs = [(i, seed) for seed in seeds for i in range(len(weights))]
    measured = _measure(recipe, data, weights, pairs, queries, **options)
    return _effects(measured, indices, len(seeds), "scratch")


def leave_one_out_warm(
    recipe: Recipe, problem: Problem, indices: Tensor, queries: Examples, *, steps: int = WARM_STEPS, **options
) -> LeaveOneOut:
    """Leave-one-out by retraining from the trained parameters, full batch, the example's weight zero.

    The reference takes the same steps with all examples: what is left is the removal's effect, not that
    training went on. Momentum .9 and a rate that falls linearly from 1/lambda_max (stable up to 3.8/lambda_max)
    to zero: a constant one would chatter for ever about the kinks of a ReLU network. The recipe gives loss,
    layers and weight decay. Deterministic, so there is one "seed". options: as in `retrain`.
    Raises ValueError where the recipe does not fit the problem.
    """
    if recipe.n_parameters != problem.n_parameters:
        raise ValueError(f"the recipe has {recipe.n_parameters} parameters, the problem {problem.n_parameters}")
    n = len(problem.train)
    largest = problem.largest_curvature()
    if not largest > 0:
        raise ValueError(
            "the curvature at the trained parameters is 0: no step size follows from it (add weight decay)"
        )
    full_batch = replace(
        recipe,
        batch_size=n,
        epochs=steps,
        schedule="linear",
        learning_rate=1 / largest,
        momentum=0.9,
        precision=warm_precision(recipe),
    )
    indices = torch.as_tensor(indices)
    weights = torch.cat([torch.ones(1, n), leave_one_out_masks(n, indices).float()])
    pairs = [(i, 0) for i in range(len(weights))]
    measured = _measure(full_batch, problem.train, weights, pairs, queries, initial=problem.theta, **options)
    return _effects(measured, indices, 1, "warm")


def warm_precision(recipe: Recipe) -> str:
    """Bfloat16 rounding would drown the effect of one example."""
    return "float32" if recipe.precision == "bfloat16" else recipe.precision


# -- blocks of models through joblib ----------------------------------------------------------------


def _measure(
    recipe: Recipe, data: Examples, weights: Tensor, pairs: list[tuple[int, int]], queries: Examples, **options
) -> dict[str, Tensor]:
    """Losses and margins (len(pairs), q) of the models (row of weights, seed), block by block."""
    options = {"store": None, "n_jobs": -1, "progress": True, "initial": None} | options
    unknown = set(options) - {"store", "n_jobs", "progress", "initial"}
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}, expected store, n_jobs or progress")
    size = recipe.models_per_block
    blocks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    store: Store | None = options["store"]
    base = _key(recipe, data, queries, options["initial"]) if store else {}
    keys = [{**base, "weights": fingerprint(weights[[i for i, _ in b]]), "seeds": [s for _, s in b]} for b in blocks]
    found = [store.load("retrain", key) if store else None for key in keys]
    missing = [i for i, block in enumerate(found) if block is None]

    def job(i: int) -> Callable:
        rows, seeds = zip(*blocks[i], strict=True)
        return joblib.delayed(_train_block)(recipe, data, weights[list(rows)], seeds, queries, options["initial"])

    # two blocks are done here before worker processes have started
    parallel = joblib.Parallel(n_jobs=options["n_jobs"] if len(missing) > 2 else 1, return_as="generator")
    results = parallel(job(i) for i in missing)
    with tqdm(total=len(pairs), desc="retraining", unit="model", disable=not options["progress"]) as bar:
        bar.update(sum(len(blocks[i]) for i in range(len(blocks)) if i not in set(missing)))
        for i, result in zip(missing, results, strict=True):
            found[i] = result
            if store:
                store.save("retrain", keys[i], result)
            bar.update(len(blocks[i]))
    return {name: torch.cat([block[name] for block in found]) for name in found[0]}


def _train_block(
    recipe: Recipe, data: Examples, weights: Tensor, seeds: Sequence[int], queries: Examples, initial: Tensor | None
) -> dict[str, Tensor]:
    with one_thread():
        theta = train_many(recipe, data, weights, list(seeds), initial)
        return evaluate(recipe, theta, queries)


def _check_seeds(seeds: Sequence[int]) -> None:
    if not len(seeds) or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be distinct and at least one, got {list(seeds)}")


def _key(recipe: Recipe, data: Examples, queries: Examples, initial: Tensor | None) -> dict:
    return {
        "recipe": recipe,
        "data": data.hash,
        "queries": queries.hash,
        "initial": None if initial is None else fingerprint(initial),
        "code": source_fingerprint(["tda_core.training"]),
    }


def _effects(measured: dict[str, Tensor], indices: Tensor, n_seeds: int, definition: str) -> LeaveOneOut:
    outcomes = measured["margins"] if "margins" in measured else -measured["losses"]
    by_seed = outcomes.view(n_seeds, len(indices) + 1, -1)
    return LeaveOneOut(indices, by_seed[:, 0], by_seed[:, 1:].transpose(0, 1).contiguous(), definition)
