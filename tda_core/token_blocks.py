"""Positions of documents under the frozen output embedding, a block at a time, with or without a steering operator.

A block holds what an operator stands on, the states that the embedding takes, and the logits of all tokens or of a few:
a restricted log-softmax knows the others by the mass that the frozen model gives them together.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_core.language import LanguageModel
from tda_core.token_gradients import head_of
from tda_core.token_table import TokenTable


@dataclass(frozen=True, eq=False)
class Head:
    """The frozen output embedding. weight: (D, V). bias: (V,) or None. Logits are last @ weight + bias."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, model: LanguageModel) -> "Head":
        weight, bias = head_of(model)
        return cls(weight.float().T.contiguous(), None if bias is None else bias.float())

    @property
    def n_tokens(self) -> int:
        return self.weight.shape[1]

    def narrowed(self, columns: Tensor | None) -> "Head":
        """The head of some tokens alone (None: all)."""
        if columns is None:
            return self
        return Head(self.weight[:, columns], None if self.bias is None else self.bias[columns])

    def logits(self, last: Tensor) -> Tensor:
        """Frozen logits (b, V)."""
        product = last @ self.weight
        return product if self.bias is None else product.add_(self.bias)


@dataclass(frozen=True, eq=False)
class Block:
    """Positions that an operator is applied to. last: (b, D). hidden: (b, d), the same tensor where operators stand on
    the last states. targets: (b,) numbers among the head's tokens. rest: (b, 1) log of the mass of all other tokens,
    None where the head has them all."""

    head: Head
    last: Tensor
    hidden: Tensor
    targets: Tensor
    rest: Tensor | None = None

    def steered(self, shift: Tensor | None) -> Tensor:
        """Logits under a shift (d, c) of the head on `hidden` (None: none), and `rest` behind them: (b, c or c + 1)."""
        if shift is None:
            found = self.head.logits(self.last)
        elif self.hidden is self.last:
            found = Head(self.head.weight + shift, self.head.bias).logits(self.last)
        else:
            found = self.head.logits(self.last).addmm_(self.hidden, shift)
        return found if self.rest is None else torch.cat([found, self.rest], 1)

    def log_likelihoods(self, shift: Tensor | None) -> Tensor:
        """log p of the targets: (b,)."""
        logits = self.steered(shift)
        return logits.gather(1, self.targets[:, None])[:, 0] - logits.logsumexp(1)

    def gains(self, projected: Tensor, matrices: Tensor, columns: Tensor | None) -> Tensor:
        """What each operator P a_k adds to log p of the targets: (K, b).

        projected: the states times P, (b, r). matrices: (K, r, V). columns: the tokens of the head, None for all.
        Equal to differences of `log_likelihoods`, without the operators themselves and with one pass of exponentials.
        """
        frozen = self.head.logits(self.last)
        before, found = self._normaliser(frozen.clone()), torch.empty(len(matrices), len(frozen), device=frozen.device)
        held = torch.empty_like(frozen)
        for k, matrix in enumerate(matrices):
            a = matrix if columns is None else matrix[:, columns]
            shifted = (projected * a[:, self.targets].T).sum(1)
            found[k] = shifted - self._normaliser(torch.addmm(frozen, projected, a, out=held)) + before
        return found

    def pushes(self) -> Tensor:
        """e_y - p of each position: the rise of log p of the target with each logit, (b, c)."""
        found = self.steered(None).softmax(1)[:, : self.head.n_tokens].neg_()
        found[torch.arange(len(found)), self.targets] += 1
        return found

    def _normaliser(self, logits: Tensor) -> Tensor:
        """log of the sum of exponentials, (b,), of logits without the rest's, which are used up."""
        top = logits.amax(1, keepdim=True)
        own = (logits.sub_(top).exp_().sum(1, keepdim=True).log_() + top)[:, 0]
        return own if self.rest is None else torch.logaddexp(own, self.rest[:, 0])


@dataclass(frozen=True, eq=False)
class Source:
    """Where blocks come from: a table, the frozen head, and which log-softmax is asked for.

    on_last: operators stand on the last states. common: (m,) tokens that restricted log-softmaxes keep besides the
    targets, None for full ones. budget: bytes of a block. masses: (N, 1) log of the whole mass of the frozen logits,
    where it is known already.
    """

    table: TokenTable
    head: Head
    on_last: bool
    common: Tensor | None
    budget: int
    masses: Tensor | None = None

    def columns(self, targets: Tensor) -> Tensor | None:
        """The tokens that stand in a log-softmax over these targets, rising; None for all."""
        return None if self.common is None else torch.cat([self.common, targets.to(self.common)]).unique()

    def size(self, n_columns: int) -> int:
        """Most positions of a block, whose logits are held about four times at once."""
        return max(1, self.budget // (16 * n_columns))

    def blocks(self, rows: Tensor, columns: Tensor | None) -> Iterator[tuple[Tensor, Block]]:
        """The positions (b,) and what stands there, a block at a time."""
        head = self.head.narrowed(columns)
        for part in rows.split(self.size(head.n_tokens)):
            yield part, self.block(part, columns, head)

    def block(self, rows: Tensor, columns: Tensor | None, head: Head) -> Block:
        weight = self.head.weight
        last = self.table.last[rows].to(weight)
        hidden = last if self.on_last else self.table.hidden[rows].to(weight)
        targets = self.table.targets[rows].to(weight.device)
        if columns is None or len(columns) == self.head.n_tokens:
            return Block(head, last, hidden, targets)
        own = head.logits(last).logsumexp(1, keepdim=True)
        total = self.log_masses(last) if self.masses is None else self.masses[rows].to(weight)
        # what the others have, never below what rounding leaves of nothing
        rest = total + torch.log1p(-(own - total).exp().clamp_max(1 - 1e-6))
        return Block(head, last, hidden, torch.searchsorted(columns, targets), rest)

    def log_masses(self, last: Tensor) -> Tensor:
        """logsumexp of all V frozen logits, (b, 1), in blocks of positions."""
        parts = last.split(self.size(self.head.n_tokens))
        return torch.cat([self.head.logits(part).logsumexp(1, keepdim=True) for part in parts])
