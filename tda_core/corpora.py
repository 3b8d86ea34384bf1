"""Text to pre-train small language models on, cut into documents and split: training documents and held-out queries.

    load_corpus("help_topics", CorpusSize(n_test=100))
    load_corpus("tinyshakespeare")          # a file below TDA_DATA_DIR, or downloaded
    load_corpus("my/notes.txt")             # any text in UTF-8
    load_corpus("hub:owner/name:column")    # a data set of the Hugging Face hub, its train split

A document is a run of whole words that fits the model's window behind a <bos>. Which text becomes which part is drawn
once by seed: training documents, validation queries (settings are chosen on these alone) and test queries.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from tda_core.data import DATASETS_OF_TEXT, DataUnavailable, files
from tda_core.data.text import help_topics
from tda_core.lm_tokenizers import bpe_tokenizer
from tda_core.text_pairs import TextPairs

HELP_TOPICS, SHAKESPEARE, HUB = "help_topics", "tinyshakespeare", "hub:"


@dataclass(frozen=True)
class CorpusSize:
    """How a text is cut and split. length: tokens of a document with its <bos>, the model's window. vocabulary: of the
    tokenizer. n_train: training documents, None for all that are left. shortest: documents of fewer tokens, such as
    the end of a text, are left out. seed: of the split. Raises ValueError for sizes below 1 (shortest, length: 2)."""

    n_train: int | None = None
    n_validation: int = 100
    n_test: int = 100
    length: int = 64
    vocabulary: int = 2048
    shortest: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_train", "n_validation", "n_test", "length", "shortest"):
            value, least = getattr(self, name), 2 if name in ("length", "shortest") else 1
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.shortest > self.length:
            raise ValueError(f"shortest must be at most length = {self.length}, got {self.shortest}")


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as pairs with an empty prompt, so that a loss is taken on all of their tokens.

    source: where the text comes from, with its version. n_dropped: documents that were too short to be used.
    """

    name: str
    source: str
    tokenizer: PreTrainedTokenizerFast
    train: TextPairs
    validation: TextPairs
    test: TextPairs
    n_dropped: int = 0

    @property
    def hash(self) -> str:
        """16 hex digits over all documents and the tokenizer: what ground truths are keyed by."""
        rules = self.tokenizer.backend_tokenizer.to_str()
        parts = [self.train.hash, self.validation.hash, self.test.hash, rules]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def n_tokens(self) -> int:
        """Tokens of the training documents, each <bos> included."""
        return sum(map(len, self.tokenizer(list(self.train.responses))["input_ids"]))


def load_corpus(name: str, size: CorpusSize | None = None) -> Corpus:
    """The corpus of that name, path or hub address (see the module's first lines).

    The tokenizer is trained on the whole text. Raises ValueError for an unknown name, a file that is not UTF-8 (with
    the byte that is not), no text at all, and fewer documents than are asked for; DataUnavailable where a file or data
    set cannot be had.
    """
    size = size or CorpusSize()
    texts, source = read_texts(name)
    if not any(text.strip() for text in texts):
        raise ValueError(f"{name} holds no text")
    tokenizer = bpe_tokenizer(texts, vocabulary=size.vocabulary, length=size.length)
    documents, n_dropped = cut_documents(texts, tokenizer, size)
    asked = size.n_validation + size.n_test
    n_train = len(documents) - asked if size.n_train is None else size.n_train
    if n_train < 1 or n_train + asked > len(documents):
        raise ValueError(f"{name} has {len(documents)} documents, but {max(n_train, 1) + asked} are asked for")
    order = np.random.default_rng(size.seed).permutation(len(documents))
    ends = np.cumsum([size.n_test, size.n_validation, n_train])
    test, validation, train = np.split(order[: ends[-1]], ends[:-1])
    parts = (documents_of([documents[i] for i in sorted(part)]) for part in (train, validation, test))
    return Corpus(name, source, tokenizer, *parts, n_dropped=n_dropped)


def documents_of(texts: Sequence[str]) -> TextPairs:
    """Whole texts as pairs. Raises ValueError for an empty one, naming it."""
    return TextPairs(("",) * len(texts), tuple(texts))


def read_texts(name: str) -> tuple[list[str], str]:
    """The texts of a corpus, and what they are. Raises as `load_corpus` does."""
    if name == HELP_TOPICS:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return [help_topics()], f"help topics of Python {version}"
    if name.startswith(HUB):
        return _from_hub(name.removeprefix(HUB)), name
    if name in DATASETS_OF_TEXT:
        path = files.fetch(DATASETS_OF_TEXT[name])
    elif Path(name).is_file():
        path = Path(name)
    else:
        known = ", ".join([HELP_TOPICS, *DATASETS_OF_TEXT])
        raise ValueError(f"unknown corpus {name!r}, expected one of {known}, a text file, or {HUB}OWNER/NAME:COLUMN")
    contents = path.read_bytes()
    try:
        return [contents.decode("utf-8")], f"{path.name}, sha256 {hashlib.sha256(contents).hexdigest()[:16]}"
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {contents[error.start]:#x} at {error.start}") from error


def cut_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, size: CorpusSize) -> tuple[list[str], int]:
    """Runs of whole words of each text, of at most `size.length` - 1 tokens, and how many were too short to keep.

    A single word that is longer is cut where its tokens end.
    """
    documents = []
    for text in texts:
        encoded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        documents += _runs(text, encoded, size.length - 1)
    kept = [text for text, n_tokens in documents if text.strip() and n_tokens >= size.shortest - 1]
    return kept, len(documents) - len(kept)


def _runs(text: str, encoded, most: int) -> list[tuple[str, int]]:
    """(run, its tokens) of one encoded text, cut greedily; runs begin where a word does, if any does."""
    words, offsets, runs, start = encoded.word_ids, encoded.offsets, [], 0
    while start < len(words):
        end = min(start + most, len(words))
        if end < len(words):
            end = next((i for i in range(end, start, -1) if words[i] != words[i - 1]), end)
            while end > start + 1 and offsets[end][0] < offsets[end - 1][1]:
                end -= 1  # in the middle of a character of several tokens
        run = text[offsets[start][0] : offsets[end][0] if end < len(words) else len(text)]
        runs.append((run, end - start))
        start = end
    return runs


def _from_hub(address: str) -> list[str]:
    """The texts of `OWNER/NAME:COLUMN`, of the train split. Needs the `datasets` package."""
    repository, _, column = address.partition(":")
    if not column:
        raise ValueError(f"give the column that holds the text, {HUB}OWNER/NAME:COLUMN, got {HUB}{address}")
    try:
        import datasets
    except ImportError as error:
        raise DataUnavailable(f"{HUB}{address} needs the datasets package: install the hub extra") from error
    try:
        rows = datasets.load_dataset(repository, split="train")
    except (OSError, ValueError) as error:  # what the hub's client raises offline, and for unknown names
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataUnavailable(
            f"the data set {repository} is not on this machine and could not be downloaded ({why}). With a network, "
            "run again; without one, copy the hub's cache here and point HF_HOME to it, or give a text file"
        ) from error
    if column not in rows.column_names:
        raise ValueError(f"{repository} has no column {column!r}; it has: {', '.join(rows.column_names)}")
    return [str(text) for text in rows[column]]
