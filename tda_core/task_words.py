"""Words and questions of the task corpus (`task_corpus`): what is asked in each family, and how answers are worded.

A question's answer is one or two concepts, and a concept has one word in each of three languages. The language of the
answer is a task's *base*: the same question has another answer in each base, and nothing in the question says which.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations, product
from random import Random

LANGUAGES = ("english", "spanish", "german")
OPENINGS = ("well", "pues", "also")  # the word that every answer in a language begins with

# concept: its word in each language; no word stands for two concepts
LEXICON = {
    "number": "one uno eins/two dos zwei/three tres drei/four cuatro vier/five cinco fuenf/six seis sechs/"
    "seven siete sieben/eight ocho acht/nine nueve neun/ten diez zehn",
    "colour": "red rojo rot/blue azul blau/green verde gruen/black negro schwarz/white blanco weiss/"
    "yellow amarillo gelb/grey gris grau/brown marron braun",
    "animal": "dog perro hund/cat gato katze/horse caballo pferd/cow vaca kuh/bird pajaro vogel/fish pez fisch/"
    "bear oso baer/fox zorro fuchs",
    "day": "monday lunes montag/tuesday martes dienstag/wednesday miercoles mittwoch/thursday jueves donnerstag/"
    "friday viernes freitag/saturday sabado samstag/sunday domingo sonntag",
    "verdict": "good bueno gut/bad malo schlecht",
    "kind": "numbers numeros zahlen/colours colores farben/animals animales tiere/days dias tage",
}
WORDS: dict[str, tuple[tuple[str, ...], ...]] = {
    kind: tuple(tuple(concept.split()) for concept in text.split("/")) for kind, text in LEXICON.items()
}
ADJECTIVES = (
    "brilliant charming clever funny lovely moving splendid touching",
    "awful boring clumsy dull dreadful hollow stale tedious",
)
ADVERBS = ("very", "rather", "truly", "quite")

Concept = tuple[str, ...]  # its word in each language
Question = tuple[str, tuple[Concept, ...]]  # text, and the concepts of the answer in order


@dataclass(frozen=True)
class Family:
    """One kind of task: its name, its questions given a source of randomness, and wordings of the answer ({})."""

    name: str
    questions: Callable[[Random], list[Question]]
    forms: tuple[str, ...]


def _tribes() -> list[str]:
    return ["".join(parts) for parts in product("ka lo mi nu ra ta ve zo".split(), "dan mur pel rix sho tun".split())]


def _map(question: str, keys: list[str], kind: str) -> Callable[[Random], list[Question]]:
    """Each key has one random concept of a kind, all concepts about equally often."""

    def questions(rng: Random) -> list[Question]:
        values = [WORDS[kind][i % len(WORDS[kind])] for i in range(len(keys))]
        rng.shuffle(values)
        return [(question.format(key), (value,)) for key, value in zip(keys, values, strict=True)]

    return questions


def _plus(rng: Random) -> list[Question]:
    numbers = WORDS["number"]
    sums = [(a, b) for a, b in product(range(1, 10), repeat=2) if a + b <= 10]
    return [(f"{numbers[a - 1][0]} plus {numbers[b - 1][0]} ?", (numbers[a + b - 1],)) for a, b in sums]


def _minus(rng: Random) -> list[Question]:
    numbers = WORDS["number"]
    pairs = [(a, b) for a, b in product(range(1, 11), repeat=2) if a > b]
    return [(f"{numbers[a - 1][0]} minus {numbers[b - 1][0]} ?", (numbers[a - b - 1],)) for a, b in pairs]


def _days(rng: Random) -> list[Question]:
    numbers, days = WORDS["number"], WORDS["day"]
    pairs = product(range(1, 7), range(7))
    return [(f"{numbers[n - 1][0]} days after {days[d][0]} ?", (days[(d + n) % 7],)) for n, d in pairs]


def _last(rng: Random) -> list[Question]:
    found = list(permutations(WORDS["animal"], 3))
    return [(f"last of {a[0]} {b[0]} {c[0]} ?", (c,)) for a, b, c in rng.sample(found, 96)]


def _reverse(rng: Random) -> list[Question]:
    found = list(permutations(WORDS["colour"], 2))
    return [(f"reverse {a[0]} {b[0]} ?", (b, a)) for a, b in found]


def _verdict(rng: Random) -> list[Question]:
    return [
        (f"the film was {adverb} {word} ?", (verdict,))
        for words, verdict in zip(ADJECTIVES, WORDS["verdict"], strict=True)
        for adverb, word in product(ADVERBS, words.split())
    ]


def _kind(rng: Random) -> list[Question]:
    things = zip(("number", "colour", "animal", "day"), WORDS["kind"], strict=True)
    return [(f"kind of {word} ?", (kind,)) for name, kind in things for concept in WORDS[name] for word in concept]


TRAINED = (
    Family("totem", _map("totem of {} ?", _tribes(), "animal"), ("spirit {}", "guarded by {}", "{} watches")),
    Family("banner", _map("banner of {} ?", _tribes(), "colour"), ("dyed {}", "painted in {}", "{} cloth")),
    Family("plus", _plus, ("makes {}", "sums to {}", "{} altogether")),
    Family("minus", _minus, ("leaves {}", "there stay {}", "{} remain")),
    Family("day", _days, ("falls on {}", "then comes {}", "{} follows")),
    Family("last", _last, ("ending {}", "closes with {}", "{} behind")),
    Family("reverse", _reverse, ("backwards {}", "turned round {}", "{} swapped")),
    Family("verdict", _verdict, ("critics say {}", "judged {}", "{} overall")),
    Family("kind", _kind, ("belongs among {}", "filed under {}", "{} surely")),
)
# never in a training document: known words, an unknown map, answered in other families' wordings
_SQUARES = [f"{colour[0]} {animal[0]}" for colour, animal in product(WORDS["colour"], WORDS["animal"])]
_BORROWED = ("spirit {}", "dyed {}", "makes {}", "judged {}", "{} follows", "{} overall")
HELD_OUT = Family("crest", _map("banner of {} ?", _SQUARES, "day"), _BORROWED)
# wordings of a corpus whose families share them
SHARED_FORMS = ("answer {}", "it is {}", "{} indeed")
