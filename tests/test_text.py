"""Windows of words: each followed by its target, from a vocabulary of the most frequent."""

import pytest
import torch

from tda_core.data.text import UNKNOWN, help_topics, word_windows

TEXT = "the cat sat on the mat, and the dog sat by the cat."


def test_windows_hold_the_words_and_the_word_that_follows():
    found = word_windows(TEXT, 11, 3, vocabulary=20, source="a test")
    words = TEXT.replace(",", " ,").replace(".", " .").split()
    for i in range(11):
        assert found.text(i).split() == words[i : i + 3]
        assert found.words[found.targets[i]] == words[i + 3]
    assert found.source == "a test" and len(set(found.words)) == len(found.words)


def test_rare_words_share_a_token():
    found = word_windows(TEXT, 5, 3, vocabulary=3)
    assert found.words[0] == UNKNOWN and found.words[1] == "the" and len(found.words) == 3
    assert found.text(0).split() == ["the", *[w if w in found.words else UNKNOWN for w in ("cat", "sat")]]


def test_pythons_help_topics_are_enough_for_ten_thousand_windows():
    found = word_windows(help_topics(), 10_000, 16, vocabulary=3000)
    assert found.tokens.shape == (10_000, 16) and found.source.startswith("help topics of Python 3.")
    assert len(torch.unique(found.tokens, dim=0)) > 8_000  # tables and rulers repeat
    assert float((found.tokens == 0).double().mean()) < 0.05


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n": 13, "length": 3}, "a text of 15 words has 12 windows, not 13"),
        ({"n": 0, "length": 3}, "n must be >= 1, got 0"),
        ({"n": 1, "length": 0}, "length must be >= 1, got 0"),
    ],
)
def test_bad_sizes_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        word_windows(TEXT, **sizes, vocabulary=5)
