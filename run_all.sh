#!/usr/bin/env bash
# Find or make the environment, then run the papers: a thin wrapper of `python -m tda_core.reproduce`.
set -euo pipefail

HELP='usage: ./run_all.sh [laptop|smoke|paper] [slug ...]   run the notebooks that are not up to date (default laptop)
       ./run_all.sh test [pytest arguments]           run the tests, with coverage
       ./run_all.sh clean [--all]                     remove results/, site/ and caches (--all: .venv too)
       ./run_all.sh --help

Further options for a run:
  --list              show what would run, in order, and why; run nothing
  --from NOTEBOOK     run this notebook and the later ones of its paper, such as 02_horizon
  --force             run everything again, without cached results
  --variant NAME      run only this variant, such as digits

The active Python is used where it has this checkout and the packages of requirements.txt; otherwise .venv is
made from that file (Python 3.11 to 3.13). TDA_DATA_DIR names a folder with data files, TDA_RESULTS_DIR one
for results.'

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
VENV="$ROOT/.venv"
STAMP="$VENV/installed-from.txt" # a copy of the requirements.txt that .venv was made from, written last

# Does this python have tda_core from this checkout and every pinned version (a local part such as +cpu aside)?
matches() {
    "$1" - "$ROOT" <<'PYTHON' 2>/dev/null
import importlib.metadata, importlib.util, pathlib, re, sys
root = pathlib.Path(sys.argv[1])
sys.path = [path for path in sys.path if path not in ("", str(root))]  # installed, and not just the working folder
found = importlib.util.find_spec("tda_core")
same = found is not None and pathlib.Path(found.origin).resolve() == (root / "tda_core" / "__init__.py").resolve()
for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", (root / "requirements.txt").read_text(), re.MULTILINE):
    try:
        same = same and importlib.metadata.version(name).split("+")[0] == version
    except importlib.metadata.PackageNotFoundError:
        same = False
sys.exit(not same)
PYTHON
}

# A Python of a version that the pins support; each candidate must really start.
base_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or activate an environment with one" >&2
    return 1
}

# Sets PYTHON. An installation that was cut short has no stamp, and is done over from nothing.
find_environment() {
    if matches python; then
        PYTHON=python
        return
    fi
    PYTHON="$VENV/bin/python"
    if cmp -s "$ROOT/requirements.txt" "$STAMP" && matches "$PYTHON"; then
        return
    fi
    if [ ! -f "$STAMP" ] && matches "$PYTHON"; then # made by hand, and complete: tda_core goes in last
        cp "$ROOT/requirements.txt" "$STAMP"
        return
    fi
    if [ -f "$STAMP" ] && "$PYTHON" -m pip --version >/dev/null 2>&1; then
        echo "bringing .venv up to date with requirements.txt" >&2
        rm -f "$STAMP"
    else
        local base
        base="$(base_python)"
        echo "making .venv with $("$base" --version) and the packages of requirements.txt (some minutes, once)" >&2
        rm -rf "$VENV"
        "$base" -m venv "$VENV"
    fi
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps -e "$ROOT"
    cp "$ROOT/requirements.txt" "$STAMP"
    echo "environment ready: .venv" >&2
}

clean() {
    if [ $# -gt 1 ] || { [ $# -eq 1 ] && [ "$1" != --all ]; }; then
        echo "error: clean takes --all or nothing, got: $*" >&2
        exit 2
    fi
    cd "$ROOT"
    rm -rf results site .pytest_cache .ruff_cache .hypothesis .coverage .coverage.*
    find . -path ./.venv -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
    if [ "${1:-}" = --all ]; then
        rm -rf .venv tda_core.egg-info
    fi
    echo "removed results, site and caches${1:+, and .venv}"
}

case "${1:-}" in
--help | -h)
    echo "$HELP"
    ;;
clean)
    shift
    clean "$@"
    ;;
test)
    shift
    find_environment
    cd "$ROOT"
    exec "$PYTHON" -m pytest --cov=tda_core --cov-fail-under=90 "$@"
    ;;
-* | "" | laptop | smoke | paper)
    find_environment
    exec "$PYTHON" -m tda_core.reproduce "$@"
    ;;
*)
    if ! ls "$ROOT/notebooks/$1"/*.ipynb >/dev/null 2>&1 && [ "$1" != tour ]; then
        papers="$(cd "$ROOT/notebooks" && ls -d */ 2>/dev/null | tr -d / | tr '\n' ' ')"
        echo "error: unknown word '$1', expected laptop, smoke, paper, test, clean, --help or a paper: tour $papers" >&2
        exit 2
    fi
    find_environment
    exec "$PYTHON" -m tda_core.reproduce "$@"
    ;;
esac
