import dataclasses
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_core import files, paths
from tda_core.store import (
    CorruptFile,
    Store,
    atomic_write,
    checksum,
    fingerprint,
    load_tensors,
    map_tensors,
    reachable_modules,
    save_tensors,
    source_fingerprint,
)

TENSORS = {
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "bf16": torch.ones(2, dtype=torch.bfloat16),
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 5),
    "mask": torch.tensor([True, False]),
}
TENSORS["again"] = TENSORS["transposed"]

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
nested = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


def same(a: dict, b: dict) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


# atomic_write


def test_atomic_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    atomic_write(path, "first")
    atomic_write(path, "zweite \N{GREEK SMALL LETTER ALPHA}".encode())
    assert path.read_text(encoding="utf-8") == "zweite \N{GREEK SMALL LETTER ALPHA}"
    assert os.listdir(path.parent) == ["file.txt"]


def test_atomic_write_goes_on_after_short_writes(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: real(handle, bytes(data)[:3]))
    atomic_write(tmp_path / "file", b"01234", "", memoryview(b"567"), "89")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch, call, error):
    path = tmp_path / "file"
    atomic_write(path, "old")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)) as caught:
        atomic_write(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    if isinstance(error, OSError):
        assert caught.value.errno == 28
        assert str(path) in str(caught.value) and "No space left" in str(caught.value)


def test_atomic_write_into_a_file_names_the_path(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(OSError, match=r"folder/x\.txt.*expected a writable folder"):
        atomic_write(tmp_path / "folder" / "x.txt", "text")


def test_atomic_write_refuses_other_data(tmp_path):
    with pytest.raises(TypeError, match="got list"):
        atomic_write(tmp_path / "x", [1])


# fingerprint


@given(nested)
def test_fingerprint_is_16_digits_and_repeats(value):
    assert fingerprint(value) == fingerprint(value)
    assert len(fingerprint(value)) == 16 and set(fingerprint(value)) <= set("0123456789abcdef")


@given(st.dictionaries(st.text() | st.integers(), nested))
def test_fingerprint_ignores_the_order_of_keys(value):
    assert fingerprint(value) == fingerprint(dict(reversed(value.items())))


@dataclasses.dataclass(frozen=True)
class Setting:
    width: int
    rate: float = 0.1


@dataclasses.dataclass(frozen=True)
class Other:
    width: int
    rate: float = 0.1


def test_fingerprint_tells_different_values_apart():
    values = [None, True, 1, 1.0, "1", "", [1], [[1]], [1, 1], {}, [], {"1": 1}, {1: 1}, {"1": 1.0}, Path("1"), False]
    values += [0, Setting(1), Setting(2), Other(1), torch.ones(1), torch.ones(1, 1), torch.ones(1).double()]
    values += [torch.zeros(1), np.ones(1), {"$path": "1"}, {"width": 1, "rate": 0.1}, float("inf"), -float("inf")]
    assert len({fingerprint(value) for value in values}) == len(values)


def test_fingerprint_sees_the_value_and_not_its_form():
    assert fingerprint((1, 2)) == fingerprint([1, 2])
    assert fingerprint(np.int64(3)) == fingerprint(3)
    assert fingerprint(np.float64(0.1)) == fingerprint(0.1)
    strided = torch.arange(6).reshape(2, 3).T
    assert fingerprint(strided) == fingerprint(strided.contiguous())


def test_fingerprint_is_the_same_on_every_machine():
    assert fingerprint({"epochs": 30, "rate": 0.1, "layers": (64, 64)}) == "22863fc24748d27c"


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ({"a": [1, {2, 3}]}, TypeError, r"\['a'\]\[1\] is of type set"),
        ({"f": len}, TypeError, "builtin_function"),
        ({"rate": float("nan")}, ValueError, r"\['rate'\] is NaN"),
        (torch.tensor([1.0, float("nan")]), ValueError, "holds NaN"),
        (np.array([object()]), TypeError, "array of objects"),
    ],
)
def test_fingerprint_refuses(value, error, words):
    with pytest.raises(error, match=words):
        fingerprint(value)


# tensors


def test_tensors_come_back_as_they_were(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {"epochs": 3, "names": ["a"]})
    tensors, metadata = load_tensors(path)
    assert same(tensors, TENSORS)
    assert metadata == {"epochs": 3, "names": ["a"]}


def test_every_truncation_and_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.arange(4.0)}, {"n": 1})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptFile, match=r"x\.safetensors"):
            load_tensors(path)
    for position in range(len(data) - 16, len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(CorruptFile, match="checksum"):
            load_tensors(path)


def test_foreign_and_absent_files(tmp_path):
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(CorruptFile, match="foreign"):
        load_tensors(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "absent")


@pytest.mark.parametrize("length", range(0, 70, 7))
def test_mapped_tensors_are_those_that_were_saved_and_aligned(tmp_path, length):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {"pad": "x" * length})
    tensors, metadata, recorded = map_tensors(path)
    assert same(tensors, TENSORS) and metadata == {"pad": "x" * length}
    assert recorded == checksum(tensors) == checksum(TENSORS)
    assert min(tensor.data_ptr() for tensor in tensors.values() if tensor.numel()) % 64 == 0
    tensors["scalar"].zero_()
    assert same(load_tensors(path)[0], TENSORS)  # the file is as it was


def test_mapping_notices_every_truncation_and_foreign_and_absent_files(tmp_path):
    import safetensors.torch

    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.arange(4.0)}, {"n": 1})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptFile, match=r"x\.safetensors"):
            map_tensors(path)
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "foreign")
    with pytest.raises(CorruptFile, match="foreign"):
        map_tensors(tmp_path / "foreign")
    with pytest.raises(FileNotFoundError):
        map_tensors(tmp_path / "absent")


