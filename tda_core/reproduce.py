"""Run the papers' notebooks and judge their claims: `python -m tda_core.reproduce [profile] [slug ...]`.

Runs what is not up to date, in order, one notebook at a time; then merges the metrics, prints the claims
tables and brings the site up to date. `./run_all.sh` calls this in the right environment.
"""

import argparse
import contextlib
import logging
import signal
import sys
from collections.abc import Sequence

from tda_core import paths, references, site
from tda_core.claims import as_text, claims_table
from tda_core.jobs import Job, known_slugs, missing_files, plan
from tda_core.references import PROFILES, duration
from tda_core.runner import AlreadyRunning, NotebookFailed, only_runner, run_notebook
from tda_core.stamps import MadeFrom, fingerprints, read_stamp, why_run

DEFAULT_PROFILE = "laptop"


class UsageError(ValueError):
    """A word on the command line that means nothing here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 1 a notebook or file failed, 2 not understood, 130 stopped."""
    options = _parser().parse_intermixed_args(arguments)
    with contextlib.suppress(ValueError):  # outside the main thread there are no signals to hear
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a kill, too, takes the kernel along
    try:
        profile, slugs = _understand(options.words)
        jobs = plan(profile, slugs)
        if options.variant and options.variant not in {job.run.variant for job in jobs}:
            known = sorted({job.run.variant for job in jobs})
            raise UsageError(f"unknown variant {options.variant!r}, expected one of: {', '.join(known)}")
        redo = _from(options.start, jobs) if options.start else []
        if options.update_reference:
            return _update_references(jobs)
        if options.list:
            return _list(jobs)
        with only_runner():
            return _reproduce(jobs, redo, options)
    except UsageError as error:
        return _complain(error, 2)
    except (NotebookFailed, AlreadyRunning, ValueError, OSError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        # the interrupted cell is an asyncio task that nobody asks for its error any more: pages of traceback
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        print("\nstopped; what had finished is kept, the same command goes on from there", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run_all.sh", description="Run the papers' notebooks and judge their claims.")
    parser.add_argument("words", nargs="*", metavar="PROFILE|SLUG", help="a profile (default laptop), then papers")
    parser.add_argument("--list", action="store_true", help="show what would run, in order, and why; run nothing")
    parser.add_argument("--force", action="store_true", help="run everything again, without cached results")
    parser.add_argument("--from", dest="start", metavar="NOTEBOOK", help="run this notebook and the paper's later ones")
    parser.add_argument("--variant", help="run only this variant, such as digits")
    parser.add_argument(
        "--update-reference",
        action="store_true",
        help="copy finished metrics to papers/<slug>/reference and rewrite the README's claims table",
    )
    return parser


def _understand(words: Sequence[str]) -> tuple[str, list[str]]:
    """Profile and slugs of the command line. Raises UsageError for any other word."""
    known = known_slugs()
    profile, slugs = (words[0], list(words[1:])) if words and words[0] in PROFILES else (DEFAULT_PROFILE, list(words))
    for word in slugs:
        if word not in known:
            raise UsageError(
                f"unknown word {word!r}: expected a profile ({', '.join(PROFILES)}) and then papers "
                f"({', '.join(known) or 'there are none yet'})"
            )
    return profile, slugs or known


def _from(start: str, jobs: Sequence[Job]) -> list[Job]:
    """The jobs of a notebook and of the later ones of its paper. Raises UsageError for an unknown name."""
    names = list(dict.fromkeys(f"{job.run.slug}/{job.run.notebook}" for job in jobs))
    hits = [name for name in names if start in (name, name.split("/")[1])]
    if len(hits) != 1:
        problem = "unknown notebook" if not hits else "more than one notebook is called"
        raise UsageError(f"{problem} {start!r}, expected one of: {', '.join(hits or names)}")
    slug, notebook = hits[0].split("/")
    return [job for job in jobs if job.run.slug == slug and job.run.notebook >= notebook]


def _reproduce(jobs: Sequence[Job], redo: Sequence[Job], options: argparse.Namespace) -> int:
    mine = [job for job in jobs if options.variant in (None, job.run.variant)]
    finished, ran = [], 0
    for number, job in enumerate(mine, 1):
        made = _made_from(job, jobs)  # now, and not before the loop: sources may have changed in the meantime
        reason = "asked for" if options.force or job in redo else why_run(job.run, made)
        line = f"[{number}/{len(mine)}] {job.label}"
        absent = missing_files(job.requires) if reason else ""
        if absent:
            print(f"{line} ... not available: {absent}", flush=True)
            continue
        if reason:
            _run(job, made, f"{line} ({reason})", fresh=options.force)
            ran += 1
        else:
            print(f"{line} ... skipped (up to date)", flush=True)
        finished.append(job)
    summary = f"{len(finished) - ran} notebooks up to date"
    finished += [job for job in jobs if job not in mine and not why_run(job.run, _made_from(job, jobs))]
    for slug in dict.fromkeys(job.run.slug for job in finished):
        _conclude([job for job in finished if job.run.slug == slug])
    pages = site.build(_all_jobs())
    if pages:
        print(f"site: {len(pages)} pages written, open {paths.SITE / 'index.html'}")
    print(f"done: {ran} notebooks run, {summary}" if ran else f"nothing to do: {summary}")
    return 0


def _run(job: Job, made: MadeFrom, line: str, *, fresh: bool) -> None:
    """Run one job with its progress line; on a terminal a bar of cells stands there meanwhile."""
    terminal = sys.stderr.isatty()
    if not terminal:
        print(f"{line} ... ", end="", flush=True)
    ending = "stopped"
    try:
        ending = duration(run_notebook(job, made, fresh=fresh, bar=line if terminal else ""))
    except NotebookFailed as error:
        ending = "failed"
        command = f"./run_all.sh {job.run.profile} {job.run.slug}"
        raise NotebookFailed(f"{error}\nresume with: {command}") from error
    finally:
        print(f"{line} ... {ending}" if terminal else ending, flush=True)


def _made_from(job: Job, jobs: Sequence[Job]) -> MadeFrom:
    return fingerprints([other for other in jobs if other.run.slug == job.run.slug])[job.run]


def _conclude(finished: Sequence[Job]) -> None:
    """Merge the metrics of one paper's finished runs and print its claims table."""
    run = finished[0].run
    parts = {job.run.stem: job.run.metrics_part for job in finished}
    seconds = {job.run.stem: read_stamp(job.run)["seconds"] for job in finished}
    document, note = references.refresh(run.metrics, parts, seconds)
    if note:
        print(f"{run.slug}: {note}")
    rows = claims_table(run.slug, document["metrics"])
    if rows:
        print(f"\n{run.slug}, profile {run.profile}\n\n{as_text(rows)}\n", flush=True)


def _all_jobs() -> list[Job]:
    """The jobs of every profile: what the site may show."""
    return [job for profile in PROFILES for job in plan(profile, known_slugs())]


def _list(jobs: Sequence[Job]) -> int:
    for number, job in enumerate(jobs, 1):
        reason = why_run(job.run, _made_from(job, jobs))
        absent = missing_files(job.requires) if reason else ""
        state = f"not available: {absent}" if absent else f"to run ({reason})" if reason else "up to date"
        print(f"[{number}/{len(jobs)}] {job.label}: {state}")
    return 0


def _update_references(jobs: Sequence[Job]) -> int:
    """Commit-ready copies of finished metrics. Raises UsageError where something has not run."""
    for job in jobs:
        reason = why_run(job.run, _made_from(job, jobs))
        if reason and not missing_files(job.requires):
            raise UsageError(
                f"{job.label} is not up to date in profile {job.run.profile} ({reason}): "
                f"first run ./run_all.sh {job.run.profile} {job.run.slug}"
            )
    for run in {job.run.slug: job.run for job in jobs}.values():
        print(f"wrote {references.keep(run)}")
    references.update_readme()
    print(f"wrote {paths.README}")
    return 0


def _complain(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
