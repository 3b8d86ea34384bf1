import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tda_core import claims, paths, references
from tda_core.claims import FAILS, HOLDS, NOT_MEASURED, NOT_RUN, SIGN_ONLY, Claim, Recorder

CLAIM = Claim("c", "It | works", "0.5", "{dataset}/lds/x", ("digits", "mnist"), "above", 0.5, "Because.", 0.1)
TOML = """
[[claim]]
id = "c"
text = "It works"
published = "0.5"
metric = "{dataset}/lds/x"
datasets = ["digits", "mnist"]
direction = "above"
threshold = 0.5
why = "Because."
"""


def entry(value, low=None, high=None, unit=""):
    return {"value": value, "low": low, "high": high, "n": None, "unit": unit}


def document(metrics):
    hardware = {"cpu": "a cpu", "cores": 2, "memory_gb": 8.0, "gpu": None}
    return {
        "commit": "abc",
        "date": "2026-01-02T03:04:05+00:00",
        "hardware": hardware,
        "versions": {},
        "seconds": {"total": 125.0},
        "metrics": metrics,
    }


@pytest.fixture
def papers(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PAPERS", tmp_path / "papers")
    monkeypatch.setattr(paths, "README", tmp_path / "README.md")
    (tmp_path / "papers" / "demo").mkdir(parents=True)
    return tmp_path / "papers"


# Recorder


@pytest.fixture
def recorder(results):
    return Recorder(paths.Run("demo", "smoke", "01_first", "digits"))


def test_recorder_writes_its_part(recorder):
    recorder.record("digits/lds/trak", 0.5, 0.4, 0.6, 100, "ratio")
    recorder.record("digits/query_ms/trak", 3)

    @dataclasses.dataclass
    class Estimate:
        value: float = 0.25
        low: float = 0.0
        high: float = 1.0
        n: int = 7

    recorder.estimate("digits/loo_warm/forward_only/tuned", Estimate(), "rank")
    path = recorder.write()
    assert path == recorder.run.metrics_part
    assert json.loads(path.read_text()) == {
        "digits/lds/trak": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100, "unit": "ratio"},
        "digits/query_ms/trak": {"value": 3.0, "low": None, "high": None, "n": None, "unit": ""},
        "digits/loo_warm/forward_only/tuned": {"value": 0.25, "low": 0.0, "high": 1.0, "n": 7, "unit": "rank"},
    }
    assert references.load_part(path) == recorder.metrics


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("digits", 1), ValueError, "name must read .* got 'digits'"),
        (("digits/LDS", 1), ValueError, "got 'digits/LDS'"),
        (("digits//lds", 1), ValueError, "name must read"),
        (("digits/lds", float("nan")), ValueError, "value of digits/lds must be finite, got nan"),
        (("digits/lds", float("inf")), ValueError, "must be finite"),
        (("digits/lds", True), TypeError, "must be a number, got True"),
        (("digits/lds", "1"), TypeError, "must be a number"),
        (("digits/lds", 1, 0), ValueError, "both ends"),
        (("digits/lds", 1, 2, 3), ValueError, r"1.0 lies outside its interval \[2.0, 3.0\]"),
        (("digits/lds", 1, float("nan"), 3), ValueError, "low end of digits/lds must be finite"),
        (("digits/lds", 1, 0, 3, 0), ValueError, "n must be"),
        (("digits/lds", 1, 0, 3, 1.5), ValueError, "n must be"),
    ],
)
def test_recorder_refuses(recorder, arguments, error, words):
    with pytest.raises(error, match=words):
        recorder.record(*arguments)
    assert recorder.metrics == {}


def test_recorder_refuses_repetition_and_emptiness(recorder):
    with pytest.raises(ValueError, match=r"01_first\.digits recorded no metric"):
        recorder.write()
    recorder.record("digits/lds", 1)
    with pytest.raises(ValueError, match="digits/lds is recorded twice"):
        recorder.record("digits/lds", 2)


# the rule


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (entry(0.6, 0.5, 0.7), HOLDS),
        (entry(0.6, 0.49, 0.7), SIGN_ONLY),
        (entry(0.5), HOLDS),
        (entry(0.49), SIGN_ONLY),
        (entry(0.11, -1, 2), SIGN_ONLY),
        (entry(0.1), FAILS),
        (entry(-3), FAILS),
        (None, NOT_RUN),
    ],
)
def test_rule_above_and_its_mirror_below(found, verdict):
    metrics = {} if found is None else {"digits/lds/x": found}
    assert claims.judge(CLAIM, "digits", metrics) == verdict
    mirrored = dataclasses.replace(CLAIM, direction="below", threshold=-0.5, sign=-0.1)
    if found is not None:
        low, high = (None, None) if found["low"] is None else (-found["high"], -found["low"])
        metrics = {"digits/lds/x": entry(-found["value"], low, high)}
    assert claims.judge(mirrored, "digits", metrics) == verdict


