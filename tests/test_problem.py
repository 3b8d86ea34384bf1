"""Problem: every derivative against autograd, finite differences or an explicit formula, in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toys import FLOAT64, Branching, continuous, generator, labelled, random_problem

from tda_core import problem as problem_module
from tda_core.examples import Examples
from tda_core.models import LOSSES, margin, mlp
from tda_core.problem import Problem

NETWORKS = [
    ((4, 3), "tanh"),
    ((4, 5, 3), "tanh"),
    ((4, 6, 5, 3), "relu"),
    ((4, 1), "relu"),
    ((4, 5, 1), "relu"),
    ((4, 6, 5, 1), "tanh"),
]
QUERIES = {3: labelled(7, seed=5), 1: continuous(7, seed=5)}
networks = pytest.mark.parametrize(("layers", "activation"), NETWORKS)


def close(found, expected, tolerance=1e-11):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def directions(problem: Problem, k: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(k, problem.n_parameters, generator=generator(seed), dtype=FLOAT64)


def by_autograd(problem: Problem, x: torch.Tensor, y: torch.Tensor, target: str) -> torch.Tensor:
    """One example's gradient through a real module and `torch.autograd`."""
    module = mlp_like(problem)
    outputs = module(x[None])
    value = {
        "loss": lambda: problem.loss(outputs, y[None])[0],
        "margin": lambda: margin(outputs, y[None])[0],
        "output": lambda: outputs[0, 0],
    }[target]()
    grads = torch.autograd.grad(value, list(module.parameters()))
    return torch.cat([grad.flatten() for grad in grads])


def mlp_like(problem: Problem) -> torch.nn.Module:
    widths = [shape[1] for shape in problem.shapes if len(shape) == 2] + [problem.shapes[-1][0]]
    activation = "relu" if "ReLU" in repr(problem.module) else "tanh"
    module = mlp(tuple(widths), activation).double()
    torch.nn.utils.vector_to_parameters(problem.theta, module.parameters())
    return module


# -- evaluation -------------------------------------------------------------------------------------


@networks
def test_outputs_losses_and_margins_are_the_modules(layers, activation):
    problem, queries = random_problem(layers, activation), QUERIES[layers[-1]]
    with torch.no_grad():
        outputs = mlp_like(problem)(queries.inputs)
    close(problem.outputs(queries.inputs), outputs)
    close(problem.losses(queries), problem.loss(outputs, queries.targets))
    if queries.is_classification:
        close(problem.margins(queries), margin(outputs, queries.targets))
    other = directions(problem, 1)[0]
    close(problem.losses(queries, other), problem.at(other).losses(queries))
    assert not torch.equal(problem.losses(queries, other), problem.losses(queries))


def test_parameters_lie_in_theta_in_the_order_of_the_module():
    problem = random_problem((4, 5, 3))
    parts = problem.unravel(problem.theta)
    assert list(parts) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert torch.equal(torch.cat([part.flatten() for part in parts.values()]), problem.theta)
    assert problem.offsets["2.weight"] == slice(25, 40)
    assert problem.n_parameters == 43
    assert problem.n_outputs == 3


def test_from_module_copies_the_model_and_turns_dropout_off():
    torch.manual_seed(0)
    module = Branching().double().train()
    problem = Problem.from_module(module, "cross_entropy", labelled(), weight_decay=0.1)
    assert problem.names == ("scale", "first.weight", "unused.weight", "unused.bias", "last.weight", "last.bias")
    assert problem.weight_decay == 0.1
    assert module.training  # the caller's model is left as it was
    before = problem.losses(problem.train)
    assert torch.equal(before, problem.losses(problem.train))
    close(before, LOSSES["cross_entropy"](module.eval()(problem.train.inputs), problem.train.targets).detach())
    with torch.no_grad():
        module.scale.mul_(3)
    assert torch.equal(before, problem.losses(problem.train))


def test_from_module_takes_a_loss_function():
    data = continuous()
    problem = Problem.from_module(mlp((4, 1)).double(), lambda out, y: (out[:, 0] - y).abs(), data)
    close(problem.losses(data), (problem.outputs(data.inputs)[:, 0] - data.targets).abs().detach())


