"""Judging a method by a bench of language models: its setting is chosen, its scores are computed, both are timed.

A `Method` prepares what no setting changes, `prepare(bench)`, and finishes with one, `finish(prepared, setting)`, which
gives something with scores(queries).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tda_core.estimates import Estimate
from tda_core.examples import hash_of
from tda_core.lm_bench import LMBench, Subject
from tda_core.speed import Watched, watched
from tda_core.store import Store
from tda_core.text_pairs import TextPairs


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

    truth = hash_of([bench.masks, bench.test.losses, bench.validation.losses])
    key = {"method": name, "settings": str(method.settings), "model": bench.model.identity, "truth": truth}
    kept = compute() if store is None else store.get("judged", key, compute)
    found, (build, query, peak) = kept["scores"], kept["cost"].tolist()
    setting = bytes(kept["setting"].tolist()).decode().strip("\0")
    cost = build, query, None if math.isinf(peak) else peak
    return Judged(found, setting, *cost, bench.lds(found), bench.lds(found, raw=True))


def scores_by_setting(
    subject: Subject, method: Method, queries: Mapping[str, TextPairs], settings: Sequence[Any] | None = None
) -> dict[Any, dict[str, Tensor]]:
    """Scores of sets of queries by setting and the set's name, (q, n) each: for a choice by something else than LDS.

    settings: some of the method's, all by default; what they share is prepared once.
    """
    prepared, found = method.prepare(subject), {}
    asked = {name: pairs if method.texts else subject.model.examples(pairs) for name, pairs in queries.items()}
    for setting in method.settings if settings is None else settings:
        answer = method.finish(prepared, setting)
        found[setting] = {name: answer.scores(of) for name, of in asked.items()}
    return found


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
