"""Log-likelihoods of many responses behind many prefixes, by three paths that give the same numbers.

"batched": every pair of prefix and query is a row of its own, sorted by length.
"prefix": keys and values of a prefix are computed once and reused by all queries behind it.
"packed": many queries stand in one row behind one prefix, under a mask by which they do not see each other.

Positions count from the beginning of each pair's own text on all of them, whatever the row looks like. Pairs that do
not fit the window, those whose prompt is empty, and those too long for layers that look back only so far take the
batched path.
"""

import logging
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from tda_core.language import LanguageModel
from tda_core.likelihood_paths import Queries, batched, by_prefix, packed

log = logging.getLogger(__name__)

PATHS = ("batched", "prefix", "packed")
PADDINGS = ("right", "left")
# By how much, relatively, a path's log-likelihoods may differ from the batched path's for it to be used, by type.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}
# Costs measured on models of .2 and 1.3 million parameters on two cores, in multiplications of a linear layer: one of
# attention's, and the copying of one float of a key or value.
ATTENTION, COPY = 1.5, 230.0
_USABLE: weakref.WeakKeyDictionary[LanguageModel, tuple[str, ...]] = weakref.WeakKeyDictionary()


def log_likelihoods(
    model: LanguageModel,
    prefixes: Sequence[list[int]],
    queries: Queries,
    *,
    path: str = "auto",
    padding: str = "right",
) -> tuple[Tensor, Tensor]:
    """log p(response | prefix, prompt) in nats, summed over tokens, (n, m); and which contexts were cut, (n, m) bool.

    prefixes: n lists of tokens, which may be empty. path: one of `PATHS`, or "auto", the cheapest for these lengths
    of `usable_paths`. padding: the side on which rows of the batched path are filled up. A context that is too long
    loses its beginning. Raises ValueError for an unknown path or padding, nothing to score, a response longer than
    the window, and log-likelihoods that are not finite, naming the pair.
    """
    if path not in (*PATHS, "auto"):
        raise ValueError(f"unknown path {path!r}, expected one of {(*PATHS, 'auto')}")
    if padding not in PADDINGS:
        raise ValueError(f"unknown padding {padding!r}, expected one of {PADDINGS}")
    if not len(prefixes) or not len(queries):
        raise ValueError(f"nothing to score: {len(prefixes)} prefixes, {len(queries)} queries")
    prefixes = [[*model.start, *prefix] for prefix in prefixes]
    lengths = torch.tensor([len(p) for p in prefixes])[:, None] + torch.tensor(queries.lengths) + 1
    cut = torch.zeros_like(lengths, dtype=torch.bool) if model.window is None else lengths > model.window
    alone = cut | torch.tensor([not prompt for prompt in queries.prompts])
    if (half := half_reach(model)) is not None:
        alone |= (lengths - 1 - torch.tensor(queries.lengths) > half) | (torch.tensor(queries.lengths) > half)
    if path == "auto":
        path = cheapest_path(model, prefixes, queries)
    if path == "batched" or not any(prefixes):
        alone = torch.ones_like(alone)
    found = torch.full(lengths.shape, torch.nan)
    rows, columns = (~alone.all(1)).nonzero()[:, 0], (~alone.all(0)).nonzero()[:, 0]
    with torch.no_grad():
        if len(rows):
            some, few = [prefixes[i] for i in rows.tolist()], queries.some(columns.tolist())
            parts = by_prefix(model, some, few) if path == "prefix" else packed(model, some, few, columns_of(model))
            for block, scores in parts:
                found[rows[block][:, None], columns] = scores
        if alone.any():
            found[alone] = batched(model, prefixes, queries, alone.nonzero(), padding)
    if not torch.isfinite(found).all():
        i, j = (~torch.isfinite(found)).nonzero()[0].tolist()
        raise ValueError(f"the log-likelihood of response {j} behind prefix {i} is NaN or infinite: broken weights?")
    return found, cut


def columns_of(model: LanguageModel) -> int:
    """Tokens of queries that are packed in one row: with more, attention costs more than fewer rows save."""
    columns, half = max(64, model.width), half_reach(model)
    return columns if half is None else min(columns, half)


def half_reach(model: LanguageModel) -> int | None:
    """Half of the columns that the layer with the shortest view looks back over, None where all look back over all.

    Sliding windows and chunks count columns of a row, not a text's own positions, and a mask of our own replaces
    theirs. So prefixes and queries share rows where each takes at most its half: there every layer sees all.
    """
    config = model.model.config.get_text_config()
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((span // 2 for span in spans if span), default=None)


def cheapest_path(model: LanguageModel, prefixes: Sequence[list[int]], queries: Queries) -> str:
    """The path of `usable_paths` with the least work for these lengths."""
    costs = path_costs(model, sum(map(len, prefixes)) / len(prefixes), queries)
    return min(usable_paths(model), key=costs.__getitem__)


def path_costs(model: LanguageModel, prefix_length: float, queries: Queries) -> dict[str, float]:
    """Work of each path for a pair of prefix and query, in multiplications a layer.

    A token costs the layer's parameters, and twice the width for each key that attention compares it with.
    """
    p, m, width = prefix_length, len(queries), model.width
    s = max(1.0, sum(queries.lengths) / m)
    layer = model.n_layer_parameters / model.model.config.get_text_config().num_hidden_layers

    def work(tokens: float, keys: float) -> float:
        return tokens * (layer + ATTENTION * 2 * width * keys)

    together = max(1.0, min(m, columns_of(model) / s))
    return {
        "batched": work(p + s, p + s),
        "prefix": work(p, p) / m + work(s, p + s) + COPY * 2 * width * p,
        "packed": work(p + together * s, p + together * s) / together,
    }


def usable_paths(model: LanguageModel) -> tuple[str, ...]:
    """The paths that give this model's own log-likelihoods on a small ragged test; the rest are logged, once.

    Architectures differ in which masks and caches they take: a path is used because it gives the right numbers.
    """
    if model not in _USABLE:
        _USABLE[model] = _tested_paths(model)
    return _USABLE[model]


def _tested_paths(model: LanguageModel) -> tuple[str, ...]:
    known = len(model.tokenizer)
    token = [i % known for i in range(3, 60)]
    prefixes = [token[:7], token[7:10]]
    queries = Queries([token[10:13], token[20:22]], [token[30:32], token[40:43]])
    expected, _ = log_likelihoods(model, prefixes, queries, path="batched")
    tolerance = TOLERANCES[model.dtype] * float(expected.abs().max())
    usable = ["batched"]
    for path in ("prefix", "packed"):
        try:
            found, _ = log_likelihoods(model, prefixes, queries, path=path)
        except Exception as error:
            log.warning("%s does not take the %s path (%s): not used", type(model.model).__name__, path, error)
            continue
        if float((found - expected).abs().max()) <= tolerance:
            usable.append(path)
        else:
            log.warning("%s gives other numbers on the %s path: not used", type(model.model).__name__, path)
    return tuple(usable)