def test_data_of_another_float_type_is_taken_in_the_type_of_the_parameters():
    problem = random_problem((4, 5, 3))
    single = Examples(problem.train.inputs.float(), problem.train.targets)
    mixed = replace(problem, train=single)
    close(mixed.losses(single), problem.losses(Examples(single.inputs.double(), single.targets)))
    assert mixed.gradients(single).dtype == FLOAT64
    assert mixed.curvature().dtype == FLOAT64
    low = replace(problem, theta=problem.theta.float(), module=mlp((4, 5, 3), "tanh"))
    torch.testing.assert_close(low.losses(problem.train), problem.losses(problem.train).float())


def test_value_is_what_gradients_differentiate():
    problem, queries = random_problem((4, 5, 3)), QUERIES[3]
    x, y = queries.inputs, queries.targets
    close(problem.value(problem.theta, x, y), problem.losses(queries))
    close(problem.value(problem.theta, x, y, "margin"), problem.margins(queries))
    close(problem.value(problem.theta, x, y, "output"), problem.outputs(x)[:, 0])


# -- features and the head --------------------------------------------------------------------------


def test_features_are_what_flows_into_a_layer():
    problem, x = random_problem((4, 6, 5, 3), "tanh"), QUERIES[3].inputs
    module = mlp_like(problem)
    with torch.no_grad():
        close(problem.features(x), module[:4](x))
        close(problem.features(x, "2"), module[:2](x))
        close(problem.features(x, "0"), x)
    assert problem.last_layer == "4"
    images = Examples(problem.train.inputs.view(-1, 2, 2), problem.train.targets)
    flat = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten(), problem.module)
    close(Problem(flat, problem.theta, problem.loss, images).features(images.inputs, "0"), problem.train.inputs)


@networks
def test_head_on_features_gives_the_models_outputs_gradients_and_curvature(layers, activation):
    problem = random_problem(layers, activation, weight_decay=0.1)
    head, queries = problem.head(), QUERIES[layers[-1]]
    featured = problem.featurise(queries)
    close(head.losses(featured), problem.losses(queries))
    last = slice(problem.n_parameters - head.n_parameters, None)
    assert head.n_parameters == (layers[-2] + 1) * layers[-1]
    close(head.gradients(featured), problem.gradients(queries)[:, last])
    close(head.curvature(), problem.curvature()[last, last])
    assert head.weight_decay == 0.1


def test_a_module_that_is_itself_linear_has_itself_as_head():
    linear = torch.nn.Linear(4, 3).double()
    problem = Problem.from_module(linear, "cross_entropy", labelled())
    assert torch.equal(problem.head().theta, problem.theta)
    assert torch.equal(problem.head().train.inputs, problem.train.inputs)


def test_a_head_that_is_not_the_output_is_refused():
    problem = Problem.from_module(Branching().double(), "cross_entropy", labelled())
    with pytest.raises(ValueError, match="last linear layer 'last' does not give the model's outputs"):
        problem.head()
    with pytest.raises(ValueError, match="layer 'unused' did not run"):
        problem.features(problem.train.inputs, "unused")


def test_unknown_and_missing_layers_are_named():
    problem = random_problem((4, 5, 3))
    with pytest.raises(ValueError, match=r"unknown layer 'fc', expected one of \['0', '1', '2'\]"):
        problem.features(problem.train.inputs, "fc")
    conv = torch.nn.Sequential(torch.nn.Unflatten(1, (1, 4)), torch.nn.Conv1d(1, 3, 4), torch.nn.Flatten()).double()
    with pytest.raises(ValueError, match=r"no nn.Linear layer"):
        Problem.from_module(conv, "cross_entropy", labelled()).features(labelled().inputs)


# -- first derivatives ------------------------------------------------------------------------------


@networks
@pytest.mark.parametrize("target", ["loss", "margin", "output"])
def test_gradients_are_autograds_one_by_one(layers, activation, target):
    problem, queries = random_problem(layers, activation), QUERIES[layers[-1]]
    if target == "margin" and layers[-1] == 1:
        with pytest.raises(ValueError, match="at least 2 classes, got outputs of width 1"):
            problem.gradients(queries, target)
        return
    expected = [by_autograd(problem, x, y, target) for x, y in zip(queries.inputs, queries.targets, strict=True)]
    close(problem.gradients(queries, target), torch.stack(expected))
    close(problem.gradients(queries, target, chunk_size=2), torch.stack(expected))
    assert not problem.gradients(queries, target).requires_grad


