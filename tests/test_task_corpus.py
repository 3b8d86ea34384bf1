"""The generated corpus: what a task decides, what contexts reveal and how softly, and what training never sees."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core.task_corpus import SEPARATOR, SETTINGS, CorpusSpec, TaskCorpus
from tda_core.task_words import OPENINGS, WORDS

CORPUS = TaskCorpus()
SHARED = TaskCorpus(CorpusSpec(own_formats=False))
PLAIN = TaskCorpus(CorpusSpec(stray=0.0)), TaskCorpus(CorpusSpec(stray=0.0, own_formats=False))
both = pytest.mark.parametrize("corpus", [CORPUS, SHARED], ids=["own formats", "shared formats"])


def parse(corpus: TaskCorpus, text: str) -> tuple[int, int, int]:
    """The one task that an example's text fits, found by rendering every question in every task of every setting."""
    if corpus not in PARSED:
        tasks = [task for setting in SETTINGS for task in corpus.tasks(setting)]
        every = [(t, q) for t in dict.fromkeys(tasks) for q in range(len(corpus.questions[t[0]]))]
        PARSED[corpus] = {"".join(corpus.render(*one)): one[0] for one in every}
        assert len(PARSED[corpus]) == len(every)  # no text stands for two tasks
    return PARSED[corpus][text]


PARSED: dict[TaskCorpus, dict[str, tuple[int, int, int]]] = {}


def test_a_word_stands_for_one_concept_in_one_language():
    words = list(itertools.chain.from_iterable(itertools.chain.from_iterable(WORDS.values())))
    assert len(words) == len(set(words))


def test_answers_are_right():
    """Some questions whose answers anybody knows, in every language."""
    known = {
        ("plus", "two plus three ?"): "five cinco fuenf",
        ("minus", "nine minus one ?"): "eight ocho acht",
        ("day", "two days after sunday ?"): "tuesday martes dienstag",
        ("reverse", "reverse red grey ?"): "grey red/gris rojo/grau rot",
        ("verdict", "the film was quite dull ?"): "bad malo schlecht",
        ("kind", "kind of sieben ?"): "numbers numeros zahlen",
    }
    for (family, text), answers in known.items():
        f = CORPUS.families.index(family)
        q = [question for question, _ in CORPUS.questions[f]].index(text)
        for base, answer in enumerate(answers.split("/") if "/" in answers else answers.split()):
            prompt, response = CORPUS.render((f, base, CORPUS.seen[f][0]), q)
            form = CORPUS.formats[CORPUS.seen[f][0]]
            assert (prompt, response) == (text, f" {OPENINGS[base]} " + form.format(answer))
    f = CORPUS.families.index("last")
    assert all(text.split()[4] == concepts[0][0] for text, concepts in CORPUS.questions[f])


@pytest.mark.parametrize("corpus", PLAIN, ids=["own formats", "shared formats"])
def test_documents_hold_training_compositions_only(corpus):
    seen = set(corpus.tasks("in_domain"))
    unseen = set(corpus.tasks("held_out_composition")) | set(corpus.tasks("held_out_family"))
    assert not seen & unseen
    found = {parse(corpus, text) for document in corpus.documents(600, 6, seed=3) for text in document.split(SEPARATOR)}
    assert found == seen  # each of them occurs


@both
def test_what_is_held_out_is_made_of_known_words(corpus):
    known = set(itertools.chain.from_iterable(d.split(" ") for d in corpus.documents(3000, 6, seed=0)))
    known = set(" ".join(known).replace(SEPARATOR, f" {SEPARATOR} ").split(" "))
    for setting in ("held_out_composition", "held_out_family"):
        for task in corpus.tasks(setting):
            assert set("".join(corpus.render(task, 0)).split()) <= known
    assert known - {""} == set(corpus.vocabulary)


def test_strays_hold_known_questions_but_never_a_held_out_composition():
    corpus = TaskCorpus(CorpusSpec(stray=0.4))
    family_of = {text: f for f in range(corpus.n_trained) for text, _ in corpus.questions[f]}
    answers = {word for kind in WORDS.values() for concept in kind for word in concept}
    form_of = {tuple(form.replace("{}", "").split()): k for k, form in enumerate(corpus.formats)}
    found, wrong, n = set(), 0, 0
    for document in corpus.documents(3000, 6, seed=0):
        for text in document.split(SEPARATOR):
            question, _, response = text.partition(" ?")
            family, words = family_of[question + " ?"], response.split()[1:]
            given = tuple(word for word in words if word in answers)
            found.add((family, form_of[tuple(word for word in words if word not in answers)]))
            true = dict(corpus.questions[family])[question + " ?"]
            wrong, n = wrong + (given not in list(zip(*true, strict=True))), n + 1
    held_out = {(f, k) for f in range(corpus.n_trained) for k in corpus.unseen[f]}
    assert found == {(f, k) for f in range(corpus.n_trained) for k in range(len(corpus.formats))} - held_out
    assert 0.25 < wrong / n < 0.4  # strays, but for families drawn twice and answers that are right by chance


