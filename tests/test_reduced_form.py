"""Closed forms read along few directions: exact with all, the best of their rank, files, named errors."""

import pytest
import torch

from tda_core import reduced_form
from tda_core.closed_form import stride_closed_form
from tda_core.features import hidden, kernel_pca, with_bias
from tda_core.kernels import ReluKernel
from tda_core.reduced_form import ReducedForm, reduce
from tda_core.store import save_tensors
from tests.toys import labelled, random_problem


def closed(problem, **options):
    return stride_closed_form(problem, kernel_pca(problem.train.inputs, ReluKernel((4, 9, 3)), 5), 0.05, **options)


@pytest.mark.parametrize(("layers", "unknowns"), [((4, 5, 3), 10), ((4, 5, 1), 5)])
def test_along_all_directions_scores_are_unchanged(layers, unknowns, monkeypatch):
    problem = random_problem(layers, n=20)
    queries, method = problem.train[:4], closed(problem)
    monkeypatch.setattr(reduced_form, "BLOCK", 6)
    (found,) = reduce(method, unknowns)
    torch.testing.assert_close(found.scores(queries), method.scores(queries))
    assert found.kept == pytest.approx(1)


def test_the_directions_keep_most_of_the_training_scores():
    problem = random_problem((4, 5, 3), n=20)
    method = closed(problem)
    full = method.scores(problem.train)
    # scores of training examples for each other are a positive matrix, whose best approximation is by its eigenvectors
    values = torch.linalg.eigvalsh(full).flip(0)
    for rank in (1, 3, 7):
        (found,) = reduce(method, rank)
        left = full - found.scores(problem.train)
        torch.testing.assert_close(left.norm(), values[rank:].norm())
        assert found.kept == pytest.approx(float(values[:rank].sum() / values.sum()))


def test_several_models_each_have_their_own():
    first = random_problem((4, 5, 3), n=20)
    problems = [first, first.at(first.theta.flip(0))]
    method = stride_closed_form(problems, [with_bias(hidden(p)) for p in problems], 0.1, target="margin")
    found = sum(one.scores(first.train[:3]) for one in reduce(method, 12)) / 2
    torch.testing.assert_close(found, method.scores(first.train[:3]))


def test_files(tmp_path):
    problem, path = random_problem((4, 5, 3), n=20), tmp_path / "reduced.safetensors"
    (found,) = reduce(closed(problem), 4)
    found.save(path)
    loaded = ReducedForm.load(path, problem)
    torch.testing.assert_close(
        loaded.scores(problem.train[:3]), found.scores(problem.train[:3]), rtol=1e-12, atol=1e-14
    )
    assert loaded.kept == found.kept
    with pytest.raises(ValueError, match="was made for theta"):
        ReducedForm.load(path, problem.at(problem.theta + 1))
    save_tensors(path, {}, {"kind": 1})
    with pytest.raises(ValueError, match=r"does not hold a ReducedForm, but \['kind'\]"):
        ReducedForm.load(path, problem)


def test_what_is_wrong_is_named():
    problem = random_problem((4, 5, 3), n=20)
    for rank in (0, 11):
        with pytest.raises(ValueError, match=rf"rank must lie in 1..10, .* got {rank}"):
            reduce(closed(problem), rank)
    with pytest.raises(ValueError, match="only a dense system has directions, got iterative"):
        reduce(closed(problem, system="iterative"), 2)
    (found,) = reduce(closed(problem), 2)
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, 4\)"):
        found.scores(labelled(2, 5))
