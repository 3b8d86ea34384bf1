"""The released ICP scores: small files of the same form everywhere, and the real ones where they are found."""

import hashlib
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from tda_core import data, jobs, paths
from tda_core.data import RELEASED, is_available, load_dataset, where_to_put
from tda_core.data.files import DataFile
from tda_core.data.released import ReleasedScores, load_released, read_icp, read_ip, with_pool

real = pytest.mark.skipif(not is_available("icp_released"), reason="the released scores are not on this machine")
N, M = 40, 3


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TDA_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(paths, "ROOT", tmp_path / "root")
    return tmp_path


def pool():
    """N texts, the i-th of which says i; every second one has an input."""
    return [
        {"instruction": f"Do {i}", "input": f"with {i}" if i % 2 else "", "output": f"done\n{'x' * i}"}
        for i in range(N)
    ]


def scores():
    rng = np.random.default_rng(0)
    return np.round(rng.uniform(0.2, 0.98, N), 2), rng.normal(size=(M, N)).astype(np.float32)


def stored(folder, name, contents):
    (folder / "icp_released").mkdir(exist_ok=True)
    (folder / "icp_released" / name).write_bytes(contents)
    return DataFile("icp_released", name, hashlib.sha256(contents).hexdigest(), "http://127.0.0.1:9/")


def tensor_file(folder, name, value):
    path = folder / name
    torch.save(value, path)
    return path


@pytest.fixture
def files(folder):
    """The released files in small: bins shuffled as the real ones are, IP in two pieces."""
    icp, ip = scores()
    made = [
        stored(folder, "icp_scores.json", json.dumps({str(i): [value] for i, value in enumerate(icp)}).encode()),
        stored(
            folder,
            "prompts.txt",
            b"doc\nInstruction: Do 0 Response: done\nInstruction: Do 1 Input: with 1 Response done x\nthird\n",
        ),
    ]
    for name, inside in (("low.json", icp <= 0.5), ("high.json", icp > 0.9)):
        order = np.flatnonzero(inside).tolist()
        random.seed(123)
        random.shuffle(order)
        made.append(stored(folder, name, json.dumps([pool()[i] for i in order]).encode()))
    for k, piece in enumerate((ip[:, :15], ip[:, 15:])):
        made.append(
            stored(folder, f"ip-{k}.pt", tensor_file(folder, "tmp.pt", torch.from_numpy(piece.copy())).read_bytes())
        )
    return made


def test_small_files_are_read_whole_and_in_order(files):
    icp, ip = scores()
    released = load_released(files)
    np.testing.assert_array_equal(released.icp, icp)
    np.testing.assert_array_equal(released.ip, ip)
    np.testing.assert_allclose(released.ip_mean, ip.astype(np.float64).mean(0))
    assert len(released.prompts) == M
    np.testing.assert_array_equal(released.index, np.flatnonzero((icp <= 0.5) | (icp > 0.9)))
    for i, text, length in zip(released.index, released.demonstrations, released.lengths, strict=True):
        own = pool()[i]
        assert f"Do {i} " in text and length == sum(map(len, own.values()))
        assert ("Input:" in text) == bool(own["input"])


def test_repeated_tasks_are_found_by_their_text(files):
    released = load_released(files)
    assert 1 in released.index and 0 not in released.index, "one repeated example lies in a bin, one does not"
    assert released.repeated_tasks() == [(1, 1)]
    whole = with_pool(released, written_pool(paths.data_dirs()[0], pool()))
    assert whole.repeated_tasks() == [(0, 0), (1, 1)]


def written_pool(folder, texts):
    path = Path(folder) / "pool.json"
    path.write_text(json.dumps(texts))
    return path


