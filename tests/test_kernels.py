"""Kernels of wide ReLU networks: against quadrature for each pair, and against real networks' gradients."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from tda_core.examples import Examples
from tda_core.kernels import GaussianKernel, ReluKernel, kernel_of, kernel_settings, relu_kernel
from tda_core.models import mlp
from tda_core.problem import Problem
from tda_core.recipes import Recipe, initial_parameters
from tests.toys import FLOAT64, generator, random_problem


def inputs(n, d, seed=0):
    return torch.randn(n, d, generator=generator(seed), dtype=FLOAT64)


def moment(a, b, c, degree):
    """E[(u+)^degree (v+)^degree] of normal u, v with variances a, b and covariance c, by quadrature over the angle."""
    angle = np.arccos(np.clip(c / np.sqrt(a * b), -1, 1))
    half = np.pi / 2
    # u = r sqrt(a) cos(s), v = r sqrt(b) cos(s - angle), with s uniform and r^2 exponential with mean 2
    inner = quad(lambda s: (np.cos(s) * np.cos(s - angle)) ** degree, angle - half, half, epsabs=1e-13)[0]
    return (np.sqrt(a * b) * 2) ** degree * inner / (2 * np.pi)


def reference(x, z, widths):
    """NTK and NNGP of one pair of inputs, as sums over the layers: what flows in times what flows back."""
    flows, factors = [x @ z], []
    own = [(x @ x, z @ z)]
    for width_in, width in pairwise(widths[:-1]):
        c, (a, b) = (flows[-1] + 1) / (3 * width_in), ((v + 1) / (3 * width_in) for v in own[-1])
        flows.append(width * moment(a, b, c, 1))
        own.append((width * moment(a, a, a, 1), width * moment(b, b, b, 1)))
        factors.append(moment(a, b, c, 0) / 3)
    ntk = sum((flow + 1) * np.prod(factors[i:]) for i, flow in enumerate(flows))
    return ntk, (flows[-1] + 1) / (3 * widths[-2])


@pytest.mark.parametrize("widths", [(3, 2), (3, 8, 2), (3, 8, 20, 5, 2)])
def test_each_pair_agrees_with_quadrature(widths):
    x, z = inputs(4, 3), inputs(3, 3, seed=1)
    z[0] = -x[0]  # opposite
    expected = np.array([[reference(a, b, widths) for b in z.numpy()] for a in x.numpy()])
    for i, kind in enumerate(("ntk", "nngp")):
        np.testing.assert_allclose(ReluKernel(widths, kind)(x, z), expected[..., i], rtol=1e-9)


def test_wide_networks_have_these_covariances_and_gradients():
    widths, x = (4, 150, 150, 1), inputs(5, 4)
    recipe = Recipe(widths, loss="squared_error", precision="float64")
    module, examples = mlp(widths).to(FLOAT64), Examples(x, x[:, 0])
    ntk, outputs = torch.zeros(5, 5, dtype=FLOAT64), []
    for seed in range(25):
        problem = Problem(module, initial_parameters(recipe, seed), lambda o, y: o[:, 0], examples)
        jacobian = problem.gradients(examples)
        ntk += jacobian @ jacobian.T / 25
        outputs.append(problem.outputs(x)[:, 0])
    torch.testing.assert_close(ntk, ReluKernel(widths)(x, x), rtol=0.15, atol=0)
    outputs = torch.stack(outputs)
    torch.testing.assert_close(outputs.T @ outputs / 25, ReluKernel(widths, "nngp")(x, x), rtol=0.8, atol=0.02)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(0, 3), st.sampled_from(["ntk", "nngp"]))
def test_kernels_are_symmetric_and_positive(seed, depth, kind):
    kernel, x = ReluKernel((3, *[7] * depth, 2), kind), inputs(12, 3, seed)
    gram = kernel(x, x)
    torch.testing.assert_close(gram, gram.T)
    assert float(torch.linalg.eigvalsh(gram)[0]) > -1e-9 * float(gram.diagonal().max())


def test_a_problems_own_kernel_has_its_widths():
    assert relu_kernel(random_problem((4, 5, 6, 3), "relu"), "nngp") == ReluKernel((4, 5, 6, 3), "nngp")
    assert relu_kernel(random_problem((4, 3), "tanh")).widths == (4, 3)  # linear: there is no activation
    x = inputs(6, 4)
    torch.testing.assert_close(relu_kernel(random_problem((4, 3)))(x, x), x @ x.T + 1)


def test_the_gaussian_kernel():
    x, z = inputs(3, 2), inputs(4, 2, seed=1)
    expected = [[np.exp(-(((a - b) ** 2).sum()) / 18) for b in z.numpy()] for a in x.numpy()]
    np.testing.assert_allclose(GaussianKernel(3.0)(x, z), expected, rtol=1e-12)


@pytest.mark.parametrize("kernel", [ReluKernel((4, 5, 3), "nngp"), ReluKernel((4, 3)), GaussianKernel(0.5)])
def test_settings_give_the_kernel_again(kernel):
    assert kernel_of(kernel_settings(kernel)) == kernel


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="unknown kernel kind 'rbf', expected one of"):
        ReluKernel((4, 3), "rbf")
    with pytest.raises(ValueError, match=r"at least two widths .* got \(4,\)"):
        ReluKernel((4,))
    with pytest.raises(ValueError, match=r"inputs must be \(n, 4\) for this kernel, got \(2, 3\)"):
        ReluKernel((4, 3))(inputs(2, 4), inputs(2, 3))
    with pytest.raises(ValueError, match="scale must be finite and > 0, got nan"):
        GaussianKernel(float("nan"))
    with pytest.raises(ValueError, match=r"nn.ReLU between them, got \['Linear', 'Tanh', 'Linear'\]"):
        relu_kernel(random_problem((4, 5, 3), "tanh"))
    with pytest.raises(ValueError, match="unknown kernel 'rbf', expected one of"):
        kernel_of({"kernel": "rbf"})
