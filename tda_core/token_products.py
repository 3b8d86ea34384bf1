"""Products of the last layer's gradients, document by document, in closed form: one forward pass, nothing backwards.

In the output embedding alone (V, d), apart from the input embedding that it may be tied to, a document's gradient is

    G_i = sum_t (p_t - y_t) h_t'       over its labelled positions,

with p_t the model's probabilities, y_t the token that follows and h_t the state that the embedding takes. Kinds:

    dot       <G_q, G_i>
    cosine    the same over both norms
    adam_dot  <G_q, G_i / (sqrt v + eps)>, v the mean square of the training set's gradients, entry by entry, which
              Adam's second moment tracks
    damped    <G_q, (F + damping I)^-1 G_i>, F = 1/n sum_j G_j G_j' the empirical Fisher matrix, solved among documents

They are what `inner_products` computes for whole models. The vocabulary is taken slice by slice, so that the (n, V, d)
gradients are never held together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.examples import Examples
from tda_core.language import LanguageModel
from tda_core.store import load_tensors, save_tensors
from tda_core.token_table import TokenTable, token_table

KINDS = ("dot", "cosine", "adam_dot", "damped")
REDUCTIONS = ("mean", "sum")
EPSILON = 1e-8
# Floats of the training gradients in one slice of the vocabulary (256 MB), and of probabilities beside them.
HELD, PROBABILITIES = 2**26, 2**23


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of n documents, a slice of the vocabulary at a time.

    table: their positions. normalisers: (N,) logarithms of the sums over exp(logits). weights: (N,) of the positions
    in their document's loss.
    """

    model: LanguageModel
    table: TokenTable
    normalisers: Tensor
    weights: Tensor

    @classmethod
    def of(cls, model: LanguageModel, examples: Examples, reduction: str) -> "Gradients":
        table = token_table(model, examples)
        size = max(1, PROBABILITIES // len(head_of(model)[0]))
        normalisers = torch.cat([_logits(model, part).logsumexp(1) for part in table.last.split(size)])
        weights = torch.ones(len(table)) if reduction == "sum" else 1 / table.lengths[table.documents]
        return cls(model, table, normalisers, weights)

    def of_tokens(self, tokens: slice) -> Tensor:
        """Rows of the gradients that belong to a slice of the vocabulary: (n, s d), float32."""
        width = tokens.stop - tokens.start
        found = torch.empty(self.table.n_documents, width, self.table.last.shape[1])
        starts = self.table.starts.tolist()
        size = max(1, PROBABILITIES // (width * int(self.table.lengths.max())))
        for block in torch.arange(len(found)).split(size):
            first, end = starts[block[0]], starts[block[-1] + 1]
            residuals = self._residuals(slice(first, end), tokens)
            for i in block.tolist():
                own = slice(starts[i] - first, starts[i + 1] - first)
                torch.mm(residuals[own].T, self.table.last[starts[i] : starts[i + 1]], out=found[i])
        return found.flatten(1)

    def _residuals(self, rows: slice, tokens: slice) -> Tensor:
        """Weighted p - y (N', s) of some positions and tokens."""
        found = _logits(self.model, self.table.last[rows], tokens).sub_(self.normalisers[rows, None]).exp_()
        targets = self.table.targets[rows] - tokens.start
        inside = ((targets >= 0) & (targets < found.shape[1])).nonzero()[:, 0]
        found[inside, targets[inside]] -= 1
        return found.mul_(self.weights[rows, None])


@dataclass(frozen=True, eq=False)
class TokenProducts:
    """Products of last-layer gradients of one model with its training documents.

    reduction: of a document's loss over its tokens, "mean" or "sum". damping: of "damped" alone, in units of the mean
    squared norm of a training gradient over n. Raises ValueError for an unknown reduction, a damping that is not
    positive and finite, and as `token_table` does.
    """

    model: LanguageModel
    train: Examples
    reduction: str = "mean"
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction {self.reduction!r}, expected one of {REDUCTIONS}")
        if not (math.isfinite(self.damping) and self.damping > 0):
            raise ValueError(f"damping must be finite and > 0, got {self.damping}")

    def scores(self, queries: Examples, kind: str = "dot") -> Tensor:
        """Scores (n_query, n_train) of one kind, positive for proponents."""
        return self.all_scores(queries, (kind,))[kind]

    def all_scores(self, queries: Examples, kinds: Sequence[str] = KINDS) -> dict[str, Tensor]:
        """Scores by kind, in one pass over the training set. ValueError for an unknown kind and no kind at all."""
        if not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f"kinds must be some of {KINDS}, got {tuple(kinds)}")
        goals = Gradients.of(self.model, queries, self.reduction)
        found = {kind: torch.zeros(len(queries), len(self.train), dtype=torch.float64) for kind in ("dot", "adam_dot")}
        norms = [torch.zeros(len(part), dtype=torch.float64) for part in (queries, self.train)]
        for tokens in self._slices():
            asked, own = goals.of_tokens(tokens), self._gradients.of_tokens(tokens)
            found["dot"] += asked @ own.T
            for total, part in zip(norms, (asked, own), strict=True):
                total += part.square().sum(1)
            if "adam_dot" in kinds:
                found["adam_dot"] += (asked / (own.square().mean(0).sqrt() + EPSILON)) @ own.T
        if "cosine" in kinds:
            lengths = [total.sqrt().clamp_min(torch.finfo(total.dtype).tiny) for total in norms]
            found["cosine"] = found["dot"] / (lengths[0][:, None] * lengths[1])
        if "damped" in kinds:
            found["damped"] = self._solved(found["dot"])
        return {kind: found[kind].float() for kind in kinds}

    def _solved(self, products: Tensor) -> Tensor:
        """K_q (K / n + damping I)^-1, equal to the solve among the V d parameters."""
        n = len(self.train)
        damping = self.damping * float(self.kernel.diagonal().mean()) / n
        system = self.kernel / n + damping * torch.eye(n, dtype=self.kernel.dtype)
        return torch.cholesky_solve(products.T, torch.linalg.cholesky(system)).T

    @cached_property
    def kernel(self) -> Tensor:
        """Products of the training documents' gradients with each other: (n, n) float64."""
        total = torch.zeros(len(self.train), len(self.train), dtype=torch.float64)
        for tokens in self._slices():
            own = self._gradients.of_tokens(tokens)
            total += own @ own.T
        return total

    @cached_property
    def _gradients(self) -> Gradients:
        return Gradients.of(self.model, self.train, self.reduction)

    def _slices(self) -> Iterator[slice]:
        """Slices of the vocabulary whose training gradients fit together."""
        n_tokens, width = head_of(self.model)[0].shape
        size = max(1, HELD // (len(self.train) * width))
        for start in tqdm(range(0, n_tokens, size), desc="slices of the vocabulary", leave=False):
            yield slice(start, min(start + size, n_tokens))

    def save(self, path: Path | str) -> None:
        """Write the settings, the kernel, and the hashes of model and data to one file."""
        made_for = {"model": self.model.identity, "data": self.train.hash}
        settings = {"reduction": self.reduction, "damping": self.damping}
        save_tensors(Path(path), {"kernel": self.kernel}, {"token_products": settings, "made_for": made_for})

    @classmethod
    def load(cls, path: Path | str, model: LanguageModel, train: Examples) -> "TokenProducts":
        """Read what `save` wrote; ValueError where the model or the data are not the saved ones."""
        tensors, found = load_tensors(Path(path))
        if "token_products" not in found:
            raise ValueError(f"{path} does not hold token products, but {sorted(found)}")
        for name, own in (("model", model.identity), ("data", train.hash)):
            if found["made_for"][name] != own:
                raise ValueError(f"{path} was made for {name} {found['made_for'][name]}, but this {name} is {own}")
        loaded = cls(model, train, **found["token_products"])
        loaded.__dict__["kernel"] = tensors["kernel"]
        return loaded


def head_of(model: LanguageModel) -> tuple[Tensor, Tensor | None]:
    """The output embedding (V, d) and its bias (V,), None where it has none."""
    head = model.model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    return head.weight.detach(), None if bias is None else bias.detach()


def _logits(model: LanguageModel, last: Tensor, tokens: slice | None = None) -> Tensor:
    """Logits (N, s) of a slice of the vocabulary, all of it by default, in float32."""
    weight, bias = (None if part is None else part[tokens or slice(None)].float() for part in head_of(model))
    found = last @ weight.cpu().T
    return found if bias is None else found + bias.cpu()
