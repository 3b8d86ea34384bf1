"""Forward passes over prefixes and queries in three layouts of rows, see `tda_core.likelihoods`."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from tda_core.language import LanguageModel
from tda_core.text_pairs import TextPairs
from tda_core.token_rows import batches_of, batches_of_sum, cut_left, padded

# Tokens of one forward pass: what stays in a CPU's cache, and what keeps a GPU busy.
CPU_TOKENS, GPU_TOKENS = 2048, 2**16
# Keys that are copied for a token of a pass on the "prefix" path, at most; and floats of keys and values of all layers
# (1 GB in float32), which bound it for models that are not small.
KEYS, KEY_FLOATS = 8, 2**28
# Logits that are held at a time (128 MB in float32).
LOGITS = 2**25


@dataclass(frozen=True, eq=False)
class Queries:
    """Tokenised pairs whose responses are scored. prompts, responses: one list of tokens each."""

    prompts: list[list[int]]
    responses: list[list[int]]

    @classmethod
    def of(cls, model: LanguageModel, pairs: TextPairs) -> "Queries":
        return cls(*model.split(pairs))

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def n_response(self) -> Tensor:
        """Tokens of each response: (m,) int64."""
        return torch.tensor([len(response) for response in self.responses])

    @cached_property
    def tokens(self) -> list[list[int]]:
        """Prompt and response but for the last token, from which nothing is predicted."""
        return [p + r[:-1] for p, r in zip(self.prompts, self.responses, strict=True)]

    @cached_property
    def lengths(self) -> list[int]:
        """How many `tokens` each query has."""
        return [len(tokens) for tokens in self.tokens]

    def some(self, rows: Sequence[int]) -> "Queries":
        return Queries([self.prompts[i] for i in rows], [self.responses[i] for i in rows])

    def spots(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of every response token: its query, the place in that query's tokens that predicts it, and the token.

        The place is -1 for the first token after an empty prompt.
        """
        which = torch.arange(len(self)).repeat_interleave(self.n_response)
        first = torch.tensor([len(prompt) for prompt in self.prompts])
        begins = self.n_response.cumsum(0) - self.n_response
        place = torch.arange(len(which)) - begins[which] + first[which] - 1
        return which, place, torch.tensor(list(chain.from_iterable(self.responses)))


