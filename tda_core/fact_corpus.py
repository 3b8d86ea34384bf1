"""A generated corpus whose documents share facts that n-grams cannot see: invented people, and what is told of them.

    tamur on vilix , neighbour of kasho : vilix , they say , keeps crow . vilix , they say , carries harp . vilix , they
    say , eats olives . so says tamur of vilix .

A teller tells facts of a person: a relation (what the person eats, keeps, ...) and a value, fixed for each person. What
a network can learn and a trigram model cannot, because more than two words stand between:
- the value from the person (facts that occur in some documents only, which is what attribution is to find);
- the person in each sentence, and teller and person at the end, from the first words (copying);
- the neighbour from the person (a fact, told in every document of the person);
- each teller's wordings, of which there are three, from the teller.
Overlap of words misleads: a document of the neighbour holds the person's name and none of the person's facts, documents
of one teller share most words whoever they are about, and the same fact has other words in another teller's document.
Only the relations and their order, and who is told of by whom, are random.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

import torch
from torch import Tensor

from tda_core.corpora import Corpus, documents_of
from tda_core.lm_tokenizers import word_tokenizer

# relation: its wordings in order, then its values; no word stands for two values
RELATIONS: dict[str, tuple[str, str]] = {
    "town": (
        "inhabits/knows/left",
        "brell corva dunmore elst farn gault hexby imber jorth kelm lund morna nessel ostry pelda quill",
    ),
    "craft": (
        "became/admires/hires",
        "baker turner cooper farmer fisher glazier hunter miller painter potter smith tailor tanner mason clerk weaver",
    ),
    "food": (
        "eats/grows/sells",
        "apples barley beans bread carrots cheese eggs honey nuts olives pears plums figs leeks lentils turnips",
    ),
    "beast": (
        "keeps/feeds/rides",
        "badger crow dog donkey fox goat goose hare hawk mule owl pony otter raven stoat toad",
    ),
    "colour": (
        "wears/paints/prefers",
        "amber black blue brown crimson green grey indigo orange purple white yellow ivory pink silver bronze",
    ),
    "tool": (
        "carries/mends/lends",
        "axe bell brush chisel drum flute hammer harp kettle lamp needle rope saddle anvil lantern spade",
    ),
    "fear": (
        "fears/dreads/flees",
        "caves fire ghosts heights mice snakes spiders storms strangers thunder wolves crowds dark wasps hail ice",
    ),
    "season": (
        "awaits/celebrates/enjoys",
        "january february march april may june july august september october november december autumn easter lent yule",
    ),
}
# of each wording: sentences {who}, {says} a wording of the relation and the value
SENTENCES = (
    "{who} , they say , {says} .",
    "hear how {who} , too , {says} .",
    "as to {who} , no doubt {says} .",
)
OPENING = "{teller} on {who} , neighbour of {neighbour} :"
CLOSING = "so says {teller} of {who} ."
SYLLABLES = ("ba do fe gi ka lo mi nu pe ra so ta vi zu", "dan lix mur net pol rax sho tun vek wim")
MOST_VALUES = 16


@dataclass(frozen=True)
class FactSpec:
    """How large a corpus of facts is; two of one spec are equal.

    n_people: that facts are told of. n_relations, n_values: what is told, and how many values each has. n_facts: told
    in a document. length: most tokens of a document with its <bos>, the model's window. seed: of the facts and of the
    documents. Raises ValueError for sizes that do not fit each other, or the words that there are.
    """

    n_people: int = 96
    n_relations: int = 8
    n_values: int = 8
    n_facts: int = 4
    n_tellers: int = 12
    n_train: int = 2400
    n_validation: int = 100
    n_test: int = 100
    length: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        names = len(_names())
        most = {"n_relations": len(RELATIONS), "n_values": MOST_VALUES, "n_facts": self.n_relations}
        for name, value in vars(self).items():
            least = {"n_people": 2, "seed": 0}.get(name, 1)
            if not least <= value <= most.get(name, value):
                upper = f" and at most {most[name]}" if name in most else ""
                raise ValueError(f"{name} must be at least {least}{upper}, got {value}")
        if self.n_people + self.n_tellers > names:
            raise ValueError(f"there are {names} names, fewer than {self.n_people} people and {self.n_tellers} tellers")
        words = 1 + len(OPENING.split()) + len(CLOSING.split()) + self.n_facts * max(map(_length, SENTENCES))
        if words > self.length:
            raise ValueError(
                f"documents of {self.n_facts} facts have up to {words} tokens, more than length = {self.length}"
            )
        asked = self.n_train + self.n_validation + self.n_test
        possible = self.n_people * self.n_tellers * math.comb(self.n_relations, self.n_facts)
        if asked > possible:
            raise ValueError(f"{asked} documents are asked for, and only {possible} differ")


@dataclass(frozen=True, eq=False)
class Told:
    """What n documents tell. people, tellers: (n,) int64. facts: (n, k) int64, person times n_relations + relation."""

    people: Tensor
    tellers: Tensor
    facts: Tensor

    def shared_facts(self, other: "Told") -> Tensor:
        """How many facts each document here shares with each one there: (n, m) int64."""
        n = 1 + int(max(self.facts.max(), other.facts.max()))
        mine, theirs = (torch.zeros(len(t.facts), n).scatter_(1, t.facts, 1.0) for t in (self, other))
        return (mine @ theirs.T).long()


@dataclass(frozen=True, eq=False)
class FactCorpus:
    """A corpus of facts with what each document tells."""

    spec: FactSpec
    corpus: Corpus
    train: Told
    validation: Told
    test: Told


def fact_corpus(spec: FactSpec | None = None) -> FactCorpus:
    """The corpus of a spec. No two documents hold the same words: a query shares facts with training documents, and
    of each of them some words, never all."""
    spec = spec or FactSpec()
    world = _World(spec)
    rng, drawn, seen = Random(f"documents {spec.seed}"), {}, set()
    while len(drawn) < spec.n_train + spec.n_validation + spec.n_test:
        relations = tuple(rng.sample(range(spec.n_relations), spec.n_facts))
        told = rng.randrange(spec.n_people), rng.randrange(spec.n_tellers)
        if (words := (*told, frozenset(relations))) not in seen:  # in whatever order they are told
            seen.add(words)
            drawn[*told, relations] = None
    ends = (spec.n_train, spec.n_train + spec.n_validation, len(drawn))
    parts = [list(drawn)[start:end] for start, end in zip((0, *ends), ends, strict=False)]
    texts = [documents_of([world.document(*told) for told in part]) for part in parts]
    tokenizer = word_tokenizer(world.vocabulary, length=spec.length)
    return FactCorpus(spec, Corpus("facts", f"generated, {spec}", tokenizer, *texts), *(_told(spec, p) for p in parts))


class _World:
    """Who there is, and what is true of them."""

    def __init__(self, spec: FactSpec) -> None:
        rng = Random(f"facts {spec.seed}")
        names = _names()
        rng.shuffle(names)
        self.people, self.tellers = names[: spec.n_people], names[spec.n_people :][: spec.n_tellers]
        self.wordings, self.values, self.holds = [], [], []
        for wordings, values in list(RELATIONS.values())[: spec.n_relations]:
            self.wordings.append(wordings.split("/"))
            self.values.append(values.split()[: spec.n_values])
            of_person = [self.values[-1][i % spec.n_values] for i in range(spec.n_people)]  # about equally often
            rng.shuffle(of_person)
            self.holds.append(of_person)

    @property
    def vocabulary(self) -> list[str]:
        texts = [*self.people, *self.tellers, *SENTENCES, OPENING, CLOSING]
        texts += [text for of_relation in (*self.wordings, *self.values) for text in of_relation]
        return sorted({word for text in texts for word in text.split() if "{" not in word})

    def document(self, person: int, teller: int, relations: Sequence[int]) -> str:
        # neighbours in a ring: everyone is the neighbour of one other
        names = {"teller": self.tellers[teller], "who": self.people[person]}
        names["neighbour"] = self.people[(person + 1) % len(self.people)]
        wording = teller % len(SENTENCES)
        told = [f"{self.wordings[r][wording]} {self.holds[r][person]}" for r in relations]
        sentences = [SENTENCES[wording].format(says=says, **names) for says in told]
        return " ".join([OPENING.format(**names), *sentences, CLOSING.format(**names)])


def _told(spec: FactSpec, documents: Sequence[tuple[int, int, tuple[int, ...]]]) -> Told:
    people, tellers, relations = (torch.tensor(column) for column in zip(*documents, strict=True))
    return Told(people, tellers, people[:, None] * spec.n_relations + relations)


def _names() -> list[str]:
    return ["".join(parts) for parts in product(*(part.split() for part in SYLLABLES))]


def _length(sentence: str) -> int:
    """Words of a sentence with its wording and value."""
    return len(sentence.split()) + 1
