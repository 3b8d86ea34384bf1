"""Training a language model's K steering operators together, by Adam with gradients written out.

Operators are linear in the logits, and the gradients of fidelity, stability and linearity in the logits are
differences of probabilities (softmax minus one-hot, steered minus frozen softmax), so no graph is kept: an operator's
gradient is a product of states with those differences, accumulated over blocks of positions (`steering_losses` has the
same losses for classifiers, and is the reference that tests compare with).
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.examples import hash_of
from tda_core.memory import refuse_beyond
from tda_core.steering_losses import linearity_residual
from tda_core.store import Store
from tda_core.token_blocks import Block, Head, Source
from tda_core.token_steering import SteeredDocuments, TokenOperators, TokenSteering, fixed_basis
from tda_core.token_steering_state import BETAS, State, move


def fit_token_operators(
    documents: SteeredDocuments, settings: TokenSteering, *, seed: int, store: Store | None = None
) -> tuple[TokenOperators, Tensor]:
    """Train one operator for every subset, all together: the operators, and the losses of every step (steps, 3).

    The losses are fidelity, stability and linearity before weighting, the first two per token and as means over
    subsets. store: where the state of training is kept every `save_every` steps, so that a stopped run goes on there,
    bit for bit. Raises MemoryError, before anything is allocated, where matrices and moments exceed what is available;
    ValueError for a rank that the states do not have; and FloatingPointError where training diverged.
    """
    head, k = Head.of(documents.model), documents.membership.shape[0]
    device = head.weight.device
    width = documents.table.hidden.shape[1]
    rank = width if settings.basis == "identity" else settings.rank
    n_held = (2 + (settings.second_moment == "own")) * k * rank * head.n_tokens
    n_outside = documents.table.n_documents if settings.outside is None else settings.outside
    n_held += n_outside * int(documents.table.lengths.max()) * head.n_tokens  # their frozen probabilities
    what = f"{k} operators of {rank} x {head.n_tokens} with their moments"
    refuse_beyond(4 * n_held + settings.budget, what, device)
    source = Source(documents.table, head, settings.layer is None, None, settings.budget)
    moment, masses, common = _survey(source, settings)
    source = replace(source, masses=masses, common=common)
    key = None
    if store is not None:
        weights = None if documents.weights is None else hash_of([documents.weights])
        made_of = {"model": documents.model.identity, "documents": documents.identity, "weights": weights}
        membership = [documents.membership.shape[0], documents.membership.indices, documents.membership.indptr]
        # how often a run is saved changes nothing of it
        key = made_of | {"membership": membership, "settings": settings.but(save_every=1), "seed": seed}
    held = None if store is None else store.load("token_steering", key)
    projection = fixed_basis(settings, moment, seed=seed).to(device)
    if held is None:
        state = State.start(projection, (k, rank, head.n_tokens), settings)
    else:
        state = State({name: value.to(device) for name, value in held.items()}, settings)
    training = _Training(documents, source, settings, seed)
    for step in tqdm(range(state.step, settings.steps), desc="steering", leave=False):
        training.advance(state, step)
        done = step + 1 == settings.steps
        if done or (step + 1) % settings.save_every == 0:
            if not torch.isfinite(state["matrices"]).all():
                raise FloatingPointError(f"steering diverged by step {step + 1}: lower rate={settings.rate}")
            if store is not None:
                store.save("token_steering", key, state.finished() if done else state.tensors)
    matrices, projection = state["matrices"], state["projection"]
    return TokenOperators(documents.model, settings, projection, matrices, common), state["losses"]


def _survey(source: Source, settings: TokenSteering) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean h'h of the states (d, d); for restricted log-softmaxes the log-mass of each position (N, 1) and the tokens
    that are most probable on average, rising (m,)."""
    width, restricted = source.table.hidden.shape[1], settings.restricted
    full = restricted is None or restricted >= source.head.n_tokens
    moment, mean, masses = torch.zeros(width, width, dtype=torch.float64), 0.0, []
    for _, block in source.blocks(torch.arange(len(source.table)), None):
        moment += (block.hidden.T @ block.hidden).cpu()
        if not full:
            logits = block.steered(None)
            masses.append(logits.logsumexp(1, keepdim=True).cpu())
            mean = mean + logits.softmax(1).sum(0)
    moment = (moment / len(source.table)).float()
    return (moment, None, None) if full else (moment, torch.cat(masses), mean.topk(restricted).indices.sort().values)


@dataclass(frozen=True, eq=False)
class _Outside:
    """The documents of one step's stability and linearity.

    parts: of positions, each a block, which of the documents its positions are of (b,), and its frozen probabilities
    (b, c). shares: (K, documents) weights of a position, 0 for members; they sum to 1 over an operator's positions.
    lengths: (documents,). columns: see `Source`. pull: (documents, K), the gradient of the weighted linearity in what
    is measured, None without it.
    """

    parts: list[tuple[Block, Tensor, Tensor]]
    shares: Tensor
    lengths: Tensor
    columns: Tensor | None
    pull: Tensor | None = None


