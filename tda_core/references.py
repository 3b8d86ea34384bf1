"""Merged metrics of a run, the committed references, and the README's claims table made from them.

`results/<profile>/<slug>/metrics.json` and `papers/<slug>/reference/<profile>.json` have one form: commit,
date, hardware, versions, seconds (by notebook, and total) and metrics {name: {value, low, high, n, unit}}.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tda_core import __version__, paths
from tda_core.claims import as_markdown, claims_table, load_claims
from tda_core.files import atomic_write

PROFILES = ("smoke", "laptop", "paper")  # from small to large
README_MARKS = ("<!-- claims:begin -->", "<!-- claims:end -->")
METRIC_FIELDS = {"value", "low", "high", "n", "unit"}


def load_part(path: str | Path) -> dict[str, dict[str, Any]]:
    """The metrics that one notebook recorded. Raises ValueError naming a path that does not hold metrics."""
    document = _load_json(path)
    _check_metrics(document, path)
    return document


def merge(parts: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """All metrics of a paper, from its notebooks' parts (by notebook).

    Raises ValueError for a metric that two notebooks recorded, naming both.
    """
    metrics: dict[str, dict[str, Any]] = {}
    owner: dict[str, str] = {}
    for stem, path in parts.items():
        for name, entry in load_part(path).items():
            if name in owner:
                raise ValueError(f"metric {name} is recorded by {owner[name]} and by {stem}: one name, one notebook")
            owner[name], metrics[name] = stem, entry
    return metrics


def refresh(path: Path, parts: Mapping[str, Path], seconds: Mapping[str, float]) -> tuple[dict[str, Any], str]:
    """The metrics document at `path`, rewritten where it does not say what the parts and run times do.

    Returns the document and, where a damaged file was redone, a note that says so.
    """
    metrics, note = merge(parts), ""
    times = {**seconds, "total": round(sum(seconds.values()), 1)}
    try:
        document = load_metrics(path)
        if document["metrics"] == metrics and document["seconds"] == times:
            return document, note
    except FileNotFoundError:
        pass
    except ValueError as error:
        note = f"redid {path.name}: {error}"
    document = {**provenance(), "seconds": times, "metrics": metrics}
    atomic_write(path, _dump(document))
    return document, note


def load_metrics(path: str | Path) -> dict[str, Any]:
    """A merged metrics file: commit, date, hardware, versions, seconds, metrics.

    Raises ValueError naming the path and what is missing.
    """
    document = _load_json(path)
    missing = {"commit", "date", "hardware", "versions", "seconds", "metrics"} - set(document)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
    _check_metrics(document["metrics"], path)
    return document


def reference(slug: str) -> tuple[str, dict[str, Any]] | None:
    """The committed metrics of the largest profile that has any, with that profile's name."""
    for profile in reversed(PROFILES):
        path = paths.PAPERS / slug / "reference" / f"{profile}.json"
        if path.is_file():
            return profile, load_metrics(path)
    return None


def keep(run: paths.Run) -> Path:
    """Copy a run's merged metrics to where the reference of its profile is committed; returns that path."""
    path = paths.PAPERS / run.slug / "reference" / f"{run.profile}.json"
    atomic_write(path, _dump(load_metrics(run.metrics)))
    return path


def readme_block() -> str:
    """The claims tables that the README shows between its marks, made from the committed references."""
    blocks = []
    for folder in sorted(paths.PAPERS.iterdir()) if paths.PAPERS.is_dir() else []:
        found = reference(folder.name) if load_claims(folder.name) else None
        if found:
            profile, document = found
            hardware = document["hardware"]
            machine = f"{_cores(document)} of {hardware['cpu']}"
            machine += f" with {hardware['gpu']}" if hardware["gpu"] else ""
            source = f"Profile `{profile}`, {document['date'][:10]}, {machine}. {_run_times(folder.name)}"
            table = as_markdown(claims_table(folder.name, document["metrics"]))
            blocks.append(f"**[{folder.name}](papers/{folder.name}/README.md)**. {source}\n\n{table}\n")
    return "\n".join(blocks) or "No reference metrics are committed yet.\n"


def _cores(document: Mapping[str, Any]) -> str:
    cores = document["hardware"]["cores"]
    return f"{cores} core{'s' * (cores != 1)}"


def _run_times(slug: str) -> str:
    """How long each profile with a reference took: `smoke` took 20 s on 1 core (the slowest of 2 notebooks 12 s)."""
    said = []
    for profile in PROFILES:
        path = paths.PAPERS / slug / "reference" / f"{profile}.json"
        if path.is_file():
            document = load_metrics(path)
            times = document["seconds"]
            each = [seconds for stem, seconds in times.items() if stem != "total"]
            slowest = f"the slowest of {len(each)} notebooks {duration(max(each))}" if each else "no notebook timed"
            said.append(f"`{profile}` took {duration(times['total'])} on {_cores(document)} ({slowest})")
    return "From a warm environment " + ", ".join(said) + "."


def update_readme() -> None:
    """Rewrite the README between its marks. Raises ValueError where it has no marks."""
    text = paths.README.read_text(encoding="utf-8")
    begin, end = README_MARKS
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{paths.README} must hold one {begin} and, after it, one {end}")
    before, rest = text.split(begin)
    atomic_write(paths.README, f"{before}{begin}\n{readme_block()}{end}{rest.split(end)[1]}")


def duration(seconds: float) -> str:
    """Seconds as people say them: 34 s, 2 min 5 s, 1 h 4 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def provenance() -> dict[str, Any]:
    """Where and with what a run was made: commit, date, hardware, versions."""
    import torch  # here, because it takes seconds and only a run that did something needs it

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    names = ("torch", "numpy", "scikit-learn")
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gb": round(memory, 1),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in names},
            "tda_core": __version__,
        },
    }


def commit() -> str | None:
    """The checkout's commit, with `-dirty` if files differ from it; None outside a git checkout."""
    answers = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
        command = ["git", "-C", str(paths.ROOT), *arguments]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        answers.append(answer.stdout.strip())
    return answers[0] + ("-dirty" if answers[1] else "")


def _cpu_model() -> str:
    """The processor's name: /proc/cpuinfo on Linux, sysctl on a Mac, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    try:
        answer = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=True
        )
        return answer.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return platform.processor() or platform.machine()


def _load_json(path: str | Path) -> dict[str, Any]:
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(document).__name__}")
    return document


def _dump(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=True) + "\n"


def _check_metrics(metrics: Mapping[str, Any], path: str | Path) -> None:
    for name, entry in metrics.items():
        if not isinstance(entry, dict) or set(entry) != METRIC_FIELDS:
            raise ValueError(f"{path}: metric {name} must have {', '.join(sorted(METRIC_FIELDS))}, got {entry}")
