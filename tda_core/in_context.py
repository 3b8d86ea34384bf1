"""What a small language model makes of demonstrations: loss on a task by the number and the kind of its examples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tda_core.language import LanguageModel
from tda_core.small_lm import TrainedLM
from tda_core.task_corpus import SEPARATOR, Target, Task, TaskCorpus
from tda_core.text_pairs import TextPairs

# kind: what its demonstrations share with the target
KINDS = ("same_task", "same_family", "same_base", "unrelated")


def of_kind(corpus: TaskCorpus, target: Target, kind: str) -> list[Task]:
    """The tasks whose examples demonstrate a target in one of `KINDS`.

    same_task: its family, base and format. same_family: its family in another base and format of its setting.
    same_base: another family of training in its base. unrelated: another family in another base. Raises ValueError
    for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of demonstration {kind!r}, expected one of {', '.join(KINDS)}")
    family, base, form = target.family, target.base, target.format
    if kind == "same_task":
        return [(family, base, form)]
    if kind == "same_family":
        return [(f, b, k) for f, b, k in corpus.tasks(target.setting) if f == family and b != base and k != form]
    return [t for t in corpus.tasks("in_domain") if t[0] != family and (t[1] == base) == (kind == "same_base")]


def contexts(corpus: TaskCorpus, target: Target, kind: str, k: int, *, seed: int) -> list[str]:
    """For each example of a target, k demonstrations of a kind as a training document has them, and a separator.

    No example of the target is among them. Raises ValueError for k < 0 and an unknown kind.
    """
    if k < 0:
        raise ValueError(f"k must be at least 0 demonstrations, got {k}")
    tasks = of_kind(corpus, target, kind)
    own = set(target.examples.pairs.pairs)
    every = [corpus.render(task, q) for task in tasks for q in range(len(corpus.questions[task[0]]))]
    texts = [prompt + response for prompt, response in every if (prompt, response) not in own]
    if len(texts) < k:
        raise ValueError(f"a target has {len(texts)} demonstrations {kind}, fewer than k = {k}")
    source = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(len(texts), generator=source)[:k].tolist() for _ in range(len(target.examples))]
    return ["".join(texts[i] + SEPARATOR for i in chosen) for chosen in rows]


def in_context_curve(
    lm: TrainedLM, corpus: TaskCorpus, targets: Sequence[Target], counts: Sequence[int], *, seed: int
) -> dict[str, Tensor]:
    """Mean loss of each target's responses after so many demonstrations, by kind: (n_targets, n_counts) nats each."""
    return {
        kind: torch.stack(
            [torch.stack([_mean(lm, corpus, target, kind, k, seed) for k in counts]) for target in targets]
        )
        for kind in KINDS
    }


def _mean(lm: TrainedLM, corpus: TaskCorpus, target: Target, kind: str, k: int, seed: int) -> Tensor:
    before, pairs = contexts(corpus, target, kind, k, seed=seed), target.examples.pairs
    prompts = [context + prompt for context, prompt in zip(before, pairs.prompts, strict=True)]
    return LanguageModel(lm.model, lm.tokenizer).losses(TextPairs(prompts, pairs.responses)).mean()
