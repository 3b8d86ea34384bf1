"""requirements.txt, environment.yml and pyproject.toml say the same; run_all.sh finds or makes an environment."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))


def ranges() -> dict[str, SpecifierSet]:
    """What pyproject.toml asks of the library, of running notebooks, of the tests and of comparisons with peers."""
    extras = PROJECT["optional-dependencies"]
    found = [Requirement(text) for text in PROJECT["dependencies"] + extras["site"] + extras["test"] + extras["peers"]]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in found}


def test_every_line_of_the_lock_is_one_exact_pin():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(lines) == len(PINS) > 15
    assert PINS["torch"] == "2.13.0"


def test_pins_and_ranges_name_the_same_packages_and_agree():
    pins = {canonicalize_name(name): version for name, version in PINS.items()}
    assert set(pins) == set(ranges())
    assert [name for name, version in pins.items() if version not in ranges()[name]] == []
    assert str(ranges()["torch"]) == "==2.13.0"


def test_environment_yml_uses_the_same_pins():
    text = (ROOT / "environment.yml").read_text()
    assert re.findall(r'- "?(-\w .*?)"?$', text, re.MULTILINE) == ["-r requirements.txt", "-e ."]
    python = re.search(r"- python=(\S+)", text).group(1)
    assert f"{python}.0" in SpecifierSet(PROJECT["requires-python"])
    assert "==" not in text


def test_the_python_range_is_the_same_everywhere():
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}.1" in supported for minor in (10, 11, 12, 13, 14)] == [False, True, True, True, False]
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "run_all.sh").read_text()


def test_the_licence_is_mit():
    assert PROJECT["license"] == "MIT" and (ROOT / "LICENSE").read_text().startswith("MIT License")


# run_all.sh, with a python and a pip that only pretend


def call(script: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **environment}
    return subprocess.run([script, *words], cwd="/", env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """run_all.sh in a folder of its own, and a PATH on which python3.11 works and python3.12 does not."""
    root = tmp_path / "a checkout"
    (root / "tda_core").mkdir(parents=True)
    (root / "notebooks" / "demo").mkdir(parents=True)
    (root / "notebooks" / "demo" / "01_first.ipynb").touch()
    (root / "tda_core" / "__init__.py").touch()
    (root / "requirements.txt").write_text("nothing==1\n")
    shutil.copy(ROOT / "run_all.sh", root)
    programs = tmp_path / "bin"
    programs.mkdir()
    # makes a "venv" whose python notes what it was asked; its pip fails while a file called broken exists
    fake = f"""#!/usr/bin/env bash
case "$*" in
"- "*) [[ "$0" == *.venv/* ]] && [ -e {tmp_path}/installed ] ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
*"-m pip install"*) echo "pip $*" >> {tmp_path}/log; [ ! -e {tmp_path}/broken ] || exit 1; touch {tmp_path}/installed ;;
*tda_core.reproduce*|*pytest*) echo "ran $*" >> {tmp_path}/log ;;
--version) echo "Python 3.11.0" ;;
esac
"""
    for name in ("python3.11", "python3.12", "python3.13", "python3", "python"):
        (programs / name).write_text(fake if name == "python3.11" else "#!/bin/sh\nexit 127\n")
        (programs / name).chmod(0o755)
    return root


def run(checkout: Path, *words: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    log = checkout.parent / "log"
    log.unlink(missing_ok=True)
    path = f"{checkout.parent / 'bin'}{os.pathsep}/usr/bin{os.pathsep}/bin"
    done = call(checkout / "run_all.sh", *words, PATH=path)
    return done, log.read_text().splitlines() if log.exists() else []


def test_run_all_makes_an_environment_once(checkout):
    done, log = run(checkout, "smoke", "demo", "--list")
    assert done.returncode == 0, done.stderr
    assert "making .venv with Python 3.11.0" in done.stderr
    assert [line.split()[0] for line in log] == ["pip", "pip", "ran"]
    assert "-r" in log[0] and "--no-deps -e" in log[1] and log[2] == "ran -m tda_core.reproduce smoke demo --list"
    assert run(checkout)[1] == ["ran -m tda_core.reproduce"]
    assert run(checkout, "test", "-x")[1] == ["ran -m pytest --cov=tda_core --cov-fail-under=90 -x"]


def test_run_all_installs_again_when_the_pins_change(checkout):
    run(checkout)
    (checkout / "requirements.txt").write_text("nothing==2\n")
    done, log = run(checkout)
    assert "bringing .venv up to date" in done.stderr
    assert [line.split()[0] for line in log] == ["pip", "pip", "ran"]
    assert len(run(checkout)[1]) == 1


def test_a_failed_installation_is_done_over(checkout):
    (checkout.parent / "broken").touch()
    done, log = run(checkout)
    assert done.returncode != 0 and len(log) == 1
    (checkout.parent / "broken").unlink()
    done, log = run(checkout)
    assert done.returncode == 0 and "making .venv" in done.stderr and len(log) == 3


def test_run_all_without_a_suitable_python_says_so(checkout):
    (checkout.parent / "bin" / "python3.11").write_text("#!/bin/sh\nexit 127\n")
    done, _ = run(checkout)
    assert done.returncode == 1 and "no Python 3.11, 3.12 or 3.13 found" in done.stderr
    assert not (checkout / ".venv").exists()


def test_unknown_words_and_help(checkout):
    done, log = run(checkout, "smok")
    assert done.returncode == 2 and log == []
    assert (
        "unknown word 'smok', expected laptop, smoke, paper, test, clean, --help or a paper: tour demo" in done.stderr
    )
    done, _ = run(checkout, "--help")
    assert done.returncode == 0 and "usage: ./run_all.sh [laptop|smoke|paper] [slug ...]" in done.stdout
    assert run(checkout, "clean", "everything")[0].returncode == 2
    assert run(checkout, "demo")[1][-1] == "ran -m tda_core.reproduce demo"


def test_clean_keeps_the_environment_unless_asked(checkout):
    run(checkout)
    for name in ("results/a", "site", ".pytest_cache", "tda_core/__pycache__", ".venv/lib/__pycache__"):
        (checkout / name).mkdir(parents=True)
    assert run(checkout, "clean")[0].returncode == 0
    left = {path.name for path in checkout.iterdir()}
    assert left == {"tda_core", "notebooks", "requirements.txt", "run_all.sh", ".venv"}
    assert not (checkout / "tda_core/__pycache__").exists() and (checkout / ".venv/lib/__pycache__").exists()
    assert run(checkout, "clean", "--all")[0].returncode == 0
    assert not (checkout / ".venv").exists()


def test_the_active_python_is_used_where_it_fits(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = call(ROOT / "run_all.sh", "--help", PATH=path)
    assert done.returncode == 0
    check = (ROOT / "run_all.sh").read_text().split("<<'PYTHON' 2>/dev/null\n")[1].split("PYTHON\n")[0]
    asked = [sys.executable, "-", str(ROOT)]
    fits = subprocess.run(asked, input=check, text=True, cwd="/", capture_output=True)
    assert fits.returncode == 0, fits.stderr
    (tmp_path / "requirements.txt").write_text("torch==0.0.1\n")
    asked[2] = str(tmp_path)
    assert subprocess.run(asked, input=check, text=True, cwd="/", capture_output=True).returncode == 1


def test_ci_calls_run_all_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and os.access(ROOT / "run_all.sh", os.X_OK)
    assert script.read_text().rstrip().endswith("exec ./run_all.sh test")
