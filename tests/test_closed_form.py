"""Closed-form operators: against autograd, last-layer influence and exact influence; additivity, files, errors."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tda_core import closed_form
from tda_core.closed_form import ClosedForm, ClosedFormFamily, stride_closed_form
from tda_core.examples import Examples
from tda_core.features import hidden, kernel_pca, raw_input, with_bias
from tda_core.gradients import exact_influence, last_layer
from tda_core.kernels import ReluKernel, relu_kernel
from tda_core.metrics import SignError, check_sign
from tda_core.problem import Problem
from tda_core.store import save_tensors
from tests.toys import FLOAT64, continuous, converged, labelled, optimum, random_problem


def features(problem, k=4):
    return kernel_pca(problem.train.inputs, ReluKernel((4, 9, 3)), k)


def queries_of(problem, n=5, seed=7):
    return labelled(n, seed=seed) if problem.train.is_classification else continuous(n, seed=seed)


def by_autograd(problem, phi_of, queries, damping):
    """Scores from gradients and Hessian in W of the loss of outputs + phi W', taken by autograd at W = 0."""
    train, n = problem.train, len(problem.train)
    phi, start = phi_of(train.inputs), problem.outputs(train.inputs).detach()
    zero = torch.zeros(start.shape[1] * phi.shape[1], dtype=phi.dtype)

    def losses(w, examples):
        outputs = problem.outputs(examples.inputs).detach() + phi_of(examples.inputs) @ w.view(start.shape[1], -1).T
        return problem.loss(outputs, examples.targets)

    # of a linear head the Hessian is the Gauss-Newton matrix
    hessian = torch.func.hessian(lambda w: losses(w, train).mean())(zero)
    of_train, of_queries = (torch.func.jacrev(losses)(zero, e) for e in (train, queries))
    return of_queries @ torch.linalg.solve(hessian + damping * torch.eye(len(zero), dtype=phi.dtype), of_train.T) / n


# -- what it is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(4, 5, 3), (4, 5, 2), (4, 5, 1)])
@pytest.mark.parametrize("system", ["dense", "iterative"])
def test_scores_are_those_of_autograd(layers, system):
    problem = random_problem(layers, n=20)
    queries = queries_of(problem)
    if layers[-1] == 2:
        queries = Examples(queries.inputs, queries.targets % 2)
    found = stride_closed_form(problem, features(problem), 0.05, system=system).scores(queries)
    tolerance = {"rtol": 1e-8, "atol": 1e-12} if system == "dense" else {"rtol": 1e-3, "atol": 1e-6}
    torch.testing.assert_close(found, by_autograd(problem, features(problem), queries, 0.05), **tolerance)


@pytest.mark.parametrize("layers", [(4, 5, 6, 3), (4, 5, 1)])
def test_on_the_last_hidden_layer_it_is_last_layer_influence(layers):
    problem = random_problem(layers, n=20, weight_decay=0.02)
    queries = queries_of(problem)
    found = stride_closed_form(problem, with_bias(hidden(problem)), 0.1 + problem.weight_decay).scores(queries)
    torch.testing.assert_close(found, last_layer(problem, 0.1).scores(queries), rtol=1e-6, atol=1e-10)


def test_of_a_linear_model_all_components_of_its_own_kernel_give_exact_influence():
    problem, queries = converged(), labelled(6, seed=3)
    own = kernel_pca(problem.train.inputs, relu_kernel(problem), 5)  # the NTK is x.z + 1
    found = stride_closed_form(problem, own, 0.1 + problem.weight_decay).scores(queries)
    torch.testing.assert_close(found, exact_influence(problem, 0.1).scores(queries), rtol=1e-6, atol=1e-10)


def test_a_positive_score_is_that_of_a_proponent():
    problem = converged()
    n, queries = len(problem.train), labelled(8, seed=5)
    scores = stride_closed_form(problem, with_bias(raw_input(problem.train.inputs)), problem.weight_decay).scores(
        queries
    )
    removed = []
    for i in range(n):
        weights = torch.ones(n, dtype=FLOAT64)
        weights[i] = 0
        removed.append(problem.losses(queries, optimum(problem, weights)))
    effects = torch.stack(removed, 1) - problem.losses(queries)[:, None]  # the loss without each example, less with it
    assert float(torch.corrcoef(torch.stack([effects.flatten(), scores.flatten()]))[0, 1]) > 0.95
    masks = torch.rand(12, n, generator=torch.Generator().manual_seed(0)) < 0.5
    outcomes = masks.double() @ effects.T
    check_sign(scores, masks, outcomes)
    with pytest.raises(SignError):
        check_sign(-scores, masks, outcomes)


