"""The index: what it scores is readings times coefficients, whatever is appended, removed, merged or rounded."""

import json
import multiprocessing
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import joblib
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import generator, labelled, random_problem

from tda_core import index as index_module
from tda_core import index_files, shards
from tda_core.basis import BasisSettings
from tda_core.basis_fit import fit_basis
from tda_core.dynamics import Dynamics
from tda_core.index import Index, build_index, index_examples
from tda_core.index_files import IndexConflict
from tda_core.shards import strongest
from tda_core.simulation import simulate
from tda_core.store import CorruptFile, fingerprint

DYNAMICS = Dynamics(horizon=60, damping=0.1)
PROBLEM = random_problem(n=24)
QUERIES = labelled(9, seed=5)
BASIS = fit_basis(PROBLEM, DYNAMICS, QUERIES, BasisSettings(energy=1.0, rank=5)).basis
BY_LABEL = fit_basis(PROBLEM, DYNAMICS, QUERIES, BasisSettings(energy=1.0, rank=4, by_label=True)).basis
WHOLE = Index.from_coefficients(BASIS, BASIS.coefficients(PROBLEM.train))


def random_index(n: int = 50, dtype: str = "float32", seed: int = 0, basis=BASIS) -> Index:
    shape = (basis.n_strata, n, basis.rank)
    return Index.from_coefficients(basis, torch.randn(shape, generator=generator(seed)), dtype=dtype)


def in_parts(index: Index, *sizes: int) -> Index:
    """The same index in shards of these sizes."""
    parts = torch.arange(len(index)).split(list(sizes))
    return replace(index, shards=tuple(index.shards[0][rows] for rows in parts))


def coefficients(index: Index) -> torch.Tensor:
    return torch.cat([shard.coefficients() for shard in index.shards], 1)


def plain_scores(index: Index) -> torch.Tensor:
    z, strata = index.basis.read(QUERIES)
    decoded = coefficients(index)
    return torch.stack([decoded[stratum] @ row.float() for row, stratum in zip(z, strata, strict=True)])


