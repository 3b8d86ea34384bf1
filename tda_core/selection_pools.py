"""A pool of training pairs of several tasks, some with wrong answers, from which each task's best are to be chosen.

Tasks are the families of an instruction mixture. A ranking by words finds a task's pairs and cannot tell right answers
from wrong ones; a model that was trained on the pool has seen both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_core.fine_tuning import top_rows
from tda_core.instruction_mixture import LabelledPairs
from tda_core.text_pairs import TextPairs
from tda_core.text_tasks import wrong_answers


@dataclass(frozen=True, eq=False)
class TaskPool:
    """pairs: n of them. families: (n,) int64, the task of each. right: (n,) bool, whether its answer is right."""

    pairs: TextPairs
    families: Tensor
    right: Tensor

    def of_task(self, family: int) -> Tensor:
        """Which pairs are of this task, and right: (n,) bool."""
        return (self.families == family) & self.right

    def best(self, family: int, k: int, *, seed: int) -> Tensor:
        """k of them, drawn: what no score can know. (k,) rows; ValueError where there are fewer."""
        rows = self.of_task(family).nonzero().flatten()
        if not 1 <= k <= len(rows):
            raise ValueError(f"k must lie in 1..{len(rows)}, the right pairs of task {family}, got {k}")
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:k]]

    def share_right(self, rows: Tensor, family: int) -> float:
        """How many of these rows are of the task, and right."""
        return float(self.of_task(family)[rows].float().mean())


def task_pool(train: LabelledPairs, wrong: float, *, seed: int) -> TaskPool:
    """The pairs, a share `wrong` of each task with the answer of another pair of the task, another answer than theirs.

    Raises ValueError for a share outside [0, 1), and where a task has but one answer.
    """
    if not 0 <= wrong < 1:
        raise ValueError(f"wrong must lie in [0, 1), got {wrong}")
    prompts, responses = list(train.pairs.prompts), list(train.pairs.responses)
    right = torch.ones(len(train), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for family in train.families.unique().tolist():
        rows = train.of_family(family)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        changed = round(wrong * len(rows))
        if changed:
            others = wrong_answers(train.pairs[rows])
            for row, response in list(zip(rows.tolist(), others.responses, strict=True))[:changed]:
                responses[row], right[row] = response, False
    return TaskPool(TextPairs(tuple(prompts), tuple(responses)), train.families, right)


def mean_precision(pool: TaskPool, scores: Tensor, families: Tensor, k: int) -> float:
    """Share of the k highest that are of the task and right, mean over tasks: what settings are chosen by.

    scores: (q, n) of queries of these tasks, families (q,).
    """
    shares = []
    for family in families.unique().tolist():
        rows = top_rows(scores[families == family].mean(0), k)
        shares.append(pool.share_right(rows, family))
    return sum(shares) / len(shares)


def few_of_each(queries: LabelledPairs, n: int, *, skip: int = 0) -> LabelledPairs:
    """n queries of every task after the first `skip`. Raises ValueError where a task has fewer, naming it."""
    rows = []
    for family in queries.families.unique().tolist():
        own = queries.of_family(family)
        if len(own) < skip + n:
            raise ValueError(f"task {family} has {len(own)} queries, fewer than {skip + n}")
        rows.append(own[skip : skip + n])
    kept = torch.cat(rows)
    return LabelledPairs(queries.pairs[kept], queries.families[kept], queries.questions[kept])


def chosen_rows(scores: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """By method, the k highest of its scores of one task, (q, n) each, mean over the queries."""
    return {name: top_rows(values.mean(0), k) for name, values in scores.items()}


def random_rows(n: int, k: int, draws: Sequence[int]) -> dict[str, Tensor]:
    """k of n rows, drawn anew for each of the draws (seeds), by `random_<place>`."""
    generators = [torch.Generator().manual_seed(draw) for draw in draws]
    return {f"random_{i}": torch.randperm(n, generator=g)[:k] for i, g in enumerate(generators)}