def test_a_checksum_tells_names_types_shapes_and_contents_apart():
    values = [torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32), torch.ones(2)]
    assert len({checksum({name: value}) for value in values for name in "ab"}) == 8


def test_save_refuses_what_is_not_a_tensor(tmp_path):
    with pytest.raises(TypeError, match="ndarray under 'a'"):
        save_tensors(tmp_path / "x", {"a": np.ones(2)}, {})
    with pytest.raises(TypeError):
        save_tensors(tmp_path / "x", {"a": torch.ones(2)}, {"bad": object()})
    assert os.listdir(tmp_path) == []


# Store


def test_store_computes_once_for_each_parameters(tmp_path):
    store, calls = Store(tmp_path), []

    def compute():
        calls.append(1)
        return {"x": torch.full((2,), float(len(calls)))}

    first = store.get("loo", {"epochs": 3, "layers": (4, 5)}, compute)
    again = Store(tmp_path).get("loo", {"layers": [4, 5], "epochs": 3}, compute)
    other = store.get("loo", {"epochs": 3.0, "layers": (4, 5)}, compute)
    assert same(first, again) and len(calls) == 2 and other["x"][0] == 2
    assert store.load("subsets", {"epochs": 3}) is None


@pytest.mark.parametrize("damage", ["truncated", "empty", "of other parameters"])
def test_store_redoes_a_damaged_file_and_says_so(tmp_path, caplog, damage):
    store, params = Store(tmp_path), {"seed": 1}
    store.save("loo", params, {"x": torch.ones(3)})
    path = store.path("loo", params)
    if damage == "of other parameters":
        store.save("loo", {"seed": True}, {"x": torch.zeros(3)})
        os.replace(store.path("loo", {"seed": True}), path)
    else:
        path.write_bytes(path.read_bytes()[: -1 if damage == "truncated" else 0])
    with caplog.at_level(logging.WARNING):
        found = store.get("loo", params, lambda: {"x": torch.ones(3)})
    assert found["x"].sum() == 3
    assert "redoing loo" in caplog.text and path.name in caplog.text
    assert same(store.load("loo", params), {"x": torch.ones(3)})


def test_store_keeps_nothing_of_a_failed_computation(tmp_path):
    def fail():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        Store(tmp_path).get("loo", {}, fail)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "../x", "a b", "A"])
def test_store_refuses_names(tmp_path, name):
    with pytest.raises(ValueError, match="name must be"):
        Store(tmp_path).path(name, {})


# sources


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "tda_core"
    (folder / "data").mkdir(parents=True)
    sources = {
        "__init__.py": "",
        "a.py": "from tda_core import b\nimport numpy",
        "b.py": "def f():\n    from tda_core.data.vision import load",
        "c.py": "import tda_core.a",
        "alone.py": "",
        "data/__init__.py": "from .text import *",
        "data/text.py": "",
        "data/vision.py": "from .. import alone\nfrom . import text",
    }
    for name, source in sources.items():
        (folder / name).write_text(source)
    monkeypatch.setattr(paths, "PACKAGE", folder)
    return folder


def names(*modules: str) -> set[str]:
    return {f"tda_core.{module}" for module in modules}


def test_reachable_modules_follow_every_kind_of_import(package):
    assert reachable_modules("import numpy") == set()
    assert reachable_modules("from tda_core import alone") == names("alone")
    everything = names("a", "b", "data", "data.text", "data.vision", "alone")
    assert reachable_modules("if True:\n    from tda_core.a import x") == everything
    assert reachable_modules("import tda_core.c as c") == everything | names("c")
    assert reachable_modules("from tda_core import __version__") == {"tda_core"}
    assert reachable_modules("from tda_core.data import text") == names("data", "data.text")


def test_circular_imports_end(package):
    (package / "alone.py").write_text("import tda_core.c")
    assert reachable_modules("import tda_core.c") >= names("c", "alone")


def test_source_fingerprint_changes_with_what_is_reached_only(package):
    before = source_fingerprint(["tda_core.a"])
    (package / "c.py").write_text("changed = 1")
    assert source_fingerprint(["tda_core.a"]) == before
    (package / "alone.py").write_text("changed = 1")  # reached through b, data.vision
    changed = source_fingerprint(["tda_core.a"])
    assert changed != before
    assert source_fingerprint(["tda_core.a"], without=names("alone")) not in (before, changed)


def test_source_fingerprint_holds_the_files_of_a_modules_page(package):
    before = source_fingerprint(["tda_core.a"])
    (package / "alone_page").mkdir()
    (package / "alone_page" / "script.js").write_text("1")
    changed = source_fingerprint(["tda_core.a"])
    (package / "alone_page" / "script.js").write_text("2")
    assert len({before, changed, source_fingerprint(["tda_core.a"])}) == 3
    assert source_fingerprint(["tda_core.c"], without=names("alone")) != source_fingerprint(["tda_core.c"])


def test_source_fingerprint_names_an_unknown_module(package):
    with pytest.raises(ValueError, match=r"no such module: tda_core\.nothing"):
        source_fingerprint(["tda_core.a", "tda_core.nothing"])


def test_real_notebooks_reach_real_modules():
    reached = reachable_modules("from tda_core.store import Store")
    assert names("store", "files", "paths") <= reached
    assert files.module_file("tda_core.paths") == Path(paths.__file__)
    assert files.module_file("numpy") is None
