"""Test items in the training data, and whether scores of training examples for the test items tell which they are.

An auditor has the benchmark and the training data, and does not know what leaked: every item is a query, and a training
example is suspected by its highest score for any of them. Scores of one method are compared across items after each
item's were brought to mean 0 and standard deviation 1; so are those of two methods before they are added.

Items are questions on facts of a world (`synonym_facts`) that the other training pairs do not hold: a model that was
not given them can only guess. A leak is "verbatim", the item itself, or "reworded", the same with the other word for
everything, which shares no word with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

import torch
from torch import Tensor

from tda_core.lm_bench import Subject
from tda_core.lm_judging import Method, scores_by_setting
from tda_core.synonym_facts import SynonymWorld, drawn_form, opposite
from tda_core.text_pairs import TextPairs

KINDS = ("verbatim", "reworded")


@dataclass(frozen=True)
class LeakSpec:
    """n_train: training pairs. n_items: of the benchmark. share: of the training pairs that are leaked items, one each.

    kind: one of `KINDS`. seed: of items (`SynonymWorld.asked_about`), which depend on it alone, leaks, other pairs.
    Raises ValueError for an unknown kind, and for shares that make no leak, or more than there are items.
    """

    n_train: int = 1000
    n_items: int = 100
    share: float = 0.01
    kind: str = "verbatim"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}, expected one of {', '.join(KINDS)}")
        if not 0 < self.share < 1 or not 1 <= self.n_leaks <= min(self.n_items - 1, self.n_train - 1):
            known = f"{self.n_train} pairs and {self.n_items} items, one of which must stay clean"
            raise ValueError(f"share must leak between 1 of {known}, got {self.share}")

    @property
    def n_leaks(self) -> int:
        return round(self.share * self.n_train)


@dataclass(frozen=True, eq=False)
class Leaked:
    """train: n pairs, in no order. items: q of them. leaked: (q,) bool. replicas: (n,) bool, which pairs are leaks.

    synonyms: the items with the other word for their answer, which is right too.
    """

    train: TextPairs
    items: TextPairs
    synonyms: TextPairs
    leaked: Tensor
    replicas: Tensor


def leak(world: SynonymWorld, spec: LeakSpec) -> Leaked:
    """Training pairs on facts of which no item asks, and the leaks. Raises ValueError where the world has too few."""
    rng = Random(f"benchmark {world.spec.seed} {spec.seed}")
    facts = world.asked_about(spec.n_items, seed=spec.seed)
    asked = [(fact, drawn_form(rng)) for fact in facts]
    others = list(product(sorted(set(world.facts) - set(facts)), product((0, 1), repeat=3)))
    n_others = spec.n_train - spec.n_leaks
    if n_others > len(others):
        raise ValueError(f"{n_others} pairs on other facts are asked for, and there are {len(others)}")
    order = rng.sample(range(spec.n_items), spec.n_items)  # a larger share leaks what a smaller one does, and more
    gone = set(order[: spec.n_leaks])
    own = [(asked[i][0], asked[i][1] if spec.kind == "verbatim" else opposite(asked[i][1])) for i in sorted(gone)]
    given = [*rng.sample(others, n_others), *own]
    places = rng.sample(range(spec.n_train), spec.n_train)
    twins = [(fact, (name, says, 1 - value)) for fact, (name, says, value) in asked]
    sets = ([world.question(*pair) for pair in pairs] for pairs in ([given[i] for i in places], asked, twins))
    return Leaked(
        *(TextPairs(*zip(*pairs, strict=True)) for pairs in sets),
        torch.tensor([i in gone for i in range(spec.n_items)]),
        torch.tensor([i >= n_others for i in places]),
    )


def standardised(scores: Tensor) -> Tensor:
    """Scores (q, n) with mean 0 and standard deviation 1 for each query, float64; 0 where all of a query are equal.

    Raises ValueError for another shape and for scores that are not finite.
    """
    if scores.ndim != 2 or not scores.numel() or not torch.isfinite(scores).all():
        raise ValueError(f"scores must be finite numbers (q, n), got {tuple(scores.shape)}")
    centred = scores.double() - scores.double().mean(1, keepdim=True)
    scale = centred.square().mean(1, keepdim=True).sqrt()
    level = 1e-9 * scores.double().abs().amax(1, keepdim=True)  # rounding is no difference
    return torch.where(scale > level, centred / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0)


def suspicion(*scores: Tensor) -> Tensor:
    """How far each training example is suspected, (n,): its highest score for any item, methods (q, n) each summed."""
    if not scores or len({tuple(one.shape) for one in scores}) > 1:
        raise ValueError(f"scores must be one (q, n) or more of one shape, got {[tuple(s.shape) for s in scores]}")
    return sum(map(standardised, scores)).amax(0)


def suspicions(
    subject: Subject, methods: Mapping[str, Method], items: TextPairs, pairs: Sequence[tuple[str, str]] = ()
) -> dict[str, Tensor]:
    """Suspicion of each method with each of its settings, named `<method>@<number of the setting>`: (n,) each.

    pairs: methods that are also combined, with their first settings, named `<first>+<second>`.
    """
    found, first = {}, {}
    for name, method in methods.items():
        for place, (_, scores) in enumerate(scores_by_setting(subject, method, {"items": items}).items()):
            found[f"{name}@{place}"] = suspicion(scores["items"])
            if not place:
                first[name] = scores["items"]
    return found | {f"{one}+{other}": suspicion(first[one], first[other]) for one, other in pairs}
