"""What the language notebooks of in-context probing work on: models, a pool of training examples, and tasks.

Either our own generated corpus with the small models trained on it, or a model and data by name; the notebooks are the
same for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tda_core.data.instructions import load_pairs
from tda_core.icp import Template
from tda_core.language import LanguageModel
from tda_core.small_lm import load_lms
from tda_core.task_corpus import SEPARATOR, SETTINGS, SPLITS, TaskCorpus
from tda_core.text_pairs import TextPairs

# Data by name: the pool and the tasks of its own kind, and tasks of another kind.
NAMED = {"in_domain": "alpaca", "other_data": "sst2_train"}
KINDS = ("family", "base", "format")
POOLS = ("clean", "wrong_answers", "without_task")


@dataclass(frozen=True, eq=False)
class Sizes:
    """How many: training examples in a pool, examples that methods see of a task, tasks of a setting (or in all)."""

    pool: int
    task: int
    targets: int
    held_out: int = 0

    def __post_init__(self) -> None:
        for name in ("pool", "task", "targets"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Material:
    """Models, one pool, and tasks by setting. labels: `KINDS` of each pool example, where they are known.

    task_labels: the same of each task, in the order of `every`.
    """

    models: tuple[LanguageModel, ...]
    template: Template
    pool: TextPairs
    tasks: dict[str, tuple[TextPairs, ...]]
    labels: dict[str, Tensor]
    task_labels: dict[str, tuple[int, ...]]

    @property
    def every(self) -> tuple[TextPairs, ...]:
        """All tasks, setting by setting."""
        return tuple(task for of_setting in self.tasks.values() for task in of_setting)

    @property
    def queries(self) -> TextPairs:
        """All examples of all tasks."""
        return together(self.every)

    def rows(self, setting: str) -> list[int]:
        """Where the tasks of a setting are in `every`."""
        start = 0
        for name, of_setting in self.tasks.items():
            if name == setting:
                return list(range(start, start + len(of_setting)))
            start += len(of_setting)
        raise ValueError(f"unknown setting {setting!r}, expected one of {list(self.tasks)}")


def material(folder: str | Path, model: str, sizes: Sizes) -> Material:
    """For a pool and tasks of `sizes`: our corpus and models from `folder`, or, where `model` is not "", by name."""
    if model:
        return _by_name(model, sizes)
    corpus, models = own_models(folder)
    pool = corpus.pool(sizes.pool, seed=1)
    targets = {s: corpus.targets(s, sizes.targets, sizes.task, split="test", without=pool) for s in SETTINGS}
    every = [target for of_setting in targets.values() for target in of_setting]
    return Material(
        models,
        Template(before="", between=SEPARATOR),
        pool.pairs,
        {setting: tuple(target.examples.pairs for target in found) for setting, found in targets.items()},
        {name: getattr(pool, name) for name in KINDS},
        {name: tuple(getattr(target, name) for target in every) for name in KINDS},
    )


def own_models(folder: str | Path) -> tuple[TaskCorpus, tuple[LanguageModel, ...]]:
    """The corpus and the models that were trained in a folder. Raises FileNotFoundError where there are none."""
    corpus, trained = load_lms(folder)
    return corpus, tuple(LanguageModel(lm.model, lm.tokenizer) for lm in trained)


def _by_name(model: str, sizes: Sizes) -> Material:
    needed = sizes.targets * sizes.task
    own = _different(load_pairs(NAMED["in_domain"]), sizes.pool + needed)
    other = _different(load_pairs(NAMED["other_data"]), needed)

    def dealt(pairs: TextPairs) -> tuple[TextPairs, ...]:
        return tuple(pairs[start : start + sizes.task] for start in range(0, needed, sizes.task))

    tasks = {"in_domain": dealt(own[sizes.pool :]), "other_data": dealt(other)}
    return Material((LanguageModel.load(model),), Template(), own[: sizes.pool], tasks, {}, {})


@dataclass(frozen=True, eq=False)
class Selection:
    """A task whose training examples are to be found in a pool.

    own: (n,) bool, which pool examples are of the task, and right. k: how many are to be chosen. task: what methods see
    of it. held_out: other examples of it.
    """

    setting: str
    name: str
    pool: TextPairs
    own: Tensor
    k: int
    task: TextPairs
    held_out: TextPairs


def selections(folder: str | Path, model: str, sizes: Sizes, *, split: str, kind: str = "clean") -> list[Selection]:
    """Tasks with a pool each, settings in turn; a tenth of a pool is of the task, the rest of all kinds.

    split: "validation" or "test", which share no task. kind, one of `POOLS`: "clean"; "wrong_answers", where half of
    that tenth has another example's answer, so that a choice by likeness takes right and wrong alike, and a
    twentieth is chosen; "without_task", where nothing of the task is in the pool. Raises ValueError for other names.
    """
    for name, value, known in (("split", split, SPLITS), ("kind", kind, POOLS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(known)}")
    if model:
        return _selections_by_name(sizes, split, kind)
    corpus, _ = load_lms(folder)
    n = -(-sizes.targets // len(SETTINGS))
    turns = [(setting, turn) for turn in range(n) for setting in SETTINGS][: sizes.targets]
    return [_of_corpus(corpus, turn, sizes, split, kind) for turn in turns]


def _of_corpus(corpus: TaskCorpus, turn: tuple[str, int], sizes: Sizes, split: str, kind: str) -> Selection:
    """The task of a setting that has this number, with a pool that holds none of the examples it is judged by."""
    setting, number = turn
    (*_, first) = corpus.targets(setting, number + 1, 1, split=split)
    task, seed = (first.family, first.base, first.format), f"{split} {setting} {number}"
    own = corpus.pool(sizes.pool // 10, seed=f"own {seed}", tasks=[task])
    others = [other for other in corpus.tasks("in_domain") if other != task]
    rest = corpus.pool(sizes.pool, seed=f"rest {seed}", tasks=others).pairs
    (*_, target) = corpus.targets(setting, number + 1, sizes.task + sizes.held_out, split=split, without=own)
    name = ", ".join((corpus.families[task[0]], corpus.bases[task[1]], corpus.formats[task[2]]))
    return _posed((setting, name), own.pairs, rest, target.examples.pairs, (sizes, kind))


def _selections_by_name(sizes: Sizes, split: str, kind: str) -> list[Selection]:
    few, n = sizes.pool // 10, sizes.task + sizes.held_out
    each = sizes.pool + n
    skipped = each * sizes.targets if split == "test" else 0
    needed = skipped + each * sizes.targets
    sets = {setting: _different(load_pairs(name), needed) for setting, name in NAMED.items()}
    found = []
    for i in range(sizes.targets):
        setting, other = list(NAMED)[:: 1 if i % 2 == 0 else -1]
        mine, rest = (sets[s][skipped + i * each : skipped + (i + 1) * each] for s in (setting, other))
        found.append(_posed((setting, NAMED[setting]), mine[:few], rest, mine[few : few + n], (sizes, kind)))
    return found


def _posed(
    names: tuple[str, str], own: TextPairs, rest: TextPairs, asked: TextPairs, how: tuple[Sizes, str]
) -> Selection:
    sizes, kind = how
    k, right = len(own), len(own)
    if kind == "wrong_answers":
        k = right = max(1, len(own) // 2)
        own = own[:right] + wrong_answers(own)[right:] if len(own) > right else own
    elif kind == "without_task":
        right = 0
    pool = rest[: sizes.pool] if not right else own + rest[: sizes.pool - len(own)]
    # shuffled, alike for all kinds: equal scores are ranked by row, which must not be where the task's own are
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(int(asked.hash[:8], 16)))
    return Selection(*names, pool[order], order < right, k, asked[: sizes.task], asked[sizes.task :])


def _different(pairs: TextPairs, n: int) -> TextPairs:
    """The first n pairs that differ, so that pool and tasks share none. ValueError where there are fewer."""
    found = list(dict.fromkeys(pairs.pairs))[:n]
    if len(found) < n:
        raise ValueError(f"{n} different pairs are needed, and there are {len(found)}")
    prompts, responses = zip(*found, strict=True)
    return TextPairs(prompts, responses)


def wrong_answers(pairs: TextPairs) -> TextPairs:
    """The same prompts, each with the next response that is another one. ValueError where all responses are equal."""
    if len(set(pairs.responses)) < 2:
        raise ValueError("all responses are equal: there is no wrong one to give")
    n = len(pairs)
    others = [
        next(r for k in range(1, n) if (r := pairs.responses[(i + k) % n]) != pairs.responses[i]) for i in range(n)
    ]
    return TextPairs(pairs.prompts, tuple(others))


def together(sets: Sequence[TextPairs]) -> TextPairs:
    """Sets of pairs as one, in order."""
    prompts, responses = zip(*(pair for pairs in sets for pair in pairs.pairs), strict=True)
    return TextPairs(prompts, responses)
