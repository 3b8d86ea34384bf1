"""Text that every Python brings along: the help topics of the language, as windows of words."""

import re
import sys
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN = "<unknown>"


@dataclass(frozen=True, eq=False)
class Windows:
    """tokens: (n, T) int64, each followed by its target (n,) int64. words: the vocabulary, by token.

    source: where the text comes from, with its version.
    """

    tokens: Tensor
    targets: Tensor
    words: tuple[str, ...]
    source: str

    def text(self, i: int) -> str:
        """The words of window i."""
        return " ".join(self.words[token] for token in self.tokens[i])


def help_topics() -> str:
    """The text of Python's own help topics (`pydoc_data.topics`), which differs between versions of Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def word_windows(text: str, n: int, length: int, *, vocabulary: int, source: str | None = None) -> Windows:
    """n windows of `length` words spread evenly over the text, with the word after each as target.

    vocabulary: the most frequent words that have a token of their own, the rest share `UNKNOWN`. source:
    default Python's help topics in the version that runs. Raises ValueError where the text has too few words.
    """
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    for name, value in (("n", n), ("length", length), ("vocabulary", vocabulary)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if len(words) - length < n:
        raise ValueError(f"a text of {len(words)} words has {max(0, len(words) - length)} windows, not {n}")
    known = (UNKNOWN, *(word for word, _ in Counter(words).most_common(vocabulary - 1)))
    token = {word: i for i, word in enumerate(known)}
    stream = torch.tensor([token.get(word, 0) for word in words])
    starts = torch.arange(n) * (len(words) - length) // n
    tokens = stream[starts[:, None] + torch.arange(length)]
    source = source or f"help topics of Python {sys.version_info.major}.{sys.version_info.minor}"
    return Windows(tokens, stream[starts + length], known, source)
