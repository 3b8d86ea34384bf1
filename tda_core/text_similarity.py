"""Controls for attribution of text: what a method that knows nothing of training must be beaten by.

Each is fitted to the training pairs once and gives scores(queries) -> (n_query, n_train), higher for proponents.
"""

from dataclasses import dataclass

import torch
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from torch.nn import functional as F

from tda_core.language import BATCH_TOKENS, LanguageModel
from tda_core.text_pairs import TextPairs
from tda_core.token_rows import batches_of, lengths_of

# Words, and every other sign that is not a space: a response of "?" alone must count.
WORDS = r"\w+|[^\w\s]"


@dataclass(frozen=True, eq=False)
class TfIdf:
    """Cosine similarity of TF-IDF vectors of prompt and response together, weights from the training set."""

    vectoriser: TfidfVectorizer
    vectors: csr_matrix

    def scores(self, queries: TextPairs) -> Tensor:
        """Cosines (n_query, n_train) in [0, 1]."""
        found = self.vectoriser.transform(_texts(queries)) @ self.vectors.T
        return torch.from_numpy(found.toarray()).float()


def tfidf(train: TextPairs, ngrams: int = 1) -> TfIdf:
    """TF-IDF on words (`tfidf` in tables), or on runs of 1 to `ngrams` words (`ngram_tfidf`).

    Raises ValueError for ngrams < 1.
    """
    if ngrams < 1:
        raise ValueError(f"ngrams must be >= 1, got {ngrams}")
    vectoriser = TfidfVectorizer(token_pattern=WORDS, ngram_range=(1, ngrams))
    return TfIdf(vectoriser, vectoriser.fit_transform(_texts(train)).tocsr())


@dataclass(frozen=True, eq=False)
class Length:
    """Characters of a training pair, for every query alike: most scores are larger for long texts."""

    lengths: Tensor

    def scores(self, queries: TextPairs) -> Tensor:
        """Characters (n_query, n_train)."""
        return self.lengths.float().expand(len(queries), -1)


def length(train: TextPairs) -> Length:
    return Length(train.lengths)


@dataclass(frozen=True, eq=False)
class EmbeddingSimilarity:
    """Cosine similarity of a model's last hidden states, averaged over the tokens of a pair."""

    model: LanguageModel
    vectors: Tensor

    def scores(self, queries: TextPairs) -> Tensor:
        """Cosines (n_query, n_train) in [-1, 1]."""
        return embeddings(self.model, queries) @ self.vectors.T


def embedding_similarity(model: LanguageModel, train: TextPairs) -> EmbeddingSimilarity:
    """`feature_similarity` in tables."""
    return EmbeddingSimilarity(model, embeddings(model, train))


def embeddings(model: LanguageModel, pairs: TextPairs) -> Tensor:
    """Mean last hidden state over prompt and response, scaled to length 1: (n, d)."""
    examples = model.examples(pairs)
    places = torch.arange(examples.inputs.shape[1])
    lengths = lengths_of(examples)
    found = torch.empty(len(pairs), model.width)
    for rows in batches_of(lengths.tolist(), BATCH_TOKENS):
        inputs = examples.inputs[rows, : int(lengths[rows].max())]
        with torch.no_grad():
            hidden = model.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state.float().cpu()
        real = (places[: inputs.shape[1]] < lengths[rows, None])[..., None]
        found[rows] = (hidden * real).sum(1) / lengths[rows, None]
    return F.normalize(found, dim=1)


def _texts(pairs: TextPairs) -> list[str]:
    return [f"{prompt} {response}" for prompt, response in pairs.pairs]
