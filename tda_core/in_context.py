"""What a small language model makes of demonstrations: loss on a task by the number and the kind of its examples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tda_core.small_lm import TrainedLM
from tda_core.task_corpus import SEPARATOR, Target, Task, TaskCorpus
from tda_core.text_pairs import TextPairs

# kind: what its demonstrations share with the target
KINDS = ("same_task", "same_family", "same_base", "unrelated")


def of_kind(corpus: TaskCorpus, target: Target, kind: str) -> list[Task]:
    """The tasks whose examples demonstrate a target in one of `KINDS`.

    same_task: its family, base and format. same_family: its family in another base and format of its
    setting. same_base: another
    family of training in its base. unrelated: another family in another base. Raises ValueError for another kind.
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


def response_losses(lm: TrainedLM, before: Sequence[str], pairs: TextPairs, *, batch_size: int = 256) -> Tensor:
    """-log p(response | context, prompt), summed over the response's tokens, in nats: (n,).

    before: n contexts, each with its separator, or empty texts. Raises ValueError for another number of contexts, and
    for a text that is longer than the model's window.
    """
    if len(before) != len(pairs):
        raise ValueError(f"{len(before)} contexts for {len(pairs)} examples")
    tokenizer, window = lm.tokenizer, lm.tokenizer.model_max_length
    texts = [context + prompt for context, prompt in zip(before, pairs.prompts, strict=True)]
    heads = tokenizer(texts)["input_ids"]
    tails = tokenizer(list(pairs.responses), add_special_tokens=False)["input_ids"]
    longest = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    if longest > window:
        raise ValueError(f"a context with its example has {longest} tokens, more than the model's window of {window}")
    losses = torch.empty(len(pairs))
    for rows in torch.arange(len(pairs)).split(batch_size):
        tokens = torch.full((len(rows), longest), tokenizer.pad_token_id)
        scored = torch.zeros(len(rows), longest, dtype=torch.bool)
        for row, i in enumerate(rows.tolist()):
            end = len(heads[i]) + len(tails[i])
            tokens[row, :end] = torch.tensor(heads[i] + tails[i])
            scored[row, len(heads[i]) : end] = True
        with torch.no_grad():  # padding stands behind every token that is scored, so causal attention never sees it
            logits = lm.model(input_ids=tokens[:, :-1], use_cache=False).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        losses[rows] = (each * scored[:, 1:]).sum(1)
    return losses


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
    return response_losses(lm, contexts(corpus, target, kind, k, seed=seed), target.examples.pairs).mean()