class _Training:
    """Gradients of one step after the other. What a step draws depends on the seed and its number alone."""

    def __init__(self, documents: SteeredDocuments, source: Source, settings: TokenSteering, seed: int) -> None:
        self.documents, self.source, self.settings, self.seed = documents, source, settings, seed
        rows = documents.membership.tocsr()
        ends = rows.indptr
        self.k = rows.shape[0]
        # each subset's documents, in an order of its own that its batches follow round and round
        self.orders = [
            np.random.default_rng([seed, k]).permutation(rows.indices[ends[k] : ends[k + 1]]) for k in range(self.k)
        ]
        self.residual = None
        if settings.linearity:
            sketch = (settings.sketch, settings.gamma)
            self.residual = linearity_residual(documents.membership, *sketch, seed=seed).to(source.head.weight.device)

    def advance(self, state: State, step: int) -> None:
        """One step of Adam for all operators, and for the basis where it is learned."""
        settings, outside = self.settings, self._outside(step)
        projection, losses = state["projection"], torch.zeros(3, dtype=torch.float64)
        if self.residual is not None:
            outside, losses[2] = self._with_pull(outside, state)
        own, pull = settings.second_moment == "own", torch.zeros_like(projection)
        if not own:
            state["second"].mul_(BETAS[1])
        starts = step == 0 and settings.full_start
        if starts:
            losses[0] = self._start(state["first"], projection)
        for k in range(self.k):
            if starts:  # all else is flat at zero, and the matrices' moments hold nothing yet
                gradient = state["first"][k].clone()
                state["first"][k].zero_()
            else:
                gradient, own_losses = self._gradient(k, step, state, outside, pull if state.learned else None)
                losses[:2] += own_losses / self.k
            state["first"][k].lerp_(gradient, 1 - BETAS[0])
            second = state["second"][k].mul_(BETAS[1]) if own else state["second"]
            second.add_(gradient.square_(), alpha=(1 - BETAS[1]) / (1 if own else self.k))
        for k in range(self.k):
            second = state["second"][k] if own else state["second"]
            move(state["matrices"][k], state["first"][k], second, step, settings.rate)
        if state.learned:
            first, second = state["projection_first"], state["projection_second"]
            first.lerp_(pull, 1 - BETAS[0])
            second.lerp_(pull.square(), 1 - BETAS[1])
            # in units of the basis's own size, as the rate is in units of the matrices'
            move(projection, first, second, step, settings.rate * float(projection.square().mean().sqrt()))
        state["losses"][step] = losses.float()
        state["step"].fill_(step + 1)

    def _start(self, gradients: Tensor, projection: Tensor) -> float:
        """Add the gradients of all operators' fidelities where all are zero to (K, r, V), and their mean value.

        Residuals are the frozen model's there, so that each document's part is formed once for all its subsets.
        """
        table, columns_of = self.documents.table, self.documents.membership
        weights = self._weights(torch.arange(len(table)))
        totals = torch.from_numpy(columns_of @ table.sums(weights.cpu()).numpy())
        totals = totals.clamp_min(torch.finfo(torch.float32).tiny).to(weights)
        value = 0.0
        for i, (start, end) in enumerate(pairwise(table.starts.tolist())):
            rows = torch.arange(start, end)
            tokens = self.source.columns(table.targets[rows])
            flow, nll = self._fidelity(rows, weights[rows], tokens, None)
            part = projection.T @ flow
            for k in columns_of.indices[columns_of.indptr[i] : columns_of.indptr[i + 1]].tolist():
                value += nll / float(totals[k]) / self.k
                if tokens is None:
                    gradients[k].add_(part, alpha=1 / float(totals[k]))
                else:
                    gradients[k].index_add_(1, tokens, part, alpha=1 / float(totals[k]))
        return value

    def _gradient(
        self, k: int, step: int, state: State, outside: _Outside, pull: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The gradient (r, V) of operator k's weighted losses, and its fidelity and stability (2,). pull: (d, r), to
        which the gradient in the basis is added."""
        matrix, projection = state["matrices"][k], state["projection"]
        gradient, losses = torch.zeros_like(matrix), torch.zeros(2, dtype=torch.float64)
        rows, weights, columns = self._own(k, step)
        jobs = [(columns, lambda shift: self._fidelity(rows, weights, columns, shift))]
        if self.settings.stability or outside.pull is not None:
            jobs.append((outside.columns, lambda shift: self._stability(k, outside, shift)))
        for i, (tokens, job) in enumerate(jobs):
            part = matrix if tokens is None else matrix[:, tokens]
            flow, losses[i] = job(projection @ part)
            if tokens is None:
                gradient.addmm_(projection.T, flow)
            else:
                gradient[:, tokens] += projection.T @ flow
            if pull is not None:
                pull.addmm_(flow, part.T)
        return gradient, losses

    def _own(self, k: int, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Positions of the subset's documents in this step, their weights (summing to 1) and the tokens they need."""
        order, table = self.orders[k], self.documents.table
        size = len(order) if self.settings.members is None else min(self.settings.members, len(order))
        picked = order[(step * size + np.arange(size)) % len(order)]
        rows = table.rows_of(torch.from_numpy(picked.astype(np.int64)))
        weights = self._weights(rows)
        weights = weights / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
        return rows, weights, self.source.columns(table.targets[rows])

    def _weights(self, rows: Tensor) -> Tensor:
        given = self.documents.weights
        return (torch.ones(len(rows)) if given is None else given[rows]).to(self.source.head.weight)

    def _fidelity(
        self, rows: Tensor, weights: Tensor, columns: Tensor | None, shift: Tensor | None
    ) -> tuple[Tensor, float]:
        """The gradient of the weighted cross-entropy in the shift (d, c), and its value, at a shift (None: at zero)."""
        c = self.source.head.n_tokens if columns is None else len(columns)
        flow, value, done = weights.new_zeros(self.documents.table.hidden.shape[1], c), 0.0, 0
        for part, block in self.source.blocks(rows, columns):
            own = weights[done : done + len(part)]
            done += len(part)
            p = block.steered(shift).softmax(1)
            at = p.gather(1, block.targets[:, None])
            value -= float((own * _log(at[:, 0])).sum())
            p.scatter_(1, block.targets[:, None], at - 1)
            flow.addmm_((self.settings.fidelity * own[:, None] * block.hidden).T, p[:, :c])
        return flow, value

    def _outside(self, step: int) -> _Outside:
        table, wanted = self.documents.table, self.settings.outside
        n, device = table.n_documents, self.source.head.weight.device
        picked = np.arange(n)
        if wanted is not None and wanted < n:
            picked = np.sort(np.random.default_rng([self.seed, self.k, step]).choice(n, wanted, replace=False))
        documents = torch.from_numpy(picked)
        rows, lengths = table.rows_of(documents), table.lengths[documents]
        own = torch.arange(len(documents)).repeat_interleave(lengths)
        columns = self.source.columns(table.targets[rows])
        parts, done = [], 0
        for part, block in self.source.blocks(rows, columns):
            parts.append((block, own[done : done + len(part)].to(device), block.steered(None).softmax(1)))
            done += len(part)
        shares = 1 - torch.from_numpy(self.documents.membership[:, picked].toarray()).float()
        shares = shares / (shares @ lengths.float())[:, None].clamp_min(1)
        return _Outside(parts, shares.to(device), lengths.to(device), columns)

    def _with_pull(self, outside: _Outside, state: State) -> tuple[_Outside, float]:
        """The same with the gradient of the linearity, whose rows are documents' gains per token; and its value."""
        gains = torch.zeros(len(outside.lengths), self.k, device=outside.lengths.device)
        before = [block.log_likelihoods(None) for block, _, _ in outside.parts]
        for k in range(self.k):
            matrix = state["matrices"][k]
            shift = state["projection"] @ (matrix if outside.columns is None else matrix[:, outside.columns])
            for frozen, (block, own, _) in zip(before, outside.parts, strict=True):
                gains[:, k].index_add_(0, own, block.log_likelihoods(shift) - frozen)
        left = (gains / outside.lengths[:, None]) @ self.residual.T
        pull = self.settings.linearity * 2 / len(left) * (left @ self.residual) / outside.lengths[:, None]
        return replace(outside, pull=pull), float(left.square().sum(1).mean())

    def _stability(self, k: int, outside: _Outside, shift: Tensor) -> tuple[Tensor, float]:
        """The gradient of KL(frozen || steered), and of the linearity, in the shift (d, c), and the KL's value."""
        flow, value, c = torch.zeros_like(shift), 0.0, shift.shape[1]
        for block, own, frozen in outside.parts:
            share, logits = outside.shares[k, own], block.steered(shift)
            p = logits.softmax(1)
            at = p.gather(1, block.targets[:, None])
            mass = logits.gather(1, block.targets[:, None]) - _log(at)
            kl = torch.special.xlogy(frozen, frozen).sum(1) - (frozen * logits).sum(1) + mass[:, 0]
            value += float((share * kl).sum())
            if outside.pull is not None:  # a gain's gradient in the logits is one-hot minus steered
                more = outside.pull[own, k, None] * block.hidden
                flow.addmm_(more.T, p[:, :c], alpha=-1)
                flow.index_add_(1, block.targets, more.T)
            flow.addmm_((self.settings.stability * share[:, None] * block.hidden).T, p.sub_(frozen)[:, :c])
        return flow, value


def _log(p: Tensor) -> Tensor:
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()
