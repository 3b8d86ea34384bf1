"""Rows of tokens: cut to a window, padded, and batched by length."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from tda_core.examples import IGNORED, Examples


def cut_left(
    start: Sequence[int], before: Sequence[int], response: list[int], window: int | None, name: str
) -> tuple[list[int], int]:
    """`start` and the last tokens of `before` that fit the window with the response, and how many were cut.

    Raises ValueError for a response that leaves no token to predict its first one from, with that name.
    """
    if window is None or len(start) + len(before) + len(response) <= window:
        return [*start, *before], 0
    room = window - len(response) - len(start)
    if room < (0 if start else 1):
        raise ValueError(f"{name} has {len(response)} tokens, which do not fit the model's window of {window}")
    return [*start, *before[len(before) - room :]], len(before) - room


def lengths_of(examples: Examples) -> Tensor:
    """Tokens of each sequence up to its last label: (n,) int64 on the CPU."""
    labelled = (examples.targets != IGNORED).cpu()
    return ((torch.arange(labelled.shape[1]) + 1) * labelled).amax(1)


def batches_of(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of similar length, batched so that rows times the longest stay within a budget of tokens (or one row)."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def padded(rows: Sequence[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows of tokens as one tensor (b, T), filled up with token 0, and which are real: (b, T) bool."""
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    places = torch.arange(longest)
    real = places < lengths[:, None] if side == "right" else places >= longest - lengths[:, None]
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    ids[real] = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
    return ids, real


def batches_of_sum(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Consecutive rows, batched so that their lengths add up to at most `most` (or one row)."""
    batches: list[list[int]] = []
    total = 0
    for row, length in enumerate(lengths):
        if batches and total + length <= most:
            batches[-1].append(row)
            total += length
        else:
            batches.append([row])
            total = length
    return batches
