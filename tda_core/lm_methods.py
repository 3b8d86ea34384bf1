"""Every method of the language-model tables by its name, with the settings that validation queries choose among.

A `Method` prepares what no setting changes, `prepare(bench)`, and finishes with one, `finish(prepared, setting)`, which
gives something with scores(queries). `judge` chooses the setting and times both on one thread.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tda_core import text_similarity
from tda_core.bm25 import bm25
from tda_core.designs import balanced
from tda_core.examples import Examples, hash_of
from tda_core.gradients import random_scores
from tda_core.icp import PLAIN, fit_icp
from tda_core.inner_products import GradientProducts
from tda_core.language import LanguageModel
from tda_core.lm_bench import LMBench, Subject
from tda_core.logra import LoGraFamily, LoGraSettings
from tda_core.metrics import Estimate, centred
from tda_core.ngram_lm import NAMES, NgramLM
from tda_core.problem import Problem
from tda_core.recovery import Penalty
from tda_core.speed import Watched, watched
from tda_core.store import Store
from tda_core.stride import Recovery
from tda_core.term_weights import fit_term_weights
from tda_core.text_pairs import TextPairs
from tda_core.token_closed_form import TokenClosedForm, TokenSettings, token_closed_form
from tda_core.token_products import TokenProducts
from tda_core.token_simulation import HeadDynamics, simulate_head
from tda_core.token_steering import PUBLISHED, TokenSteering
from tda_core.token_stride import TokenStride, fit_token_stride

DAMPINGS = (0.01, 0.1, 1.0, 10.0)
# Kinds of last-layer products by their names in tables
LAST_LAYER = {"dot": "last_layer_dot", "adam_dot": "adam_dot"}
# Shares of the depth whose states closed forms may stand on
LAYERS = (0.5, 1.0)
# Terms that they sum
SUMMED = ("unigram", "bigram", "trigram", "related_bigram", "state")


@dataclass(frozen=True)
class Answer:
    """Anything as a method: `scores` calls a function of the queries."""

    function: Callable[[Any], Tensor]

    def scores(self, queries: Any) -> Tensor:
        return self.function(queries)


def unchanged(prepared: Any, _: Any) -> Any:
    """`finish` of a method without settings."""
    return prepared


def unprepared(bench: Any) -> Any:
    """`prepare` of a method of which every setting changes all."""
    return bench


@dataclass(frozen=True)
class Method:
    """prepare: bench, or `Subject` where no ground truth is needed, -> anything. finish: (that, setting) -> an object
    with scores(queries), which gives scores (q, n), or predictions (m, q) of each subset.

    settings: what `finish` may be given; with more than one, the highest LDS on validation queries decides. texts:
    whether queries are text pairs, instead of sequences of tokens.
    """

    prepare: Callable[[Any], Any]
    finish: Callable[[Any, Any], Any] = unchanged
    settings: Sequence[Any] = (None,)
    texts: bool = False

    def queries(self, bench: Subject, part: str) -> Any:
        return getattr(bench.corpus, part) if self.texts else bench.examples(part)


@dataclass(frozen=True, eq=False)
class Judged:
    """scores: of the test queries. setting: the one that was chosen, as text, "" where there was nothing to choose.
    build_seconds: CPU seconds of one fit. query_ms: wall time. peak_mb: None where the system does not tell."""

    scores: Tensor
    setting: str
    build_seconds: float
    query_ms: float
    peak_mb: float | None
    lds: Estimate
    lds_raw: Estimate


def judge(bench: LMBench, method: Method, *, name: str = "", store: Store | None = None) -> Judged:
    """Choose a setting, fit with it, and answer the test queries, all timed on one thread but for the choice.

    store: where the outcome is kept under this name, so that a table that was stopped goes on where it stopped; a name
    must stand for one method with one set of parameters there.
    """

    def compute() -> dict[str, Tensor]:
        prepared = watched(lambda: method.prepare(bench))
        setting, text = method.settings[0], ""
        if len(method.settings) > 1:
            validation = method.queries(bench, "validation")
            setting, _ = bench.choose(lambda s: method.finish(prepared.value, s).scores(validation), method.settings)
            text = str(setting)
        found, *cost = _asked(method, prepared, setting, method.queries(bench, "test"))
        numbers = torch.tensor([math.inf if value is None else value for value in cost], dtype=torch.float64)
        return {"scores": found.contiguous(), "cost": numbers, "setting": torch.tensor(list(text.encode()) or [0])}

    key = {"method": name, "model": bench.model.identity, "truth": hash_of([bench.masks, bench.test.losses])}
    kept = compute() if store is None else store.get("judged", key, compute)
    found, (build, query, peak) = kept["scores"], kept["cost"].tolist()
    setting = bytes(kept["setting"].tolist()).decode().strip("\0")
    cost = build, query, None if math.isinf(peak) else peak
    return Judged(found, setting, *cost, bench.lds(found), bench.lds(found, raw=True))


def costs(subject: Subject, method: Method) -> tuple[float, float, float | None]:
    """CPU seconds of fitting with the first setting, milliseconds a test query, and peak memory in MB."""
    prepared = watched(lambda: method.prepare(subject))
    _, *cost = _asked(method, prepared, method.settings[0], method.queries(subject, "test"))
    return tuple(cost)


def _asked(method: Method, prepared: Watched, setting: Any, queries: Any) -> tuple[Tensor, float, float, float | None]:
    """Scores of the queries; CPU seconds of preparing and finishing, ms a query, peak MB."""
    built = watched(lambda: method.finish(prepared.value, setting))
    answer = watched(lambda: built.value.scores(queries))
    peaks = [part.megabytes for part in (prepared, built, answer) if part.megabytes is not None]
    return answer.value, prepared.cpu + built.cpu, 1e3 * answer.wall / len(queries), max(peaks, default=None)


def controls() -> dict[str, Method]:
    """Chance, length, words, and n-gram models of the subsets."""
    searches = ((1.5, 0.75), (0.5, 0.75), (1.5, 0.0), (0.5, 0.0))
    return {
        "random": Method(lambda b: Answer(lambda q: random_scores(len(q), len(b.corpus.train), seed=0))),
        "length": Method(lambda b: text_similarity.length(b.corpus.train), texts=True),
        "tfidf": Method(lambda b: text_similarity.tfidf(b.corpus.train), texts=True),
        "ngram_tfidf": Method(lambda b: text_similarity.tfidf(b.corpus.train, 3), texts=True),
        "bm25/tuned": Method(lambda b: b.corpus.train, lambda t, s: bm25(t, k1=s[0], b=s[1]), searches, texts=True),
        "feature_similarity": Method(
            lambda b: text_similarity.embedding_similarity(b.model, b.corpus.train), texts=True
        ),
        **{name: Method(partial(_ngram_models, order=order)) for name, order in NAMES.items()},
    }


def gradient_methods(parameters: Sequence[str], rank: int) -> dict[str, Method]:
    """Products of gradients and projected influence.

    parameters: patterns of the layers below the output whose gradients are taken; those of the output embedding are
    computed in closed form. rank: of LoGra's projections.
    """

    def problem(bench: Subject) -> Problem:
        return bench.model.problem(bench.corpus.train, parameters)

    def head(bench: Subject) -> TokenProducts:
        return TokenProducts(bench.model, bench.examples("train"))

    found = {name: Method(head, partial(_of_kind, kind=kind)) for kind, name in LAST_LAYER.items()}
    found["last_layer/tuned"] = Method(lambda b: _with_kernel(head(b)), _damped, DAMPINGS)
    for kind in ("dot", "cosine"):
        found[f"gradient_{kind}"] = Method(lambda b: GradientProducts(problem(b)), partial(_of_kind, kind=kind))
    settings = LoGraSettings(rank)
    found["logra/tuned"] = Method(lambda b: LoGraFamily.of(problem(b), settings), LoGraFamily.at, DAMPINGS)
    return found


def steering_methods(n_operators: int, degree: int, rank: int, steps: int) -> dict[str, Method]:
    """STRIDE as published, as far as that is known, and with settings whose recovery is chosen on validation queries.

    n_operators: K. degree: subsets that each document joins. rank: of the tuned operators. They take one step from zero
    on all documents of all subsets, which on validation queries of another split was better than more steps on drawn
    documents; those as published take `steps` of these.
    """

    def prepare(steering: TokenSteering, bench: Subject) -> TokenStride:
        membership = balanced(len(bench.corpus.train), n_operators, degree, seed=0)
        return fit_token_stride(bench.model, bench.examples("train"), membership, steering)

    def finish(stride: TokenStride, recovery: Recovery) -> Answer:
        recovering = stride.recovering(recovery)
        return Answer(lambda queries: recovering.scores(queries) / lengths(queries)[:, None])

    shares = {Penalty(intercept=True): (0.03, 0.1, 0.3), Penalty(nonnegative=True): (0.003, 0.01, 0.03, 0.1)}
    recoveries = [Recovery(lam, penalty, tolerance=1e-3) for penalty, lams in shares.items() for lam in lams]
    tuned, published = TokenSteering(rank=rank), PUBLISHED.but(steps=steps, rate=0.005)
    return {
        "stride/untuned": Method(partial(prepare, published), finish, [Recovery("universal")]),
        "stride/tuned": Method(partial(prepare, tuned), finish, recoveries),
    }


def simulation() -> Method:
    """Forward-only simulation of the output head on frozen states, from a head that knows nothing."""
    starts = ("frequency", "model")
    grid = [HeadDynamics(damping=damping, start=start) for damping in (0.1, 1.0) for start in starts]
    return Method(unprepared, lambda b, dynamics: simulate_head(b.model, b.examples("train"), dynamics), grid)


def closed_forms(residuals: str = "counts") -> dict[str, Method]:
    """Steering operators in closed form, their terms weighted by validation queries, and weighted alike.

    residuals: as in `TokenSettings`. The layer whose states count is chosen on validation queries too.
    """

    def weighted(bench: LMBench, layer: float) -> TokenClosedForm:
        share = float(bench.masks.double().mean())
        settings = TokenSettings(SUMMED, (1.0,) * len(SUMMED), share=share, layer=layer, residuals=residuals)
        form = token_closed_form(bench.model, bench.examples("train"), settings)
        terms = centred(form.term_scores(bench.examples("validation")), 1)
        outcomes = centred(bench.validation.outcomes.mean(1))
        return form.weighted(fit_term_weights(terms, bench.validation.masks, outcomes).values)

    def plain(bench: Subject) -> TokenClosedForm:
        settings = TokenSettings(SUMMED, (1.0,) * len(SUMMED), layer=LAYERS[0], residuals=residuals)
        return token_closed_form(bench.model, bench.examples("train"), settings)

    return {
        "stride_closed_form/tuned": Method(unprepared, weighted, LAYERS),
        "stride_closed_form/untuned": Method(plain),
    }


def probing() -> Method:
    """In-context probing, with each document cut to what leaves room for another one in the window."""

    def prepare(bench: Subject) -> Answer:
        model = bench.model
        room = None if model.window is None else (model.window - len(model.start) - 1) // 2
        pool = cropped(model, bench.corpus.train, room)
        icp = fit_icp(model, pool, PLAIN, variant="gain_per_token")
        return Answer(lambda queries: icp.scores(cropped(model, queries, room)))

    return Method(prepare, texts=True)


def cropped(model: LanguageModel, pairs: TextPairs, n_tokens: int | None) -> TextPairs:
    """The pairs with responses of at most so many tokens, prompts included (None: as they are)."""
    if n_tokens is None:
        return pairs
    prompts, responses = model.split(pairs)
    short = [
        response if len(prompt) + len(tokens) <= n_tokens else model.tokenizer.decode(tokens[: n_tokens - len(prompt)])
        for prompt, tokens, response in zip(prompts, responses, pairs.responses, strict=True)
    ]
    return TextPairs(pairs.prompts, tuple(short))


def _ngram_models(bench: LMBench, order: int) -> Answer:
    model = NgramLM(bench.examples("train"), order, len(bench.corpus.tokenizer))
    return Answer(lambda queries: -model.losses(bench.masks, queries) / lengths(queries))


def _of_kind(products: TokenProducts | GradientProducts, _: None, kind: str) -> Answer:
    return Answer(lambda queries: products.scores(queries, kind))


def _with_kernel(products: TokenProducts) -> tuple[TokenProducts, dict[str, Tensor]]:
    """Products whose kernel has been computed, and room for those of queries."""
    assert products.kernel.shape  # which is computed here, and kept
    return products, {}


def _damped(prepared: tuple[TokenProducts, dict[str, Tensor]], damping: float) -> Answer:
    """Damped products of the last layer; the plain ones of each set of queries are kept for the next damping."""
    products, known = prepared

    def scores(queries: Examples) -> Tensor:
        if queries.hash not in known:
            known[queries.hash] = products.scores(queries, "dot")
        return products.damped(known[queries.hash], damping).float()

    return Answer(scores)


def lengths(queries: Examples) -> Tensor:
    """Labelled tokens of each query: (q,). Ground truths are of mean losses."""
    return (queries.targets >= 0).sum(1)
