"""Every method of the language-model tables by its name, with the settings that validation queries choose among."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from torch import Tensor

from tda_core import text_similarity
from tda_core.adapter_products import KINDS, STARTS, AdapterProducts
from tda_core.bm25 import bm25
from tda_core.designs import balanced
from tda_core.examples import Examples
from tda_core.gradients import random_scores
from tda_core.icp import PLAIN, fit_icp
from tda_core.inner_products import GradientProducts
from tda_core.language import LanguageModel
from tda_core.lm_bench import LMBench, Subject
from tda_core.lm_judging import Answer, Method, unprepared
from tda_core.logra import LoGraFamily, LoGraSettings
from tda_core.metrics import centred
from tda_core.ngram_lm import NAMES, NgramLM
from tda_core.problem import Problem
from tda_core.recovery import Penalty
from tda_core.stride import Recovery
from tda_core.term_weights import TermWeights, fit_term_weights
from tda_core.text_pairs import TextPairs
from tda_core.token_closed_form import TokenClosedForm, TokenSettings, token_closed_form
from tda_core.token_products import TokenProducts
from tda_core.token_simulation import HeadDynamics, SimulatedHead, simulate_head
from tda_core.token_steering import PUBLISHED, TokenSteering
from tda_core.token_stride import TokenStride, fit_token_stride

DAMPINGS = (0.01, 0.1, 1.0, 10.0)
# Kinds of last-layer products by their names in tables
LAST_LAYER = {"dot": "last_layer_dot", "adam_dot": "adam_dot"}
# Shares of the depth whose states closed forms may stand on
LAYERS = (0.5, 1.0)
# Terms that they sum: those of counts, and those that look at the network
COUNTED = ("unigram", "bigram", "trigram")
SUMMED = (*COUNTED, "related_bigram", "state")


def controls() -> dict[str, Method]:
    """Chance, length, words, and n-gram models of the subsets, whose predictions do not add up over documents."""
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
        "bigram_lm_additive": Method(_ngram_scores),
    }


def gradient_methods(parameters: Sequence[str], rank: int) -> dict[str, Method]:
    """Products of gradients and projected influence.

    parameters: patterns of the layers below the output whose gradients are taken; those of the output embedding are
    computed in closed form. rank: of LoGra's projections. Of a training document the loss of all its tokens counts, as
    in training, where each token of a batch weighs alike; of a query, as in the ground truth, a token's mean.
    """

    def problem(bench: Subject) -> Problem:
        return bench.model.problem(bench.corpus.train, parameters, reduction="sum")

    def head(bench: Subject) -> TokenProducts:
        return _holding(TokenProducts(bench.model, bench.examples("train"), reduction="sum"), "gradients")

    def projected(family: LoGraFamily, damping: float) -> Answer:
        logra = family.at(damping)
        return Answer(lambda queries: logra.scores(queries) / lengths(queries)[:, None])

    found = {name: Method(head, partial(_of_kind, kind=kind)) for kind, name in LAST_LAYER.items()}
    found["last_layer/tuned"] = Method(lambda b: (_holding(head(b), "kernel"), {}), _damped, DAMPINGS)
    for kind in ("dot", "cosine"):
        found[f"gradient_{kind}"] = Method(
            lambda b: _holding(GradientProducts(problem(b)), "held"), partial(_of_kind, kind=kind)
        )
    found["logra/tuned"] = Method(lambda b: LoGraFamily.of(problem(b), LoGraSettings(rank)), projected, DAMPINGS)
    return found


def steering_methods(n_operators: int, degree: int, rank: int, steps: int) -> dict[str, Method]:
    """STRIDE as published, as far as that is known, and with settings whose recovery is chosen on validation queries.

    n_operators: K. degree: subsets that each document joins. rank: of the tuned operators. They take one step from zero
    on all documents of all subsets, which on validation queries of another split was better than more steps on drawn
    documents; those as published take `steps` of these. "first_order" measures the same operators by their slopes.
    """

    def prepare(bench: Subject, steering: TokenSteering, **measured: bool) -> tuple[TokenStride, dict[str, Tensor]]:
        membership = balanced(len(bench.corpus.train), n_operators, degree, seed=0)
        stride = fit_token_stride(bench.model, bench.examples("train"), membership, steering)
        return replace(stride, **measured), {}

    def finish(prepared: tuple[TokenStride, dict[str, Tensor]], recovery: Recovery) -> Answer:
        stride, known = prepared

        def scores(queries: Examples) -> Tensor:
            if queries.hash not in known:  # measured once for all recoveries
                known[queries.hash] = stride.measurements(queries)
            return recovery(stride.membership, known[queries.hash]).weights / lengths(queries)[:, None]

        return Answer(scores)

    shares = {Penalty(intercept=True): (0.03, 0.1, 0.3), Penalty(nonnegative=True): (0.003, 0.01, 0.03, 0.1)}
    recoveries = [Recovery(lam, penalty, tolerance=1e-3) for penalty, lams in shares.items() for lam in lams]
    tuned, published = TokenSteering(rank=rank), PUBLISHED.but(steps=steps, rate=0.005, full_start=False)
    return {
        "stride/untuned": Method(partial(prepare, steering=published), finish, [Recovery("universal")]),
        "stride/tuned": Method(partial(prepare, steering=tuned), finish, recoveries),
        "stride_first_order/tuned": Method(partial(prepare, steering=tuned, first_order=True), finish, recoveries),
    }


def without_truth(n_operators: int, degree: int, rank: int = 64) -> dict[str, Method]:
    """The methods and controls that need no ground truth: what applications compare. Arguments as of
    `steering_methods`; layers' gradients are those of all matrices."""
    names = ("random", "length", "tfidf", "ngram_tfidf", "bm25/tuned", "feature_similarity")
    steering = steering_methods(n_operators, degree, rank=rank, steps=2)
    known = {
        **{name: method for name, method in controls().items() if name in names},
        **gradient_methods(("*weight",), 8),
        "stride_published": steering.pop("stride/untuned"),
        **steering,
        "forward_only/tuned": simulation(),
        "adapter/tuned": adapter(),
        "stride_closed_form": closed_forms()["stride_closed_form/untuned"],
        "icp": probing(),
    }
    return {name.removesuffix("/tuned"): method for name, method in known.items()}


