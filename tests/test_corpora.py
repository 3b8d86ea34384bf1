"""Text cut into documents: nothing lost, nothing too long, the same split every time, and clear errors."""

import hashlib
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core import corpora
from tda_core.corpora import CorpusSize, cut_documents, documents_of, load_corpus
from tda_core.data import DATASETS_OF_TEXT, DataUnavailable, is_available, load_dataset, where_to_put
from tda_core.data.text import help_topics
from tda_core.language import LanguageModel
from tda_core.lm_recipes import LMRecipe
from tda_core.lm_tokenizers import bpe_tokenizer

SMALL = CorpusSize(n_train=40, n_validation=5, n_test=6, length=24, vocabulary=400, shortest=4)
STORY = "\n".join(f"On day {i} the {w} met {i * i} cats, and left." for i, w in enumerate(["fox", "owl", "hen"] * 40))
TOKENIZER = bpe_tokenizer([STORY], vocabulary=300, length=12)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus("help_topics", SMALL)


def test_documents_fit_the_window_behind_a_bos_and_are_of_the_text(corpus):
    text = help_topics()
    for part, n in (("train", 40), ("validation", 5), ("test", 6)):
        pairs = getattr(corpus, part)
        assert len(pairs) == n and set(pairs.prompts) == {""}
        for document in pairs.responses:
            assert document in text
            assert 4 <= len(corpus.tokenizer(document)["input_ids"]) <= 24
    assert corpus.n_tokens == sum(len(corpus.tokenizer(d)["input_ids"]) for d in corpus.train.responses)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert corpus.source == f"help topics of Python {version}"


def test_parts_do_not_share_documents_and_the_seed_alone_decides(corpus):
    parts = [set(getattr(corpus, part).responses) for part in ("train", "validation", "test")]
    again = load_corpus("help_topics", SMALL)
    other = load_corpus("help_topics", CorpusSize(40, 5, 6, 24, 400, 4, seed=1))
    assert again.hash == corpus.hash != other.hash
    assert again.train == corpus.train and other.test != corpus.test
    assert sum(map(len, parts)) == len(set().union(*parts))  # help topics hardly repeat a run of words


def test_a_language_model_takes_the_documents(corpus):
    recipe = LMRecipe(width=8, layers=1, heads=2, length=24)
    model = LanguageModel(recipe.untrained(len(corpus.tokenizer), seed=0), corpus.tokenizer)
    examples = model.examples(corpus.train)
    first = corpus.tokenizer(corpus.train.responses[0])["input_ids"]
    n = len(first) - 1
    assert examples.inputs[0, :n].tolist() == first[:-1] and examples.targets[0, :n].tolist() == first[1:]


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=200), st.integers(3, 12))
def test_cutting_loses_nothing_but_what_is_counted(text, length):
    size = CorpusSize(length=length, shortest=2)
    kept, n_dropped = cut_documents([text], TOKENIZER, size)
    assert "".join(kept).replace(" ", "") in text.replace(" ", "") or n_dropped
    if not n_dropped:
        assert "".join(kept) == text
    for document in kept:
        assert document.strip()


def test_documents_begin_with_a_word_and_do_not_cross_texts():
    texts = ["one two three four five six seven", "eight nine"]
    tokenizer = bpe_tokenizer([*texts, STORY], vocabulary=320, length=12)
    kept, n_dropped = cut_documents(texts, tokenizer, CorpusSize(length=12, shortest=2))
    assert "".join(kept) == "".join(texts) and not n_dropped
    assert not any("seven" in document and "eight" in document for document in kept)
    starts = {len("".join(kept[:i])) for i in range(len(kept))}
    words = {0, *(i for i, c in enumerate("".join(texts)) if c == " "), len(texts[0])}
    assert starts <= words


def test_a_word_longer_than_a_document_is_cut():
    kept, _ = cut_documents(["x" * 100], TOKENIZER, CorpusSize(length=8, shortest=2))
    assert len(kept) > 1 and "".join(kept) == "x" * 100


