"""Sources of training data, such as publishers: groups of training examples that are attributed and removed as one.

What a source does to a query is measured by retraining without it (`removal_effects`) and predicted by summed scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.examples import Examples
from tda_core.ground_truth import retrain
from tda_core.recipes import Recipe


@dataclass(frozen=True, eq=False)
class Sources:
    """A training set whose examples each belong to one source.

    groups: (n,) int64, the source of each example, 0 to the highest. names: one a source. Raises ValueError
    for groups of another length or outside 0..n_sources-1, and for a source without examples, naming it.
    """

    examples: Examples
    groups: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        n, top = len(self.examples), len(self.names) - 1
        if self.groups.dtype != torch.int64 or self.groups.shape != (n,):
            got = f"{self.groups.dtype} of shape {tuple(self.groups.shape)}"
            raise ValueError(f"groups must be {n} int64 numbers, got {got}")
        outside = self.groups[(self.groups < 0) | (self.groups > top)]
        if len(outside):
            raise ValueError(f"groups must lie in 0..{top}, one name each, got {int(outside[0])}")
        if int(self.sizes.min()) == 0:
            raise ValueError(f"{self.names[int(self.sizes.argmin())]!r} has no example")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def sizes(self) -> Tensor:
        """Examples of each source: (n_sources,) int64."""
        return torch.bincount(self.groups, minlength=len(self.names))

    @property
    def class_counts(self) -> Tensor:
        """Examples of each class in each source: (n_sources, n_classes) int64. ValueError for a regression."""
        if not self.examples.is_classification:
            raise ValueError("these targets are numbers: there are no classes to count")
        n_classes = int(self.examples.targets.max()) + 1
        counts = torch.bincount(self.groups * n_classes + self.examples.targets, minlength=len(self) * n_classes)
        return counts.view(len(self), n_classes)

    @classmethod
    def split(
        cls, examples: Examples, n_sources: int, *, concentration: float = 0.5, decay: float = 1.0, seed: int
    ) -> "Sources":
        """Deal the examples to sources of falling size and of different class mix.

        The size of source i (from 0) falls as (i + 1)^-decay, at least 1; decay 0 makes all alike. Each source
        draws the classes that it prefers from a Dirichlet distribution: a small concentration gives it few, a
        large one all. Sizes are exact; the mix is as near as room and examples allow.
        Raises ValueError for a regression, n_sources outside 1..n, concentration <= 0 and decay < 0.
        """
        if not examples.is_classification:
            raise ValueError("sources are dealt by class, but these targets are numbers")
        if not 1 <= n_sources <= len(examples):
            raise ValueError(f"n_sources must lie in 1..{len(examples)}, the examples there are, got {n_sources}")
        if not (concentration > 0 and decay >= 0):
            raise ValueError(f"expected concentration > 0 and decay >= 0, got {concentration} and {decay}")
        rng = np.random.default_rng(seed)
        labels, room = examples.targets.numpy(), _power_law(len(examples), n_sources, decay)
        preferred = rng.dirichlet(np.full(labels.max() + 1, concentration), n_sources)
        groups = np.empty(len(labels), dtype=np.int64)
        for i in rng.permutation(len(labels)):
            # a class that nobody with room prefers goes where there is room
            wanted = room * (preferred[:, labels[i]] + 1e-9)
            groups[i] = rng.choice(n_sources, p=wanted / wanted.sum())
            room[groups[i]] -= 1
        return cls(examples, torch.from_numpy(groups), tuple(f"source {i + 1}" for i in range(n_sources)))

    def removed(self, share: float = 1.0, *, seed: int = 0) -> Tensor:
        """Which examples go when (a random share of) each source is removed: (n_sources, n) bool.

        At least one example goes; smaller shares are nested in larger ones. ValueError for a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        drawn = torch.rand(len(self.groups), generator=torch.Generator().manual_seed(seed))
        masks = torch.zeros(len(self), len(self.groups), dtype=torch.bool)
        for source, size in enumerate(self.sizes.tolist()):
            members = (self.groups == source).nonzero()[:, 0]
            first = drawn[members].argsort(stable=True)[: max(1, round(share * size))]
            masks[source, members[first]] = True
        return masks

    def copied(self, source: int) -> "Sources":
        """With one source more, the last, which holds the same examples as `source`."""
        rows = self._members(source)
        inputs = torch.cat([self.examples.inputs, self.examples.inputs[rows]])
        examples = Examples(inputs, torch.cat([self.examples.targets, self.examples.targets[rows]]))
        groups = torch.cat([self.groups, torch.full((len(rows),), len(self))])
        return Sources(examples, groups, (*self.names, f"copy of {self.names[source]}"))

    def mislabelled(self, source: int, share: float = 0.5, *, seed: int = 0) -> "Sources":
        """With a random share of the labels of `source` replaced by another class, up to the highest that occurs.

        Raises ValueError for a share outside (0, 1] and for fewer than two classes.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {share}")
        n_classes = self.class_counts.shape[1]
        if n_classes < 2:
            raise ValueError("there is no wrong label where there is one class")
        generator = torch.Generator().manual_seed(seed)
        rows = self._members(source)
        rows = rows[torch.randperm(len(rows), generator=generator)[: max(1, round(share * len(rows)))]]
        targets = self.examples.targets.clone()
        targets[rows] = (targets[rows] + torch.randint(1, n_classes, (len(rows),), generator=generator)) % n_classes
        return replace(self, examples=Examples(self.examples.inputs, targets))

    def _members(self, source: int) -> Tensor:
        if not 0 <= source < len(self):
            raise ValueError(f"source must lie in 0..{len(self) - 1}, got {source}")
        return (self.groups == source).nonzero()[:, 0]


def removal_effects(
    recipe: Recipe, data: Examples, removed: Tensor, seeds: Sequence[int], queries: Examples, **options
) -> Tensor:
    """Rise of each query's loss when the model is trained without some examples: (k, s, q), positive for proponents.

    removed: (k, n) bool, what is left out in each row, of any size. Both models have the seed's initialisation and
    see the examples that they share in one order. options: as in `ground_truth.retrain`.
    Raises ValueError for removed of another shape and for a row that leaves nothing to train on.
    """
    if removed.dtype != torch.bool or removed.ndim != 2 or removed.shape[1] != len(data) or not len(removed):
        expected = f"(k, {len(data)}) booleans, k >= 1"
        raise ValueError(f"removed must be {expected}, got {removed.dtype} of shape {tuple(removed.shape)}")
    # equal sizes only can be trained together, and these differ
    masks = [torch.ones(len(data), dtype=torch.bool), *~removed]
    bar = tqdm(masks, desc="retraining without", disable=not options.get("progress", True))
    options = options | {"progress": False}
    losses = torch.stack([retrain(recipe, data, mask[None], seeds, queries, **options).losses[0] for mask in bar])
    return losses[1:] - losses[:1]


def _power_law(n: int, n_parts: int, decay: float) -> np.ndarray:
    """n in whole parts that fall as (i + 1)^-decay, each at least 1: (n_parts,) int64."""
    weights = np.arange(1, n_parts + 1) ** -decay
    parts = np.floor(1 + weights / weights.sum() * (n - n_parts)).astype(np.int64)
    parts[: n - parts.sum()] += 1  # fewer are missing than there are parts, and the first may be the largest
    return parts