def adapter() -> Method:
    """Products of what a linear map before the output embedding would learn, see `adapter_products`."""

    def fitted(bench: Subject, setting: tuple[str, str]) -> AdapterProducts:
        return _holding(AdapterProducts(bench.model, bench.examples("train"), *setting), "own")

    return Method(unprepared, fitted, list(product(STARTS, KINDS)))


def simulation() -> Method:
    """Forward-only simulation of the output head on frozen states, from where the network or token frequencies are."""
    starts = ("frequency", "model")
    grid = [HeadDynamics(damping=damping, start=start) for damping in (0.1, 1.0) for start in starts]

    def fitted(bench: Subject, dynamics: HeadDynamics) -> SimulatedHead:
        return _holding(simulate_head(bench.model, bench.examples("train"), dynamics), "own")

    return Method(unprepared, fitted, grid)


def closed_forms(residuals: str = "counts") -> dict[str, Method]:
    """Steering operators in closed form, their terms weighted by validation queries, and weighted alike; and, as a
    control, the terms that never look at the network.

    residuals: as in `TokenSettings`. The layer whose states count is chosen on validation queries too. The weights, one
    a term, are fitted to what the ground truth's subsets did to the validation queries.
    """

    def form(bench: Subject, terms: tuple[str, ...], layer: float, residuals: str = residuals) -> TokenClosedForm:
        options = {"share": share_of(bench), "layer": layer, "residuals": residuals}
        settings = TokenSettings(terms, (1.0,) * len(terms), **options)
        return _holding(token_closed_form(bench.model, bench.examples("train"), settings), "terms")

    def weighted(bench: LMBench, layer: float) -> TokenClosedForm:
        return weighted_terms(bench, form(bench, SUMMED, layer))[0]

    def without_network(bench: LMBench) -> TokenClosedForm:
        return weighted_terms(bench, form(bench, COUNTED, LAYERS[0], "counts"))[0]

    return {
        "stride_closed_form/tuned": Method(unprepared, weighted, LAYERS),
        "stride_closed_form/untuned": Method(lambda bench: form(bench, SUMMED, LAYERS[0])),
        "no_network/tuned": Method(without_network),
    }