def test_the_whole_pool_gives_all_lengths_and_must_agree_with_the_bins(files, folder):
    released = load_released(files)
    whole = with_pool(released, written_pool(folder, pool()))
    np.testing.assert_array_equal(whole.lengths, [sum(map(len, text.values())) for text in pool()])
    np.testing.assert_array_equal(whole.lengths[released.index], released.lengths)
    other = pool()
    other[released.index[3]]["output"] = "another"
    with pytest.raises(ValueError, match=f"not the pool that was scored: its text {released.index[3]} is not"):
        with_pool(released, written_pool(folder, other))
    with pytest.raises(ValueError, match="holds 39 texts, but 40 examples were scored"):
        with_pool(released, written_pool(folder, pool()[1:]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": [0.1], "2": [0.2]}', r"must hold the indices 0\.\.1, but lacks \[1\]"),
        ("{}", r"must hold the indices"),
        ('{"0": [0.1, 0.2]}', r"one score an example, but example 0 has \[0.1, 0.2\]"),
        ('{"0": 0.1}', r"one score an example, but example 0 has 0.1"),
    ],
)
def test_bad_score_tables_are_named(tmp_path, text, message):
    (tmp_path / "icp.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_icp(tmp_path / "icp.json")


def test_tensors_are_checked_and_nothing_else_is_unpickled(tmp_path):
    good = tensor_file(tmp_path, "a.pt", torch.zeros(3, 4))
    assert read_ip([good, good]).shape == (3, 8)
    with pytest.raises(ValueError, match=r"must hold one tensor .*, got shape \(3,\)"):
        read_ip([tensor_file(tmp_path, "b.pt", torch.zeros(3))])
    with pytest.raises(ValueError, match=r"must hold one tensor .*, got list"):
        read_ip([tensor_file(tmp_path, "b.pt", [1])])
    with pytest.raises(ValueError, match="has 2 task examples, the pieces before it 3"):
        read_ip([good, tensor_file(tmp_path, "b.pt", torch.zeros(2, 4))])
    with pytest.raises(Exception, match="weights_only"):
        read_ip([tensor_file(tmp_path, "b.pt", Path("code"))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ip": np.zeros((2, 4))}, r"ip must be \(task examples, pool\) = \(2, 3\)"),
        ({"ip": np.array([[0, 1, 2], [0, np.nan, 1]])}, r"ip must be finite, but ip\[1, 1\] is not \(1 in all\)"),
        ({"icp": np.array([0.1, np.inf, 1])}, r"icp must be finite, but icp\[1\]"),
        ({"icp": np.array([0.1, 1.5, 1])}, r"shares in 0\.\.1, but icp\[1\] is 1.5"),
        ({"demonstrations": ("a",)}, r"2 indices, but 1 texts"),
    ],
)
def test_scores_that_do_not_fit_are_refused(change, message):
    good = ReleasedScores(
        np.array([0.1, 0.5, 1]), np.zeros((2, 3)), ("p", "q"), np.array([0, 2]), ("a", "b"), np.array([1, 1])
    )
    with pytest.raises(ValueError, match=message):
        replace(good, **change)


def test_a_bin_of_another_size_and_texts_without_fields_are_refused(files, folder):
    short = stored(folder, "short.json", json.dumps(pool()[:2]).encode())
    with pytest.raises(ValueError, match=r"short.json holds 2 texts, but \d+ ICP scores lie in its bin"):
        load_released([*files[:2], short, *files[3:]])
    for contents, message in ((b"{}", "must hold a list"), (b'[{"instruction": "a"}]', "text 0 must have the fields")):
        with pytest.raises(ValueError, match=message):
            load_released([*files[:2], stored(folder, "bad.json", contents), *files[3:]])


# The registry


def test_the_registry_knows_the_files_without_reading_them(folder):
    assert not is_available("icp_released") and jobs.missing_files("icp_released") == where_to_put("icp_released")
    lines = where_to_put("icp_released").splitlines()
    assert len(lines) == 13 and all("cxcscmu/InContextDataAttribution/87a5da6" in line for line in lines)
    assert any(line.startswith("put finetune-icp-gt-0.9.json ") and "/icp%3E0.9.json)" in line for line in lines)
    for file in RELEASED["icp_released"]:
        stored(folder, file.name, b"")
    assert is_available("icp_released") and jobs.missing_files("icp_released") == ""
    with pytest.raises(ValueError, match=r"load it with tda_core\.data\.released\.load_released"):
        load_dataset("icp_released")
    assert "icp_released" in data.__doc__


# The real files, against computations that share nothing with the library


@pytest.fixture(scope="module")
def released():
    return load_released()


@real
def test_the_real_scores_are_those_that_scipy_reads(released):
    folder = next(d for d in paths.data_dirs() if (d / "icp_released").is_dir()) / "icp_released"
    table = json.loads((folder / "icp_scores.json").read_text())
    icp = np.array([table[str(i)][0] for i in range(52_002)])
    ip = np.mean(
        np.concatenate(
            [torch.load(folder / f"infl_ip-{k}-of-9.pt", weights_only=True).double().numpy() for k in "123456789"],
            axis=1,
        ),
        axis=0,
    )
    np.testing.assert_array_equal(released.icp, icp)
    np.testing.assert_allclose(released.ip_mean, ip, rtol=1e-12)
    assert released.ip.shape == (100, 52_002) and len(released.index) == 4_186 + 792
    assert spearmanr(icp, ip).statistic == pytest.approx(0.729, abs=5e-4)  # as shared with this project
    assert pearsonr(icp, ip).statistic == pytest.approx(0.752, abs=5e-4)


@real
def test_the_recovered_order_puts_repeated_tasks_where_their_gradients_match_best(released):
    """The order was found by lengths; that the same indices have the largest IP of 52,002 is evidence of its own."""
    repeats = released.repeated_tasks()
    assert len(repeats) == 8
    best = [released.ip[j].argmax() == i for j, i in repeats]
    assert sum(best) >= 6  # by chance: 8 / 52,002


@real
def test_lengths_follow_the_gradients_in_either_bin_only_in_the_recovered_order(released):
    for inside in (released.icp[released.index] <= 0.5, released.icp[released.index] > 0.9):
        lengths, ip = released.lengths[inside], released.ip_mean[released.index[inside]]
        assert spearmanr(lengths, ip).statistic > 0.4
        assert abs(spearmanr(np.random.default_rng(0).permutation(lengths), ip).statistic) < 0.12
