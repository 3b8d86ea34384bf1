"""The runner, on a small project in a temporary folder (see conftest.Project)."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FIRST, PROFILES, SECOND

from tda_core import data, jobs, paths, reproduce, runner, stamps
from tda_core.reproduce import main

DRIVER = """
import pathlib, sys
from tda_core import paths
root = pathlib.Path(sys.argv[1])
paths.ROOT, paths.PACKAGE, paths.NOTEBOOKS, paths.PAPERS = root, root / "tda_core", root / "notebooks", root / "papers"
paths.README, paths.LOCK, paths.SITE = root / "README.md", root / "requirements.txt", root / "site"
from tda_core.reproduce import main
sys.exit(main(sys.argv[2:]))
"""
CHECKOUT = Path(__file__).resolve().parent.parent


def start(project, *words) -> subprocess.Popen:
    """The runner in a process of its own, to be killed."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", DRIVER, str(project.root), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def rerun(project, capsys, *words) -> tuple[str, list[str]]:
    """What a further run says, and the notebooks that it ran."""
    before = len(project.runs)
    assert main(["smoke", "demo", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out, project.runs[before:]


def listed(capsys) -> list[str]:
    """What --list says of each notebook, which takes no kernel."""
    assert main(["smoke", "demo", "--list"]) == 0
    return [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()]


# runs and what is up to date


def test_first_run_and_second_run(finished, capsys):
    run = paths.Run("demo", "smoke", "01_first", "digits")
    assert finished.runs == ["01_first.digits", "02_second.digits"]
    assert "[1/2] demo/01_first digits (not run yet) ... " in finished.output
    assert "done: 2 notebooks run, 0 notebooks up to date" in finished.output
    assert (
        "It doubles" in finished.output and "6 [1, 90]" in finished.output and "holds in sign only" in finished.output
    )
    assert "not run at this" in finished.output  # mnist; the cell is wrapped
    document = json.loads(run.metrics.read_text())
    assert document["metrics"]["digits/score"]["value"] == 6
    assert document["metrics"]["digits/later"]["value"] == 1.5
    assert set(document["seconds"]) == {"01_first.digits", "02_second.digits", "total"}
    assert (finished.root / "site" / "smoke" / "demo" / "02_second.digits.html").is_file()
    assert not stamps.partial(run).exists()

    before = {path: path.stat().st_mtime_ns for path in (finished.root / "results").rglob("*.*") if path.is_file()}
    output, ran = rerun(finished, capsys)
    assert ran == []
    assert "nothing to do: 2 notebooks up to date" in output and "site" not in output and "It doubles" in output
    after = {path: path.stat().st_mtime_ns for path in before if path.name != ".lock"}
    assert after == {path: when for path, when in before.items() if path.name != ".lock"}


def test_profiles_do_not_share_results(finished, capsys):
    assert main(["laptop", "demo"]) == 0
    scores = {}
    for profile in ("smoke", "laptop"):
        document = json.loads(paths.Run("demo", profile, "x").metrics.read_text())
        scores[profile] = [document["metrics"][name]["value"] for name in ("digits/score", "digits/later")]
    assert scores == {"smoke": [6, 1.5], "laptop": [14, 1.75]}
    assert "holds" in capsys.readouterr().out
    index = (finished.root / "site" / "index.html").read_text()
    assert "Profile smoke" in index and "Profile laptop" in index


def test_a_changed_cell_reruns_what_stands_on_it(finished, capsys):
    finished.notebook("demo/02_second", [*SECOND[:3], "changed = 1", *SECOND[3:]])
    output, ran = rerun(finished, capsys)
    assert ran == ["02_second.digits"] and "(changed: code)" in output
    finished.notebook("demo/01_first", [*FIRST[:3], "n_train = 4", *FIRST[3:]])
    output, ran = rerun(finished, capsys)
    assert ran == ["01_first.digits", "02_second.digits"] and "(changed: notebooks below)" in output


def test_a_changed_module_reruns_what_reaches_it(finished, capsys):
    finished.write("tda_core/unused.py", "changed = 1")
    assert rerun(finished, capsys)[1] == []
    finished.write("tda_core/helper.py", "def double(number):\n    return 20 * number\n")
    output, ran = rerun(finished, capsys)
    assert ran == ["01_first.digits", "02_second.digits"] and "(changed: modules)" in output
    assert "60 [1, 90]" in output  # the kernel imported the changed module


def test_changed_pins_and_changed_text_rerun(finished, capsys):
    finished.write("requirements.txt", "# a comment\none==1\n")
    assert rerun(finished, capsys)[1] == []
    finished.write("requirements.txt", "one==2\n")
    assert all(": to run (changed: requirements.txt" in line for line in listed(capsys))
    finished.write("requirements.txt", "one==1\n")
    finished.notebook("demo/02_second", SECOND, prose="# Other words")
    output, ran = rerun(finished, capsys)
    assert "(changed: text)" in output and ran == ["02_second.digits"]


DAMAGES = [
    ("cache/01_first.digits/sum.txt", "truncate", "is damaged or was changed"),
    ("figures/01_first.digits/plot.png", "delete", "is missing"),
    ("galleries/01_first.digits.html", "truncate", "is damaged or was changed"),
    ("metrics/01_first.digits.json", "truncate", "is damaged or was changed"),
    ("notebooks/01_first.digits.ipynb", "delete", "is missing"),
    ("notebooks/01_first.digits.stamp.json", "truncate", "is damaged"),
]


def damage(path, how):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) if how == "truncate" else path.unlink()


@pytest.mark.parametrize(("name", "how", "said"), DAMAGES)
def test_a_damaged_result_is_named_and_to_be_redone_by_its_notebook_alone(finished, capsys, name, how, said):
    damage(finished.root / "results" / "smoke" / "demo" / name, how)
    named = name.removeprefix("notebooks/") if "stamp" in name else name
    assert listed(capsys) == [f"demo/01_first digits: to run ({named} {said})", "demo/02_second digits: up to date"]


@pytest.mark.parametrize("damages", [DAMAGES[:-1], DAMAGES[-1:]], ids=["all outputs", "the stamp"])
def test_damaged_results_are_made_again(finished, capsys, damages):
    folder = finished.root / "results" / "smoke" / "demo"
    good = {name: (folder / name).read_bytes() for name, *_ in damages}
    for name, how, _ in damages:
        damage(folder / name, how)
    assert rerun(finished, capsys)[1] == ["01_first.digits"]
    for name, before in good.items():
        assert (folder / name).read_bytes() == before or name.startswith("notebooks/")  # which tell the time
    assert "nothing to do" in rerun(finished, capsys)[0]


def test_what_a_run_wrote_is_gone_before_the_next(finished):
    """A notebook that draws or shows something no more leaves no old picture or gallery to be found."""
    every = jobs.plan("smoke", ["demo"])
    run = every[0].run
    assert run.gallery.is_file() and run.gallery in stamps.outputs(run)
    stamps.prepare(run, stamps.fingerprints(every)[run])
    assert [path.name for path in stamps.outputs(run)] == [stamps.CACHE_KEY, "sum.txt"]  # the same code's cache stays
    assert run.gallery.parent.is_dir() and not run.stamp.exists()


def test_truncated_merged_metrics_are_redone_without_running(finished, capsys):
    path = paths.Run("demo", "smoke", "x").metrics
    path.write_text(path.read_text()[:50])
    output, ran = rerun(finished, capsys)
    assert ran == [] and "redid metrics.json" in output and json.loads(path.read_text())["metrics"]


def test_large_outputs_are_compared_by_size_and_time(finished, monkeypatch):
    run = paths.Run("demo", "smoke", "01_first", "digits")
    made = stamps.fingerprints(jobs.plan("smoke", ["demo"]))[run]
    monkeypatch.setattr(stamps, "HASH_UP_TO", 1)
    stamps.write_stamp(run, made, 1.0)
    assert stamps.why_run(run, made) == ""
    os.utime(run.cache / "sum.txt", (1, 1))
    assert stamps.why_run(run, made) == "cache/01_first.digits/sum.txt is damaged or was changed"


def test_force_from_and_variant(finished, capsys):
    kept = finished.root / "results" / "smoke" / "demo" / "cache" / "02_second.digits" / "kept.txt"
    kept.write_text("cached")
    output, ran = rerun(finished, capsys, "--from", "02_second")
    assert ran == ["02_second.digits"] and "(asked for)" in output and kept.exists()
    last = jobs.plan("smoke", ["demo"])
    assert reproduce._from("demo/01_first", last) == last
    assert rerun(finished, capsys, "--force", "--variant", "digits")[1] == ["01_first.digits", "02_second.digits"]
    assert not kept.exists()


def test_cached_results_live_as_long_as_the_code_that_made_them(finished, capsys):
    kept = finished.root / "results" / "smoke" / "demo" / "cache" / "01_first.digits" / "kept.txt"
    kept.write_text("cached")
    (finished.root / "notebooks" / "demo" / "02_second.ipynb").unlink()
    finished.notebook("demo/01_first", FIRST, prose="# Other words")
    assert rerun(finished, capsys)[1] and kept.exists()
    finished.write("tda_core/claims.py", (finished.root / "tda_core/claims.py").read_text() + "\n# drawn otherwise\n")
    assert rerun(finished, capsys)[1] and kept.exists()
    finished.write("tda_core/helper.py", "def double(number):\n    return number + number\n")
    assert rerun(finished, capsys)[1] and not kept.exists()


def test_list_shows_order_and_state_and_runs_nothing(project, capsys):
    project.notebook("00_tour", [FIRST[0], *FIRST[3:]])
    assert main(["smoke", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] tour/00_tour digits: to run (not run yet)",
        "[2/3] demo/01_first digits: to run (not run yet)",
        "[3/3] demo/02_second digits: to run (not run yet)",
    ]
    assert not (project.root / "results").exists()


# variants


def test_a_variant_without_its_files_is_skipped_and_says_where_to_put_them(finished, capsys, monkeypatch):
    finished.write(
        "papers/demo/profiles.toml",
        PROFILES + '[variants.mnist]\ndataset = "mnist"\nrequires = "mnist"\nnotebooks = ["01_first"]\n',
    )
    there = []
    monkeypatch.setattr(data, "is_available", lambda name: name in there)
    monkeypatch.setattr(data, "where_to_put", lambda name: f"put {name} here")
    output, ran = rerun(finished, capsys)
    assert ran == [] and "[2/3] demo/01_first mnist ... not available: put mnist here" in output
    assert "demo/01_first mnist: not available: put mnist here" in listed(capsys)

    there.append("mnist")
    assert rerun(finished, capsys)[1] == ["01_first.mnist"]
    there.clear()  # what has run needs its data no more, and is not lost
    output, ran = rerun(finished, capsys)
    assert ran == [] and "nothing to do: 3 notebooks up to date" in output
    assert "mnist/score" in paths.Run("demo", "smoke", "x").metrics.read_text()


def test_a_variant_may_be_limited_to_profiles_and_notebooks(project):
    limits = '[variants.mnist]\ndataset = "mnist"\nprofiles = ["laptop"]\nnotebooks = ["02_second"]\n'
    project.write("papers/demo/profiles.toml", PROFILES + limits)
    labels = {profile: [job.label for job in jobs.plan(profile, ["demo"])] for profile in ("smoke", "laptop")}
    assert labels["smoke"] == ["demo/01_first digits", "demo/02_second digits"]
    assert labels["laptop"] == [*labels["smoke"], "demo/02_second mnist"]
    job = jobs.plan("laptop", ["demo"])[0]
    assert job.parameters == {"profile": "laptop", "dataset": "digits", "n_train": 7, "rate": 0.25}


# bad input, found before anything runs


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("n_train = 7", "n_trian = 7", r"01_first\]: unknown name 'n_trian', expected one of: n_train, rate"),
        ("n_train = 7", "n_train = 7.0", "n_train must be of type int, as in 01_first.ipynb .n_train = 3., got 7.0"),
        ("n_train = 7", "n_train = true", "must be of type int, .* got True of type bool"),
        ("rate = 0.25", "rate = 1", "rate must be of type float, .* got 1 of type int"),
        ("rate = 0.25", 'dataset = "mnist"', "unknown name 'dataset'"),
        ("01_first", "01_frist", "unknown name '01_frist', expected one of: 01_first, 02_second"),
        ("laptop.digits", "laptop.mnist", r"\[laptop\]: unknown name 'mnist', expected one of: digits"),
        ("[laptop", "[desktop", "unknown name 'desktop'"),
        ('dataset = "digits"', "", "variant digits: dataset must be a text, got None"),
        ('dataset = "digits"', 'dataset = "digits"\nprofiles = ["desktop"]', "unknown name 'desktop' in profiles"),
        ('dataset = "digits"', 'dataset = "digits"\nprofiles = []', "profiles must be a list of names"),
        ('dataset = "digits"', 'dataset = "digits"\nneeds = "x"', "variant digits: unknown name 'needs'"),
        ("[variants.digits]", "[variants.digits", "is not TOML"),
    ],
)
def test_wrong_profiles_are_named_before_anything_runs(project, capsys, old, new, words):
    assert old in PROFILES
    path = project.write("papers/demo/profiles.toml", PROFILES.replace(old, new))
    with pytest.raises(ValueError, match=words) as caught:
        jobs.plan("smoke", ["demo"])
    assert str(path) in str(caught.value)
    assert main(["smoke", "demo"]) == 1
    assert project.runs == [] and "profiles.toml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("n = 3", "must set profile to a text"),
        (FIRST[0] + "\nn = 2 * 3", r"line 6: expected a number, a text, True or False, got `2 \* 3`"),
        (FIRST[0] + "\nn = [3]", "expected a number"),
        (FIRST[0] + "\nprint(3)", "expected `name = value`"),
        (FIRST[0] + "\nn =", "line 6: invalid syntax"),
        (FIRST[0] + "".join(f"\nn{i} = {i}" for i in range(5)), "at most 8 parameters, found 9"),
    ],
)
def test_wrong_parameter_cells_are_named(project, cell, words):
    project.notebook("demo/01_first", [cell, *FIRST[1:]])
    with pytest.raises(ValueError, match=words) as caught:
        jobs.plan("smoke", ["demo"])
    assert "01_first.ipynb" in str(caught.value)