def test_for_one_model_the_margin_ranks_as_the_loss_and_for_several_it_does_not():
    problems = [random_problem((4, 5, 3), n=20, seed=0)]
    problems.append(problems[0].at(problems[0].theta.flip(0)))
    queries = queries_of(problems[0])
    for chosen, same in ((problems[:1], True), (problems, False)):
        loss, margin = (
            stride_closed_form(chosen, features(problems[0]), 0.1, target=t).scores(queries) for t in ("loss", "margin")
        )
        ratio = loss / margin
        assert bool((ratio.std(1) < 1e-9).all()) is same
        if same:
            torch.testing.assert_close(ratio[:, 0], torch.sigmoid(-problems[0].margins(queries)))


# -- subsets ----------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.sampled_from([(4, 5, 3), (4, 5, 1)]), st.sampled_from(["dense", "kronecker"]))
def test_a_subsets_operator_does_what_its_members_scores_add_up_to(seed, layers, system):
    problem = random_problem(layers, n=15, seed=seed)
    queries = queries_of(problem, seed=seed + 1)
    method = stride_closed_form(problem, features(problem), 0.05, system=system)
    masks = torch.rand(4, 15, generator=torch.Generator().manual_seed(seed)) < 0.4
    masks[:, 0] = True
    (operators,) = method.operators(masks)
    assert operators.shape == (4, layers[-1], 4)
    outputs = problem.outputs(queries.inputs).detach()
    moved = torch.einsum("kcf,qf->qkc", operators, features(problem)(queries.inputs))

    def losses(size):
        shifted = (outputs[:, None] + size * moved).flatten(0, 1)
        return problem.loss(shifted, queries.targets.repeat_interleave(4)).view(-1, 4)

    _, fall = torch.func.jvp(losses, (torch.tensor(0.0, dtype=FLOAT64),), (torch.tensor(-1.0, dtype=FLOAT64),))
    torch.testing.assert_close(fall, method.scores(queries) @ masks.double().T, rtol=1e-7, atol=1e-10)


def test_an_operator_is_the_damped_newton_step_that_autograd_finds():
    problem = random_problem((4, 5, 3), n=15)
    mask = torch.arange(15) % 3 == 0
    phi, start = features(problem)(problem.train.inputs), problem.outputs(problem.train.inputs).detach()
    zero = torch.zeros(12, dtype=FLOAT64)

    def mean_loss(w, weights):
        return (weights * problem.loss(start + phi @ w.view(3, 4).T, problem.train.targets)).sum() / 15

    everything = torch.ones(15, dtype=FLOAT64)
    matrix = torch.func.hessian(mean_loss)(zero, everything) + 0.05 * torch.eye(12, dtype=FLOAT64)
    expected = -torch.linalg.solve(matrix, torch.func.grad(mean_loss)(zero, mask.double())).view(3, 4)
    (found,) = stride_closed_form(problem, features(problem), 0.05).operators(mask[None])
    torch.testing.assert_close(found[0], expected)


# -- several models, dampings, blocks, files ----------------------------------------------------------


def test_several_models_are_averaged_each_on_its_own_features():
    first = random_problem((4, 5, 3), n=20)
    problems, queries = [first, first.at(first.theta.flip(0))], queries_of(first)
    own = [with_bias(hidden(p)) for p in problems]
    alone = [stride_closed_form(p, m, 0.1).scores(queries) for p, m in zip(problems, own, strict=True)]
    torch.testing.assert_close(stride_closed_form(problems, own, 0.1).scores(queries), sum(alone) / 2)


def test_a_family_gives_each_damping_and_leaves_out_those_too_small():
    problem = random_problem((4, 5, 3), n=3)  # fewer examples than features
    queries = queries_of(problem)
    found = ClosedFormFamily.of(problem, raw_input(problem.train.inputs)).scores(queries, [0.1, 0.0, 1.0])
    assert list(found) == [0.1, 1.0]
    for damping, scores in found.items():
        assert torch.equal(
            scores, stride_closed_form(problem, raw_input(problem.train.inputs), damping).scores(queries)
        )
    with pytest.raises(ValueError, match="use a damping above"):
        stride_closed_form(problem, raw_input(problem.train.inputs), 0.0)


