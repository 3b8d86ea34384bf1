"""The index: what it scores is readings times coefficients, whatever is appended, removed, merged or rounded."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import generator, labelled, random_problem

from tda_core import index as index_module
from tda_core.basis import BasisSettings
from tda_core.basis_fit import fit_basis
from tda_core.dynamics import Dynamics
from tda_core.index import Index, build_index
from tda_core.simulation import simulate
from tda_core.store import CorruptFile

DYNAMICS = Dynamics(horizon=60, damping=0.1)
PROBLEM = random_problem(n=24)
QUERIES = labelled(9, seed=5)
BASIS = fit_basis(PROBLEM, DYNAMICS, QUERIES, BasisSettings(energy=1.0, rank=5)).basis
BY_LABEL = fit_basis(PROBLEM, DYNAMICS, QUERIES, BasisSettings(energy=1.0, rank=4, by_label=True)).basis
WHOLE = Index.from_coefficients(BASIS, BASIS.coefficients(PROBLEM.train))


def random_index(n: int = 50, dtype: str = "float32", seed: int = 0, basis=BASIS) -> Index:
    shape = (basis.n_strata, n, basis.rank)
    return Index.from_coefficients(basis, torch.randn(shape, generator=generator(seed)), dtype=dtype)


def plain_scores(index: Index) -> torch.Tensor:
    z, strata = index.basis.read(QUERIES)
    decoded = index.codes.float() * index.scales[..., None]
    return torch.stack([decoded[stratum] @ row.float() for row, stratum in zip(z, strata, strict=True)])


@pytest.mark.parametrize("basis", [BASIS, BY_LABEL])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_scores_are_readings_times_coefficients(basis, dtype, monkeypatch):
    index = random_index(dtype=dtype, basis=basis)
    torch.testing.assert_close(index.scores(QUERIES), plain_scores(index), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(index.scores(QUERIES[:1]), plain_scores(index)[:1], rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(index_module, "BLOCK_FLOATS", 35)  # blocks of 7 rows or so
    again = replace(index)
    torch.testing.assert_close(again.scores(QUERIES), plain_scores(index), rtol=1e-5, atol=1e-6)


def test_a_full_rank_index_gives_the_scores_of_the_simulation():
    index = build_index(PROBLEM, DYNAMICS, QUERIES, BasisSettings(energy=1.0, rank=24))
    expected = simulate(PROBLEM, DYNAMICS).scores(QUERIES).float()
    assert float((index.scores(QUERIES) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_building_indexes_what_was_not_fitted_too_in_the_order_of_the_training_set():
    index = build_index(PROBLEM, DYNAMICS, QUERIES, BasisSettings(energy=1.0, rank=5, n_fit=10))
    assert torch.equal(index.ids, torch.arange(24))
    expected = index.basis.coefficients(PROBLEM.train).float()
    torch.testing.assert_close(index.codes, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("basis", [BASIS, BY_LABEL])
@pytest.mark.parametrize("k", [1, 4, 50])
def test_top_is_the_sorted_score_matrix(dtype, basis, k, monkeypatch):
    index = random_index(dtype=dtype, basis=basis)
    index = replace(index, ids=torch.randperm(50, generator=generator(1)) + 100)
    index.codes[:, 7] = index.codes[:, 3]  # a tie
    if dtype != "float32":
        monkeypatch.setattr(index_module, "BLOCK_FLOATS", 35)
    scores, found = index.scores(QUERIES), index.top(QUERIES, k)
    for sign, ids, values in (
        (1, found.proponents, found.proponent_scores),
        (-1, found.opponents, -found.opponent_scores),
    ):
        order = (sign * scores).argsort(dim=1, descending=True, stable=True)[:, :k]
        torch.testing.assert_close(values, (sign * scores).gather(1, order), rtol=1e-5, atol=1e-6)
        assert torch.equal(ids, index.ids[order])


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


def test_removing_and_merging_are_choices_of_columns():
    removed = WHOLE.remove(torch.tensor([3, 20]))
    kept = torch.tensor([i for i in range(24) if i not in (3, 20)])
    torch.testing.assert_close(removed.scores(QUERIES), WHOLE.scores(QUERIES)[:, kept])
    assert torch.equal(removed.ids, kept)
    back = Index.merge([removed, WHOLE.remove(kept)])
    assert torch.equal(back.scores(QUERIES)[:, back.ids.argsort()], WHOLE.scores(QUERIES))
    assert WHOLE.remove(WHOLE.ids).scores(QUERIES).shape == (9, 0)


def test_groups_score_what_their_members_score_together():
    groups = torch.arange(24) % 4
    found = WHOLE.grouped(groups)
    members = WHOLE.scores(QUERIES)
    expected = torch.stack([members[:, groups == group].sum(1) for group in range(4)], 1)
    torch.testing.assert_close(found.scores(QUERIES), expected, rtol=1e-5, atol=1e-6)
    assert found.units == "groups" and len(found) == 4
    with pytest.raises(ValueError, match="cannot be appended to an index of groups"):
        found.append(PROBLEM.train[:2])
    with pytest.raises(ValueError, match="groups must be 24 int64 numbers"):
        WHOLE.grouped(groups[:5])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(1e-6, 1e6))
def test_int8_is_within_its_rounding_bound(seed, size):
    coefficients = size * torch.randn(1, 20, BASIS.rank, generator=generator(seed))
    coefficients[:, 4] = 0
    exact, rounded = (Index.from_coefficients(BASIS, coefficients, dtype=dtype) for dtype in ("float32", "int8"))
    z = BASIS.read(QUERIES)[0].float()
    bound = z.abs().sum(1, keepdim=True) * rounded.scales / 2
    error = (exact.scores(QUERIES) - rounded.scores(QUERIES)).abs()
    assert bool((error <= bound * 1.001 + 1e-5 * exact.scores(QUERIES).abs().max()).all())
    assert bool((rounded.scores(QUERIES)[:, 4] == 0).all())
    assert rounded.codes.nbytes * 4 == exact.codes.nbytes


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_an_index_comes_back_from_its_file(dtype, tmp_path):
    index = random_index(dtype=dtype, basis=BY_LABEL)
    index.save(tmp_path / "index.safetensors")
    back = Index.load(tmp_path / "index.safetensors", PROBLEM)
    assert (back.dtype, back.units, back.basis.rank) == (dtype, "examples", 4)
    assert torch.equal(back.scores(QUERIES), index.scores(QUERIES)) and torch.equal(back.ids, index.ids)


def test_a_file_of_another_model_code_or_format_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "index.safetensors"
    WHOLE.save(path)
    with pytest.raises(ValueError, match=r"made for theta \w{16}, but this problem has theta \w{16}"):
        Index.load(path, PROBLEM.at(PROBLEM.theta * 2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CorruptFile, match="truncated"):
        Index.load(path, PROBLEM)
    path.write_bytes(whole)
    monkeypatch.setattr(index_module, "_code", lambda: "0123456789abcdef")
    with pytest.raises(ValueError, match=r"written by code \w{16}, but this is code 0123456789abcdef"):
        Index.load(path, PROBLEM)
    assert len(Index.load(path, PROBLEM, any_code=True)) == 24
    monkeypatch.setattr(index_module, "FORMAT", 2)
    with pytest.raises(ValueError, match="index format 1, but this code reads 2"):
        Index.load(path, PROBLEM)
    with pytest.raises(FileNotFoundError):
        Index.load(tmp_path / "none", PROBLEM)


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
    with pytest.raises(ValueError, match="ids must be 3 int64 numbers"):
        Index.from_coefficients(BASIS, torch.zeros(1, 3, 5), ids=torch.arange(2))
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, 4\), got \(n, 5\)"):
        WHOLE.scores(labelled(3, d=5))
    assert len(WHOLE) == 24
