"""Prompts and responses by name and from files of one's own, offline and with a hub that is played."""

import hashlib
import json
import shutil
import sys

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from tda_core import paths
from tda_core.data import DataUnavailable, instructions
from tda_core.data.instructions import (
    ALPACA,
    FLAN_TASKS,
    HUB,
    SAFER,
    SENTIMENT,
    TURNS,
    Form,
    HubFile,
    fetch,
    load_pairs,
    read_pairs,
)

ROWS = [
    {"instruction": "Add two numbers.", "input": "45 + 86", "output": "131"},
    {"instruction": "Say hello.", "input": "", "output": "Hello!\u2028Welcome."},
    {"instruction": "Say nothing.", "input": "", "output": ""},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder, and no other one."""
    monkeypatch.setenv("TDA_DATA_DIR", str(tmp_path / "named"))
    monkeypatch.setattr(paths, "ROOT", tmp_path / "root")
    return tmp_path / "named"


def written(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_alpaca_leaves_out_an_empty_input_and_counts_empty_responses(tmp_path):
    path = written(tmp_path, "a.json", json.dumps(ROWS))
    with pytest.warns(UserWarning, match="a.json: 1 of 3 rows have no response"):
        pairs = read_pairs(path, ALPACA)
    assert pairs.pairs == (
        ("Instruction: Add two numbers. Input: 45 + 86 Response:", " 131"),
        ("Instruction: Say hello. Response:", " Hello!\u2028Welcome."),
    )


def test_the_three_kinds_of_file_hold_the_same(tmp_path):
    rows = [{"text": 'A "fine" film,\nreally. {1}', "label": 1, "label_text": "positive"}, {"text": "Bad", "label": 0}]
    rows[1]["label_text"] = "negative"
    csv_text = 'text,label,label_text\n"A ""fine"" film,\nreally. {1}",1,positive\nBad,0,negative\n'
    paths_ = [
        written(tmp_path, "a.json", json.dumps(rows)),
        written(tmp_path, "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"),
        written(tmp_path, "a.csv", "\ufeff" + csv_text),
    ]
    read = [read_pairs(path, SENTIMENT) for path in paths_]
    assert read[0].pairs[0] == ('Review: A "fine" film,\nreally. {1} Sentiment:', " positive")
    assert read[0] == read[1] == read[2]
    assert read_pairs(paths_[1], Form(("{text}",), "label")).responses == (" 1", " 0"), "numbers become text"
    assert read_pairs(paths_[1], Form((), "label_text")).pairs == (("", "positive"), ("", "negative"))
    assert read_pairs(paths_[1], Form(("Is it good?\n",), "label_text")).responses == ("positive", "negative")


def test_a_conversation_gives_its_first_turn_and_the_answer_to_it(tmp_path):
    talk = [("system", "Be kind."), ("assistant", "Ready."), ("user", "Hi?"), ("assistant", "Hello."), ("user", "Bye?")]
    rows = [
        {"id": 1, "messages": [{"role": role, "content": content} for role, content in talk]},
        {"id": 2, "messages": [{"role": "user", "content": "Alone?"}]},
    ]
    expected = (("User: Hi? Assistant:", " Hello."),)
    path = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="1 of 2 rows have no response"):
        assert read_pairs(path, TURNS).pairs == expected
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="1 of 2 rows have no response"):
        assert read_pairs(tmp_path / "a.parquet", TURNS).pairs == expected
    with pytest.raises(ValueError, match=r"b.parquet is not PARQUET"):
        read_pairs(written(tmp_path, "b.parquet", "text"), TURNS)


def test_parquet_without_its_package_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataUnavailable, match=r"a.parquet is parquet, which needs the pyarrow package"):
        read_pairs(written(tmp_path, "a.parquet", "text"), TURNS)


def test_the_response_may_be_in_the_column_that_another_names(tmp_path):
    rows = [
        {"prompt": f"q{i}", "response_0": "bad" if i else "good", "response_1": "good" if i else "bad"} for i in (0, 1)
    ]
    rows = [row | {"safer_response_id": i} for i, row in enumerate(rows)]
    path = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_pairs(path, SAFER).pairs == (("Question: q0 Answer:", " good"), ("Question: q1 Answer:", " good"))
    path = written(tmp_path, "b.jsonl", json.dumps({"prompt": "q", "response_0": "a"}))
    with pytest.raises(ValueError, match=r"b.jsonl has no column 'safer_response_id'"):
        read_pairs(path, SAFER)


def test_flan_is_had_task_by_task(folder):
    assert len(set(FLAN_TASKS)) == len(FLAN_TASKS) == 66  # as many as the data set is said to have
    rows = json.dumps({"inputs": "Does it follow?", "targets": "yes", "task": "rte_10templates"})
    written(folder / "hub" / "Muennighoff" / "flan" / "train", "rte_10templates_train.jsonl", rows)
    assert load_pairs("flan:rte").pairs == (("Does it follow?", " yes"),)
    for name in ("flan", "flan:", "flan:rtee"):
        with pytest.raises(ValueError, match=f"'{name}' needs one task, as in flan:rte; known: aeslc, "):
            load_pairs(name)
    with pytest.raises(ValueError, match="unknown data set 'alpaca:rte'"):
        load_pairs("alpaca:rte")


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path):
    line = json.dumps({"q": "a\u2028b\x85c", "a": "d"}, ensure_ascii=False)
    assert read_pairs(written(tmp_path, "a.jsonl", line), Form(("{q}",), "a")).prompts == ("a\u2028b\x85c",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x", r"a.txt must end in .json, .jsonl, .csv or .parquet, got '.txt'"),
        ("a.json", "{", r"a.json is not JSON"),
        ("a.jsonl", '{"q": 1}\n{', r"a.jsonl is not JSONL"),
        ("a.json", '{"q": 1}', r"a.json must hold a list of objects"),
        ("a.json", "[1]", r"a.json must hold a list of objects"),
        ("a.json", "[]", r"a.json holds no rows"),
        ("a.csv", "q,b\n1,2\n", r"a.csv has no column 'a'; it has: b, q"),
        ("a.csv", "q,a\n1,\n2, \n", r"column 'a' is empty in all 2 rows"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(written(tmp_path, name, text), Form(("{q}",), "a"))


def test_bad_forms_and_names(tmp_path):
    with pytest.raises(ValueError, match="response must name the column"):
        Form(("{q}",), "")
    with pytest.raises(TypeError, match=r"prompt must be a tuple of parts, got one text '\{q\}'"):
        Form("{q}", "a")
    with pytest.raises(ValueError, match="unknown data set 'alpacca'; known: alpaca, alpaca_cleaned, sst2_train"):
        load_pairs("alpacca")
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "none.json", ALPACA)


def test_a_data_folder_comes_before_the_hub(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("the hub was asked"))
    rows = "".join(json.dumps({"text": f"film {i}", "label": i, "label_text": "positive"}) + "\n" for i in range(5))
    written(folder / "hub" / "SetFit" / "sst2", "dev.jsonl", rows)
    assert load_pairs("sst2_validation", n=2).prompts == ("Review: film 0 Sentiment:", "Review: film 1 Sentiment:")
    assert len(load_pairs("sst2_validation")) == 5
    for n in (0, 6):
        with pytest.raises(ValueError, match=rf"n must lie in 1\.\.5, what sst2_validation has, got {n}"):
            load_pairs("sst2_validation", n=n)


def test_the_hub_is_asked_for_the_pinned_file(folder, tmp_path, monkeypatch):
    source = written(tmp_path / "remote", "alpaca_data.json", json.dumps(ROWS[:2]))
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options))
        return shutil.copy(source, tmp_path / "cached.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_pairs("alpaca").responses == (" 131", " Hello!\u2028Welcome.")
    assert asked == [
        ("tatsu-lab/alpaca", "alpaca_data.json", {"repo_type": "dataset", "revision": HUB["alpaca"].revision})
    ]


def test_offline_says_which_file_belongs_where(folder, monkeypatch):
    def offline(*arguments, **options):
        raise LocalEntryNotFoundError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(DataUnavailable) as caught:
        load_pairs("alpaca_cleaned")
    for part in (
        "alpaca_data_cleaned.json of the data set yahma/alpaca-cleaned (revision main)",
        "no network)",
        "$TDA_DATA_DIR/hub/yahma/alpaca-cleaned/alpaca_data_cleaned.json",
        str(paths.ROOT / "data" / "hub"),
    ):
        assert part in str(caught.value)


def test_the_real_client_offline_raises_what_is_caught(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataUnavailable, match=r"train.jsonl of the data set SetFit/sst2"):
        load_pairs("sst2_train")
    with pytest.raises(DataUnavailable, match="not-a/repository/name"):
        fetch(HubFile("not-a/repository/name", "x.json", "main", ALPACA))


def test_a_known_checksum_is_checked(folder):
    path = written(folder / "hub" / "me" / "mine", "a.json", json.dumps(ROWS[:1]))
    right = HubFile("me/mine", "a.json", "main", ALPACA, hashlib.sha256(path.read_bytes()).hexdigest())
    assert fetch(right) == path
    with pytest.raises(ValueError, match=f"a.json is not the expected file.*expected {'0' * 64}"):
        fetch(HubFile("me/mine", "a.json", "main", ALPACA, "0" * 64))


def test_the_table_in_the_docstring_is_the_registry():
    lines = [line for line in instructions.__doc__.splitlines() if line.startswith("| ") and "name  " not in line]
    assert [line.split("|")[1].strip() for line in lines] == list(HUB)
    for line, file in zip(lines, HUB.values(), strict=True):
        assert f"{file.repository}, {file.name}" in line
