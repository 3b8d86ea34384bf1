"""Every labelled position of a set of documents as a row: what the frozen model has there, and what it must predict.

Methods that stand on a language model's frozen states (steering operators, heads in closed form, products of its last
layer's gradients) need nothing else of it: one forward pass, no gradient.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tda_core.examples import IGNORED, Examples
from tda_core.language import BATCH_TOKENS, LanguageModel
from tda_core.token_rows import batches_of, lengths_of


@dataclass(frozen=True, eq=False)
class TokenTable:
    """N positions of n documents, document by document, in order.

    hidden: (N, d) states of one layer. last: (N, d) states that the output embedding takes, so that logits are its
    product with them. context: (N, c) int64, the token at the position and those before it, nearest first, -1 before
    the text begins. targets: (N,) the token to predict. documents: (N,) int64, rising. n_documents: n.
    """

    hidden: Tensor
    last: Tensor
    context: Tensor
    targets: Tensor
    documents: Tensor
    n_documents: int

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def lengths(self) -> Tensor:
        """Positions of each document: (n,)."""
        return torch.bincount(self.documents, minlength=self.n_documents)

    @cached_property
    def starts(self) -> Tensor:
        """The first position of each document, and N: (n + 1,)."""
        return torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    def rows_of(self, documents: Tensor) -> Tensor:
        """The positions of these documents, in their order: (m,)."""
        lengths = self.lengths[documents]
        ends = lengths.cumsum(0)
        shift = self.starts[documents] - (ends - lengths)
        return torch.arange(int(ends[-1])) + shift.repeat_interleave(lengths)

    def of(self, documents: Tensor) -> "TokenTable":
        """Some of the documents (indices), as a table of their own."""
        rows = self.rows_of(documents)
        numbered = torch.arange(len(documents)).repeat_interleave(self.lengths[documents])
        parts = (value[rows] for value in (self.hidden, self.last, self.context, self.targets))
        return TokenTable(*parts, numbered, len(documents))

    def sums(self, values: Tensor) -> Tensor:
        """Sums of values (N, ...) over the positions of each document: (n, ...)."""
        return values.new_zeros(self.n_documents, *values.shape[1:]).index_add_(0, self.documents, values)


def token_table(
    model: LanguageModel, examples: Examples, *, layer: int | float | None = None, n_context: int = 2
) -> TokenTable:
    """Run the model over the examples once and keep what stands at each labelled position, on the CPU in float32.

    layer: whose output `hidden` is: a number from 0 (the embeddings) to the number of layers, or a share of the depth
    such as .6; default what the output embedding takes, after the last norm. Raises ValueError for a layer that there
    is not, and a model whose logits are not its output embedding's product with the last states.
    """
    if not model.has_plain_head:
        raise ValueError(f"{type(model.model).__name__} does more to its last states than embed them: no token table")
    depth = model.model.config.get_text_config().num_hidden_layers
    place = round(layer * depth) if isinstance(layer, float) else layer
    if place is not None and not 0 <= place <= depth:
        raise ValueError(f"layer must lie in 0..{depth}, or be a share of the depth, got {layer}")
    labelled = (examples.targets != IGNORED).cpu()
    lengths = lengths_of(examples)
    counts = labelled.sum(1)
    ends = counts.cumsum(0)
    last = torch.empty(int(ends[-1]), model.width)
    hidden = last if place is None else torch.empty_like(last)
    for rows in batches_of(lengths.tolist(), BATCH_TOKENS):
        part = slice(0, int(lengths[rows].max()))
        inputs, own = examples.inputs[rows, part].to(model.device), labelled[rows, part]
        with torch.no_grad():
            found = model.model.base_model(input_ids=inputs, use_cache=False, output_hidden_states=place is not None)
        into = torch.cat([torch.arange(int(ends[row] - counts[row]), int(ends[row])) for row in rows])
        last[into] = found.last_hidden_state.float().cpu()[own]
        if place is not None:
            hidden[into] = found.hidden_states[place].float().cpu()[own]
    documents = torch.arange(len(examples)).repeat_interleave(counts)
    context = _context(examples.inputs.cpu(), n_context)[labelled]
    return TokenTable(hidden, last, context, examples.targets.cpu()[labelled], documents, len(examples))


def logits_of(model: LanguageModel, last: Tensor) -> Tensor:
    """The model's logits (N, V) for last states (N, d), in float32."""
    head = model.model.get_output_embeddings()
    with torch.no_grad():
        return head(last.to(model.device, model.dtype)).float().cpu()


def _context(inputs: Tensor, n: int) -> Tensor:
    """Of each position, its token and those before it: (n, T) -> (n, T, n_context)."""
    shifted = [inputs]
    for _ in range(n - 1):
        shifted.append(torch.nn.functional.pad(shifted[-1], (1, 0), value=-1)[:, :-1])
    return torch.stack(shifted, 2)
