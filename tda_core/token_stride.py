"""STRIDE for causal language models: steering operators of subsets of documents, and sparse recovery.

Dagli et al. 2026 (arXiv 2606.05165), as `stride` has it for small models: fitted once, K operators shift the frozen
model's logits as training more on each subset would. A query is measured under all K without a gradient, y_k = Loss(o)
- Loss(o~_k) summed over its labelled tokens, and the influences w of the documents are recovered from y = M w.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from tda_core.designs import check_membership
from tda_core.examples import IGNORED, Examples
from tda_core.language import LanguageModel
from tda_core.recovery import Penalty
from tda_core.store import Store, load_tensors, save_tensors
from tda_core.stride import Recovery
from tda_core.token_files import mapped_token_table
from tda_core.token_steering import SteeredDocuments, TokenOperators, TokenSteering
from tda_core.token_steering_fit import fit_token_operators
from tda_core.token_table import token_table

OPTIONS = {"weights": None, "store": None, "states": None}


@dataclass(frozen=True, eq=False)
class TokenStride:
    """Fitted operators with their subsets. membership: (K, n). recovery: what `scores` recovers by. losses: (steps, 3),
    see `fit_token_operators`. train: hash of the training documents. first_order: see `TokenOperators.measurements`."""

    membership: sparse.csc_array
    operators: TokenOperators
    recovery: Recovery
    losses: Tensor
    train: str
    first_order: bool = False

    def measurements(self, queries: Examples) -> Tensor:
        """y (q, K) in nats: what each operator does for each query, higher where it helps."""
        return self.operators.measurements(queries, first_order=self.first_order)

    def scores(self, queries: Examples) -> Tensor:
        """Influence of every training document on every query: (q, n), positive for proponents."""
        return self.recovery(self.membership, self.measurements(queries)).weights

    def recovering(self, recovery: Recovery) -> "TokenStride":
        """The same operators with another recovery: nothing is trained again. ValueError for a target but "loss"."""
        if recovery.target != "loss":
            raise ValueError(f"a language model's queries are measured by their loss, got target {recovery.target!r}")
        return replace(self, recovery=recovery)

    def save(self, path: Path | str) -> None:
        """Write operators, subsets and settings to one file, with the hashes of model and documents."""
        operators = self.operators
        tensors = {"projection": operators.projection, "matrices": operators.matrices, "losses": self.losses}
        tensors["indices"] = torch.from_numpy(self.membership.indices)
        tensors["indptr"] = torch.from_numpy(self.membership.indptr)
        if operators.common is not None:
            tensors["common"] = operators.common
        recovery = {**vars(self.recovery), "penalty": asdict(self.recovery.penalty)}
        made_for = {"model": operators.model.identity, "data": self.train}
        described = {"steering": asdict(operators.settings), "recovery": recovery, "made_for": made_for}
        described["first_order"] = self.first_order
        save_tensors(path, tensors, {"kind": "TokenStride", **described})

    @classmethod
    def load(cls, path: Path | str, model: LanguageModel, train: Examples) -> "TokenStride":
        """Read what `save` wrote. Raises ValueError for a file of something else, another model or other documents."""
        tensors, metadata = load_tensors(path)
        if metadata.get("kind") != "TokenStride":
            raise ValueError(f"{path} does not hold a TokenStride, but {sorted(metadata)}")
        model.check_made_for(path, metadata["made_for"], train)
        recovery = Recovery(**{**metadata["recovery"], "penalty": Penalty(**metadata["recovery"]["penalty"])})
        settings, device = TokenSteering(**metadata["steering"]), model.device
        projection, matrices = tensors["projection"].to(device), tensors["matrices"].to(device)
        common = tensors["common"].to(device) if "common" in tensors else None
        operators = TokenOperators(model, settings, projection, matrices, common)
        indices, indptr = tensors["indices"].numpy(), tensors["indptr"].numpy()
        ones = np.ones(len(indices), dtype=np.float32)
        membership = sparse.csc_array((ones, indices, indptr), shape=(len(matrices), len(train)))
        made_for, first_order = metadata["made_for"]["data"], metadata.get("first_order", False)
        return cls(membership, operators, recovery, tensors["losses"], made_for, first_order)


def fit_token_stride(
    model: LanguageModel,
    train: Examples,
    membership: sparse.sparray,
    settings: TokenSteering | None = None,
    *,
    seed: int = 0,
    **options: Tensor | Store | Path | str | None,
) -> TokenStride:
    """Train an operator for every subset of the training documents: the one costly step.

    train: from `LanguageModel.examples`. membership: (K, n) from `tda_core.designs`. options: `weights`, (n, T) in
    [0, 1], each labelled position's weight in the fidelity (default 1); `store`, which keeps the state of training, so
    that a stopped run goes on there; `states`, a folder that the documents' states are written to and mapped from, in
    half precision, for more than fit in memory (`token_files`). The recovery is the Lasso, as published; `recovering`
    changes it. Raises ValueError for a membership that is not one of these documents, and what `fit_token_operators`
    raises.
    """
    unknown = set(options) - set(OPTIONS)
    if unknown:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}, expected one of {sorted(OPTIONS)}")
    check_membership(membership)
    settings, options = settings or TokenSteering(), OPTIONS | options
    columns = sparse.csc_array(membership, copy=True)
    columns.sum_duplicates()
    columns.eliminate_zeros()  # stored ones are no members
    weights = options["weights"]
    if weights is not None:
        if weights.shape != train.targets.shape:
            raise ValueError(f"weights must be {tuple(train.targets.shape)} as targets, got {tuple(weights.shape)}")
        weights = weights[(train.targets != IGNORED).to(weights.device)].cpu()
    if options["states"] is None:
        table = token_table(model, train, layer=settings.layer)
    else:
        table = mapped_token_table(model, train, options["states"], layer=settings.layer)
    documents = SteeredDocuments(model, table, columns, weights, train.hash)
    operators, losses = fit_token_operators(documents, settings, seed=seed, store=options["store"])
    return TokenStride(columns, operators, Recovery(), losses, train.hash)