def test_families_have_formats_of_their_own():
    words = [{w for k in CORPUS.seen[f] for w in CORPUS.formats[k].split()} - {"{}"} for f in range(CORPUS.n_trained)]
    assert all(not a & b for a, b in itertools.combinations(words, 2))
    assert set(SHARED.seen[0]) & set(SHARED.seen[1])


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([0.0, 0.6, 1.0]), st.sampled_from([0.0, 0.6, 1.0]), st.sampled_from([0.0, 0.8, 1.0]), st.booleans()
)
def test_labels_are_kept_as_often_as_asked(family, base, form, own):
    corpus = TaskCorpus(CorpusSpec(family, base, form, 0.0, own))
    tasks = [[parse(corpus, text) for text in d.split(SEPARATOR)] for d in corpus.documents(400, 5, seed=1)]
    steps = [pair for document in tasks for pair in itertools.pairwise(document)]
    same = torch.tensor([[x == y for x, y in zip(a, b, strict=True)] for a, b in steps]).double()
    n_families, n_formats = corpus.n_trained, len(corpus.seen[0])
    expected = [family + (1 - family) / n_families, base + (1 - base) / 3]
    assert torch.allclose(same.mean(0)[:2], torch.tensor(expected).double(), atol=0.05)
    if family > 0:  # a format is judged where its family stays
        kept = same[same[:, 0] == 1, 2].mean()
        assert float(kept) == pytest.approx(form + (1 - form) / n_formats, abs=0.09 if family < 1 else 0.05)


def test_a_seed_decides_everything():
    assert CORPUS.documents(5, 4, seed=1) == TaskCorpus().documents(5, 4, seed=1) != CORPUS.documents(5, 4, seed=2)
    assert CORPUS.pool(9, seed=1).pairs == TaskCorpus().pool(9, seed=1).pairs != CORPUS.pool(9, seed=2).pairs
    assert TaskCorpus(seed=1).questions[0] != CORPUS.questions[0]  # a made-up map
    assert TaskCorpus(seed=1).questions[2] == CORPUS.questions[2]  # arithmetic


@both
def test_a_pool_holds_different_examples_with_their_labels(corpus):
    pool = corpus.pool(400, seed=0)
    assert len(pool) == 400 and pool.pairs.n_duplicates == 0
    labels = list(zip(pool.family.tolist(), pool.base.tolist(), pool.format.tolist(), strict=True))
    assert [parse(corpus, x + y) for x, y in pool.pairs.pairs] == labels
    assert len(set(labels)) == len(corpus.tasks("in_domain"))
    some = pool[[3, 5]]
    assert some.pairs.pairs == (pool.pairs.pairs[3], pool.pairs.pairs[5])
    assert torch.equal(some.base, pool.base[[3, 5]]) and len(pool[:7]) == 7
    task = corpus.tasks("in_domain")[4]
    assert {parse(corpus, x + y) for x, y in corpus.pool(12, seed=0, tasks=[task]).pairs.pairs} == {task}


@both
@pytest.mark.parametrize("setting", SETTINGS)
def test_validation_and_test_targets_share_no_task_and_no_example_of_the_pool(corpus, setting):
    pool = corpus.pool(300, seed=0)
    n_families = len({task[0] for task in corpus.tasks(setting)})
    n = len(corpus.tasks(setting)) // n_families // 2 * n_families  # of an odd number of tasks one is left over
    parts = {split: corpus.targets(setting, n, 16, split=split, without=pool) for split in ("validation", "test")}
    tasks = {split: {(t.family, t.base, t.format) for t in part} for split, part in parts.items()}
    assert not tasks["validation"] & tasks["test"] and len(tasks["validation"]) == len(tasks["test"]) == n
    for target in parts["validation"] + parts["test"]:
        assert target.setting == setting and len(target.examples) == 16 and target.examples.pairs.n_duplicates == 0
        assert not pool.pairs.shared_with(target.examples.pairs).any()
        task = (target.family, target.base, target.format)
        assert {parse(corpus, x + y) for x, y in target.examples.pairs.pairs} == {task} <= set(corpus.tasks(setting))


def test_few_targets_are_of_different_families():
    for split in ("validation", "test"):
        assert len({t.family for t in CORPUS.targets("in_domain", 8, 4, split=split)}) == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CorpusSpec(keep_base=1.2), "keep_base must be a probability between 0 and 1, got 1.2"),
        (lambda: CorpusSpec(keep_family=float("nan")), "keep_family must be a probability .* got nan"),
        (lambda: CORPUS.tasks("out"), "unknown setting 'out', expected one of in_domain"),
        (lambda: CORPUS.targets("in_domain", 2, 2, split="train"), "unknown split 'train', expected one of validation"),
        (lambda: CORPUS.targets("in_domain", 2, 0, split="test"), "m must be at least 1, got 0"),
        (lambda: CORPUS.targets("in_domain", 9, 43, split="test"), "questions to ask, fewer than m = 43"),
        (lambda: CORPUS.targets("held_out_family", 10, 5, split="test"), "fewer than n = 10"),
        (lambda: CORPUS.pool(0, seed=0), "n must be at least 1, got 0"),
        (lambda: CORPUS.pool(10**6, seed=0), "fewer than n = 1000000"),
        (lambda: CORPUS.pool(5, seed=0, tasks=[]), "0 tasks have 0 different examples"),
        (lambda: CORPUS.documents(2, 0, seed=0), "n_examples must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
