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
from tda_core.task_corpus import SEPARATOR, SETTINGS, TaskCorpus, TaskExamples
from tda_core.text_pairs import TextPairs

# Data by name: the pool and the tasks of its own kind, and tasks of another kind.
NAMED = {"in_domain": "alpaca", "other_data": "sst2_train"}


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
    """Models, one pool, and tasks by setting. labels: family and format of each pool example, where they are known.

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
        {"family": pool.family, "format": pool.format},
        {"family": tuple(t.family for t in every), "format": tuple(t.format for t in every)},
    )


def own_models(folder: str | Path) -> tuple[TaskCorpus, tuple[LanguageModel, ...]]:
    """The corpus and the models that were trained in a folder. Raises FileNotFoundError where there are none."""
    corpus, trained = load_lms(folder)
    return corpus, tuple(LanguageModel(lm.model, lm.tokenizer) for lm in trained)


def _by_name(model: str, sizes: Sizes) -> Material:
    needed = sizes.targets * sizes.task
    own = load_pairs(NAMED["in_domain"], n=sizes.pool + needed)
    other = load_pairs(NAMED["other_data"], n=needed)

    def dealt(pairs: TextPairs) -> tuple[TextPairs, ...]:
        return tuple(pairs[start : start + sizes.task] for start in range(0, needed, sizes.task))

    tasks = {"in_domain": dealt(own[sizes.pool :]), "other_data": dealt(other)}
    return Material((LanguageModel.load(model),), Template(), own[: sizes.pool], tasks, {}, {})


@dataclass(frozen=True, eq=False)
class Selection:
    """A task whose training examples are to be found in a pool.

    own: (n,) bool, which pool examples are of the task. task: what methods see of it. held_out: other examples of it.
    """

    setting: str
    name: str
    pool: TextPairs
    own: Tensor
    task: TextPairs
    held_out: TextPairs


def selections(folder: str | Path, model: str, sizes: Sizes, *, split: str) -> list[Selection]:
    """Tasks with a pool each, a tenth of it (at most) of the task, the rest of all kinds; settings take turns.

    split: "validation" or "test", which share no task. Raises ValueError for another split.
    """
    if split not in ("validation", "test"):
        raise ValueError(f"unknown split {split!r}, expected 'validation' or 'test'")
    if model:
        return _selections_by_name(sizes, split)
    corpus, _ = load_lms(folder)
    n = -(-sizes.targets // len(SETTINGS))
    turns = [(setting, turn) for turn in range(n) for setting in SETTINGS][: sizes.targets]
    return [_dealt(corpus, setting, turn, sizes, split) for setting, turn in turns]


def _dealt(corpus: TaskCorpus, setting: str, turn: int, sizes: Sizes, split: str) -> Selection:
    """The task of a setting that is number `turn`, with a pool that holds none of its examples."""
    (*_, first) = corpus.targets(setting, turn + 1, 1, split=split)
    task, few = (first.family, first.base, first.format), sizes.pool // 10
    seed = f"{split} {setting} {turn}"
    own = corpus.pool(few, seed=f"own {seed}", tasks=[task])
    pool = _joined(own, corpus.pool(sizes.pool - few, seed=f"rest {seed}"))
    (*_, target) = corpus.targets(setting, turn + 1, sizes.task + sizes.held_out, split=split, without=pool)
    mine = torch.tensor([kind == task for kind in _kinds(pool)])
    name = ", ".join((corpus.families[task[0]], corpus.bases[task[1]], corpus.formats[task[2]]))
    pairs = target.examples.pairs
    return Selection(setting, name, pool.pairs, mine, pairs[: sizes.task], pairs[sizes.task :])


def _joined(one: TaskExamples, other: TaskExamples) -> TaskExamples:
    labels = (torch.cat([getattr(part, name) for part in (one, other)]) for name in ("family", "base", "format"))
    return TaskExamples(one.pairs + other.pairs, *labels)


def _kinds(examples: TaskExamples) -> list[tuple[int, int, int]]:
    return list(zip(examples.family.tolist(), examples.base.tolist(), examples.format.tolist(), strict=True))


def _selections_by_name(sizes: Sizes, split: str) -> list[Selection]:
    few, n = sizes.pool // 10, sizes.task + sizes.held_out
    each = sizes.pool + n
    skipped = each * sizes.targets if split == "test" else 0
    sets = {setting: load_pairs(name, n=skipped + each * sizes.targets) for setting, name in NAMED.items()}
    found = []
    for i in range(sizes.targets):
        setting, other = list(NAMED)[:: 1 if i % 2 == 0 else -1]
        mine, rest = (sets[s][skipped + i * each : skipped + (i + 1) * each] for s in (setting, other))
        pool = mine[:few] + rest[: sizes.pool - few]
        own = torch.arange(sizes.pool) < few
        asked = mine[few : few + n]
        found.append(Selection(setting, NAMED[setting], pool, own, asked[: sizes.task], asked[sizes.task :]))
    return found


def together(sets: Sequence[TextPairs]) -> TextPairs:
    """Sets of pairs as one, in order."""
    prompts, responses = zip(*(pair for pairs in sets for pair in pairs.pairs), strict=True)
    return TextPairs(prompts, responses)
