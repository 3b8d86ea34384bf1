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

from tda_core.examples import Examples
from tda_core.language import LanguageModel
from tda_core.store import load_tensors, save_tensors
from tda_core.token_gradients import HeadGradients, head_of, position_weights, slices_of
from tda_core.token_table import token_table

KINDS = ("dot", "cosine", "adam_dot", "damped")
EPSILON = 1e-8


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
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"unknown reduction {self.reduction!r}, expected 'mean' or 'sum'")
        if not (math.isfinite(self.damping) and self.damping > 0):
            raise ValueError(f"damping must be finite and > 0, got {self.damping}")

    def scores(self, queries: Examples, kind: str = "dot") -> Tensor:
        """Scores (n_query, n_train) of one kind, positive for proponents."""
        return self.all_scores(queries, (kind,))[kind]

    def all_scores(self, queries: Examples, kinds: Sequence[str] = KINDS) -> dict[str, Tensor]:
        """Scores by kind, in one pass over the training set. ValueError for an unknown kind and no kind at all."""
        if not kinds or not set(kinds) <= set(KINDS):
            raise ValueError(f"kinds must be some of {KINDS}, got {tuple(kinds)}")
        goals = self._gradients_of(queries)
        found = {kind: torch.zeros(len(queries), len(self.train), dtype=torch.float64) for kind in ("dot", "adam_dot")}
        norms = [torch.zeros(len(part), dtype=torch.float64) for part in (queries, self.train)]
        for tokens in self._slices():
            asked, own = (part.of_tokens(tokens).flatten(1) for part in (goals, self.gradients))
            found["dot"] += asked @ own.T
            for total, part in zip(norms, (asked, own), strict=True):
                total += part.square().sum(1)
            if "adam_dot" in kinds:
                found["adam_dot"] += (asked / (own.square().mean(0).sqrt() + EPSILON)) @ own.T
        if "cosine" in kinds:
            lengths = [total.sqrt().clamp_min(torch.finfo(total.dtype).tiny) for total in norms]
            found["cosine"] = found["dot"] / (lengths[0][:, None] * lengths[1])
        if "damped" in kinds:
            found["damped"] = self.damped(found["dot"], self.damping)
        return {kind: found[kind].float() for kind in kinds}

    def damped(self, dots: Tensor, damping: float) -> Tensor:
        """Scores of kind "damped" from those of kind "dot", (q, n), which dampings share.

        K_q (K / n + damping I)^-1, equal to the solve among the V d parameters.
        """
        n = len(self.train)
        damping = damping * float(self.kernel.diagonal().mean()) / n
        system = self.kernel / n + damping * torch.eye(n, dtype=self.kernel.dtype)
        return torch.cholesky_solve(dots.double().T, torch.linalg.cholesky(system)).T

    @cached_property
    def kernel(self) -> Tensor:
        """Products of the training documents' gradients with each other: (n, n) float64."""
        total = torch.zeros(len(self.train), len(self.train), dtype=torch.float64)
        for tokens in self._slices():
            own = self.gradients.of_tokens(tokens).flatten(1)
            total += own @ own.T
        return total

    @cached_property
    def gradients(self) -> HeadGradients:
        """The training documents', of which slices of the vocabulary are computed: one forward pass."""
        return self._gradients_of(self.train)

    def _gradients_of(self, examples: Examples) -> HeadGradients:
        table = token_table(self.model, examples)
        return HeadGradients.of(self.model, table, table.last, position_weights(table, self.reduction))

    def _slices(self) -> Iterator[slice]:
        n_tokens, width = head_of(self.model)[0].shape
        return slices_of(n_tokens, len(self.train) * width)

    def save(self, path: Path | str) -> None:
        """Write the settings, the kernel, and the hashes of model and data to one file."""
        made_for = self.model.made_for(self.train)
        settings = {"reduction": self.reduction, "damping": self.damping}
        save_tensors(Path(path), {"kernel": self.kernel}, {"token_products": settings, "made_for": made_for})

    @classmethod
    def load(cls, path: Path | str, model: LanguageModel, train: Examples) -> "TokenProducts":
        """Read what `save` wrote; ValueError where the model or the data are not the saved ones."""
        tensors, found = load_tensors(Path(path))
        if "token_products" not in found:
            raise ValueError(f"{path} does not hold token products, but {sorted(found)}")
        model.check_made_for(path, found["made_for"], train)
        loaded = cls(model, train, **found["token_products"])
        loaded.__dict__["kernel"] = tensors["kernel"]
        return loaded
