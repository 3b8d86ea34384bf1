"""Gradients of a linear head over the vocabulary, document by document, in closed form and a slice of tokens at a time.

    G_i = sum_t w_t (p_t - y_t) phi_t'        (V, f), over a document's labelled positions

with p_t the probabilities of a state that training starts from, y_t the token that follows, phi_t fixed features of the
frozen model. With the model's own probabilities and last states it is the loss' gradient in the output embedding, apart
from the input embedding that it may be tied to.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.language import LanguageModel
from tda_core.token_table import TokenTable

# Floats of the gradients in one slice of the vocabulary (256 MB), and of probabilities beside them (32 MB).
HELD, PROBABILITIES = 2**26, 2**23


@dataclass(frozen=True, eq=False)
class HeadGradients:
    """The gradients of the n documents of a table.

    features: (N, f) of its positions. weights: (N,) of the positions in their document's loss. start: (V,)
    probabilities at every position, None for the model's own, whose logarithms of sums over exp(logits) are then
    `normalisers` (N,).
    """

    model: LanguageModel
    table: TokenTable
    features: Tensor
    weights: Tensor
    start: Tensor | None = None
    normalisers: Tensor | None = None

    @classmethod
    def of(cls, model: LanguageModel, table: TokenTable, features: Tensor, weights: Tensor) -> "HeadGradients":
        """Those of the model's own probabilities."""
        size = max(1, PROBABILITIES // len(head_of(model)[0]))
        normalisers = torch.cat([_logits(model, part).logsumexp(1) for part in table.last.split(size)])
        return cls(model, table, features, weights, normalisers=normalisers)

    def of_tokens(self, tokens: slice) -> Tensor:
        """Rows of the gradients that belong to a slice of the vocabulary: (n, s, f), float32."""
        width = tokens.stop - tokens.start
        found = torch.empty(self.table.n_documents, width, self.features.shape[1])
        starts = self.table.starts.tolist()
        size = max(1, PROBABILITIES // (width * int(self.table.lengths.max())))
        for block in torch.arange(len(found)).split(size):
            first, end = starts[block[0]], starts[block[-1] + 1]
            residuals = self._residuals(slice(first, end), tokens)
            for i in block.tolist():
                own = slice(starts[i] - first, starts[i + 1] - first)
                torch.mm(residuals[own].T, self.features[starts[i] : starts[i + 1]], out=found[i])
        return found

    def _residuals(self, rows: slice, tokens: slice) -> Tensor:
        """Weighted p - y (N', s) of some positions and tokens."""
        targets = self.table.targets[rows] - tokens.start
        if self.start is None:
            found = _logits(self.model, self.table.last[rows], tokens).sub_(self.normalisers[rows, None]).exp_()
        else:
            found = self.start[tokens].expand(len(targets), -1).clone()
        inside = ((targets >= 0) & (targets < found.shape[1])).nonzero()[:, 0]
        found[inside, targets[inside]] -= 1
        return found.mul_(self.weights[rows, None])


def slices_of(n_tokens: int, floats: int) -> Iterator[slice]:
    """Slices of the vocabulary whose gradients, of so many floats a token, fit into memory together."""
    size = max(1, HELD // floats)
    for start in tqdm(range(0, n_tokens, size), desc="slices of the vocabulary", leave=False):
        yield slice(start, min(start + size, n_tokens))


def position_weights(table: TokenTable, reduction: str) -> Tensor:
    """Weights (N,) that make a document's loss its tokens' "mean" or "sum". ValueError for another reduction."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}, expected 'mean' or 'sum'")
    return torch.ones(len(table)) if reduction == "sum" else 1 / table.lengths[table.documents]


def head_of(model: LanguageModel) -> tuple[Tensor, Tensor | None]:
    """The output embedding (V, d) and its bias (V,), None where it has none."""
    head = model.model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return head.weight.detach(), None if bias is None else bias.detach()


def _logits(model: LanguageModel, last: Tensor, tokens: slice | None = None) -> Tensor:
    """Logits (N, s) of a slice of the vocabulary, all of it by default, in float32."""
    weight, bias = (None if part is None else part[tokens or slice(None)].float().cpu() for part in head_of(model))
    found = last @ weight.T
    return found if bias is None else found + bias