def test_characters_of_several_tokens_are_not_cut_in_two():
    text = "".join(chr(0x4E00 + 37 * i % 5000) for i in range(600))
    tokenizer = bpe_tokenizer([STORY], vocabulary=300, length=16)  # which spells these byte by byte
    kept, _ = cut_documents([text], tokenizer, CorpusSize(length=16, shortest=2))
    assert "".join(kept) == text and max(len(tokenizer(part)["input_ids"]) for part in kept) <= 16


def test_files_of_ones_own(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text(STORY, encoding="utf-8")
    found = load_corpus(str(path), CorpusSize(None, 2, 2, 16, 300, 4))
    assert len(found.train) > 10 and found.source.endswith(hashlib.sha256(STORY.encode()).hexdigest()[:16])
    assert found.source.startswith("story.txt")


def test_texts_by_name_are_checked_and_say_where_they_belong(monkeypatch, tmp_path):
    monkeypatch.setenv("TDA_DATA_DIR", str(tmp_path))
    assert "sha256 86c4e6aa" in where_to_put("tinyshakespeare")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tinyshakespeare.txt").write_text("not it")
    assert is_available("tinyshakespeare")
    with pytest.raises(ValueError, match="is not the expected file"):
        load_corpus("tinyshakespeare")
    with pytest.raises(ValueError, match="is a text: load it with"):
        load_dataset("tinyshakespeare")


@pytest.mark.skipif(not is_available("tinyshakespeare"), reason="the text is not here")
def test_tinyshakespeare():
    found = load_corpus("tinyshakespeare", CorpusSize(n_train=50, n_validation=5, n_test=5, vocabulary=500))
    assert len(found.train) == 50 and "tinyshakespeare.txt" in found.source


def test_data_sets_of_the_hub(monkeypatch):
    class Rows(dict):
        column_names = ("body",)

    def load_dataset(name, split):
        if name == "nobody/nothing":
            raise OSError("offline")
        return Rows(body=[STORY, STORY[:500]])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    size = CorpusSize(10, 2, 2, 16, 300, 4)
    assert len(load_corpus("hub:some/stories:body", size).train) == 10
    with pytest.raises(ValueError, match="has no column 'text'; it has: body"):
        load_corpus("hub:some/stories:text", size)
    with pytest.raises(ValueError, match="give the column"):
        load_corpus("hub:some/stories", size)
    with pytest.raises(DataUnavailable, match=r"nobody/nothing is not on this machine .*offline"):
        load_corpus("hub:nobody/nothing:body", size)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataUnavailable, match="needs the datasets package"):
        load_corpus("hub:some/stories:body", size)


def test_bad_input_is_refused(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("ein übel".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8: byte 0xfc at 4"):
        load_corpus(str(latin))
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        load_corpus(str(empty))
    with pytest.raises(ValueError, match="unknown corpus 'helptopics', expected one of help_topics, tinyshakespeare"):
        load_corpus("helptopics")
    with pytest.raises(ValueError, match=r"has .* documents, but 100000"):
        load_corpus("help_topics", CorpusSize(n_train=99_800))
    with pytest.raises(ValueError, match="n_test must be at least 1, got 0"):
        CorpusSize(n_test=0)
    with pytest.raises(ValueError, match="shortest must be at most length = 8, got 16"):
        CorpusSize(length=8)
    with pytest.raises(ValueError, match=r"responses\[1\] is empty"):
        documents_of(["text", " "])
    with pytest.raises(ValueError, match="vocabulary must be at least 260"):
        bpe_tokenizer([STORY], vocabulary=200, length=10)
    with pytest.raises(ValueError, match="tokens, not 5000: give more text"):
        bpe_tokenizer([STORY], vocabulary=5000, length=10)
    assert set(DATASETS_OF_TEXT) == {"tinyshakespeare"} and corpora.HUB == "hub:"
