"""Networks, losses and the margin against their definitions."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import FLOAT64, generator

from tda_core.models import LOSSES, cross_entropy, margin, mlp, squared_error


@pytest.mark.parametrize(("activation", "function"), [("relu", torch.relu), ("tanh", torch.tanh)])
@pytest.mark.parametrize("layers", [(4, 3), (4, 5, 3), (4, 6, 5, 3)])
def test_mlp_is_affine_maps_with_activations_between(layers, activation, function):
    model = mlp(layers, activation).double()
    x = torch.randn(7, layers[0], dtype=FLOAT64)
    expected = x
    parameters = list(model.parameters())
    assert [tuple(p.shape) for p in parameters] == [shape for a, b in pairwise(layers) for shape in ((b, a), (b,))]
    for i in range(0, len(parameters), 2):
        expected = expected @ parameters[i].T + parameters[i + 1]
        expected = function(expected) if i + 2 < len(parameters) else expected
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert isinstance(model[-1], nn.Linear)


def test_relu_is_the_default():
    assert isinstance(mlp((4, 5, 3))[1], nn.ReLU)


@pytest.mark.parametrize("layers", [(4,), (), (4, 0), (4, -1, 3), (4, 2.5)])
def test_impossible_widths_are_refused(layers):
    with pytest.raises(ValueError, match=r"at least two widths of 1 or more, got \("):
        mlp(layers)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"unknown activation 'gelu', expected one of \['relu', 'tanh'\]"):
        mlp((4, 3), "gelu")


def test_cross_entropy_is_minus_the_log_probability():
    outputs = torch.randn(6, 4, generator=generator(0), dtype=FLOAT64)
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = [-math.log(math.exp(o[t]) / sum(math.exp(v) for v in o)) for o, t in zip(outputs, targets, strict=True)]
    assert cross_entropy(outputs, targets).tolist() == pytest.approx(expected, rel=1e-12)


def test_squared_error_is_half_the_square():
    found = squared_error(torch.tensor([[3.0], [1.0]]), torch.tensor([1.0, 1.5]))
    assert found.tolist() == [2.0, 0.125]
    with pytest.raises(ValueError, match="outputs of width 1, got width 2"):
        squared_error(torch.zeros(3, 2), torch.zeros(3))


def test_losses_are_known_by_name():
    assert LOSSES == {"cross_entropy": cross_entropy, "squared_error": squared_error}


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_margin_is_the_log_odds_of_the_label(seed, classes):
    outputs = 2 * torch.randn(5, classes, generator=generator(seed), dtype=FLOAT64)
    targets = torch.randint(0, classes, (5,), generator=generator(seed))
    probability = outputs.softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(margin(outputs, targets), (probability / (1 - probability)).log())
    naive = -torch.expm1(cross_entropy(outputs, targets)).log()
    torch.testing.assert_close(margin(outputs, targets), naive, rtol=1e-9, atol=1e-9)


def test_margin_stays_exact_where_the_naive_form_overflows():
    outputs = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0], [1e4, 1e4 - 3.0, 0.0]])
    targets = torch.tensor([0, 0, 0])
    assert margin(outputs, targets).tolist() == [1e4, -2e4, 3.0]
    assert not torch.isfinite(-(cross_entropy(outputs, targets).exp() - 1).log()).all()


@settings(deadline=None)
@given(st.floats(-1e4, 1e4), st.integers(0, 100))
def test_margin_does_not_change_with_a_common_shift_and_is_the_difference_of_two_logits(shift, seed):
    outputs = torch.randn(3, 4, generator=generator(seed), dtype=FLOAT64)
    targets = torch.tensor([0, 1, 3])
    torch.testing.assert_close(margin(outputs + shift, targets), margin(outputs, targets), rtol=1e-9, atol=1e-9)
    two = outputs[:, :2]
    torch.testing.assert_close(margin(two, torch.ones(3, dtype=torch.long)), two[:, 1] - two[:, 0])


def test_margin_has_a_finite_gradient_at_extreme_logits():
    outputs = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    margin(outputs, torch.tensor([0])).sum().backward()
    assert outputs.grad.tolist() == [[1.0, -1.0, 0.0]]


def test_margin_needs_two_classes():
    with pytest.raises(ValueError, match="at least 2 classes, got outputs of width 1"):
        margin(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
