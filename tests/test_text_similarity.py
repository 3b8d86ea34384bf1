"""Controls: what they compute, written out by hand."""

import pytest
import torch
from language_toys import language_model, text_pairs

from tda_core.text_pairs import TextPairs
from tda_core.text_similarity import embedding_similarity, embeddings, length, tfidf

TRAIN = TextPairs(["the cat sat", "the dog", "a bird ?"], [" down", " ran", " flew"])
QUERIES = TextPairs(["the cat", "a fish"], [" down", " ?"])


def test_tfidf_by_hand():
    scores = tfidf(TRAIN).scores(QUERIES)
    documents = [(p + " " + r).split() for p, r in TRAIN.pairs]
    words = sorted({word for document in documents for word in document})
    # scikit-learn's smoothed inverse document frequency: ln((1 + n) / (1 + df)) + 1
    counts = torch.tensor([sum(word in document for document in documents) for word in words])
    idf = torch.log((1 + len(documents)) / (1 + counts.double())) + 1

    def vector(text: str) -> torch.Tensor:
        found = idf * torch.tensor([text.split().count(word) for word in words])
        return found / found.norm()

    expected = [[vector(p + r) @ vector(a + b) for a, b in TRAIN.pairs] for p, r in QUERIES.pairs]
    torch.testing.assert_close(scores.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    assert scores[1, 2] > 0 and scores[1, 0] == 0  # "?" is a word too


def test_runs_of_words_tell_order():
    train = TextPairs(["a b c", "c b a"], ["x", "x"])
    query = TextPairs(["a b c"], ["x"])
    words, runs = tfidf(train).scores(query)[0], tfidf(train, 3).scores(query)[0]
    torch.testing.assert_close(words[0], words[1])
    assert runs[0] > runs[1] + 0.1
    with pytest.raises(ValueError, match="ngrams must be >= 1, got 0"):
        tfidf(train, 0)


def test_length_counts_characters():
    assert length(TRAIN).scores(QUERIES).tolist() == [[16.0, 11.0, 13.0]] * 2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_embeddings_are_means_over_each_pair_alone(kind):
    model = language_model(kind)
    pairs = text_pairs(6)
    found = embeddings(model, pairs)
    for i, (prompt, response) in enumerate(pairs.pairs):
        tokens = torch.tensor([model.tokens([prompt + response])[0][:-1]])
        hidden = model.model.base_model(input_ids=tokens).last_hidden_state[0].detach().mean(0)
        torch.testing.assert_close(found[i], hidden / hidden.norm(), rtol=1e-4, atol=1e-5)
    scores = embedding_similarity(model, pairs).scores(pairs)
    torch.testing.assert_close(scores.diagonal(), torch.ones(6))
    torch.testing.assert_close(scores, found @ found.T)
