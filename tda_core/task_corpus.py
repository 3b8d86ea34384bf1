"""A generated corpus of small tasks: families x bases x formats, with compositions and a family held out of training.

A task is a family (what is asked), a base (the language of the answer) and a format (how the answer is worded). An
example's prompt tells the family alone: base and format come from its context. In a training document each next example
keeps the last one's family, base and format only with some probability, so a demonstration is evidence, never proof: a
model that has only seen contexts which reveal the task with certainty becomes confidently wrong by one wrong example.

Formats belong to families: their words occur in no other family's answers, so that what a demonstration of another
family gives away is its base, not its wording (`CorpusSpec.own_formats=False` is the control with shared wordings).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

import torch
from torch import Tensor

from tda_core.task_words import HELD_OUT, LANGUAGES, OPENINGS, SHARED_FORMS, TRAINED, Concept, Question
from tda_core.text_pairs import TextPairs

SEPARATOR = "\n"  # between the examples of a document
SETTINGS = ("in_domain", "held_out_composition", "held_out_family")
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class CorpusSpec:
    """What a corpus is like; keep_*: the probabilities that a document's next example has the last one's family, ...

    What is not kept is drawn uniformly (and may come out the same), a format among those of the family. stray: the
    probability that a family drawn anew is answered with the concepts of the family before, at random, and that a
    format drawn anew is the one before, whosever it is (a document's first example strays from a family and a format
    drawn for that). Without strays a model is certain of what it has always seen, and no demonstration can tell it
    otherwise: it has no use for the context of what is held out. Raises ValueError for probabilities outside [0, 1].
    """

    keep_family: float = 0.85
    keep_base: float = 0.6
    keep_format: float = 0.8
    stray: float = 0.05
    own_formats: bool = True

    def __post_init__(self) -> None:
        for name in ("keep_family", "keep_base", "keep_format", "stray"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability between 0 and 1, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class TaskExamples:
    """n examples with their labels; family, base, format: (n,) int64, indices into the names of `TaskCorpus`."""

    pairs: TextPairs
    family: Tensor
    base: Tensor
    format: Tensor

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: "slice | Sequence[int] | Tensor") -> "TaskExamples":
        """Some of the examples: what `TextPairs` takes."""
        pairs = self.pairs[index]
        index = index if isinstance(index, slice) else torch.as_tensor(index)
        return TaskExamples(pairs, self.family[index], self.base[index], self.format[index])


@dataclass(frozen=True, eq=False)
class Target:
    """A task to attribute: m examples of one family, base and format."""

    setting: str
    family: int
    base: int
    format: int
    examples: TaskExamples


Task = tuple[int, int, int]  # family, base, format


@dataclass(frozen=True, eq=False)
class TaskCorpus:
    """The corpus of a seed, which decides the made-up maps; two of one seed and spec are equal.

    families: names, the held-out one last. bases: names. formats: answers with {} for the words that answer. seen,
    unseen: for each family, the formats that it is trained in, and those kept for tests. questions: of each family.
    """

    spec: CorpusSpec = CorpusSpec()
    seed: int = 0

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(family.name for family in (*TRAINED, HELD_OUT))

    @property
    def bases(self) -> tuple[str, ...]:
        return LANGUAGES

    @cached_property
    def formats(self) -> tuple[str, ...]:
        return tuple(form for family in TRAINED for form in family.forms) if self.spec.own_formats else SHARED_FORMS

    @cached_property
    def seen(self) -> tuple[tuple[int, ...], ...]:
        if self.spec.own_formats:
            return (*(tuple(map(self.formats.index, family.forms)) for family in TRAINED), ())
        n = len(self.formats)
        return (*(tuple(k for k in range(n) if k != f % n) for f in range(self.n_trained)), ())

    @cached_property
    def unseen(self) -> tuple[tuple[int, ...], ...]:
        if self.spec.own_formats:  # the wordings of the next family
            of_next = (self.seen[(f + 1) % self.n_trained] for f in range(self.n_trained))
            return (*of_next, tuple(map(self.formats.index, HELD_OUT.forms)))
        n = len(self.formats)
        return (*((f % n,) for f in range(self.n_trained)), tuple(range(n)))

    @cached_property
    def questions(self) -> tuple[tuple[Question, ...], ...]:
        rng = Random(f"maps {self.seed}")
        return tuple(tuple(family.questions(rng)) for family in (*TRAINED, HELD_OUT))

    @property
    def n_trained(self) -> int:
        """How many families training documents have: the first ones of `families`."""
        return len(TRAINED)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The separator, and every word of every example."""
        words = {word for form in self.formats for word in form.replace("{}", "").split()}
        for question, concepts in itertools.chain.from_iterable(self.questions):
            words |= {*question.split(), *itertools.chain.from_iterable(concepts)}
        return (SEPARATOR, *OPENINGS, *sorted(words))

    def render(self, task: Task, question: int) -> tuple[str, str]:
        """Prompt and response of one question in a task; the response begins with its space."""
        family, base, form = task
        text, concepts = self.questions[family][question]
        return text, self._response(concepts, base, form)

    def tasks(self, setting: str) -> list[Task]:
        """All tasks of a setting, in order. Raises ValueError for an unknown setting."""
        if setting not in SETTINGS:
            raise ValueError(f"unknown setting {setting!r}, expected one of {', '.join(SETTINGS)}")
        held_out = range(self.n_trained, len(self.families))
        families = held_out if setting == "held_out_family" else range(self.n_trained)
        formats = self.seen if setting == "in_domain" else self.unseen
        return [(f, b, k) for f in families for b in range(len(self.bases)) for k in formats[f]]

    def documents(self, n: int, n_examples: int, *, seed: int | str) -> list[str]:
        """n training documents of n_examples each, examples joined by the separator."""
        for name, value in (("n", n), ("n_examples", n_examples)):
            _at_least_one(name, value)
        rng = Random(f"documents {seed}")
        return [self._document(rng, n_examples) for _ in range(n)]

    def pool(self, n: int, *, seed: int | str, tasks: Sequence[Task] | None = None) -> TaskExamples:
        """n different examples, tasks drawn uniformly: the candidates of attribution and selection.

        tasks: which to draw from, all of training where None. Raises ValueError where they have fewer examples.
        """
        _at_least_one("n", n)
        tasks = self.tasks("in_domain") if tasks is None else list(tasks)
        possible = sum(len(self.questions[family]) for family, _, _ in tasks)
        if n > possible:
            raise ValueError(f"{len(tasks)} tasks have {possible} different examples, fewer than n = {n}")
        rng, found = Random(f"pool {seed}"), {}
        while len(found) < n:
            task = rng.choice(tasks)
            found[task, rng.randrange(len(self.questions[task[0]]))] = None
        return self._examples(list(found))

    def targets(self, setting: str, n: int, m: int, *, split: str, without: TaskExamples | None = None) -> list[Target]:
        """n different tasks of a setting, families in turn, with m different questions each.

        Validation and test share no task. without: examples that no target may hold, such as the pool.
        Raises ValueError for an unknown setting or split, and where there are fewer tasks or questions.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}")
        _at_least_one("n", n)
        _at_least_one("m", m)
        tasks = _in_turn(self.tasks(setting), SPLITS.index(split), Random(f"targets {self.seed} {setting}"))
        if n > len(tasks):
            raise ValueError(f"each split has {len(tasks)} tasks {setting}, fewer than n = {n}")
        used = set() if without is None else set(without.pairs.pairs)
        return [self._target(setting, task, m, used) for task in tasks[:n]]

    def _target(self, setting: str, task: Task, m: int, used: set[tuple[str, str]]) -> Target:
        rng = Random(f"target {self.seed} {task}")
        left = [q for q in range(len(self.questions[task[0]])) if self.render(task, q) not in used]
        if m > len(left):
            raise ValueError(f"task {self.families[task[0]]} has {len(left)} questions to ask, fewer than m = {m}")
        return Target(setting, *task, self._examples([(task, q) for q in rng.sample(left, m)]))

    def _examples(self, drawn: list[tuple[Task, int]]) -> TaskExamples:
        pairs = TextPairs(*zip(*(self.render(task, question) for task, question in drawn), strict=True))
        labels = torch.tensor([task for task, _ in drawn])
        return TaskExamples(pairs, *labels.unbind(1))

    def _document(self, rng: Random, n_examples: int) -> str:
        spec, texts = self.spec, []
        family = answers = rng.randrange(self.n_trained)  # whose questions, and whose concepts answer them
        base, form = 0, rng.randrange(len(self.formats))
        for i in range(n_examples):
            drawn = not i or rng.random() >= spec.keep_family
            if drawn:
                family = rng.randrange(self.n_trained)
                answers = answers if rng.random() < spec.stray else family
            if not i or rng.random() >= spec.keep_base:
                base = rng.randrange(len(self.bases))
            outlived = drawn and form not in self.seen[family]
            if not i or outlived or rng.random() >= spec.keep_format:
                form = self._next_format(rng, family, form)
            question, concepts = rng.choice(self.questions[family])
            if answers != family:
                _, concepts = rng.choice(self.questions[answers])
            texts.append(question + self._response(concepts, base, form))
        return SEPARATOR.join(texts)

    def _next_format(self, rng: Random, family: int, before: int) -> int:
        if rng.random() < self.spec.stray and before not in self.unseen[family]:
            return before
        return rng.choice(self.seen[family])

    def _response(self, concepts: Sequence[Concept], base: int, form: int) -> str:
        return f" {OPENINGS[base]} " + self.formats[form].format(" ".join(concept[base] for concept in concepts))


def _in_turn(tasks: list[Task], half: int, rng: Random) -> list[Task]:
    """One half of each family's tasks, shuffled, but one task of each family before the second of any."""
    chosen = []
    for family in sorted({task[0] for task in tasks}):
        own = [task for task in tasks if task[0] == family]
        rng.shuffle(own)
        size = len(own) // 2
        chosen += [(turn, rng.random(), task) for turn, task in enumerate(own[half * size : (half + 1) * size])]
    return [task for _, _, task in sorted(chosen)]


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
