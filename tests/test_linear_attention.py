"""The constructed layer against gradient descent by autograd, its closed forms, and named errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core import linear_attention, regression_references
from tda_core.linear_attention import gains_of_one_step, gradient_products, one_step_layer
from tda_core.regression_tasks import Family, Pairs, Sizes, draw_tasks

TASKS = draw_tasks(Family(3, 0.5), Sizes(2, 0, 4, 5), seed=0)
DEMONSTRATIONS, QUERIES = TASKS.candidates.to(torch.float64), TASKS.queries.to(torch.float64)


@settings(max_examples=20, deadline=None)
@given(eta=st.floats(0.001, 1.0), n=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_forward_pass_is_a_gradient_step(eta, n, seed):
    tasks = draw_tasks(Family(3, 0.5), Sizes(2, 0, 4, 5), seed=seed)
    context = tasks.candidates.first(n)
    zero = torch.zeros(2, 3, requires_grad=True)
    loss = (((context.inputs * zero[:, None]).sum(2) - context.targets) ** 2).sum() / 2
    (gradient,) = torch.autograd.grad(loss, zero)
    expected = regression_references.predict(-eta * gradient, tasks.queries.inputs)
    found = one_step_layer(3, eta).predict(context, tasks.queries.inputs)
    scale = expected.abs().max().clamp(min=1)
    assert (found - expected).abs().max() <= 1e-6 * scale


def test_a_forward_pass_keeps_the_inputs_of_all_tokens():
    tokens = torch.cat([DEMONSTRATIONS.inputs, DEMONSTRATIONS.targets[:, :, None]], 2)
    out = one_step_layer(3, 0.1, dtype=torch.float64)(tokens, tokens)
    assert torch.equal(out[:, :, :3], tokens[:, :, :3])
    assert not torch.equal(out[:, :, 3], tokens[:, :, 3])


@pytest.mark.parametrize("eta", [0.01, 0.3, 2.0])
def test_closed_forms_are_those_of_autograd_and_of_the_layer(eta):
    products, gains = linear_attention.autograd_reference(DEMONSTRATIONS, QUERIES, eta)
    torch.testing.assert_close(gradient_products(DEMONSTRATIONS, QUERIES), products)
    torch.testing.assert_close(gains_of_one_step(DEMONSTRATIONS, QUERIES, eta), gains)
    tasks = type(TASKS)(TASKS.vectors.double(), TASKS.background.to(torch.float64), DEMONSTRATIONS, QUERIES)
    layer = one_step_layer(3, eta, dtype=torch.float64)
    torch.testing.assert_close(regression_references.loss_changes(layer.predict, tasks), gains)
    torch.testing.assert_close(regression_references.inner_product(tasks, 1.0), products)


def test_the_gain_is_the_inner_product_to_first_order():
    products = gradient_products(DEMONSTRATIONS, QUERIES)
    errors = [
        float((gains_of_one_step(DEMONSTRATIONS, QUERIES, eta) / eta - products).abs().max()) for eta in (1e-3, 1e-4)
    ]
    assert errors[0] / errors[1] == pytest.approx(10, rel=1e-6)  # what is left shrinks with eta


@settings(max_examples=30, deadline=None)
@given(eta=st.floats(1e-3, 10), scale=st.floats(0.1, 4), seed=st.integers(0, 99))
def test_signs_agree_exactly_where_the_step_does_not_overshoot_twice(eta, scale, seed):
    tasks = draw_tasks(Family(3, 0.5), Sizes(2, 0, 4, 5), seed=seed)
    demonstrations = Pairs(scale * tasks.candidates.inputs.double(), tasks.candidates.targets.double())
    queries = tasks.queries.to(torch.float64)
    products, gains = gradient_products(demonstrations, queries), gains_of_one_step(demonstrations, queries, eta)
    ratio = eta * products / (2 * queries.targets[:, None] ** 2)
    agree = products.sign() == gains.sign()
    clear = (ratio - 1).abs() > 1e-9
    assert torch.equal(agree[clear], (ratio < 1)[clear])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: one_step_layer(0, 0.1), "dimension must be at least 1, got 0"),
        (lambda: one_step_layer(3, 0.0), "eta must be finite and above 0, got 0.0"),
        (lambda: gains_of_one_step(DEMONSTRATIONS, QUERIES, float("nan")), "eta must be finite and above 0, got nan"),
        (lambda: linear_attention.autograd_reference(DEMONSTRATIONS, QUERIES, -1.0), "above 0, got -1.0"),
        (lambda: one_step_layer(4, 0.1).predict(TASKS.candidates, TASKS.queries.inputs), "4 dimensions, got 3"),
    ],
)
def test_bad_input_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()
