"""Steering operators in closed form, carried over to tokens: a document's influence on another, position by position.

`closed_form` takes one damped Newton step of a head on fixed features. For language models the features that predict
retraining are those a model from scratch learns first: which tokens follow which contexts. The score is

    score(q, i) = sum over terms f of weight_f  1 / T_q sum_{t in q, s in i} term_f(t, s)

with the terms of `token_terms`. One forward pass over the training documents builds it, one over the queries reads it
out, and neither a subset is drawn nor a gradient taken.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tda_core.examples import Examples
from tda_core.language import LanguageModel
from tda_core.store import load_tensors, save_tensors
from tda_core.token_gradients import head_of, position_weights
from tda_core.token_table import TokenTable, logits_of, token_table
from tda_core.token_terms import CONTEXTS, Match, Positions, Related, Smoothing, State

TERMS = (*CONTEXTS, *(f"related_{name}" for name in CONTEXTS), "state")
RESIDUALS = ("counts", "model")
# Positions whose logits are held at a time times tokens of the vocabulary (32 MB).
LOGITS = 2**23


@dataclass(frozen=True)
class TokenSettings:
    """Which terms are summed, and what they are made of (see `token_terms`).

    terms: some of `TERMS`, weights: one for each. share: of the documents, that the models are trained on whose losses
    are to be predicted. smoothing: occurrences added to counts. Occurrences of the whole text's tokens added to each
    context's: prior in matches, mixing in related terms. damping: of related terms, in units of the mean variance of
    the output embedding over the text. layer, power: of the state term. residuals: "counts", those of a model that has
    learnt counts, for training from scratch; "model", the network's own, where training starts from it (fine-tuning).
    Raises ValueError for terms that are unknown, repeated or none, weights that are not finite and >= 0 or of another
    number, a share outside (0, 1), numbers that are not finite and positive, and unknown residuals.
    """

    terms: tuple[str, ...] = ("unigram", "bigram", "related_bigram")
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    share: float = 0.3
    smoothing: float = 0.1
    prior: float = 300.0
    mixing: float = 30.0
    damping: float = 1.0
    layer: int | float | None = None
    power: float = 16.0
    residuals: str = "counts"

    def __post_init__(self) -> None:
        if not self.terms or not set(self.terms) <= set(TERMS) or len(set(self.terms)) < len(self.terms):
            raise ValueError(f"terms must be different ones of {TERMS}, got {self.terms}")
        fits = len(self.weights) == len(self.terms) and all(math.isfinite(w) and w >= 0 for w in self.weights)
        if not fits:
            raise ValueError(f"weights must be {len(self.terms)} finite numbers >= 0, got {self.weights}")
        for name in ("smoothing", "prior", "mixing", "damping", "power"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be finite and > 0, got {getattr(self, name)}")
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie strictly between 0 and 1, got {self.share}")
        if self.residuals not in RESIDUALS:
            raise ValueError(f"unknown residuals {self.residuals!r}, expected one of {RESIDUALS}")


@dataclass(frozen=True, eq=False)
class TokenClosedForm:
    """Influence of the documents of a table. data: hash of the training examples that it is of."""

    model: LanguageModel
    table: TokenTable
    settings: TokenSettings
    data: str

    def scores(self, queries: Examples) -> Tensor:
        """Scores (n_query, n_train): by document, how far training on it lowers the query's mean loss, up to a factor.

        Raises ValueError as `token_table` does.
        """
        return torch.einsum(
            "f,fqn->qn", torch.tensor(self.settings.weights, dtype=torch.float32), self.term_scores(queries)
        )

    def term_scores(self, queries: Examples) -> Tensor:
        """Scores of each term by itself: (n_terms, n_query, n_train)."""
        table = _table(self.model, queries, self.settings)
        asked = self._positions(table, position_weights(table, "mean"))
        return torch.stack([term.scores(asked) for term in self.terms])

    def weighted(self, weights: Sequence[float]) -> "TokenClosedForm":
        """The same with other weights of the terms: n_terms."""
        made = replace(self, settings=replace(self.settings, weights=tuple(map(float, weights))))
        if "terms" in self.__dict__:
            made.__dict__["terms"] = self.terms
        return made

    @cached_property
    def terms(self) -> list[Match | Related | State]:
        own = self._positions(self.table, torch.ones(len(self.table)))
        return [self._term(name, own) for name in self.settings.terms]

    def _term(self, name: str, own: Positions) -> Match | Related | State:
        given, embedding = self.settings, head_of(self.model)[0].float().cpu()
        smoothing = Smoothing(given.share, given.smoothing, given.prior, given.mixing, given.damping)
        if name == "state":
            return State.of(own, given.power, smoothing)
        if name.startswith("related_"):
            return Related.of(own, CONTEXTS[name.removeprefix("related_")], embedding, smoothing)
        return Match.of(own, CONTEXTS[name], len(embedding), smoothing)

    def _positions(self, table: TokenTable, weights: Tensor) -> Positions:
        if self.settings.residuals == "counts":
            return Positions(table, weights, table.hidden)
        return Positions(table, weights, table.hidden, *network_residuals(self.model, table))

    def save(self, path: Path | str) -> None:
        """Write the training table and the settings, with the hashes of model and data, to one file."""
        names = ("hidden", "last", "context", "targets", "documents")
        metadata = {"token_closed_form": asdict(self.settings), "n_documents": self.table.n_documents}
        metadata |= {"made_for": {"model": self.model.identity, "data": self.data}}
        # hidden states may be the last ones themselves, and a file holds no tensor twice
        save_tensors(Path(path), {name: getattr(self.table, name).clone() for name in names}, metadata)

    @classmethod
    def load(cls, path: Path | str, model: LanguageModel, train: Examples) -> "TokenClosedForm":
        """Read what `save` wrote; ValueError where the model or the data are not the saved ones."""
        tensors, found = load_tensors(Path(path))
        if "token_closed_form" not in found:
            raise ValueError(f"{path} does not hold a closed form of tokens, but {sorted(found)}")
        model.check_made_for(path, found["made_for"], train)
        given = found["token_closed_form"]
        settings = TokenSettings(**given | {name: tuple(given[name]) for name in ("terms", "weights")})
        return cls(model, TokenTable(**tensors, n_documents=found["n_documents"]), settings, train.hash)


def token_closed_form(model: LanguageModel, train: Examples, settings: TokenSettings | None = None) -> TokenClosedForm:
    """One forward pass over the training documents. Raises ValueError as `token_table` does."""
    settings = settings or TokenSettings()
    return TokenClosedForm(model, _table(model, train, settings), settings, train.hash)


def network_residuals(model: LanguageModel, table: TokenTable) -> tuple[Tensor, Tensor]:
    """E'(p - y) of each position (N, d), E the output embedding centred, and the probability of its token (N,)."""
    embedding = head_of(model)[0].float().cpu()
    found, expected = [], []
    size = max(1, LOGITS // len(embedding))
    for last, targets in zip(table.last.split(size), table.targets.split(size), strict=True):
        p = F.softmax(logits_of(model, last), 1)
        found.append(p @ embedding - embedding[targets])
        expected.append(p.gather(1, targets[:, None])[:, 0])
    return torch.cat(found), torch.cat(expected)


def _table(model: LanguageModel, examples: Examples, settings: TokenSettings) -> TokenTable:
    return token_table(model, examples, layer=settings.layer, n_context=3)