@networks
@pytest.mark.parametrize("target", ["loss", "output"])
def test_derivatives_along_directions_are_products_with_gradients_and_finite_differences(layers, activation, target):
    problem, queries = random_problem(layers, activation), QUERIES[layers[-1]]
    along = directions(problem, 5)
    found = problem.derivatives_along(queries, along, target)
    assert found.shape == (7, 5)
    close(found, problem.gradients(queries, target) @ along.T)
    step = 1e-6
    for column, v in zip(found.T, along, strict=True):
        ahead, behind = (
            problem.value(problem.theta + sign * step * v, queries.inputs, queries.targets, target) for sign in (1, -1)
        )
        torch.testing.assert_close(column, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-6)


@networks
def test_frozen_parameters_are_constants_and_the_others_keep_their_gradients(layers, activation):
    whole = random_problem(layers, activation)
    module = copy.deepcopy(whole.module)
    nn.utils.vector_to_parameters(whole.theta, module.parameters())
    first = next(iter(dict(module.named_parameters())))
    dict(module.named_parameters())[first].requires_grad_(False)
    part = Problem.from_module(module, whole.loss, whole.train)
    rest = torch.ones(whole.n_parameters, dtype=torch.bool)
    rest[whole.offsets[first]] = False
    assert part.names == whole.names[1:]
    close(part.theta, whole.theta[rest])
    close(part.gradients(part.train), whole.gradients(whole.train)[:, rest])
    close(part.outputs(part.train.inputs), whole.outputs(whole.train.inputs))
    other = copy.deepcopy(module)
    with torch.no_grad():
        dict(other.named_parameters())[first].add_(1e-3)
    assert Problem.from_module(other, whole.loss, whole.train).identity["theta"] != part.identity["theta"]


def test_a_module_without_anything_to_attribute_to_is_refused():
    frozen = nn.Linear(3, 2).requires_grad_(False)
    train = Examples(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="no parameter of this module requires a gradient"):
        Problem.from_module(frozen, "cross_entropy", train)
    head_frozen = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), frozen)
    with pytest.raises(ValueError, match="the last linear layer '2' is frozen"):
        Problem.from_module(head_frozen, "cross_entropy", train).head()


# -- curvature --------------------------------------------------------------------------------------


def explicit_ggn(problem: Problem, batch: Examples) -> torch.Tensor:
    """Mean over examples of J' (second derivative of the loss in the outputs) J, by reverse mode only."""
    total = 0
    for x, y in zip(batch.inputs, batch.targets, strict=True):
        jacobian = torch.func.jacrev(lambda theta, x=x: problem.outputs(x[None], theta)[0])(problem.theta)
        outputs = problem.outputs(x[None])[0]
        inner = torch.func.jacrev(torch.func.jacrev(lambda out, y=y: problem.loss(out[None], y[None])[0]))(outputs)
        total += jacobian.T @ inner @ jacobian / len(batch)
    return total.detach()


def explicit_hessian(problem: Problem, batch: Examples) -> torch.Tensor:
    def objective(theta):
        return problem.loss(problem.outputs(batch.inputs, theta), batch.targets).mean()

    return torch.func.hessian(objective)(problem.theta).detach()


@networks
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@pytest.mark.parametrize("rows", [None, [2], [0, 3, 3, 7]])
def test_curvature_products_are_those_of_the_explicit_matrix(layers, activation, kind, rows):
    problem = random_problem(layers, activation, weight_decay=0.2)
    batch = problem.train if rows is None else problem.train[torch.tensor(rows)]
    explicit = {"ggn": explicit_ggn, "hessian": explicit_hessian}[kind](problem, batch)
    explicit = explicit + 0.2 * torch.eye(problem.n_parameters, dtype=FLOAT64)
    vectors = directions(problem, 3)
    found = problem.curvature_product(vectors, kind, None if rows is None else torch.tensor(rows))
    close(found, vectors @ explicit, 1e-10)
    assert not found.requires_grad
    if rows is None:
        close(problem.curvature(kind), explicit, 1e-10)
        assert torch.equal(problem.curvature(kind), problem.curvature(kind).T)


