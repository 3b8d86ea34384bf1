"""A paper's claims against our metrics: what a run measured, the rules written before it, and the verdicts.

`papers/<slug>/claims.toml` holds a list of [[claim]]:
    id         short name, unique in the file
    text       the claim as a sentence
    published  the paper's own value, or why there is none
    metric     name of the metric that tests it; {dataset} stands for each of the datasets
    datasets   list of dataset names
    direction  "above" or "below": the side on which the claim is true
    threshold  number that the metric has to reach for the claim to hold
    sign       number that it has to pass for the claim to hold in sign only (default 0)
    unit       what to show after the number (default: the metric's own)
    why        one sentence: why this rule tests the claim

The rule, for direction "above" (mirrored for "below"): the claim `holds` if the whole 95% interval is at or
above the threshold, `holds in sign only` if not, but the value is greater than `sign`, and `does not hold`
otherwise; so the threshold may not be less strict than the sign.
"""

import json
import math
import re
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tda_core import paths
from tda_core.files import atomic_write

HOLDS, SIGN_ONLY, FAILS, NOT_RUN = "holds", "holds in sign only", "does not hold", "not run at this profile"
NOT_MEASURED = "not measured"  # of a dataset that has other metrics here
COLUMNS = ("claim", "dataset", "published", "reproduced", "verdict")

Metrics = Mapping[str, Mapping[str, Any]]


class Recorder:
    """Collects what one notebook measured; its last cell calls `write`."""

    def __init__(self, run: paths.Run) -> None:
        self.run = run
        self.metrics: dict[str, dict[str, Any]] = {}

    def record(
        self,
        name: str,
        value: float,
        low: float | None = None,
        high: float | None = None,
        n: int | None = None,
        unit: str = "",
    ) -> None:
        """Note one metric, named `<dataset>/<metric>/...`, with its 95% interval and the number of cases.

        Raises ValueError for a bad or repeated name, a value that is not finite, half an interval, or a value
        outside its interval; TypeError for what is not a number.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_.]+(/[a-z0-9_.]+)+", name):
            raise ValueError(f"a metric's name must read <dataset>/<metric>/... in a-z 0-9 _ . only, got {name!r}")
        if name in self.metrics:
            raise ValueError(f"metric {name} is recorded twice in {self.run.stem}")
        value = _finite(value, f"the value of {name}")
        if (low is None) != (high is None):
            raise ValueError(f"metric {name} needs both ends of its interval or none, got low={low}, high={high}")
        if low is not None:
            low, high = _finite(low, f"the low end of {name}"), _finite(high, f"the high end of {name}")
            if not low <= value <= high:
                raise ValueError(f"metric {name}: {value} lies outside its interval [{low}, {high}]")
        if n is not None and (isinstance(n, bool) or int(n) != n or n < 1):
            raise ValueError(f"metric {name}: n must be a whole number of cases >= 1, got {n!r}")
        entry = {"value": value, "low": low, "high": high, "n": None if n is None else int(n), "unit": str(unit)}
        self.metrics[name] = entry

    def estimate(self, name: str, estimate: Any, unit: str = "") -> None:
        """Note a `metrics.Estimate` (value, low, high, n)."""
        self.record(name, estimate.value, estimate.low, estimate.high, estimate.n, unit)

    def write(self) -> Path:
        """Write the notebook's part of the metrics. Raises ValueError where nothing was recorded."""
        if not self.metrics:
            raise ValueError(f"{self.run.stem} recorded no metric: record at least one before write()")
        atomic_write(self.run.metrics_part, json.dumps(self.metrics, indent=1, sort_keys=True) + "\n")
        return self.run.metrics_part