def test_what_is_no_notebook_is_named(project):
    project.write("notebooks/demo/03_third.ipynb", "{}")
    with pytest.raises(ValueError, match=r"03_third\.ipynb is not a notebook"):
        jobs.plan("smoke", ["demo"])
    (project.root / "papers" / "demo" / "profiles.toml").unlink()
    with pytest.raises(ValueError, match=r"profiles\.toml is missing"):
        jobs.plan("smoke", ["demo"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["desktop"], "unknown word 'desktop': expected a profile (smoke, laptop, paper) and then papers (demo)"),
        (["smoke", "dmeo"], "unknown word 'dmeo'"),
        (
            ["smoke", "demo", "--from", "03_third"],
            "unknown notebook '03_third', expected one of: demo/01_first, demo/02",
        ),
        (["smoke", "demo", "--variant", "mnist"], "unknown variant 'mnist', expected one of: digits"),
    ],
)
def test_unknown_words_are_refused_with_the_known_ones(project, capsys, words, said):
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_an_ambiguous_notebook_is_refused(project, capsys):
    project.write("papers/other/profiles.toml", PROFILES)
    shutil.copytree(project.root / "notebooks" / "demo", project.root / "notebooks" / "other")
    assert main(["smoke", "--from", "01_first"]) == 2
    assert (
        "more than one notebook is called '01_first', expected one of: demo/01_first, other/01"
        in capsys.readouterr().err
    )


