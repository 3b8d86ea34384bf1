"""Wrong labels: made with a seed, looked for along a ranking, corrected, and the model trained again.

Each labelling of a training set whose wrong labels are corrected in part is a subset of one pool of examples (see
`Mislabelled.pool`), so that `ground_truth.retrain` trains models of many labellings side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tda_core.examples import Examples
from tda_core.ground_truth import retrained_right
from tda_core.recipes import Recipe


@dataclass(frozen=True, eq=False)
class Mislabelled:
    """A training set of which some labels are wrong.

    clean: n examples with their true labels. labels: (n,) int64, what a model is given instead.
    Raises ValueError for a regression, for labels of another shape or type, and where none is wrong.
    """

    clean: Examples
    labels: Tensor

    def __post_init__(self) -> None:
        _check_classes(self.clean)
        if self.labels.dtype != torch.int64 or self.labels.shape != self.clean.targets.shape:
            got = f"{self.labels.dtype} of shape {tuple(self.labels.shape)}"
            raise ValueError(f"labels must be {len(self.clean)} int64 numbers, got {got}")
        if not self.wrong.any():
            raise ValueError(f"at least one label must be wrong, but all {len(self.clean)} are right")

    @classmethod
    def flip(cls, clean: Examples, share: float, n_classes: int, *, seed: int) -> "Mislabelled":
        """Give round(share * n) examples, drawn at random, another class, each of the others equally likely.

        The draws for two shares with one seed are nested: what is wrong for the smaller is wrong for the larger.
        Raises ValueError for a share that leaves no label, or no right label, for fewer than 2 classes, for
        labels beyond them, and for a regression.
        """
        _check_classes(clean)
        n, highest = len(clean), int(clean.targets.max())
        if n_classes < 2 or n_classes <= highest:
            raise ValueError(f"n_classes must be at least 2 and above the highest label {highest}, got {n_classes}")
        n_wrong = round(share * n) if 0 < share < 1 else 0
        if not 0 < n_wrong < n:
            raise ValueError(f"share must be above 0 and below 1 and flip 1 to {n - 1} of {n} labels, got {share}")
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(n, generator=generator)[:n_wrong]
        shift = torch.randint(1, n_classes, (n,), generator=generator)
        labels = clean.targets.clone()
        labels[chosen] = (labels[chosen] + shift[chosen]) % n_classes
        return cls(clean, labels)

    @property
    def wrong(self) -> Tensor:
        """(n,) bool."""
        return self.labels != self.clean.targets

    @property
    def noisy(self) -> Examples:
        """The examples with the labels that a model is given."""
        return replace(self.clean, targets=self.labels)

    @property
    def pool(self) -> Examples:
        """The n examples as labelled, and after them those with a wrong label once more, with the true one."""
        extra = self.clean[self.wrong]
        inputs = torch.cat([self.clean.inputs, extra.inputs])
        return Examples(inputs, torch.cat([self.labels, extra.targets]))

    def corrected(self, inspected: Tensor) -> Tensor:
        """Members of `pool`, (m, n + n_wrong) bool, n each: wrong labels among the inspected are replaced.

        inspected: (m, n) bool. Raises ValueError for another shape or type.
        """
        if inspected.dtype != torch.bool or inspected.ndim != 2 or inspected.shape[1] != len(self.clean):
            got = f"{inspected.dtype} of shape {tuple(inspected.shape)}"
            raise ValueError(f"inspected must be boolean (m, {len(self.clean)}), got {got}")
        fixed = inspected & self.wrong
        return torch.cat([~fixed, fixed[:, self.wrong]], 1)

    def share_found(self, inspected: Tensor) -> Tensor:
        """Share of the wrong labels that are among the inspected: (m, n) bool -> (m,)."""
        return (inspected & self.wrong).sum(1) / self.wrong.sum()


def inspect_first(suspicion: Tensor, shares: Sequence[float]) -> Tensor:
    """The first share of a ranking, for each of the shares: (len(shares), n) bool.

    suspicion: (n,), the highest are looked at first; equal values go by the lower index. A share of 0 is none,
    1 is all, and others are rounded to whole examples.
    Raises ValueError for values that are not finite numbers (n,), and for a share outside 0 to 1.
    """
    if suspicion.ndim != 1 or not torch.isfinite(suspicion).all():
        raise ValueError(f"suspicion must be finite and of shape (n,), got shape {tuple(suspicion.shape)}")
    outside = [share for share in shares if not 0 <= share <= 1]
    if outside or not len(shares):
        raise ValueError(f"shares must lie in 0 to 1, got {outside[0] if outside else 'none'}")
    place = suspicion.argsort(descending=True, stable=True).argsort()
    return torch.stack([place < round(share * len(suspicion)) for share in shares])


def right_after_fixing(
    recipe: Recipe,
    mislabelled: Mislabelled,
    inspected: Tensor,
    seeds: Sequence[int],
    queries: Examples,
    **options: object,
) -> Tensor:
    """Whether a model is right about a query, once the wrong labels among the inspected are corrected.

    inspected: (m, n) bool; a model is trained for each row and seed. options: as of `ground_truth.retrain`.
    Returns (m, s, q) bool. Raises what `retrain` and `Mislabelled.corrected` raise.
    """
    return retrained_right(recipe, mislabelled.pool, mislabelled.corrected(inspected), seeds, queries, **options)


def _check_classes(examples: Examples) -> None:
    if not examples.is_classification:
        raise ValueError(f"wrong labels are of classes, but these targets are {examples.targets.dtype}")