@given(st.floats(-2, 2), st.floats(0, 1), st.floats(0, 1))
def test_a_better_interval_never_gets_a_worse_verdict(value, below, shift):
    order = [FAILS, SIGN_ONLY, HOLDS]
    verdicts = []
    for move in (0, shift):
        metrics = {"digits/lds/x": entry(value + move, value + move - below, 9)}
        verdicts.append(order.index(claims.judge(CLAIM, "digits", metrics)))
    assert verdicts[0] <= verdicts[1]


# claims.toml


def test_load_claims(papers):
    assert claims.load_claims("demo") == []
    (papers / "demo" / "claims.toml").write_text(TOML)
    assert claims.load_claims("demo") == [dataclasses.replace(CLAIM, text="It works", sign=0.0)]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('why = "Because."', "", "claim 'c': field 'why' is missing"),
        ('why = "Because."', 'why = ""', "field 'why' must be text"),
        ("threshold = 0.5", 'threshold = "0.5"', "field 'threshold' must be a finite number, got '0.5'"),
        ("threshold = 0.5", "threshold = true", "must be a finite number, got True"),
        ("threshold = 0.5", "threshold = nan", "must be a finite number"),
        ("threshold = 0.5", "threshold = 0.5\nsign = 0.6", "threshold 0.5 is less strict than sign 0.6"),
        ('"above"', '"over"', "field 'direction' must be 'above' or 'below', got 'over'"),
        ('"above"', '"below"', "less strict"),
        ('["digits", "mnist"]', "[]", "field 'datasets' must be a list"),
        ("{dataset}/lds/x", "digits/lds/x", r"must hold \{dataset\}"),
        ("{dataset}/lds/x", "{data}/lds/x", "no other braces"),
        ('published = "0.5"', "published = 0.5", "field 'published' must be text, got 0.5"),
        ('text = "It works"', 'text = "It works"\nlimit = 3', "unknown field 'limit', expected id, text"),
        ("[[claim]]", "[[claims]]", r"list of \[\[claim\]\]"),
        ("[[claim]]", "[[claim]", "is not TOML"),
        ('why = "Because."', 'why = "Because."' + TOML, "two claims have the id 'c'"),
    ],
)
def test_a_wrong_claim_is_named(papers, old, new, words):
    assert old in TOML
    (papers / "demo" / "claims.toml").write_text(TOML.replace(old, new, 1))
    with pytest.raises(ValueError, match=words) as caught:
        claims.load_claims("demo")
    assert "demo/claims.toml" in str(caught.value)


# tables


def test_what_was_not_run_says_which_profiles_run_it(papers):
    (papers / "demo" / "claims.toml").write_text(TOML)

    def variant(name, dataset, profiles=""):
        return f'[variants.{name}]\ndataset = "{dataset}"\n{profiles}\n'

    def verdicts(profiles, metrics=None):
        (papers / "demo" / "profiles.toml").write_text(profiles)
        return [row.verdict for row in claims.claims_table("demo", metrics or {})]

    variants = variant("mnist", "mnist", 'profiles = ["laptop", "paper"]') + variant("digits", "digits")
    assert verdicts(variants) == [NOT_RUN, f"{NOT_RUN} (it is part of laptop and paper)"]
    assert verdicts(variant("x", "x")) == [f"{NOT_RUN}, nor at another"] * 2
    assert verdicts(variant("mnist", "x") + variant("digits", "y")) == [NOT_RUN] * 2
    more = (
        variants + variant("linear", "digits", 'profiles = ["paper"]') + variant("s", "mnist", 'profiles = ["smoke"]')
    )
    assert verdicts(more) == [NOT_RUN, f"{NOT_RUN} (it is part of laptop and paper and smoke)"]
    assert verdicts(variants, {"mnist/lds/other": entry(1.0)})[1] == NOT_MEASURED
    assert verdicts(variants, {"mnist/lds/x": entry(0.61, 0.52, 0.7)}) == [NOT_RUN, HOLDS]


def test_tables(papers):
    (papers / "demo" / "claims.toml").write_text(TOML.replace("It works", "It | works"))
    rows = claims.claims_table("demo", {"digits/lds/x": entry(0.61234, 0.52, 0.7, "rank")})
    assert [(row.dataset, row.reproduced, row.verdict) for row in rows] == [
        ("digits", "0.612 [0.52, 0.7] rank", HOLDS),
        ("mnist", "\N{EM DASH}", NOT_RUN),
    ]
    markdown = claims.as_markdown(rows).splitlines()
    assert markdown[0] == "| claim | dataset | published | reproduced | verdict |"
    assert markdown[2] == r"| It \| works | digits | 0.5 | 0.612 [0.52, 0.7] rank | holds |"
    text = claims.as_text(rows, (5, 10, 10, 40, 40)).splitlines()
    assert text[2].split() == ["It", "|", "digits", "0.5", "0.612", "[0.52,", "0.7]", "rank", "holds"]
    assert text[3] == "works"