def test_ggn_is_the_default_and_differs_from_the_hessian():
    problem = random_problem((4, 5, 3))
    assert torch.equal(problem.curvature(), problem.curvature("ggn"))
    assert not torch.allclose(problem.curvature(), problem.curvature("hessian"), atol=1e-3)
    linear = random_problem((4, 3))  # without hidden layers they are one
    close(linear.curvature(), linear.curvature("hessian"))


def test_chunks_do_not_change_the_products(monkeypatch):
    problem = random_problem((4, 5, 3))
    vectors = directions(problem, 6)
    whole = [problem.curvature_product(vectors, kind) for kind in ("ggn", "hessian")]
    along = problem.derivatives_along(problem.train, vectors)
    monkeypatch.setattr(problem_module, "CHUNK_FLOATS", 1)
    for kind, expected in zip(("ggn", "hessian"), whole, strict=True):
        close(problem.curvature_product(vectors, kind), expected)
    close(problem.derivatives_along(problem.train, vectors), along)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(-3, 3), st.floats(-3, 3), st.sampled_from(["ggn", "hessian"]))
def test_curvature_products_are_linear_and_symmetric_and_the_ggn_is_not_negative(seed, a, b, kind):
    problem = random_problem((3, 4, 3), "relu", n=6, weight_decay=0.1, seed=seed)
    u, v = directions(problem, 2, seed)
    of_u, of_v, of_sum = problem.curvature_product(torch.stack([u, v, a * u + b * v]), kind)
    close(of_sum, a * of_u + b * of_v, 1e-9)
    close(u @ of_v, v @ of_u, 1e-9)
    if kind == "ggn":
        assert float(u @ of_u) >= 0.1 * float(u @ u) * (1 - 1e-9)


@networks
def test_largest_curvature_is_the_largest_eigenvalue_from_below(layers, activation):
    problem = random_problem(layers, activation, weight_decay=0.05)
    exact = float(torch.linalg.eigvalsh(problem.curvature())[-1])
    found = problem.largest_curvature(steps=100)
    assert 0.99 * exact <= found <= exact * (1 + 1e-9)
    assert problem.largest_curvature() == problem.largest_curvature()
    assert problem.largest_curvature(seed=0, steps=1) != problem.largest_curvature(seed=1, steps=1)


def test_largest_curvature_of_a_saturated_model_is_zero():
    problem = random_problem((4, 3))
    assert problem.at(problem.theta * 1e6).largest_curvature() == 0.0


# -- identity ---------------------------------------------------------------------------------------


def test_identity_names_parameters_and_data():
    problem = random_problem()
    assert problem.identity == random_problem().identity
    moved = problem.at(problem.theta * (1 + 1e-15))
    assert moved.identity["theta"] != problem.identity["theta"]
    assert moved.identity["data"] == problem.identity["data"] == problem.train.hash[:16]
    decayed = replace(problem, weight_decay=problem.weight_decay + 0.5)
    assert decayed.identity["theta"] == problem.identity["theta"]
    with pytest.raises(ValueError, match=r"file was made for objective .*but this problem has objective"):
        decayed.check_identity("file", problem.identity)
    problem.check_identity("file", dict(problem.identity))
    both = f"file was made for theta {moved.identity['theta']}.*{problem.identity['theta']}"
    with pytest.raises(ValueError, match=both):
        problem.check_identity("file", moved.identity)
    with pytest.raises(ValueError, match=f"x.bin was made for data None.* data {problem.identity['data']}"):
        problem.check_identity("x.bin", {"theta": problem.identity["theta"]})


# -- bad input --------------------------------------------------------------------------------------