@dataclass(frozen=True)
class Claim:
    """One claim of a paper and the rule that judges it; the fields are explained above."""

    id: str
    text: str
    published: str
    metric: str
    datasets: tuple[str, ...]
    direction: str
    threshold: float
    why: str
    sign: float = 0.0
    unit: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the claims table; `reproduced` is our value with its interval, as text."""

    claim: str
    dataset: str
    published: str
    reproduced: str
    verdict: str
    why: str


def load_claims(slug: str) -> list[Claim]:
    """The claims of a paper, [] where it has no claims.toml.

    Raises ValueError naming the file, the claim and the field that is wrong.
    """
    path = paths.PAPERS / slug / "claims.toml"
    if not path.is_file():
        return []
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    entries = document.get("claim")
    if set(document) != {"claim"} or not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of [[claim]] and nothing else, got {sorted(document)}")
    claims = [_parse(entry, f"{path}, claim {entry.get('id', i + 1)!r}") for i, entry in enumerate(entries)]
    ids = [claim.id for claim in claims]
    for repeated in {i for i in ids if ids.count(i) > 1}:
        raise ValueError(f"{path}: two claims have the id {repeated!r}")
    return claims


def judge(claim: Claim, dataset: str, metrics: Metrics) -> str:
    """The verdict on a claim for one dataset, by the rule at the top of this module."""
    entry = metrics.get(claim.metric.format(dataset=dataset))
    if entry is None:
        return NOT_RUN
    side = 1.0 if claim.direction == "above" else -1.0
    near = entry["low" if claim.direction == "above" else "high"]
    if near is None:
        near = entry["value"]
    if side * near >= side * claim.threshold:
        return HOLDS
    return SIGN_ONLY if side * entry["value"] > side * claim.sign else FAILS


def claims_table(slug: str, metrics: Metrics) -> list[Row]:
    """One row for each claim and dataset, judged by these metrics ({name: {value, low, high, n, unit}}).

    Where a dataset was not run, the verdict names the profiles that it is part of if it is not of all, or says that it
    is of none.
    """
    rows, profiles = [], _profiles(slug)
    for claim in load_claims(slug):
        for dataset in claim.datasets:
            entry = metrics.get(claim.metric.format(dataset=dataset))
            verdict = judge(claim, dataset, metrics)
            if verdict == NOT_RUN:
                measured = any(name.startswith(f"{dataset}/") for name in metrics)
                verdict = NOT_MEASURED if measured else NOT_RUN + _elsewhere(profiles, dataset)
            rows.append(Row(claim.text, dataset, claim.published, _show(entry, claim.unit), verdict, claim.why))
    return rows


def as_text(rows: Sequence[Row], widths: Sequence[int] = (44, 10, 22, 26, 23)) -> str:
    """The table for a terminal, cells wrapped to these widths."""
    lines = []
    for cells in (COLUMNS, *(_cells(row) for row in rows)):
        wrapped = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, widths, strict=True)]
        for i in range(max(map(len, wrapped))):
            parts = [(cell[i] if i < len(cell) else "").ljust(w) for cell, w in zip(wrapped, widths, strict=True)]
            lines.append("  ".join(parts).rstrip())
        if cells is COLUMNS:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def as_markdown(rows: Sequence[Row]) -> str:
    """The table for the README."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        cells = [" ".join(cell.split()).replace("|", "\\|") for cell in _cells(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _profiles(slug: str) -> dict[str, list[str]]:
    """Profiles that run each dataset or variant of a paper, [] for all, by its profiles.toml; {} where it has none."""
    path = paths.PAPERS / slug / "profiles.toml"
    if not path.is_file():
        return {}
    variants = tomllib.loads(path.read_text(encoding="utf-8")).get("variants", {})
    found = {}
    for name, variant in variants.items():
        limits = variant.get("profiles", [])
        for called in {name, variant["dataset"]}:
            known = found.get(called, limits)
            found[called] = sorted({*known, *limits}) if known and limits else []
    return found


def _elsewhere(profiles: Mapping[str, list[str]], dataset: str) -> str:
    """What a dataset that was not run needs, as the end of the verdict."""
    if profiles and dataset not in profiles:
        return ", nor at another"
    return f" (it is part of {' and '.join(profiles[dataset])})" if profiles.get(dataset) else ""


def _parse(entry: Mapping[str, Any], where: str) -> Claim:
    known = [field.name for field in fields(Claim)]
    for name in entry:
        if name not in known:
            raise ValueError(f"{where}: unknown field {name!r}, expected {', '.join(known)}")
    for name in known:
        if name not in entry and name not in ("sign", "unit"):
            raise ValueError(f"{where}: field {name!r} is missing")
    for name in ("id", "text", "published", "metric", "direction", "why", "unit"):
        if name in entry and (not isinstance(entry[name], str) or (name != "unit" and not entry[name].strip())):
            raise ValueError(f"{where}: field {name!r} must be text, got {entry[name]!r}")
    for name in ("threshold", "sign"):
        value = entry.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where}: field {name!r} must be a finite number, got {value!r}")
    datasets = entry["datasets"]
    if not isinstance(datasets, list) or not datasets or not all(isinstance(d, str) and d for d in datasets):
        raise ValueError(f"{where}: field 'datasets' must be a list of names, got {datasets!r}")
    if re.findall(r"\{.*?\}|[{}]", entry["metric"].replace("{dataset}", "")):
        raise ValueError(f"{where}: field 'metric' may hold {{dataset}} and no other braces, got {entry['metric']!r}")
    if len(datasets) > 1 and "{dataset}" not in entry["metric"]:
        raise ValueError(f"{where}: field 'metric' must hold {{dataset}} for datasets {datasets}")
    if entry["direction"] not in ("above", "below"):
        raise ValueError(f"{where}: field 'direction' must be 'above' or 'below', got {entry['direction']!r}")
    gap = float(entry["threshold"]) - float(entry.get("sign", 0.0))
    if gap < 0 if entry["direction"] == "above" else gap > 0:
        raise ValueError(
            f"{where}: threshold {entry['threshold']} is less strict than sign {entry.get('sign', 0.0)} "
            f"for direction {entry['direction']!r}"
        )
    return Claim(**{**entry, "datasets": tuple(datasets)})


def _finite(value: Any, what: str) -> float:
    if isinstance(value, bool | str):
        raise TypeError(f"{what} must be a number, got {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} must be finite, got {number}")
    return number


def _cells(row: Row) -> tuple[str, ...]:
    return tuple(getattr(row, column) for column in COLUMNS)


def _show(entry: Mapping[str, Any] | None, unit: str) -> str:
    """`0.70 [0.65, 0.74] unit`, or a dash where the metric was not measured."""
    if entry is None:
        return "\N{EM DASH}"
    interval = "" if entry["low"] is None else f" [{_number(entry['low'])}, {_number(entry['high'])}]"
    return f"{_number(entry['value'])}{interval} {unit or entry['unit']}".rstrip()


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