def test_plan_names_an_unknown_profile_and_paper(project):
    with pytest.raises(ValueError, match="unknown profile 'desktop', expected one of: smoke, laptop, paper"):
        jobs.plan("desktop", ["demo"])
    with pytest.raises(ValueError, match="unknown paper 'x', expected one of: demo"):
        jobs.plan("smoke", ["x"])


# failures


def test_a_failing_cell_is_named_with_the_command_that_resumes(project, capsys):
    project.notebook("demo/01_first", [*FIRST[:3], "'''no function'''\n1 / 0", *FIRST[3:]])
    assert main(["smoke", "demo"]) == 1
    error = capsys.readouterr().err
    assert "demo/01_first digits failed in cell 5 of 7 (`'''no function'''`): ZeroDivisionError: division" in error
    assert "resume with: ./run_all.sh smoke demo" in error
    assert project.runs == ["01_first.digits"]
    assert not paths.Run("demo", "smoke", "01_first", "digits").executed.exists()
    assert main(["smoke", "demo", "--list"]) == 0
    assert "demo/01_first digits: to run (it did not finish last time)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cells", "metadata", "said"),
    [
        (FIRST[:-1], {}, "recorded no metrics: expected"),
        ([*FIRST[:3], *FIRST[4:]], {}, "saved no figure in"),
        (
            [*FIRST[:3], "import sys\nsys.exit()", *FIRST[3:]],
            {},
            "stopped in cell 5 of 7 (`import sys`): it ended early",
        ),
        ([*FIRST, "run.metrics_part.write_text('{')"], {}, "01_first.digits.json is not JSON"),
        ([*FIRST[:3], *FIRST[4:]], {"tda": {"figures": False}}, None),
    ],
)
def test_silent_success_is_refused(project, capsys, cells, metadata, said):
    project.notebook("demo/01_first", cells, **metadata)
    (project.root / "notebooks" / "demo" / "02_second.ipynb").unlink()
    assert main(["smoke", "demo"]) == (1 if said else 0)
    if said:
        assert said in capsys.readouterr().err