def test_numbers_are_readable():
    shown = [claims._show(entry(value), "ms") for value in (0.0001234, 12.345, 12345.6, -0.5)]
    assert shown == ["0.000123 ms", "12.3 ms", "12,346 ms", "-0.5 ms"]


# merged metrics and references


def test_merge_and_refresh(tmp_path, monkeypatch):
    parts = {}
    for stem, metrics in {"01.a": {"a/x": entry(1.0)}, "02.a": {"a/y": entry(2.0)}}.items():
        parts[stem] = tmp_path / f"{stem}.json"
        parts[stem].write_text(json.dumps(metrics))
    path, seconds = tmp_path / "metrics.json", {"01.a": 1.5, "02.a": 2.0}
    made, note = references.refresh(path, parts, seconds)
    assert made["metrics"] == {"a/x": entry(1.0), "a/y": entry(2.0)}
    assert made["seconds"] == {"01.a": 1.5, "02.a": 2.0, "total": 3.5} and note == ""
    assert set(made["hardware"]) == {"cpu", "cores", "memory_gb", "gpu"} and made["hardware"]["cores"] >= 1
    assert set(made["versions"]) == {"python", "torch", "numpy", "scikit-learn", "tda_core"}
    assert references.load_metrics(path) == made

    written = path.stat().st_mtime_ns
    assert references.refresh(path, parts, seconds) == (made, "") and path.stat().st_mtime_ns == written
    path.write_text(path.read_text()[:40])
    again, note = references.refresh(path, parts, seconds)
    assert again["metrics"] == made["metrics"] and "redid metrics.json" in note

    parts["02.a"].write_text(json.dumps({"a/x": entry(3.0)}))
    with pytest.raises(ValueError, match=r"a/x is recorded by 01\.a and by 02\.a"):
        references.merge(parts)
    parts["02.a"].write_text('{"a/z": {"value": 1}}')
    with pytest.raises(ValueError, match=r"02\.a\.json: metric a/z must have"):
        references.merge(parts)


def test_load_metrics_names_what_is_missing(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps({"commit": "abc", "metrics": {}}))
    with pytest.raises(ValueError, match=r"metrics\.json lacks date, hardware, seconds, versions"):
        references.load_metrics(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        references.load_metrics(path)


def test_commit_of_a_checkout_and_of_none(tmp_path, monkeypatch):
    import subprocess

    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert references.commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    clean = references.commit()
    assert len(clean) == 40
    (tmp_path / "new.txt").write_text("new")
    assert references.commit() == f"{clean}-dirty"


def test_readme_block_prefers_the_largest_profile(papers):
    (papers / "demo" / "claims.toml").write_text(TOML)
    (papers / "without_claims").mkdir()
    assert "No reference metrics" in references.readme_block()
    for (profile, value), cores in zip({"smoke": 0.1, "laptop": 0.7}.items(), (1, 2), strict=True):
        (papers / "demo" / "reference").mkdir(exist_ok=True)
        made = document({"digits/lds/x": entry(value)})
        made["hardware"] = made["hardware"] | {"cores": cores}
        (papers / "demo" / "reference" / f"{profile}.json").write_text(json.dumps(made))
    block = references.readme_block()
    assert "Profile `laptop`, 2026-01-02, 2 cores of a cpu. " in block
    assert "`smoke` took 2 min 5 s on 1 core (" in block and "`laptop` took 2 min 5 s on 2 cores (" in block
    assert "| It works | digits | 0.5 | 0.7 | holds |" in block

    paths.README.write_text("before\n<!-- claims:begin -->\nold\n<!-- claims:end -->\nafter\n")
    references.update_readme()
    expected = f"before\n<!-- claims:begin -->\n{block}<!-- claims:end -->\nafter\n"
    assert paths.README.read_text() == expected
    references.update_readme()
    assert paths.README.read_text() == expected
    paths.README.write_text("no marks")
    with pytest.raises(ValueError, match="must hold one <!-- claims:begin -->"):
        references.update_readme()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (125, "2 min 5 s"), (3840, "1 h 4 min")])
def test_duration(seconds, text):
    assert references.duration(seconds) == text


# the committed files


def test_the_readme_shows_the_committed_references():
    text = paths.README.read_text(encoding="utf-8")
    begin, end = references.README_MARKS
    assert text.count(begin) == text.count(end) == 1, f"{paths.README} must hold {begin} and {end}"
    shown = text.split(begin)[1].split(end)[0].strip()
    hint = "run: python -m tda_core.reproduce --update-reference PROFILE SLUG"
    assert shown == references.readme_block().strip(), (
        f"the README's claims table is not what the references say; {hint}"
    )


def test_the_committed_claims_are_valid():
    for folder in paths.PAPERS.iterdir():
        claims.load_claims(folder.name)
        references.reference(folder.name)
