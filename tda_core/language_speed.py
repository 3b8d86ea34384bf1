"""What scoring prompts costs: our paths, one pair at a time, and lm-evaluation-harness; and probing beside gradients.

All run on the same tokens and the same model. lm-evaluation-harness (the `peers` extra) scores each pair of context and
continuation, sorted by length and batched.
"""

import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tda_core.icp import PLAIN, fit_icp
from tda_core.inner_products import GradientProducts
from tda_core.language import LanguageModel
from tda_core.likelihood_paths import Queries
from tda_core.likelihoods import PATHS, log_likelihoods
from tda_core.speed import peak_memory
from tda_core.text_pairs import TextPairs

Scorer = Callable[[], Tensor]


def one_by_one(model: LanguageModel, prefixes: Sequence[list[int]], queries: Queries) -> Tensor:
    """Log-likelihoods (n, m) by a forward pass for each pair: the plain reference of `log_likelihoods`.

    For contexts that fit the window and are not empty.
    """
    found = torch.empty(len(prefixes), len(queries))
    with torch.no_grad():
        for i, prefix in enumerate(prefixes):
            for j, (prompt, response) in enumerate(zip(queries.prompts, queries.responses, strict=True)):
                tokens = torch.tensor([*model.start, *prefix, *prompt, *response], device=model.device)
                log_p = model.model(input_ids=tokens[None], use_cache=False).logits[0].float().log_softmax(1)
                places = torch.arange(len(tokens) - len(response), len(tokens))
                found[i, j] = log_p[places - 1, tokens[places]].sum()
    return found


def harness(model: LanguageModel, prefixes: Sequence[list[int]], queries: Queries, batch_size: int = 64) -> Tensor:
    """The same by lm-evaluation-harness: (n, m). Raises ModuleNotFoundError where it is not installed."""
    from lm_eval.models.huggingface import HFLM

    scorer = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size, device=str(model.device))
    asked = list(zip(queries.prompts, queries.responses, strict=True))
    requests = [
        ((f"{i}", f"{j}"), [*model.start, *prefix, *prompt], response)
        for i, prefix in enumerate(prefixes)
        for j, (prompt, response) in enumerate(asked)
    ]
    found = scorer._loglikelihood_tokens(requests, disable_tqdm=True)
    return torch.tensor([value for value, _ in found]).view(len(prefixes), len(queries))


def scorers(model: LanguageModel, prefixes: Sequence[list[int]], queries: Queries) -> dict[str, Scorer]:
    """Every way to score these pairs, by name: ours by path, and "lm_eval" with the best of some batch sizes."""
    ways: dict[str, Scorer] = {}
    for path in (*PATHS, "auto"):
        ways[path] = lambda path=path: log_likelihoods(model, prefixes, queries, path=path)[0]
    if importlib.util.find_spec("lm_eval"):
        for size in (16, 64, 256):
            ways[f"lm_eval/{size}"] = lambda size=size: harness(model, prefixes, queries, size)
    return ways


def seconds_each(ways: dict[str, Scorer], *, rounds: int = 5) -> dict[str, float]:
    """Median seconds of each, all in turn in every round, after one that is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                taken[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in taken.items()}


@dataclass(frozen=True)
class Cost:
    """Seconds, and the memory in bytes that a process held beyond what it held with the model loaded."""

    seconds: float
    peak_bytes: int


COSTED = ("icp", "gradient_dot")


def cost(folder: str | Path, pool: TextPairs, queries: TextPairs, method: str) -> Cost:
    """What scores (n_query, n_train) cost by "icp" or "gradient_dot", in a process of its own with this many threads.

    folder: of a saved model. Raises ValueError for another method.
    """
    if method not in COSTED:
        raise ValueError(f"unknown method {method!r}, expected one of {COSTED}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(_cost, str(folder), pool, queries, method).result()


def _cost(folder: str, pool: TextPairs, queries: TextPairs, method: str) -> Cost:
    model = LanguageModel.load(folder, device="cpu")

    def scores(pool: TextPairs, queries: TextPairs) -> Tensor:
        if method == "icp":
            return fit_icp(model, pool, PLAIN).scores(queries)
        return GradientProducts(model.problem(pool)).scores(model.examples(queries))

    scores(pool[:4], queries[:4])  # what is set up once
    before, start = peak_memory(), time.perf_counter()
    scores(pool, queries)
    return Cost(time.perf_counter() - start, peak_memory() - before)
