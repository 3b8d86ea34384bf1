"""Facts told in two sets of words: what tells methods that see what a model learned from those that count words.

Every concept - a person, a relation, a value, the end of a sentence - has two words that mean the same. A document
tells facts of a person, and then again in another order, with either word of each concept, at random:

    tamur keeps crow . tamur dreads usim ; balen feeds ovek ; tamur fears storms .

so that a model learns which words are the same. A planted fact is told in one choice of words, whatever document it is
in. Any document tells one of its facts in one choice of words, and half of them use one name throughout, so that form
alone does not give away which documents tell something planted. A query in the same words is easy to trace; one in the
opposite words shares no word with any document that tells the fact, and a ranking by words finds nothing, however it
weighs them.

    told = planted_facts(SynonymWorld(WorldSpec(seed=0)), PlantedSpec(n_planted=60))
    told.train, told.queries["same"], told.queries["opposite"], told.relevant
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tda_core.corpora import documents_of
from tda_core.fact_corpus import MOST_VALUES, RELATIONS, SYLLABLES
from tda_core.lm_tokenizers import word_tokenizer
from tda_core.text_pairs import TextPairs

END = (".", ";")
OLD_SYLLABLES = ("a e i o u ya ye yo", "bor cen dul fam gis hon jur kev lum mip ners pog quar rud sim thal")
WORDINGS = ("same", "opposite")
ANY = (None, None, None)

Fact = tuple[int, int]  # person, relation
# Which of their two words the person, the relation and the value have; None: either, drawn each time
Form = tuple[int | None, int | None, int | None]


@dataclass(frozen=True)
class WorldSpec:
    """n_people, n_relations, n_values: who there is, what is told of each, and how many values a relation has.

    seed: of names and facts. Raises ValueError for sizes beyond the words that there are.
    """

    n_people: int = 64
    n_relations: int = 8
    n_values: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        most = {"n_people": len(_joined(SYLLABLES)) // 2, "n_relations": len(RELATIONS), "n_values": MOST_VALUES}
        for name, highest in most.items():
            if not 2 <= getattr(self, name) <= highest:
                raise ValueError(f"{name} must lie in 2..{highest}, got {getattr(self, name)}")


@dataclass(frozen=True)
class SynonymWorld:
    """Who there is and what is true of them; two of one spec are equal.

    people, relations: both words of each. values: both words of each value, by relation. held: [person][relation],
    which value is theirs.
    """

    spec: WorldSpec

    @cached_property
    def people(self) -> list[tuple[str, str]]:
        names, n = _joined(SYLLABLES), self.spec.n_people
        Random(f"names {self.spec.seed}").shuffle(names)
        return list(zip(names[:n], names[n : 2 * n], strict=True))

    @cached_property
    def relations(self) -> list[tuple[str, str]]:
        return [(first, second) for first, second, _ in (wordings.split("/") for wordings, _ in self._told)]

    @cached_property
    def values(self) -> list[list[tuple[str, str]]]:
        second = iter(_joined(OLD_SYLLABLES))
        return [[(word, next(second)) for word in words.split()[: self.spec.n_values]] for _, words in self._told]

    @cached_property
    def held(self) -> list[list[int]]:
        rng, columns = Random(f"held {self.spec.seed}"), []
        for _ in range(self.spec.n_relations):
            column = [i % self.spec.n_values for i in range(self.spec.n_people)]  # all values about equally often
            rng.shuffle(column)
            columns.append(column)
        return [list(row) for row in zip(*columns, strict=True)]

    @property
    def facts(self) -> list[Fact]:
        """Every person with every relation."""
        return list(product(range(self.spec.n_people), range(self.spec.n_relations)))

    def asked_about(self, n: int, *, seed: int) -> list[Fact]:
        """n facts to ask about. Those of seed 0, for choosing settings, are in no other seed's; others may meet.

        Raises ValueError for n outside 1 and half of the facts.
        """
        most = len(self.facts) // 2
        if not 1 <= n <= most:
            raise ValueError(f"n must lie in 1..{most}, half of the world's facts, got {n}")
        order = Random(f"asked {self.spec.seed}").sample(self.facts, len(self.facts))
        return order[:n] if seed == 0 else Random(f"asked {self.spec.seed} {seed}").sample(order[n:], n)

    def question(self, fact: Fact, form: Form) -> tuple[str, str]:
        """Prompt and response, which begins with its space."""
        name, says, value = self._words(fact, form, self.held[fact[0]][fact[1]])
        return f"{name} {says}", f" {value}"

    def document(self, facts: Sequence[Fact], rng: Random, forms: Mapping[Fact, Form] | None = None) -> str:
        """The facts, and then again in another order. forms: the words of some of them; others are drawn."""
        return self._told_twice([(fact, self.held[fact[0]][fact[1]]) for fact in facts], rng, forms or {})

    def practice(self, n: int, n_facts: int, *, seed: int | str) -> list[str]:
        """n documents that tell made-up facts: from them a model learns which words are the same, and no fact."""
        rng, found = Random(f"practice {seed}"), []
        for _ in range(n):
            person = rng.randrange(self.spec.n_people)
            told = [(person, relation) for relation in rng.sample(range(self.spec.n_relations), n_facts)]
            found.append(self._told_twice([(fact, rng.randrange(self.spec.n_values)) for fact in told], rng, {}))
        return found

    @property
    def vocabulary(self) -> list[str]:
        """Every word."""
        concepts = [*self.people, *self.relations, END, *(value for of in self.values for value in of)]
        return sorted({word for both in concepts for word in both})

    def tokenizer(self, length: int) -> PreTrainedTokenizerFast:
        """A token each word. length: the model's window."""
        return word_tokenizer(self.vocabulary, length=length)

    @property
    def _told(self) -> list[tuple[str, str]]:
        return list(RELATIONS.values())[: self.spec.n_relations]

    def _words(self, fact: Fact, form: Form, value: int) -> tuple[str, str, str]:
        (person, relation), (name, says, which) = fact, form
        return self.people[person][name], self.relations[relation][says], self.values[relation][value][which]

    def _told_twice(self, told: Sequence[tuple[Fact, int]], rng: Random, forms: Mapping[Fact, Form]) -> str:
        again = list(told)
        rng.shuffle(again)
        words = []
        for fact, value in [*told, *again]:
            form = tuple(
                either if own is None else own
                for own, either in zip(forms.get(fact, ANY), drawn_form(rng), strict=True)
            )
            words += [*self._words(fact, form, value), END[rng.randrange(2)]]
        return " ".join(words)


