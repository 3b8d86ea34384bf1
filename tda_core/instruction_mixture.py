"""A mixture of tasks to fine-tune a small language model on, and documents to pre-train it on, which hold none of them.

Both come from the task corpus (`task_corpus`): documents are its own, but for those that ask a question of a family
kept for fine-tuning or use one of that family's wordings; pairs are questions of these families with their answers. A
model that is pre-trained on the documents knows the words, the languages and other tasks, and none of the answers, so
that fine-tuning on a subset of the pairs teaches it what the subset holds.

A family answers in one language, in three wordings: most queries' questions stand in training in another wording (the
same answer to be learned), beside questions of its family that share nearly all of its words and none of its answer.

`named_mixture` takes the data sets of STRIDE's instruction tuning instead: some of their pairs, as texts, are
pre-trained on, and others fine-tuned on, so that the model knows tasks like these before it is tuned.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tda_core.corpora import Corpus, documents_of
from tda_core.data import MIXTURES
from tda_core.data.instructions import load_pairs
from tda_core.lm_tokenizers import bpe_tokenizer, word_tokenizer
from tda_core.task_corpus import SEPARATOR, TaskCorpus
from tda_core.text_pairs import TextPairs

BLOCK = 200  # documents made at a time
MOST = 1_000_000  # questions of a family, at most


@dataclass(frozen=True)
class MixtureSpec:
    """What is kept for fine-tuning, and how many; documents longer than the window are left out.

    tuned: families of the task corpus that pre-training lacks; data sets by name have their own. n_documents,
    n_examples: documents to pre-train on, and the examples of each. n_train, n_validation, n_test: pairs. length: most
    tokens, the model's window. seed: of the task corpus's made-up maps and of the split. Raises ValueError for unknown
    or all families, and sizes below 1.
    """

    tuned: tuple[str, ...] = ("totem", "banner", "minus", "reverse")
    n_documents: int = 4000
    n_examples: int = 5
    n_train: int = 400
    n_validation: int = 80
    n_test: int = 80
    length: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        corpus = TaskCorpus()
        known = corpus.families[: corpus.n_trained]
        if not self.tuned or len(set(self.tuned)) < len(self.tuned) or not set(self.tuned) < set(known):
            raise ValueError(
                f"tuned must be different families, some but not all of {', '.join(known)}, got {self.tuned}"
            )
        for name in ("n_documents", "n_examples", "n_train", "n_validation", "n_test", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class LabelledPairs:
    """n pairs. families: (n,) int64, which of `InstructionMixture.families`.

    questions: (n,) int64, equal for pairs that ask the same, whatever the wording of the answer.
    """

    pairs: TextPairs
    families: Tensor
    questions: Tensor

    def __len__(self) -> int:
        return len(self.pairs)

    def of_family(self, family: int) -> Tensor:
        """Rows of one family: (k,) indices, for the scores and outcomes of these queries alone."""
        return (self.families == family).nonzero().flatten()


@dataclass(frozen=True, eq=False)
class InstructionMixture:
    """pretraining: documents without any of the pairs, and where they are generated without their families, split
    9 : 1/2 : 1/2; its tokenizer knows the words of both. families: names."""

    spec: MixtureSpec
    families: tuple[str, ...]
    pretraining: Corpus
    train: LabelledPairs
    validation: LabelledPairs
    test: LabelledPairs


def instruction_mixture(spec: MixtureSpec | None = None) -> InstructionMixture:
    """The mixture of a spec; two of one spec are equal. Raises ValueError where there are too few pairs."""
    spec = spec or MixtureSpec()
    corpus = TaskCorpus(seed=spec.seed)
    kept = [corpus.families.index(name) for name in spec.tuned]
    rows = [
        (place, question, corpus.render((family, place % len(corpus.bases), form), question))
        for place, family in enumerate(kept)
        for question in range(len(corpus.questions[family]))
        for form in corpus.seen[family]
    ]
    asked = spec.n_train + spec.n_validation + spec.n_test
    if asked > len(rows):
        raise ValueError(f"{asked} pairs are asked for, and these families have {len(rows)}")
    Random(f"mixture {spec.seed}").shuffle(rows)
    ends = (spec.n_train, spec.n_train + spec.n_validation, asked)
    parts = (_labelled(rows[start:end]) for start, end in zip((0, *ends), ends, strict=False))
    return InstructionMixture(spec, spec.tuned, _pretraining(corpus, spec, kept), *parts)


def named_mixture(name: str, spec: MixtureSpec, *, vocabulary: int = 2048) -> InstructionMixture:
    """The mixture of a data set by name, one of `tda_core.data.MIXTURES`, see `mixture_of`.

    Raises ValueError for an unknown one, and as `mixture_of` does; DataUnavailable, which says what to put where, for
    files that cannot be had.
    """
    if name not in MIXTURES:
        raise ValueError(f"unknown data set {name!r}, expected one of {', '.join(MIXTURES)}")
    return mixture_of(
        {part.partition(":")[2] or part: load_pairs(part) for part in MIXTURES[name]}, spec, vocabulary=vocabulary
    )


def mixture_of(families: Mapping[str, TextPairs], spec: MixtureSpec, *, vocabulary: int = 2048) -> InstructionMixture:
    """A mixture of one's own pairs, by family: prompt and response of some are documents to pre-train on.

    vocabulary: tokens of the byte-level pair encoding, which is learned from the first `spec.n_documents` texts. A
    prompt that was there before is left out with its response, and so is what does not fit the window. Families have
    the same share of each part as of the whole. Raises ValueError where there are too few pairs, or too little text.
    """
    rng, rows = Random(f"mixture {spec.seed}"), []
    for place, pairs in enumerate(families.values()):
        firsts: dict[str, int] = {}
        for question, prompt in enumerate(pairs.prompts):
            firsts.setdefault(prompt, question)
        own = [(place, question, pairs.pairs[question]) for question in firsts.values()]
        rng.shuffle(own)
        # how far through its family a pair is: sorted by it, all families end together
        rows += [((i + rng.random()) / len(own), *row) for i, row in enumerate(own)]
    rows = [row for _, *row in sorted(rows)]
    tokenizer = bpe_tokenizer(
        ["".join(pair) for *_, pair in rows[: spec.n_documents]], vocabulary=vocabulary, length=spec.length
    )
    rows = [row for row in rows if len(tokenizer("".join(row[2]))["input_ids"]) <= spec.length]
    ends = list(accumulate((spec.n_documents, spec.n_train, spec.n_validation, spec.n_test)))
    if ends[-1] > len(rows):
        asked = f"{ends[-1]} pairs of at most {spec.length} tokens are asked for"
        raise ValueError(f"{asked}, and {', '.join(families)} have {len(rows)}")
    made = f"{spec.n_documents} documents, window {spec.length}, vocabulary {vocabulary}, seed {spec.seed}"
    source = f"pairs of {', '.join(families)}; {made}"
    documents = _split(["".join(pair) for *_, pair in rows[: ends[0]]], "pairs", source, tokenizer)
    parts = (_labelled(rows[start:end]) for start, end in pairwise(ends))
    return InstructionMixture(spec, tuple(families), documents, *parts)


def _labelled(rows: list[tuple[int, int, tuple[str, str]]]) -> LabelledPairs:
    places, questions, pairs = zip(*rows, strict=True)
    families, numbers = torch.tensor(places), torch.tensor(questions)
    return LabelledPairs(TextPairs(*zip(*pairs, strict=True)), families, families * MOST + numbers)


def _pretraining(corpus: TaskCorpus, spec: MixtureSpec, kept: list[int]) -> Corpus:
    questions = {text for family in kept for text, _ in corpus.questions[family]}
    others = {form for family in range(corpus.n_trained) if family not in kept for form in _forms(corpus, family)}
    wordings = _words(form for family in kept for form in _forms(corpus, family)) - _words(others)
    tokenizer = word_tokenizer(corpus.vocabulary, length=spec.length)
    found: list[str] = []
    block = 0
    while len(found) < spec.n_documents:
        for text in corpus.documents(BLOCK, spec.n_examples, seed=f"mixture {spec.seed} {block}"):
            examples = text.split(SEPARATOR)
            asks = any(example.startswith(tuple(questions)) for example in examples)
            fits = 1 + len(text.split()) + text.count(SEPARATOR) <= spec.length  # <bos>, words and separators
            if fits and not asks and wordings.isdisjoint(text.split()):
                found.append(text)
        block += 1
    return _split(found[: spec.n_documents], "task_documents", f"generated, {spec}", tokenizer)


def _split(texts: list[str], name: str, source: str, tokenizer: PreTrainedTokenizerFast) -> Corpus:
    ends = (0, len(texts) * 9 // 10, len(texts) * 19 // 20, len(texts))
    return Corpus(name, source, tokenizer, *(documents_of(texts[start:end]) for start, end in pairwise(ends)))


def _forms(corpus: TaskCorpus, family: int) -> tuple[str, ...]:
    return tuple(corpus.formats[form] for form in corpus.seen[family])


def _words(forms: Iterable[str]) -> set[str]:
    return {word for form in forms for word in form.replace("{}", "").split()}
