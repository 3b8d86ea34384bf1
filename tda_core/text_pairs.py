"""Prompts with their responses: the one form in which examples of a language task travel."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextPairs:
    """n prompts, each with the response that follows it; a loss is taken on the response alone.

    A prompt may be empty, a response may not. Raises ValueError for an empty set, unequal lengths and an empty
    response (naming it), TypeError for what is not text.
    """

    prompts: tuple[str, ...]
    responses: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("prompts", "responses"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise TypeError(f"{name} must be a sequence of texts, got one text {value[:40]!r}")
            object.__setattr__(self, name, tuple(value))
            for i, text in enumerate(getattr(self, name)):
                if not isinstance(text, str):
                    raise TypeError(f"{name}[{i}] must be text, got {type(text).__name__}")
        if len(self.prompts) != len(self.responses):
            raise ValueError(f"{len(self.prompts)} prompts but {len(self.responses)} responses")
        if not self.prompts:
            raise ValueError("a set of text pairs must not be empty, got 0 pairs")
        empty = [i for i, text in enumerate(self.responses) if not text.strip()]
        if empty:
            raise ValueError(f"responses[{empty[0]}] is empty: there is nothing to take a loss on")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: "slice | Sequence[int] | Tensor") -> "TextPairs":
        """Some of the pairs: a slice, indices or a boolean mask (never a single number)."""
        if isinstance(index, int):
            raise TypeError(f"index pairs with a slice, indices or a mask, not with the single number {index}")
        if not isinstance(index, slice):
            index = torch.as_tensor(index)
            if index.dtype == torch.bool and index.shape != (len(self),):
                raise ValueError(f"a mask over {len(self)} pairs must be ({len(self)},), got {tuple(index.shape)}")
        rows = torch.arange(len(self))[index].tolist()
        return TextPairs(tuple(self.prompts[i] for i in rows), tuple(self.responses[i] for i in rows))

    def __add__(self, other: "TextPairs") -> "TextPairs":
        return TextPairs(self.prompts + other.prompts, self.responses + other.responses)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return tuple(zip(self.prompts, self.responses, strict=True))

    @property
    def lengths(self) -> Tensor:
        """Characters of prompt and response together: (n,) int64."""
        return torch.tensor([len(prompt) + len(response) for prompt, response in self.pairs])

    @property
    def n_duplicates(self) -> int:
        """How many pairs repeat an earlier one."""
        return len(self) - len(Counter(self.pairs))

    def shared_with(self, other: "TextPairs") -> Tensor:
        """(n, m) bool: where a pair here equals a pair there, white space at the ends aside."""
        mine, theirs = ([(p.strip(), r.strip()) for p, r in pairs.pairs] for pairs in (self, other))
        places: dict[tuple[str, str], list[int]] = {}
        for j, pair in enumerate(theirs):
            places.setdefault(pair, []).append(j)
        found = torch.zeros(len(mine), len(theirs), dtype=torch.bool)
        for i, pair in enumerate(mine):
            found[i, places.get(pair, [])] = True
        return found

    @property
    def hash(self) -> str:
        """SHA-256 of the texts: what cached results are keyed by."""
        return hashlib.sha256(json.dumps(self.pairs, ensure_ascii=True).encode()).hexdigest()