@dataclass(frozen=True)
class PlantedSpec:
    """n_planted: facts that few documents tell. n_tellings: how many, each. n_documents: in all. n_facts: told in a
    document. seed: of what is planted (`SynonymWorld.asked_about`) and drawn. Raises ValueError for sizes below 1,
    and too few documents."""

    n_planted: int = 60
    n_tellings: int = 4
    n_documents: int = 2000
    n_facts: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_planted", "n_tellings", "n_documents", "n_facts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        told = self.n_planted * self.n_tellings
        if told > self.n_documents:
            raise ValueError(f"{self.n_planted} facts told {self.n_tellings} times take {told} of {self.n_documents}")


@dataclass(frozen=True, eq=False)
class PlantedFacts:
    """train: n documents, in no order. facts: the planted ones, q of them. queries: by wording, "same" as in the
    documents or "opposite". relevant: (q, n) bool, which documents tell a fact."""

    train: TextPairs
    facts: list[Fact]
    queries: dict[str, TextPairs]
    relevant: Tensor


def planted_facts(world: SynonymWorld, spec: PlantedSpec) -> PlantedFacts:
    """Documents of a world in which some facts are planted.

    A planted fact stands beside facts of the same person that are not planted, under the same name there; the person's
    other name is learned elsewhere. Raises ValueError where there are not enough facts for that.
    """
    rng = Random(f"planted {world.spec.seed} {spec.seed}")
    planted = sorted(world.asked_about(spec.n_planted, seed=spec.seed))
    forms = {fact: drawn_form(rng) for fact in planted}
    ordinary = {p: [f for f in world.facts if f[0] == p and f not in forms] for p in range(world.spec.n_people)}
    able = [person for person, facts in ordinary.items() if len(facts) >= spec.n_facts]
    unable = {person for person, _ in planted} - set(able)
    if unable:
        raise ValueError(f"person {min(unable)} has fewer than n_facts = {spec.n_facts} facts that are not planted")
    told = [
        [fact, *rng.sample(ordinary[fact[0]], spec.n_facts - 1)] for fact in planted for _ in range(spec.n_tellings)
    ]
    while len(told) < spec.n_documents:
        told.append(rng.sample(ordinary[rng.choice(able)], spec.n_facts))
    rng.shuffle(told)
    texts = []
    for facts in told:
        fixed = forms.get(facts[0]) or drawn_form(rng)  # of the planted fact, or of the first one
        name = fixed[0] if facts[0] in forms or rng.randrange(2) else None
        words = {fact: (name, None, None) for fact in facts} | {facts[0]: fixed}
        rng.shuffle(facts)
        texts.append(world.document(facts, rng, words))
    queries = {
        wording: _pairs(
            [world.question(fact, form if wording == "same" else opposite(form)) for fact, form in forms.items()]
        )
        for wording in WORDINGS
    }
    relevant = torch.tensor([[fact in facts for facts in told] for fact in planted])
    return PlantedFacts(documents_of(texts), planted, queries, relevant)


def drawn_form(rng: Random) -> Form:
    """Either word of each concept, each as likely."""
    return rng.randrange(2), rng.randrange(2), rng.randrange(2)


def opposite(form: Form) -> Form:
    """The other word of each concept."""
    name, says, value = form
    return 1 - name, 1 - says, 1 - value


def _pairs(pairs: Sequence[tuple[str, str]]) -> TextPairs:
    return TextPairs(*zip(*pairs, strict=True))


def _joined(syllables: Sequence[str]) -> list[str]:
    return ["".join(parts) for parts in product(*(part.split() for part in syllables))]
