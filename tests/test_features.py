"""Feature maps: closed forms, what they keep of a kernel, files, and named errors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from tda_core import features
from tda_core.features import hidden, input_pca, joined, kernel_pca, load_features, random_relu, raw_input, with_bias
from tda_core.kernels import GaussianKernel, ReluKernel
from tda_core.store import save_tensors
from tests.toys import FLOAT64, generator, random_problem

KERNEL = ReluKernel((4, 8, 3))


def inputs(n=20, d=4, seed=0):
    return torch.randn(n, d, generator=generator(seed), dtype=FLOAT64)


def maps(problem):
    x = problem.train.inputs
    parts = [
        raw_input(x),
        input_pca(x, 3),
        input_pca(x, 2, whiten=0.1),
        hidden(problem),
        random_relu(x, (6, 5), seed=1),
    ]
    parts += [kernel_pca(x, KERNEL, 5), kernel_pca(x, GaussianKernel(1.0), 4, landmarks=8, seed=2)]
    return [*parts, joined(parts[1:], x, bias=True), with_bias(parts[3])]


# -- what each map is -------------------------------------------------------------------------------


def test_raw_inputs_are_flattened():
    images = inputs(5, 6).view(5, 2, 3)
    assert torch.equal(raw_input(images)(images), images.flatten(1))


def test_principal_components_agree_with_scikit_learn():
    x, new = inputs(), inputs(7, seed=1)
    reference = PCA(3, svd_solver="full").fit(x.numpy())
    ours, theirs = input_pca(x, 3)(new), reference.transform(new.numpy())
    np.testing.assert_allclose(ours.abs(), np.abs(theirs), rtol=1e-10)
    white = input_pca(x, 3, whiten=0.0)(x)
    torch.testing.assert_close(white.T @ white / len(x), torch.eye(3, dtype=FLOAT64))
    variances = input_pca(x, 3)(x).var(0, correction=0)
    torch.testing.assert_close(
        input_pca(x, 3, whiten=0.5)(x).var(0, correction=0), variances / (variances + 0.5 * variances[0])
    )


def test_hidden_layers_are_the_problems_own():
    problem = random_problem((4, 5, 6, 3))
    x = problem.train.inputs
    assert torch.equal(hidden(problem)(x), problem.features(x))
    assert torch.equal(hidden(problem, "2")(x), problem.features(x, "2")) and hidden(problem, "2").n_features == 5
    assert hidden(problem, "2").name == "hidden_2"


def test_kernel_components_are_projections_on_eigenvectors():
    x, new = inputs(), inputs(7, seed=1)
    found = kernel_pca(x, GaussianKernel(1.5), 6)(new)
    values, vectors = np.linalg.eigh(GaussianKernel(1.5)(x, x).numpy())
    expected = GaussianKernel(1.5)(new, x).numpy() @ vectors[:, ::-1][:, :6] / np.sqrt(values[::-1][:6])
    np.testing.assert_allclose(found.abs(), np.abs(expected), rtol=1e-8)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(1, 20), st.booleans())
def test_kernel_components_are_the_best_of_their_rank(seed, k, sampled):
    x = inputs(seed=seed)
    phi = kernel_pca(x, KERNEL, k, landmarks=20 if sampled else None, seed=seed)(x)
    gram = KERNEL(x, x)
    left = torch.linalg.eigvalsh(gram).flip(0)[k:]
    torch.testing.assert_close((gram - phi @ phi.T).norm(), left.norm(), rtol=1e-6, atol=1e-8)
    second = phi.T @ phi  # uncorrelated, and falling
    assert float((second - second.diag().diag()).abs().max()) < 1e-8 * float(second.max())
    assert bool((second.diagonal().diff() < 1e-9).all())


def test_landmarks_reproduce_the_kernel_on_themselves_and_approach_it_elsewhere():
    x = inputs(60)
    gram = KERNEL(x, x)
    errors = []
    for m in (5, 20, 60):
        phi = kernel_pca(x, KERNEL, m, landmarks=m, seed=3)(x)
        errors.append(float((phi @ phi.T - gram).norm() / gram.norm()))
        rows = torch.randperm(60, generator=generator(3))[:m]
        torch.testing.assert_close((phi @ phi.T)[rows][:, rows], gram[rows][:, rows], rtol=1e-6, atol=1e-7)
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-8


def test_random_features_approach_the_arc_cosine_kernel():
    x, width = inputs(6, 40), 50_000  # enough inputs for sums of uniform weights to be close to normal
    phi = random_relu(x, (width,), seed=0)(x)
    kernel = ReluKernel((40, width, 1), "nngp")(x, x)  # (sum over units + 1) / (3 width)
    torch.testing.assert_close((phi @ phi.T + 1) / (3 * width), kernel, rtol=0.08, atol=0)
    assert torch.equal(phi, random_relu(x, (width,), seed=0)(x))
    assert not torch.equal(phi, random_relu(x, (width,), seed=1)(x))


def test_joined_maps_weigh_alike():
    x = inputs()
    parts = [raw_input(x), kernel_pca(x, KERNEL, 5)]
    found = joined(parts, x, bias=True)(x)
    assert found.shape == (20, 10) and bool((found[:, -1] == 1).all())
    for columns in (found[:, :4], found[:, 4:9]):
        assert float((columns**2).sum(1).mean()) == pytest.approx(1)
    assert torch.equal(with_bias(parts[0])(x), torch.cat([x, torch.ones(20, 1, dtype=FLOAT64)], 1))


def test_every_map_takes_new_inputs_in_their_own_type_and_says_how_wide_it_is():
    problem = random_problem((4, 5, 3))
    for found in maps(problem):
        new = inputs(3, seed=5).float()
        assert found(new).shape == (3, found.n_features) and found(new).dtype == torch.float32
        torch.testing.assert_close(found(new).double(), found(new.double()), rtol=1e-3, atol=1e-3)
        assert not set(found.name) - set("abcdefghijklmnopqrstuvwxyz0123456789_.")


# -- files ------------------------------------------------------------------------------------------


def test_saved_maps_give_the_same_features(tmp_path):
    problem = random_problem((4, 5, 3))
    for i, found in enumerate(maps(problem)):
        found.save(tmp_path / f"{i}.safetensors")
        loaded = load_features(tmp_path / f"{i}.safetensors", problem)
        assert torch.equal(loaded(inputs(3, seed=5)), found(inputs(3, seed=5)))
        assert (loaded.name, loaded.n_features, loaded.shape) == (found.name, found.n_features, found.shape)


def test_files_of_something_else_are_refused(tmp_path):
    problem, path = random_problem((4, 5, 3)), tmp_path / "map.safetensors"
    with_bias(hidden(problem)).save(path)
    with pytest.raises(ValueError, match="features of layer '2': give the problem"):
        load_features(path)
    with pytest.raises(ValueError, match="was made for theta"):
        load_features(path, problem.at(problem.theta + 1))
    save_tensors(path, {"x": torch.ones(1)}, {"other": 1})
    with pytest.raises(ValueError, match=r"does not hold a feature map, but \['other'\]"):
        load_features(path)
    save_tensors(path, {"x": torch.ones(1)}, {"features": {"kind": "new", "name": "a", "shape": [4]}})
    with pytest.raises(ValueError, match="features of an unknown kind 'new'"):
        load_features(path)


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 5, 2.0, True])
def test_impossible_numbers_of_components_are_named(k):
    with pytest.raises(ValueError, match=rf"k must be a whole number in 1..4, got {k}"):
        input_pca(inputs(), k)
    with pytest.raises(ValueError, match=rf"in 1..4, got {k}"):
        kernel_pca(inputs(4), KERNEL, k)


def test_what_cannot_be_fitted_is_named(monkeypatch):
    x = inputs()
    with pytest.raises(ValueError, match="finite floor >= 0, got nan"):
        input_pca(x, 2, whiten=float("nan"))
    flat = x.clone()
    flat[:, 3] = 1.0
    with pytest.raises(ValueError, match=r"component 4 has no variance: use k <= 3"):
        input_pca(flat, 4, whiten=0.0)
    with pytest.raises(ValueError, match="numerical rank 5, below k = 6"):
        kernel_pca(x, ReluKernel((4, 3)), 6)  # x.z + 1
    with pytest.raises(ValueError, match="landmarks' kernel has numerical rank 5, below k = 6"):
        kernel_pca(x, ReluKernel((4, 3)), 6, landmarks=10)
    with pytest.raises(ValueError, match=r"landmarks must lie in 1..20, .* got 21"):
        kernel_pca(x, KERNEL, 2, landmarks=21)
    with pytest.raises(ValueError, match=r"k must be a whole number in 1..5, got 6"):
        kernel_pca(x, KERNEL, 6, landmarks=5)
    monkeypatch.setattr(features, "EXACT_LIMIT", 19)
    with pytest.raises(ValueError, match="takes up to 19 examples, got 20: give a number of landmarks"):
        kernel_pca(x, KERNEL, 2)
    with pytest.raises(ValueError, match=r"at least two widths .* got \(4, 0\)"):
        random_relu(x, (0,))


def test_unknown_layers_are_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"unknown layer 'head', expected one of \['0', '1', '2'\]"):
        hidden(random_problem((4, 5, 3)), "head")


def test_maps_that_do_not_fit_together_are_named():
    x = inputs()
    with pytest.raises(ValueError, match="at least one feature map to join, got none"):
        joined([], x)
    with pytest.raises(ValueError, match=r"shapes \(4,\) and \(3,\)"):
        joined([raw_input(x), raw_input(x[:, :3])], x)
    with pytest.raises(ValueError, match="'input' are zero on all training inputs"):
        joined([raw_input(x)], torch.zeros(3, 4, dtype=FLOAT64))


def test_bad_inputs_are_named():
    for found in maps(random_problem((4, 5, 3))):
        with pytest.raises(ValueError, match=r"inputs must be \(n, 4\), n >= 1, got \(3, 5\)"):
            found(inputs(3, 5))
        with pytest.raises(ValueError, match=r"n >= 1, got \(0, 4\)"):
            found(inputs(0))
        bad = inputs(3)
        bad[1, 2] = float("nan")
        with pytest.raises(ValueError, match="input 1 holds NaN"):
            found(bad)
        with pytest.raises(TypeError, match=r"floating point tensor, got torch\.int64"):
            found(torch.ones(2, 4, dtype=torch.int64))