def test_a_killed_kernel_is_a_failure_and_the_next_run_repairs_it(project, capsys):
    killer = "from pathlib import Path\nimport os, signal\nkept = run.cache / 'kept.txt'\nif not kept.exists():\n"
    killer += "    kept.write_text('x')\n    os.kill(os.getpid(), signal.SIGKILL)"
    project.notebook("demo/01_first", [*FIRST[:3], killer, *FIRST[3:]])
    assert main(["smoke", "demo"]) == 1
    error = capsys.readouterr().err
    assert (
        "demo/01_first digits failed in cell 5 of 7" in error and "its kernel died" in error and "resume with" in error
    )
    output, ran = rerun(project, capsys)  # passes only if the cache outlived the kernel
    assert "(it did not finish last time)" in output and ran == ["01_first.digits", "02_second.digits"]
    assert "nothing to do" in rerun(project, capsys)[0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_runner_leaves_nothing_that_looks_complete(finished, capsys, how):
    waiting = "import os, time\n(run.cache / 'pid.txt').write_text(str(os.getpid()))\n"
    waiting += "while not (run.root / 'go').exists():\n    time.sleep(0.05)"
    finished.notebook("demo/02_second", [*SECOND[:3], waiting, *SECOND[3:]])
    pid = finished.root / "results" / "smoke" / "demo" / "cache" / "02_second.digits" / "pid.txt"
    process = start(finished, "smoke", "demo")
    wait_for(lambda: pid.exists() and pid.read_text())

    # meanwhile nobody else may use the folder
    assert main(["smoke", "demo"]) == 1
    assert f"is in use by another run (process {process.pid})" in capsys.readouterr().err

    process.send_signal(how)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    assert "[1/2] demo/01_first digits ... skipped" in output and "02_second digits (changed: code) ... " in output
    assert how == signal.SIGKILL or "the same command goes on from there" in output
    wait_for(lambda: not Path(f"/proc/{pid.read_text()}").exists())  # the kernel ends with its runner
    run = paths.Run("demo", "smoke", "02_second", "digits")
    assert not run.stamp.exists() and not run.executed.exists() and not run.metrics_part.exists()

    (run.root / "go").touch()
    output, ran = rerun(finished, capsys)
    assert ran == ["02_second.digits"]
    assert "demo/01_first digits ... skipped" in output and "02_second digits (it did not finish last time)" in output


def test_a_results_folder_that_cannot_be_written_is_named(project, capsys):
    (project.root / "results").write_text("a file where a folder should be")
    assert main(["smoke", "demo"]) == 1
    assert str(project.root / "results") in capsys.readouterr().err


def test_a_full_disk_is_named_and_nothing_counts_as_done(finished, capsys, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["smoke", "demo", "--force"]) == 1
    error = capsys.readouterr().err
    assert "could not write its results" in error and "No space left on device" in error and "resume with" in error
    monkeypatch.undo()
    assert not (finished.root / "results/smoke/demo/notebooks/01_first.digits.stamp.json").exists()


def test_the_kernel_is_this_interpreter_whatever_the_user_has_installed(project, tmp_path, monkeypatch, capsys):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("TDA_DATA_DIR", "relative")
    monkeypatch.chdir(tmp_path)
    check = (
        f"import os, sys\nassert sys.executable == {sys.executable!r}\nassert os.path.isabs(os.environ['TDA_DATA_DIR'])"
    )
    (project.root / "notebooks" / "demo" / "02_second.ipynb").unlink()
    check += f"\nassert os.getcwd() == {str(project.root / 'notebooks' / 'demo')!r}"
    project.notebook("demo/01_first", [*FIRST[:3], check, *FIRST[3:]])
    before = dict(os.environ)
    assert main(["smoke", "demo"]) == 0, capsys.readouterr().err
    assert dict(os.environ) == before


def test_code_that_is_not_python_is_named(project):
    project.notebook("demo/01_first", [*FIRST, "%matplotlib inline\n!ls", "x = = 1"])
    with pytest.raises(ValueError, match=r"01_first\.ipynb, code cell 7, line 1: invalid syntax"):
        stamps.fingerprints(jobs.plan("smoke", ["demo"]))


# references


def test_update_reference_keeps_finished_metrics_only(finished, capsys):
    finished.write("README.md", "<!-- claims:begin -->\n<!-- claims:end -->\n")
    stamp = paths.Run("demo", "smoke", "01_first", "digits").stamp
    stamp.rename(stamp.with_suffix(".away"))
    assert main(["--update-reference", "smoke", "demo"]) == 2
    assert "demo/01_first digits is not up to date" in capsys.readouterr().err
    stamp.with_suffix(".away").rename(stamp)
    assert main(["--update-reference", "smoke", "demo"]) == 0
    reference = json.loads((finished.root / "papers" / "demo" / "reference" / "smoke.json").read_text())
    assert reference["metrics"]["digits/score"]["value"] == 6
    assert "| It doubles | digits | 2x | 6 [1, 90] | holds in sign only |" in paths.README.read_text()


def test_a_slow_package_is_missing_for_a_moment_alone(monkeypatch):
    name = "rfc3987_syntax"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with jobs.without_iri_grammar(), pytest.raises(ImportError):
        importlib.import_module(name)
    assert name not in sys.modules
    monkeypatch.setitem(sys.modules, name, json)  # one that is there stays
    with jobs.without_iri_grammar():
        assert importlib.import_module(name) is json


def test_only_one_runner_for_a_folder(results):
    with (
        runner.only_runner(),
        pytest.raises(runner.AlreadyRunning, match="in use by another run"),
        runner.only_runner(),
    ):
        pass
    with runner.only_runner():
        pass