def test_blocks_of_training_examples_change_nothing(monkeypatch):
    problem = random_problem((4, 5, 3), n=20)
    queries, method = queries_of(problem), stride_closed_form(problem, features(problem), 0.1)
    whole = method.scores(queries)
    monkeypatch.setattr(closed_form, "CHUNK_FLOATS", 30)
    torch.testing.assert_close(method.scores(queries), whole)


@pytest.mark.parametrize("system", ["dense", "iterative", "kronecker"])
def test_saved_methods_give_the_same_scores(tmp_path, system):
    first = random_problem((4, 5, 3), n=20)
    problems, queries = [first, first.at(first.theta.flip(0))], queries_of(first)
    method = stride_closed_form(problems, [with_bias(hidden(p)) for p in problems], 0.1, target="margin", system=system)
    method.save(tmp_path / "form.safetensors")
    loaded = ClosedForm.load(tmp_path / "form.safetensors", problems)
    torch.testing.assert_close(loaded.scores(queries), method.scores(queries), rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="was made for 2 problems, but got 1"):
        ClosedForm.load(tmp_path / "form.safetensors", problems[:1])
    with pytest.raises(ValueError, match="was made for theta"):
        ClosedForm.load(tmp_path / "form.safetensors", problems[::-1])
    save_tensors(tmp_path / "other", {}, {"kind": 1})
    with pytest.raises(ValueError, match=r"does not hold a ClosedForm, but \['kind'\]"):
        ClosedForm.load(tmp_path / "other", problems)


def test_a_network_that_is_no_perceptron_takes_features_of_its_inputs():
    torch.manual_seed(0)
    convolutional = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(18, 3)
    )
    images = torch.randn(20, 1, 4, 4)
    problem = Problem.from_module(convolutional, "cross_entropy", Examples(images, torch.arange(20) % 3))
    for phi in (with_bias(raw_input(images)), kernel_pca(images, ReluKernel((16, 30, 3)), 8), hidden(problem, "2")):
        scores = stride_closed_form(problem, phi, 0.1).scores(Examples(images[:2], torch.tensor([0, 1])))
        assert scores.shape == (2, 20) and float(scores[0, 0]) > 0


# -- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_bad_dampings_are_named(damping):
    problem = random_problem()
    with pytest.raises(ValueError, match=f"damping must be finite and >= 0, got {damping}"):
        stride_closed_form(problem, features(problem), damping)


def test_bad_arguments_are_named():
    problem, regression = random_problem((4, 5, 3)), random_problem((4, 5, 1))
    phi = features(problem)
    with pytest.raises(ValueError, match="at least one problem"):
        stride_closed_form([], phi, 0.1)
    with pytest.raises(ValueError, match="one feature map, or one a problem: got 2 for 1 problems"):
        stride_closed_form(problem, [phi, phi], 0.1)
    with pytest.raises(ValueError, match="unknown target 'output', expected one of"):
        stride_closed_form(problem, phi, 0.1, target="output")
    with pytest.raises(ValueError, match="target 'margin' needs a classifier"):
        stride_closed_form(regression, features(regression), 0.1, target="margin")
    with pytest.raises(ValueError, match="unknown system 'qr'"):
        stride_closed_form(problem, phi, 0.1, system="qr")
    with pytest.raises(ValueError, match="not for smoothed"):
        stride_closed_form(replace(problem, loss=smoothed), phi, 0.1)
    with pytest.raises(ValueError, match=r"inputs must be \(n, 3\)"):
        stride_closed_form(problem, raw_input(problem.train.inputs[:, :3]), 0.1)
    other = random_problem((4, 5, 3), seed=1)
    with pytest.raises(ValueError, match="must share one training set"):
        stride_closed_form([problem, other], phi, 0.1)


def smoothed(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)


def test_bad_queries_and_masks_are_named():
    problem = random_problem((4, 5, 3))
    method = stride_closed_form(problem, features(problem), 0.1)
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, 4\), got \(n, 5\)"):
        method.scores(labelled(3, 5))
    with pytest.raises(ValueError, match="label 3 is out of range for 3 outputs"):
        method.scores(Examples(labelled(1).inputs, torch.tensor([3])))
    for masks in (torch.ones(2, 11, dtype=torch.bool), torch.ones(2, 12), torch.ones(0, 12, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"masks must be boolean \(K, 12\), K >= 1, got"):
            method.operators(masks)
    masks = torch.ones(3, 12, dtype=torch.bool)
    masks[1] = False
    with pytest.raises(ValueError, match="subset 1 is empty"):
        method.operators(masks)