def make(**changes) -> Problem:
    problem = random_problem((4, 5, 3))
    given = {"theta": problem.theta, "train": problem.train, "weight_decay": 0.0} | changes
    return Problem(problem.module, given["theta"], problem.loss, given["train"], given["weight_decay"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta": torch.zeros(42, dtype=FLOAT64)}, r"theta must be \(43,\) for this module, got \(42,\)"),
        ({"theta": torch.zeros(1, 43, dtype=FLOAT64)}, r"got \(1, 43\)"),
        ({"theta": torch.full((43,), torch.nan, dtype=FLOAT64)}, "theta must be finite: it holds NaN"),
        ({"weight_decay": -0.5}, "weight_decay must be finite and >= 0, got -0.5"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite and >= 0, got nan"),
        ({"train": labelled(8, classes=4)}, "label 3 is out of range for 3 outputs"),
    ],
)
def test_impossible_problems_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        (labelled(5).inputs, TypeError, r"expected Examples\(inputs, targets\), got Tensor"),
        (labelled(5, d=6), ValueError, r"inputs must have shape \(n, 4\), got \(n, 6\)"),
        (Examples(torch.zeros(2, 2, 2), torch.zeros(2)), ValueError, r"\(n, 4\), got \(n, 2, 2\)"),
        (continuous(5), ValueError, "targets must be torch.int64 as in training, got torch.float64"),
        (Examples(torch.zeros(2, 4), torch.tensor([0, 7])), ValueError, "label 7 is out of range for 3 outputs"),
    ],
)
@pytest.mark.parametrize("method", ["losses", "margins", "gradients", "featurise", "check", "derivatives_along"])
def test_queries_that_do_not_fit_are_refused_at_every_door(queries, error, message, method):
    problem = make()
    arguments = (torch.ones(1, 43),) if method == "derivatives_along" else ()
    with pytest.raises(error, match=message):
        getattr(problem, method)(queries, *arguments)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.ones(43), r"directions must be \(k, 43\), k >= 1, got \(43,\)"),
        (torch.ones(2, 42), r"got \(2, 42\)"),
        (torch.ones(0, 43), r"got \(0, 43\)"),
        (torch.full((1, 43), torch.inf), "directions must be finite: they hold NaN or infinity"),
    ],
)
def test_directions_that_do_not_fit_are_refused(vectors, message):
    problem = make()
    with pytest.raises(ValueError, match=message):
        problem.curvature_product(vectors)
    with pytest.raises(ValueError, match=message):
        problem.derivatives_along(problem.train, vectors)


def test_directions_of_another_float_type_are_converted():
    problem = make()
    ones = torch.ones(1, 43)
    assert torch.equal(problem.curvature_product(ones), problem.curvature_product(ones.double()))


def test_unknown_names_are_refused():
    problem = make()
    with pytest.raises(ValueError, match=r"unknown target 'logit', expected one of \('loss', 'margin', 'output'\)"):
        problem.gradients(problem.train, "logit")
    with pytest.raises(ValueError, match=r"unknown curvature 'kfac', expected one of \('ggn', 'hessian', 'fisher'\)"):
        problem.curvature_product(torch.ones(1, 43), "kfac")
    with pytest.raises(ValueError, match="unknown curvature 'kfac'"):
        problem.curvature("kfac")
    with pytest.raises(ValueError, match=r"unknown loss 'hinge', expected one of \['cross_entropy', 'squared_error'\]"):
        Problem.from_module(problem.module, "hinge", problem.train)


def test_a_loss_that_does_not_fit_the_targets_is_refused():
    module = mlp((4, 1)).double()
    with pytest.raises(ValueError, match=r"loss 'cross_entropy' does not fit targets of type torch.float64"):
        Problem.from_module(module, "cross_entropy", continuous())
    with pytest.raises(ValueError, match=r"loss 'squared_error' does not fit targets of type torch.int64"):
        Problem.from_module(module, "squared_error", labelled())
    wide = Problem.from_module(mlp((4, 2)).double(), "squared_error", continuous())
    with pytest.raises(ValueError, match="outputs of width 1, got width 2"):
        wide.losses(wide.train)


def test_an_empty_mini_batch_is_refused():
    with pytest.raises(ValueError, match="got 0 examples"):
        make().curvature_product(torch.ones(1, 43), rows=torch.tensor([], dtype=torch.long))
