"""A test bench: a data set, a recipe, and ground truths for validation and for test queries.

Notebooks of a paper build it once and load it in the notebooks that follow. Settings are chosen on the
validation queries, through `tune`; what is reported is judged on the test queries.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tda_core.data import Dataset, load_dataset
from tda_core.examples import Examples
from tda_core.files import atomic_write
from tda_core.ground_truth import GroundTruth, retrain
from tda_core.metrics import Ceiling, Estimate, check_sign, lds, lds_ceiling, lds_over_models
from tda_core.problem import Problem
from tda_core.recipes import Recipe
from tda_core.store import Store
from tda_core.subsets import random_subsets
from tda_core.training import train

# Seeds of attributed models start here, those of the ground truth at 0: no model is judged by itself.
MODEL_SEED = 1000


@dataclass(frozen=True, eq=False)
class Tuned:
    """The outcome of a search: the chosen setting, each setting's validation LDS, the method fitted with it.

    tried: all settings of the search, those left out of `validation` because they failed among them.
    """

    setting: Any
    validation: dict[Any, Estimate]
    method: Any
    tried: tuple[Any, ...]

    @property
    def at_edge(self) -> bool:
        """Whether the chosen number is the smallest or the largest tried, so that one beyond may be better.

        A setting of 0 is no edge: no damping lies below it.
        """
        if not all(isinstance(setting, int | float) for setting in self.tried):
            raise TypeError(f"only numbers have an edge, got settings such as {self.tried[0]!r}")
        return self.setting == max(self.tried) or self.setting == min(self.tried) != 0


@dataclass(frozen=True, eq=False)
class Bench:
    """Data, recipe and ground truth. validation, test: `GroundTruth` of the queries in data.validation, data.test."""

    data: Dataset
    recipe: Recipe
    validation: GroundTruth
    test: GroundTruth

    @classmethod
    def build(
        cls, data: Dataset, recipe: Recipe, *, n_subsets: int, n_seeds: int, store: Store | None = None
    ) -> "Bench":
        """Retrain on random half subsets, n_seeds times each, and measure all validation and test queries."""
        masks = random_subsets(len(data.train), n_subsets, 0.5, seed=0)
        inputs = torch.cat([data.validation.inputs, data.test.inputs])
        queries = Examples(inputs, torch.cat([data.validation.targets, data.test.targets]))
        truth = retrain(recipe, data.train, masks, list(range(n_seeds)), queries, store=store)
        n = len(data.validation)
        return cls(data, recipe, truth.queries(slice(0, n)), truth.queries(slice(n, None)))

    def save(self, folder: Path | str) -> None:
        """Write settings and ground truths below `folder`; the data themselves are loaded again by name."""
        sizes = {f"n_{part}": len(getattr(self.data, part)) for part in ("train", "validation", "test")}
        settings = {"dataset": self.data.name, "sizes": sizes, "recipe": asdict(self.recipe)}
        self.validation.save(Path(folder) / "validation.safetensors")
        self.test.save(Path(folder) / "test.safetensors")
        atomic_write(Path(folder) / "bench.json", json.dumps(settings, indent=1))

    @classmethod
    def load(cls, folder: Path | str) -> "Bench":
        """Read what `save` wrote. Raises FileNotFoundError naming the folder where there is nothing."""
        path = Path(folder) / "bench.json"
        if not path.is_file():
            raise FileNotFoundError(f"no bench in {folder}: run the notebook that builds it first")
        settings = json.loads(path.read_text())
        recipe = Recipe(**{**settings["recipe"], "layers": tuple(settings["recipe"]["layers"])})
        data = load_dataset(settings["dataset"], **settings["sizes"])
        truths = [GroundTruth.load(Path(folder) / f"{part}.safetensors") for part in ("validation", "test")]
        return cls(data, recipe, *truths)

    @property
    def ceiling(self) -> Ceiling:
        """Reliability and ceiling of the test queries' ground truth."""
        return lds_ceiling(self.test.outcomes)

    def problems(self, n: int = 1) -> list[Problem]:
        """Models trained on the whole training set with seeds of their own: what methods attribute."""
        return [train(self.recipe, self.data.train, MODEL_SEED + i) for i in range(n)]

    def lds(self, scores: Tensor) -> Estimate:
        """LDS of test scores (n_query, n_train). Raises SignError for a reversed sign."""
        return self.lds_over_models([scores])

    def lds_over_models(self, scores: Sequence[Tensor]) -> Estimate:
        """Mean LDS of test scores (n_query, n_train) of several models. Raises SignError for a reversed sign."""
        found = lds_over_models(scores, self.test.masks, self.test.outcomes)
        if found.high < 0:  # what the check refuses; it computes the LDS once more
            for one in scores:
                check_sign(one, self.test.masks, self.test.outcomes)
        return found

    def tune(self, fit: Callable[[Any], Any], settings: Sequence[Any]) -> Tuned:
        """Fit with every setting (a damping, say) and keep the one with the highest LDS on validation queries.

        A setting with which `fit` or its scores raise ValueError (a singular system) is left out; if all do,
        the last error is raised.
        """
        _expect_some(settings)
        fitted, table, failure = {}, {}, None
        for setting in settings:
            try:
                method = fit(setting)
                scores = method.scores(self.data.validation)
            except ValueError as error:
                failure = error
                continue
            fitted[setting] = method
            table[setting] = self._validation_lds(scores)
        if failure is not None and not table:
            raise failure
        best = _highest(table)
        return Tuned(best, table, fitted[best], tuple(settings))

    def tune_family(self, family: Any, dampings: Sequence[float]) -> Tuned:
        """`tune` for a method whose dampings share work, such as `gradients.InfluenceFamily`.

        family: has scores(queries, dampings) -> {damping: scores} without those that failed, and at(damping).
        """
        _expect_some(dampings)
        scores = family.scores(self.data.validation, dampings)
        table = {damping: self._validation_lds(of_damping) for damping, of_damping in scores.items()}
        best = _highest(table)
        return Tuned(best, table, family.at(best), tuple(dampings))

    def _validation_lds(self, scores: Tensor) -> Estimate:
        return lds(scores, self.validation.masks, self.validation.outcomes)


def _expect_some(settings: Sequence[float]) -> None:
    if not len(settings):
        raise ValueError("tune needs at least one setting, got none")


def _highest(table: dict[Any, Estimate]) -> Any:
    return max(table, key=lambda setting: table[setting].value)
