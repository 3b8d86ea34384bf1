"""Prompts with responses: checked once, indexed like tensors, compared pair by pair."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_core.text_pairs import TextPairs

PAIRS = TextPairs(["a b", "", "a b", "c"], [" x", "y", " x", " z z"])


def test_pairs_are_indexed_like_tensors():
    assert len(PAIRS) == 4
    assert PAIRS[1:3].pairs == (("", "y"), ("a b", " x"))
    assert PAIRS[torch.tensor([3, 0])].prompts == ("c", "a b")
    assert PAIRS[torch.tensor([False, True, False, True])].responses == ("y", " z z")
    assert (PAIRS[:1] + PAIRS[3:]).prompts == ("a b", "c")
    assert PAIRS.lengths.tolist() == [5, 1, 5, 5]


@given(st.lists(st.tuples(st.sampled_from("ab "), st.sampled_from("xy")), min_size=1, max_size=8))
def test_repeats_and_shared_pairs_are_those_of_a_plain_loop(pairs):
    prompts, responses = zip(*pairs, strict=True)
    found = TextPairs(prompts, responses)
    assert found.n_duplicates == len(pairs) - len(set(pairs))
    shared = found.shared_with(PAIRS + found[:1])
    for i, (prompt, response) in enumerate(pairs):
        plain = [(prompt.strip(), response) == (p.strip(), r.strip()) for p, r in (*PAIRS.pairs, pairs[0])]
        assert shared[i].tolist() == plain


def test_equal_texts_have_equal_hashes_and_others_do_not():
    assert PAIRS.hash == TextPairs(PAIRS.prompts, PAIRS.responses).hash
    assert len({PAIRS.hash, PAIRS[:3].hash, TextPairs(["a b "], ["x"]).hash, TextPairs(["a b"], [" x"]).hash}) == 4


@pytest.mark.parametrize(
    ("prompts", "responses", "error", "message"),
    [
        (["a"], ["b", "c"], ValueError, "1 prompts but 2 responses"),
        ([], [], ValueError, "must not be empty"),
        (["a", "b"], ["x", "  "], ValueError, r"responses\[1\] is empty"),
        (["a", 3], ["x", "y"], TypeError, r"prompts\[1\] must be text, got int"),
        ("ab", ["x", "y"], TypeError, "prompts must be a sequence of texts, got one text 'ab'"),
    ],
)
def test_what_is_no_set_of_pairs_is_refused(prompts, responses, error, message):
    with pytest.raises(error, match=message):
        TextPairs(prompts, responses)


def test_indices_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="not with the single number 2"):
        PAIRS[2]
    with pytest.raises(ValueError, match=r"a mask over 4 pairs must be \(4,\), got \(3,\)"):
        PAIRS[torch.ones(3, dtype=torch.bool)]
