"""Gradients through what flows in and out of linear layers: those of autograd, example by example."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probes import FLAT, SEQUENTIAL, make, problem_of
from torch import nn
from toys import FLOAT64, labelled, random_problem

from tda_core.problem import Problem


class Reused(nn.Module):
    """A layer whose weight is used a second time, where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h) + (h @ self.last.weight.T) ** 2


def by_autograd(problem: Problem, target: str) -> torch.Tensor:
    """Each example alone through `torch.autograd`."""
    rows = []
    for i in range(len(problem.train)):
        theta = problem.theta.clone().requires_grad_()
        one = problem.train[i : i + 1]
        rows.append(torch.autograd.grad(problem.value(theta, one.inputs, one.targets, target)[0], theta)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("target", ["loss", "margin"])
@pytest.mark.parametrize("name", [*FLAT, *SEQUENTIAL])
def test_gradients_by_layer_are_those_of_autograd(name, target):
    problem = make(name)
    assert problem.linear_layers is not None
    expected = by_autograd(problem, target)
    for chunk_size in (1, 4, 256):
        found = problem.gradients(problem.train, target, chunk_size=chunk_size)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert not found.requires_grad and float(expected.abs().max()) > 1e-3


def test_a_weight_that_is_used_outside_of_its_layer_is_noticed():
    problem = problem_of(Reused())
    assert problem.linear_layers is None
    torch.testing.assert_close(problem.gradients(problem.train), by_autograd(problem, "loss"), rtol=1e-11, atol=1e-12)


class Mingled(nn.Module):
    """Each output depends on the other examples of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h - h.mean(0, keepdim=True) / 2)


def test_examples_that_depend_on_each_other_are_noticed():
    problem = problem_of(Mingled())
    assert problem.linear_layers is None
    torch.testing.assert_close(problem.gradients(problem.train), by_autograd(problem, "loss"), rtol=1e-11, atol=1e-12)


def test_threads_that_share_a_problem_do_not_disturb_each_other():
    problem = random_problem((4, 30, 3), n=60)
    expected = problem.gradients(problem.train)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: problem.gradients(problem.train[i : i + 1]), list(range(60)) * 5))
    torch.testing.assert_close(torch.cat(found), expected.repeat(5, 1), rtol=1e-12, atol=1e-13)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(12)))
def test_an_examples_gradient_does_not_depend_on_its_company(order):
    problem, order = random_problem(), torch.tensor(order)
    whole = problem.gradients(problem.train)
    torch.testing.assert_close(problem.gradients(problem.train[order]), whole[order], rtol=1e-12, atol=1e-13)


def test_the_copy_has_the_parameters_of_the_problem_and_leaves_the_module_alone():
    problem = random_problem()
    before = [value.clone() for value in problem.module.parameters()]
    moved = problem.at(problem.theta * 2)
    torch.testing.assert_close(moved.placed(problem.train.inputs), moved.outputs(problem.train.inputs))
    assert not torch.allclose(moved.placed(problem.train.inputs), problem.outputs(problem.train.inputs))
    assert all(torch.equal(a, b) for a, b in zip(before, problem.module.parameters(), strict=True))
    assert all(value.requires_grad for value in problem.module.parameters())


def test_single_precision_is_enough_to_tell_layers_apart():
    double = random_problem((4, 30, 3), n=40)
    single = Problem(double.module.float(), double.theta.float(), double.loss, labelled(40, dtype=torch.float32))
    assert single.linear_layers is not None
    found = single.gradients(single.train).to(FLOAT64)
    torch.testing.assert_close(found, by_autograd(single, "loss").to(FLOAT64), rtol=1e-4, atol=1e-6)