@pytest.mark.parametrize("basis", [BASIS, BY_LABEL])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_scores_are_readings_times_coefficients(basis, dtype, monkeypatch):
    index = random_index(dtype=dtype, basis=basis)
    torch.testing.assert_close(index.scores(QUERIES), plain_scores(index), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(index.scores(QUERIES[:1]), plain_scores(index)[:1], rtol=1e-5, atol=1e-6)
    in_three = in_parts(index, 13, 1, 36)
    torch.testing.assert_close(in_three.scores(QUERIES), plain_scores(index), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(shards, "BLOCK_FLOATS", 70)  # blocks of 5 to 7 rows
    torch.testing.assert_close(index.scores(QUERIES), plain_scores(index), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(in_three.scores(QUERIES), plain_scores(index), rtol=1e-5, atol=1e-6)


def test_a_full_rank_index_gives_the_scores_of_the_simulation():
    index = build_index(PROBLEM, DYNAMICS, QUERIES, BasisSettings(energy=1.0, rank=24))
    expected = simulate(PROBLEM, DYNAMICS).scores(QUERIES).float()
    assert float((index.scores(QUERIES) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_building_indexes_what_was_not_fitted_too_in_the_order_of_the_training_set():
    index = build_index(PROBLEM, DYNAMICS, QUERIES, BasisSettings(energy=1.0, rank=5, n_fit=10))
    assert torch.equal(index.ids, torch.arange(24))
    expected = index.basis.coefficients(PROBLEM.train).float()
    torch.testing.assert_close(coefficients(index), expected, rtol=1e-5, atol=1e-6)
    assert len(index.shards) == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("basis", [BASIS, BY_LABEL])
@pytest.mark.parametrize("k", [1, 4, 50])
def test_top_is_the_sorted_score_matrix(dtype, basis, k, monkeypatch):
    c = torch.randn(basis.n_strata, 50, basis.rank, generator=generator(0))
    c[:, [7, 31, 44]] = c[:, [3]]  # ties, also between blocks and shards
    ids = torch.randperm(50, generator=generator(1)) + 100
    index = in_parts(Index.from_coefficients(basis, c, ids=ids, dtype=dtype), 20, 9, 21)
    monkeypatch.setattr(shards, "BLOCK_FLOATS", 70)
    scores, found = index.scores(QUERIES), index.top(QUERIES, k)
    for sign, ids, values in (
        (1, found.proponents, found.proponent_scores),
        (-1, found.opponents, -found.opponent_scores),
    ):
        order = (sign * scores).argsort(dim=1, descending=True, stable=True)[:, :k]
        torch.testing.assert_close(values, (sign * scores).gather(1, order), rtol=1e-5, atol=1e-6)
        assert torch.equal(ids, index.ids[order])


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.integers(0, 5), min_size=1, max_size=12), k=st.integers(1, 14))
def test_the_strongest_of_equal_scores_is_the_first(values, k):
    scores = torch.tensor([values, values[::-1]]).float()
    expected = [sorted(range(len(row)), key=lambda i, row=row: -row[i])[:k] for row in scores.tolist()]
    assert strongest(scores, k).tolist() == expected


def test_top_holds_no_more_scores_than_a_block(monkeypatch):
    index, seen = random_index(n=500), []
    inner = shards.strongest

    def spy(scores, k):
        seen.append(scores.numel())
        return inner(scores, k)

    monkeypatch.setattr(index_module, "strongest", spy)
    monkeypatch.setattr(shards, "BLOCK_FLOATS", 180)
    found = index.top(QUERIES, 2)
    assert max(seen) == 180 and len(seen) == 50
    torch.testing.assert_close(found.proponent_scores, index.scores(QUERIES).sort(descending=True).values[:, :2])


def test_appending_equals_a_fresh_build_and_simulates_the_new_examples_alone(monkeypatch):
    first = Index.from_coefficients(BASIS, BASIS.coefficients(PROBLEM.train[:15]))
    seen = []
    inner = type(BASIS).coefficients

    def spy(basis, examples, *rest):
        seen.append(len(examples))
        return inner(basis, examples, *rest)

    monkeypatch.setattr(type(BASIS), "coefficients", spy)
    found = first.append(PROBLEM.train[15:])
    assert seen == [9] and len(first) == 15
    assert torch.equal(found.ids, WHOLE.ids)
    torch.testing.assert_close(found.scores(QUERIES), WHOLE.scores(QUERIES), rtol=1e-5, atol=1e-6)
    assert found.shards[0] is first.shards[0]  # not copied
    with pytest.raises(ValueError, match="ids must differ, but 3 occurs twice"):
        first.append(PROBLEM.train[:1], torch.tensor([3]))
    assert seen == [9]  # refused before anything is simulated


def test_removing_and_merging_are_choices_of_columns():
    removed = WHOLE.remove(torch.tensor([3, 20]))
    kept = torch.tensor([i for i in range(24) if i not in (3, 20)])
    torch.testing.assert_close(removed.scores(QUERIES), WHOLE.scores(QUERIES)[:, kept])
    assert torch.equal(removed.ids, kept)
    back = Index.merge([removed, WHOLE.remove(kept)])
    torch.testing.assert_close(back.scores(QUERIES)[:, back.ids.argsort()], WHOLE.scores(QUERIES))
    assert WHOLE.remove(WHOLE.ids).scores(QUERIES).shape == (9, 0)
    parts = in_parts(WHOLE, 10, 5, 9)
    fewer = parts.remove(torch.tensor([3, *range(10, 15)]))
    assert [len(shard) for shard in fewer.shards] == [9, 9] and fewer.shards[1] is parts.shards[2]
    torch.testing.assert_close(fewer.scores(QUERIES), parts.scores(QUERIES)[:, fewer.ids])


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(24)), cut=st.integers(1, 23), dtype=st.sampled_from(["float32", "float16", "int8"]))
def test_compacting_sorts_by_id_and_changes_no_score(order, cut, dtype):
    shuffled = WHOLE.astype(dtype).shards[0][torch.tensor(order)]
    parts = replace(WHOLE, shards=(shuffled[torch.arange(cut)], shuffled[torch.arange(cut, 24)]), dtype=dtype)
    found = parts.compacted()
    assert torch.equal(found.ids, torch.arange(24)) and len(found.shards) == 1
    torch.testing.assert_close(found.scores(QUERIES)[:, parts.ids], parts.scores(QUERIES))
    assert found.compacted() is found
    assert len(parts.remove(parts.ids).compacted()) == 0


def test_shards_of_workers_merge_to_the_index_built_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    parts = torch.arange(24).tensor_split(3)
    jobs = [joblib.delayed(BASIS.coefficients)(PROBLEM.train[rows]) for rows in parts]
    found = joblib.Parallel(n_jobs=2)(jobs)
    of_workers = [Index.from_coefficients(BASIS, c, ids=rows) for c, rows in zip(found, parts, strict=True)]
    of_workers[0].save(tmp_path / "shard")  # as a worker elsewhere would
    merged = Index.merge([Index.load(tmp_path / "shard", PROBLEM), *of_workers[1:]])
    assert torch.equal(merged.ids, WHOLE.ids)
    torch.testing.assert_close(merged.scores(QUERIES), WHOLE.scores(QUERIES), rtol=1e-5, atol=1e-6)

    setting = BasisSettings(energy=1.0, rank=5, n_fit=10)
    built, expected = (build_index(PROBLEM, DYNAMICS, QUERIES, setting, n_shards=n) for n in (3, 1))
    assert torch.equal(built.ids, expected.ids)
    torch.testing.assert_close(built.scores(QUERIES), expected.scores(QUERIES), rtol=1e-5, atol=1e-6)
    for n_shards in (0, 25):
        with pytest.raises(ValueError, match=f"n_shards must lie in 1..24, the examples, got {n_shards}"):
            index_examples(BASIS, PROBLEM.train, n_shards=n_shards)


def test_groups_score_what_their_members_score_together():
    groups = torch.arange(24) % 4
    found = WHOLE.grouped(groups)
    members = WHOLE.scores(QUERIES)
    expected = torch.stack([members[:, groups == group].sum(1) for group in range(4)], 1)
    torch.testing.assert_close(found.scores(QUERIES), expected, rtol=1e-5, atol=1e-6)
    assert found.units == "groups" and len(found) == 4
    with pytest.raises(ValueError, match="cannot be appended to an index of groups"):
        found.append(PROBLEM.train[:2])
    in_three = in_parts(WHOLE, 10, 5, 9).grouped(groups)
    torch.testing.assert_close(in_three.scores(QUERIES), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"groups must be 24 int64 numbers, got torch.int64 of shape \(5,\)"):
        WHOLE.grouped(groups[:5])
    with pytest.raises(ValueError, match="nothing to group"):
        WHOLE.remove(WHOLE.ids).grouped(groups[:0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(1e-6, 1e6))
def test_int8_is_within_its_rounding_bound(seed, size):
    coefficients = size * torch.randn(1, 20, BASIS.rank, generator=generator(seed))
    coefficients[:, 4] = 0
    exact, rounded = (Index.from_coefficients(BASIS, coefficients, dtype=dtype) for dtype in ("float32", "int8"))
    z = BASIS.read(QUERIES)[0].float()
    bound = z.abs().sum(1, keepdim=True) * rounded.shards[0].scales / 2
    error = (exact.scores(QUERIES) - rounded.scores(QUERIES)).abs()
    assert bool((error <= bound * 1.001 + 1e-5 * exact.scores(QUERIES).abs().max()).all())
    assert bool((rounded.scores(QUERIES)[:, 4] == 0).all())
    assert rounded.n_bytes == 20 * (BASIS.rank + 4 + 8) and exact.n_bytes == 20 * (4 * BASIS.rank + 8)


def test_bad_input_is_named_and_changes_nothing():
    for k in (0, 25):
        with pytest.raises(ValueError, match=f"k must lie in 1..24, the units of this index, got {k}"):
            WHOLE.top(QUERIES, k)
    with pytest.raises(ValueError, match="no unit of this index has id 99"):
        WHOLE.remove(torch.tensor([3, 99]))
    with pytest.raises(ValueError, match="ids must differ, but 3 occurs twice"):
        WHOLE.append(PROBLEM.train[:1], torch.tensor([3]))
    with pytest.raises(ValueError, match="cannot merge dtype 'float32' with 'int8'"):
        Index.merge([WHOLE, WHOLE.astype("int8")])
    with pytest.raises(ValueError, match="cannot merge indexes of different bases"):
        Index.merge([WHOLE, random_index(basis=BY_LABEL)])
    with pytest.raises(ValueError, match="merge needs at least one index"):
        Index.merge([])
    with pytest.raises(ValueError, match="unknown dtype 'int4'"):
        WHOLE.astype("int4")
    with pytest.raises(ValueError, match=r"coefficients must be \(1, n, 5\), got \(1, 3, 4\)"):
        Index.from_coefficients(BASIS, torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="coefficients must be finite"):
        Index.from_coefficients(BASIS, torch.full((1, 3, 5), torch.nan))
    with pytest.raises(ValueError, match=r"ids must be 2 int64 numbers, got torch\.bool"):
        WHOLE.remove(torch.tensor([True, False]))
    with pytest.raises(ValueError, match="coefficients must be finite as float16"):
        Index.from_coefficients(BASIS, torch.full((1, 3, 5), 1e5), dtype="float16")
    with pytest.raises(ValueError, match="ids must be 3 int64 numbers"):
        Index.from_coefficients(BASIS, torch.zeros(1, 3, 5), ids=torch.arange(2))
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, 4\), got \(n, 5\)"):
        WHOLE.scores(labelled(3, d=5))
    assert len(WHOLE) == 24


# on disk


def tensor_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


def changed(folder: Path, **values) -> None:
    """The manifest with other values, and a generation that fits them."""
    manifest = json.loads((folder / "index.json").read_text()) | values
    number = manifest.pop("generation").split("-")[0]
    manifest["generation"] = f"{number}-{fingerprint(manifest)}"
    (folder / "index.json").write_text(json.dumps(manifest))


@pytest.fixture
def folder(tmp_path) -> Path:
    """An index of the first 20 examples, in two shards."""
    in_parts(WHOLE.remove(torch.arange(20, 24)), 12, 8).save(tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("basis", [BASIS, BY_LABEL])
def test_a_mapped_index_scores_as_the_one_in_memory_bit_for_bit(dtype, basis, tmp_path):
    index = in_parts(random_index(dtype=dtype, basis=basis, n=203), 100, 3, 100)
    index.save(tmp_path / "index")
    back = Index.load(tmp_path / "index", PROBLEM, verify=True, dtype=dtype, rank=basis.rank)
    assert (back.dtype, back.units, back.basis.rank, len(back.shards)) == (dtype, "examples", basis.rank, 3)
    assert torch.equal(back.scores(QUERIES), index.scores(QUERIES)) and torch.equal(back.ids, index.ids)
    assert torch.equal(back.scores(QUERIES[:1]), index.scores(QUERIES[:1]))
    for name, value in vars(index.top(QUERIES, 9)).items():
        assert torch.equal(getattr(back.top(QUERIES, 9), name), value)
    assert torch.equal(back.basis.residual(QUERIES), index.basis.residual(QUERIES))
    assert back.n_bytes == index.n_bytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_shards_are_mapped_and_what_is_done_to_them_stays_off_the_disk(folder):
    index = Index.load(folder, PROBLEM)
    for shard in index.shards:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "shard-" in line]
        spans = [[int(end, 16) for end in line[0].split("-")] for line in lines]
        assert any(start <= shard.codes.data_ptr() < stop for start, stop in spans)
        assert shard.codes.data_ptr() % 64 == 0
    index.shards[0].codes.zero_()
    assert torch.equal(coefficients(Index.load(folder, PROBLEM, verify=True)), coefficients(WHOLE)[:, :20])


def test_the_manifest_says_what_an_index_is(folder):
    manifest = json.loads((folder / "index.json").read_text())
    settings = manifest["settings"]
    assert {name: manifest[name] for name in PROBLEM.identity} == PROBLEM.identity
    assert (manifest["format"], manifest["dtype"], manifest["units"], manifest["rank"]) == (2, "float32", "examples", 5)
    assert (settings["dynamics"]["horizon"], settings["dynamics"]["damping"]) == (60, 0.1)
    assert settings["kept"] == BASIS.kept and manifest["code"] == index_module._code()
    for entry in (manifest["basis"], *manifest["shards"]):
        assert (folder / entry["file"]).stat().st_size == entry["bytes"]
    assert [entry["rows"] for entry in manifest["shards"]] == [12, 8]


def test_a_change_writes_only_what_is_new_and_deletes_what_is_gone(folder):
    before = tensor_files(folder)
    index = Index.load(folder, PROBLEM).append(PROBLEM.train[20:])
    index.save(folder)
    new = tensor_files(folder) - before
    assert len(new) == 1 and before < tensor_files(folder)
    back = Index.load(folder, PROBLEM)
    assert torch.equal(back.scores(QUERIES), index.scores(QUERIES))
    torch.testing.assert_close(back.scores(QUERIES), WHOLE.scores(QUERIES), rtol=1e-5, atol=1e-6)

    fewer = back.remove(torch.arange(20, 24))
    fewer.save(folder)
    assert tensor_files(folder) == before
    fewer.remove(torch.tensor([15])).save(folder)
    assert len(tensor_files(folder) & before) == 2 and len(tensor_files(folder)) == 3
    assert torch.equal(back.scores(QUERIES), index.scores(QUERIES))  # still mapped, though its file has gone
    back.save(folder.parent / "copy")
    assert torch.equal(Index.load(folder.parent / "copy", PROBLEM, verify=True).ids, torch.arange(24))


def test_an_empty_index_and_one_of_groups_come_back(tmp_path):
    WHOLE.remove(WHOLE.ids).save(tmp_path / "empty")
    assert len(Index.load(tmp_path / "empty", PROBLEM)) == 0
    grouped = WHOLE.grouped(torch.arange(24) % 4)
    grouped.save(tmp_path / "groups")
    back = Index.load(tmp_path / "groups", PROBLEM, units="groups")
    assert torch.equal(back.scores(QUERIES), grouped.scores(QUERIES))


def test_another_model_code_or_format_is_refused(folder, monkeypatch):
    with pytest.raises(ValueError, match=r"made for theta \w{16}, but this problem has theta \w{16}"):
        Index.load(folder, PROBLEM.at(PROBLEM.theta * 2))
    with pytest.raises(ValueError, match=r"made for data \w{16}, but this problem has data \w{16}"):
        Index.load(folder, replace(PROBLEM, train=PROBLEM.train[:-1]))
    with pytest.raises(FileNotFoundError, match=r"none/index\.json"):
        Index.load(folder.parent / "none", PROBLEM)
    (folder.parent / "file").touch()
    with pytest.raises(ValueError, match="file is a file, but an index of format 2 is a folder"):
        Index.load(folder.parent / "file", PROBLEM)
    with pytest.raises(NotADirectoryError, match="file is a file, but an index is saved as a folder"):
        WHOLE.save(folder.parent / "file")
    changed(folder, format=3)
    with pytest.raises(ValueError, match="index format 3, but this code reads 2"):
        Index.load(folder, PROBLEM)
    with pytest.raises(ValueError, match="index format 3, but this code reads 2"):
        WHOLE.save(folder)
    WHOLE.save(folder, overwrite=True)
    assert len(Index.load(folder, PROBLEM, verify=True)) == 24


def test_what_other_code_built_stays_marked_as_such(folder, monkeypatch):
    monkeypatch.setattr(index_module, "_code", lambda: "0123456789abcdef")
    with pytest.raises(ValueError, match=r"written by code \w{16}, but this is code 0123456789abcdef"):
        Index.load(folder, PROBLEM)
    old = Index.load(folder, PROBLEM, any_code=True)
    with pytest.raises(ValueError, match=r"cannot merge code '' with '\w{16}'"):
        Index.merge([WHOLE.remove(torch.arange(20)), old])
    old.append(PROBLEM.train[20:]).save(folder)
    with pytest.raises(ValueError, match="written by code"):
        Index.load(folder, PROBLEM)
    assert len(Index.load(folder, PROBLEM, any_code=True)) == 24


def test_what_was_expected_and_is_not_so_is_refused(folder):
    assert len(Index.load(folder, PROBLEM, damping=0.1, horizon=60, units="examples", kept=BASIS.kept)) == 20
    for name, value, found in (("damping", 0.2, "0.1"), ("horizon", 5, "60"), ("dtype", "int8", "'float32'")):
        with pytest.raises(ValueError, match=f"built with {name} {found}, but {name} {value!r} was expected"):
            Index.load(folder, PROBLEM, **{name: value})
    with pytest.raises(TypeError, match=r"unknown expectation 'dampening', expected one of .*'damping'"):
        Index.load(folder, PROBLEM, dampening=0.1)


def test_damage_is_noticed(folder):
    manifest = json.loads((folder / "index.json").read_text())
    files = [folder / entry["file"] for entry in (manifest["basis"], *manifest["shards"])]
    for path in (*files, folder / "index.json"):
        whole = path.read_bytes()
        for shorter in (whole[:-2], whole[:100], b""):
            path.write_bytes(shorter)
            with pytest.raises(CorruptFile, match=path.name):
                Index.load(folder, PROBLEM)
        path.write_bytes(whole)
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert len(Index.load(folder, PROBLEM)) == 20
        with pytest.raises(CorruptFile, match=rf"{path.name} is damaged: it has checksum \w+, but the manifest \w+"):
            Index.load(folder, PROBLEM, verify=True)
        path.unlink()
        with pytest.raises(CorruptFile, match=path.name):
            Index.load(folder, PROBLEM)
        path.write_bytes(whole)
    shutil.copy(files[1], files[2])
    with pytest.raises(CorruptFile, match=rf"{files[2].name} is truncated or damaged: it has \d+ bytes"):
        Index.load(folder, PROBLEM)


def test_a_shard_of_another_index_is_refused(folder):
    changed(folder, dtype="int8")
    with pytest.raises(CorruptFile, match=r"belongs to another index: it is of .*'float32'.*manifest of .*'int8'"):
        Index.load(folder, PROBLEM)


def test_an_edited_manifest_is_noticed(folder):
    path = folder / "index.json"
    whole = path.read_text()
    for edited in (whole.replace('"float32"', '"int8"'), whole.replace('"damping": 0.1', '"damping": 0.2')):
        assert edited != whole
        path.write_text(edited)
        with pytest.raises(CorruptFile, match=r"index\.json is damaged: its contents do not match its generation 1-"):
            Index.load(folder, PROBLEM)
    for other in ("[]", '{"format": 2}', '{"format": 2, "generation": 7}', '{"format": 2, "generation": "x"}'):
        path.write_text(other)
        with pytest.raises(CorruptFile, match="is not the manifest of an index"):
            Index.load(folder, PROBLEM)


@pytest.mark.parametrize("stage", ["save_tensors", "atomic_write"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_writer_that_stops_half_way_leaves_the_old_index(folder, monkeypatch, stage, error):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    index = Index.load(folder, PROBLEM).append(PROBLEM.train[20:])

    def fail(*_):
        raise error

    monkeypatch.setattr(index_files, stage, fail)
    with pytest.raises(type(error)):
        index.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.undo()
    assert len(Index.load(folder, PROBLEM, verify=True)) == 20
    index.save(folder)  # and it can go on
    assert len(Index.load(folder, PROBLEM, verify=True)) == 24


def test_a_first_save_that_fails_leaves_no_tensors_and_one_over_a_damaged_index_deletes_nothing(folder, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    (folder / "index.json").write_text("damaged")
    before = tensor_files(folder)
    with monkeypatch.context() as patch:
        patch.setattr(index_files, "atomic_write", fail)
        with pytest.raises(OSError, match="No space left"):
            WHOLE.save(folder.parent / "new")
        with pytest.raises(OSError, match="No space left"):
            WHOLE.save(folder, overwrite=True)
    assert not tensor_files(folder.parent / "new") and before < tensor_files(folder)
    with pytest.raises(CorruptFile):
        WHOLE.save(folder)
    WHOLE.save(folder, overwrite=True)
    assert len(tensor_files(folder)) == 2 and len(Index.load(folder, PROBLEM, verify=True)) == 24


def test_what_a_killed_writer_left_is_not_read_and_deleted_by_the_next(folder, monkeypatch):
    index = Index.load(folder, PROBLEM).append(PROBLEM.train[20:])
    before = tensor_files(folder)
    with monkeypatch.context() as patch:  # killed: nothing is tidied up
        patch.setattr(index_files, "_delete_unnamed", lambda folder: None)
        patch.setattr(index_files, "atomic_write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            index.save(folder)
    (folder / ".partial-0123-shard").touch()
    (folder / "notes.txt").touch()
    assert len(tensor_files(folder) - before) == 1
    again = Index.load(folder, PROBLEM)
    assert len(again) == 20
    again.save(folder)
    assert {path.name for path in folder.iterdir()} == before | {"index.json", ".lock", "notes.txt"}


def test_a_new_index_replaces_another_only_when_told_to(folder):
    with pytest.raises(FileExistsError, match="holds an index already: load and change that one, or pass overwrite"):
        WHOLE.save(folder)
    loaded = Index.load(folder, PROBLEM)
    for derived in (loaded.astype("int8"), loaded.grouped(torch.zeros(20, dtype=torch.int64))):
        with pytest.raises(FileExistsError):
            derived.save(folder)
    assert len(Index.load(folder, PROBLEM, verify=True)) == 20
    WHOLE.astype("float16").save(folder, overwrite=True)
    assert len(Index.load(folder, PROBLEM, verify=True)) == 24 and len(tensor_files(folder)) == 2


def test_a_save_after_another_is_refused_naming_both_generations(folder):
    first, second = (
        Index.load(folder, PROBLEM).append(PROBLEM.train[20:22], ids) for ids in torch.arange(20, 24).view(2, 2)
    )
    first.save(folder)
    manifest = (folder / "index.json").read_bytes()
    with pytest.raises(IndexConflict, match=r"index is at generation 2-\w{16}, but this index is of 1-\w{16}"):
        second.save(folder)
    assert (folder / "index.json").read_bytes() == manifest
    first.append(PROBLEM.train[22:23]).save(folder)  # goes on from its own save
    assert torch.equal(Index.load(folder, PROBLEM).ids, torch.arange(23))
    shutil.rmtree(folder)
    second.save(folder)  # nobody else's work is lost
    assert len(Index.load(folder, PROBLEM)) == 22


def test_a_folder_that_another_writes_to_is_refused_naming_it(folder):
    index = Index.load(folder, PROBLEM).append(PROBLEM.train[20:])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with (
        index_files._locked(folder),
        pytest.raises(IndexConflict, match=f"another process is writing to the index {folder}"),
    ):
        index.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    index.save(folder)


def test_of_two_processes_that_append_at_once_one_succeeds(folder):
    context = multiprocessing.get_context("fork")
    barrier, said = context.Barrier(2), context.SimpleQueue()

    def work(member: int) -> None:
        index = Index.load(folder, PROBLEM).append(PROBLEM.train[20 + member : 21 + member])
        barrier.wait(30)
        try:
            index.save(folder)
            said.put((member, "saved"))
        except IndexConflict as error:
            said.put((member, str(error)))

    workers = [context.Process(target=work, args=(member,)) for member in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    results = dict(said.get() for _ in workers)
    saved = [member for member, text in results.items() if text == "saved"]
    assert len(saved) == 1 and str(folder) in results[1 - saved[0]]
    back = Index.load(folder, PROBLEM, verify=True)
    expected = Index.from_coefficients(BASIS, BASIS.coefficients(PROBLEM.train[20 + saved[0] : 21 + saved[0]]))
    assert len(back) == 21
    torch.testing.assert_close(back.scores(QUERIES)[:, 20:], expected.scores(QUERIES), rtol=1e-5, atol=1e-6)


def test_a_reader_whose_files_are_replaced_meanwhile_reads_the_new_ones(folder, monkeypatch):
    writer, inner = Index.load(folder, PROBLEM).remove(torch.arange(3)), index_files.map_tensors
    calls = []

    def slow(path):
        if not calls:
            calls.append(path)
            monkeypatch.undo()
            writer.save(folder)
        return inner(path)

    monkeypatch.setattr(index_files, "map_tensors", slow)
    assert torch.equal(Index.load(folder, PROBLEM).ids, torch.arange(3, 20)) and calls


def test_saving_over_a_damaged_index_repairs_it(tmp_path):
    folder = tmp_path / "index"
    WHOLE.save(folder)
    (shard,) = folder.glob("shard-*.safetensors")
    damaged = bytearray(shard.read_bytes())
    damaged[-5] ^= 64
    shard.write_bytes(bytes(damaged))
    with pytest.raises(CorruptFile):
        Index.load(folder, PROBLEM, verify=True)
    WHOLE.save(folder, overwrite=True)
    back = Index.load(folder, PROBLEM, verify=True)
    assert torch.equal(back.scores(QUERIES), WHOLE.scores(QUERIES))