def budget(model: LanguageModel) -> int:
    """Tokens of one forward pass. Fewer where the logits of all of them have to be held."""
    most = CPU_TOKENS if model.device.type == "cpu" else GPU_TOKENS
    if model.has_plain_head:
        return most
    return min(most, max(1, LOGITS // model.model.config.get_text_config().vocab_size))


def batched(
    model: LanguageModel, prefixes: Sequence[list[int]], queries: Queries, pairs: Tensor, padding: str
) -> Tensor:
    """Log-likelihoods of some pairs (k, 2) of prefix, which begins with `start`, and query, each a row: (k,)."""
    contexts, responses = [], [queries.responses[j] for j in pairs[:, 1].tolist()]
    for (i, j), response in zip(pairs.tolist(), responses, strict=True):
        before = prefixes[i][len(model.start) :] + queries.prompts[j]
        context, _ = cut_left(model.start, before, response, model.window, f"responses[{j}]")
        contexts.append(context or [model.empty_context])
    all_rows = Queries(contexts, responses)
    found = torch.empty(len(pairs))
    for some in batches_of(all_rows.lengths, budget(model)):
        part = all_rows.some(some)
        ids, real = padded(part.tokens, padding)
        which, place, targets = part.spots()
        shift = ids.shape[1] - real.sum(1) if padding == "left" else torch.zeros(len(ids), dtype=torch.int64)
        inputs = {"input_ids": ids}
        if padding == "left":
            inputs |= {"attention_mask": real.long(), "position_ids": (real.cumsum(1) - 1).clamp_min(0)}
        scores = token_scores(model, inputs, which, place + shift[which], targets)
        found[some] = torch.zeros(len(some)).index_add_(0, which, scores)
    return found


def by_prefix(
    model: LanguageModel, prefixes: Sequence[list[int]], queries: Queries
) -> Iterator[tuple[list[int], Tensor]]:
    """Rows of prefixes and their log-likelihoods (b, m), with each prefix' keys and values computed once."""
    most = budget(model)
    longest = max(len(prefix) for prefix in prefixes)
    config = model.model.config.get_text_config()
    keys = min(KEYS * most, KEY_FLOATS // (2 * model.width * config.num_hidden_layers))
    # rows of queries at a time: as many tokens as a pass takes, and not too many copies of a prefix' keys
    costs = [max(n, (longest + n) * most // max(1, keys)) for n in queries.lengths]
    parts = batches_of(costs, most)
    width = max(len(part) * max(costs[j] for j in part) for part in parts)
    for some in batches_of([max(width, len(prefix)) for prefix in prefixes], most):
        ids, real = padded([prefixes[i] for i in some])
        kept = model.model.base_model(input_ids=ids.to(model.device), use_cache=True).cache
        found = torch.empty(len(some), len(queries))
        for part in parts:
            found[:, part] = _behind(model, kept, real, queries.some(part))
        yield some, found


def _behind(model: LanguageModel, kept: object, real: Tensor, queries: Queries) -> Tensor:
    """Log-likelihoods (b, c) of queries behind b prefixes whose keys and values are kept; real: (b, P) bool."""
    b, c = len(real), len(queries)
    cache = copy.deepcopy(kept)
    cache.batch_repeat_interleave(c)
    ids, own = padded(queries.tokens)
    known = real.repeat_interleave(c, 0)
    positions = known.sum(1, keepdim=True) + torch.arange(ids.shape[1])
    inputs = {
        "input_ids": ids.repeat(b, 1),
        "attention_mask": torch.cat([known, own.repeat(b, 1)], 1).long(),
        "position_ids": positions,
        "cache": cache,
    }
    which, place, targets = queries.spots()
    rows = (torch.arange(b)[:, None] * c + which).flatten()
    scores = token_scores(model, inputs, rows, place.repeat(b), targets.repeat(b))
    return torch.zeros(b * c).index_add_(0, rows, scores).view(b, c)


def packed(
    model: LanguageModel, prefixes: Sequence[list[int]], queries: Queries, columns: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Rows of prefixes and their log-likelihoods (b, m), with up to `columns` tokens of queries in one row."""
    packs = batches_of_sum(queries.lengths, columns)
    widest = max(sum(queries.lengths[j] for j in pack) for pack in packs)
    lengths = [len(prefix) + widest for prefix in prefixes]
    for some in batches_of(lengths, budget(model)):
        ids, real = padded([prefixes[i] for i in some])
        found = torch.empty(len(some), len(queries))
        for pack in packs:
            found[:, pack] = _one_pack(model, ids, real, queries.some(pack))
        yield some, found


def _one_pack(model: LanguageModel, ids: Tensor, real: Tensor, queries: Queries) -> Tensor:
    """Log-likelihoods (b, c) of the queries of one row behind b prefixes: ids, real (b, P)."""
    (b, width), c = ids.shape, len(queries)
    lengths = torch.tensor(queries.lengths)
    begins = lengths.cumsum(0) - lengths
    owner = torch.arange(c).repeat_interleave(lengths)
    within = torch.arange(len(owner)) - begins[owner]
    suffix = torch.tensor(list(chain.from_iterable(queries.tokens)))
    positions = torch.cat([torch.arange(width).expand(b, -1), real.sum(1, keepdim=True) + within], 1)
    # a column of a query sees what is real of the prefix, and of the queries its own up to itself
    group = torch.cat([torch.full((width,), -1), owner]).to(model.device)  # where masks, which are large, are made
    together = (group[:, None] == group) | (group == -1)
    seen = (together & torch.ones_like(together).tril()).expand(b, -1, -1).clone()
    seen[:, width:, :width] &= real[:, None].to(model.device)
    lowest = torch.finfo(model.dtype).min
    mask = torch.zeros(seen.shape, dtype=model.dtype, device=model.device).masked_fill_(~seen, lowest)[:, None]
    inputs = {
        "input_ids": torch.cat([ids, suffix.expand(b, -1)], 1),
        "attention_mask": mask,
        "position_ids": positions,
    }
    which, place, targets = queries.spots()
    rows = torch.arange(b).repeat_interleave(len(which))
    spots = (width + begins[which] + place).repeat(b)
    scores = token_scores(model, inputs, rows, spots, targets.repeat(b))
    return torch.zeros(b, c).index_put_((rows, which.repeat(b)), scores, accumulate=True)


def token_scores(model: LanguageModel, inputs: dict, rows: Tensor, columns: Tensor, targets: Tensor) -> Tensor:
    """log p of `targets` (N,) at those rows and columns of a forward pass: (N,) float32 on the CPU, in nats."""
    if "position_ids" in inputs and model.window is not None:  # which padding, and pairs that do not fit, may pass
        inputs["position_ids"] = inputs["position_ids"].clamp_max(model.window - 1)
    placed = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    placed.setdefault("use_cache", "cache" in inputs)
    rows, columns, targets = rows.to(model.device), columns.to(model.device), targets.to(model.device)
    with torch.no_grad():
        if not model.has_plain_head:
            logits = model.model(**placed).logits[rows, columns].float()
            return -F.cross_entropy(logits, targets, reduction="none").cpu()
        hidden = model.model.base_model(**placed).last_hidden_state[rows, columns]
        head, scores = model.model.get_output_embeddings(), []
        size = max(1, LOGITS // head.weight.shape[0])
        for part, target in zip(hidden.split(size), targets.split(size), strict=True):
            scores.append(-F.cross_entropy(head(part).float(), target, reduction="none"))
    return torch.cat(scores).cpu()