def weighted_terms(bench: LMBench, form: TokenClosedForm) -> tuple[TokenClosedForm, TermWeights]:
    """The form with weights fitted to the validation queries, centred, and what they were fitted by."""
    terms = centred(form.term_scores(bench.examples("validation")), 1)
    outcomes = centred(bench.validation.outcomes.mean(1))
    found = fit_term_weights(terms, bench.validation.masks, outcomes)
    return form.weighted(found.values), found


def share_of(bench: Subject) -> float:
    """The share of the documents in a subset of the ground truth, .3 where there is none."""
    return float(bench.masks.double().mean()) if isinstance(bench, LMBench) else 0.3


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
    """The pairs cut to so many tokens (None: as they are): responses at their end, down to one token, then prompts at
    their beginning. Raises ValueError for fewer than 1."""
    if n_tokens is None:
        return pairs
    if n_tokens < 1:
        raise ValueError(f"n_tokens must be at least 1, got {n_tokens}")
    short, decode = [], model.tokenizer.decode
    for (before, after), prompt, response in zip(pairs.pairs, *model.split(pairs), strict=True):
        kept = min(len(response), max(1, n_tokens - len(prompt)))
        room = n_tokens - kept
        before = before if len(prompt) <= room else decode(prompt[len(prompt) - room :])
        short.append((before, after if kept == len(response) else decode(response[:kept])))
    return TextPairs(*zip(*short, strict=True))


def _ngram_scores(bench: LMBench) -> Answer:
    """What each document does to a bigram model of the average subset: `bigram_lm`, if effects added up."""
    model = NgramLM(bench.examples("train"), 2, len(bench.corpus.tokenizer), share_of(bench))
    return Answer(lambda queries: model.scores(queries) / lengths(queries)[:, None])


def _ngram_models(bench: LMBench, order: int) -> Answer:
    model = NgramLM(bench.examples("train"), order, len(bench.corpus.tokenizer))
    return Answer(lambda queries: -model.losses(bench.masks, queries) / lengths(queries))


def _of_kind(products: TokenProducts | GradientProducts, _: None, kind: str) -> Answer:
    def scores(queries: Examples) -> Tensor:
        found = products.scores(queries, kind)
        return found if kind == "cosine" else found / lengths(queries)[:, None]

    return Answer(scores)


def _holding(method: Any, name: str) -> Any:
    """The method after a property of it was computed that it keeps: part of building, not of the first query."""
    getattr(method, name)
    return method


def _damped(prepared: tuple[TokenProducts, dict[str, Tensor]], damping: float) -> Answer:
    """Damped products of the last layer; the plain ones of each set of queries are kept for the next damping."""
    products, known = prepared

    def scores(queries: Examples) -> Tensor:
        if queries.hash not in known:
            known[queries.hash] = products.scores(queries, "dot")
        return products.damped(known[queries.hash], damping).float() / lengths(queries)[:, None]

    return Answer(scores)


def lengths(queries: Examples) -> Tensor:
    """Labelled tokens of each query: (q,). Ground truths are of mean losses."""
    return (queries.targets >= 0).sum(1).cpu()
