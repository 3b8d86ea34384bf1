"""Other people's implementations against ours: equal where the method is the same, and asked in the same way."""

import ast
import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from toys import FLOAT64, Branching, continuous, converged, correlation, generator, labelled, optimum, random_problem

from tda_core import peers
from tda_core.examples import Examples
from tda_core.gradients import exact_influence, gradient_dot, trak
from tda_core.models import LOSSES
from tda_core.peers import (
    PEERS,
    captum_arnoldi,
    captum_last_layer,
    captum_tracin,
    dattri_influence,
    dattri_trak,
    traker,
)
from tda_core.problem import Problem

QUERIES = labelled(6, seed=5)
SMALL = {  # sizes for these toys, and a damping for Hessians that may be indefinite
    "traker": {"dimension": 20},
    "dattri": {"dimension": 20},
    "dattri/influence": {"dimension": 64},
    "captum": {"damping": 0.3, "rank": 30, "krylov": 40},
}


def needs(name: str) -> None:
    pytest.importorskip({"traker": "trak"}.get(name.split("/")[0], name.split("/")[0]))


def fit(name: str, problem: Problem) -> peers.Peer:
    needs(name)
    return PEERS[name](problem, **SMALL.get(name, {}))


def each(names):
    """The test for each of these peers, skipped where its package is not installed."""
    return lambda test: pytest.mark.peers(pytest.mark.parametrize("name", names)(test))


CLASSES = each([name for name in PEERS if name.split("/")[0] != "captum"])
each_peer = each(PEERS)


def proportional(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Equal up to one positive factor."""
    factor = float((found * expected).sum() / (expected * expected).sum())
    assert factor > 0
    torch.testing.assert_close(
        found.double() / factor, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


# -- the same methods as ours ------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.parametrize("damping", [0.3, 0.02])
def test_unprojected_trak_is_ours(damping):
    problem = random_problem(weight_decay=0.05)
    expected = trak(problem, damping, dimension=None).scores(QUERIES)
    needs("dattri")
    torch.testing.assert_close(dattri_trak(problem, damping, dimension=None).scores(QUERIES), expected)
    needs("traker")
    proportional(traker(problem, damping, dimension=None).scores(QUERIES), expected, 1e-4)


@pytest.mark.peers
@pytest.mark.parametrize("peer", [traker, dattri_trak])
def test_a_wide_projection_tends_to_none_at_the_same_damping(peer):
    needs("traker" if peer is traker else "dattri")
    problem = random_problem()
    expected = trak(problem, 0.05, dimension=None).scores(QUERIES)
    found = peer(problem, 0.05, dimension=1500).scores(QUERIES)
    assert correlation(found, expected) > 0.98
    assert correlation(trak(problem, 1.0, dimension=None).scores(QUERIES), expected) < 0.97  # it tells dampings apart
    narrow = peer(problem, 0.05, dimension=12).scores(QUERIES)
    assert spearmanr(narrow.flatten(), expected.flatten()).statistic > 0.5
    assert torch.equal(peer(problem, 0.05, dimension=12).scores(QUERIES), narrow)
    assert not torch.allclose(peer(problem, 0.05, dimension=12, seed=1).scores(QUERIES), narrow)


@pytest.mark.peers
def test_dattri_influence_is_that_of_the_layers_empirical_fisher_matrices():
    needs("dattri")
    problem, damping = random_problem(), 0.2
    g_q, g_b = problem.gradients(QUERIES), problem.gradients(problem.train)
    expected = torch.zeros(6, 12, dtype=FLOAT64)
    for layer in (slice(0, 25), slice(25, 43)):
        fisher = g_b[:, layer].T @ g_b[:, layer] / 12
        fisher += damping * fisher.trace() / len(fisher) * torch.eye(len(fisher), dtype=FLOAT64)
        expected += g_q[:, layer] @ torch.linalg.solve(fisher, g_b[:, layer].T)
    found = dattri_influence(problem, damping, dimension=None).scores(QUERIES)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert correlation(dattri_influence(problem, damping, dimension=1600).scores(QUERIES), expected) > 0.5
    # one dimension for each of two layers
    assert torch.linalg.matrix_rank(dattri_influence(problem, damping, dimension=1).scores(QUERIES)) == 2
    with pytest.raises(ValueError, match="perfect square"):
        dattri_influence(problem, damping, dimension=5)


@pytest.mark.peers
def test_dattri_influence_compiles_nothing_and_leaves_the_compiler_on():
    needs("dattri")
    dynamo = pytest.importorskip("torch._dynamo")
    torch.compiler.reset()  # or what an earlier test compiled would be used
    dynamo.utils.counters.clear()
    fit("dattri/influence", random_problem()).scores(QUERIES)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 0
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.peers
@pytest.mark.parametrize(("layers", "damping"), [((4, 5, 3), 0.02), ((4, 5, 3), 0.5), ((4, 3), 0.1), ((4, 5, 1), 0.1)])
def test_captum_last_layer_is_our_influence_of_the_head(layers, damping):
    needs("captum")
    problem = random_problem(layers, weight_decay=0.05)
    queries = QUERIES if layers[-1] > 1 else continuous(6, seed=5)
    expected = exact_influence(problem, damping, curvature="hessian", last_layer=True).scores(queries)
    torch.testing.assert_close(captum_last_layer(problem, damping).scores(queries), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.peers
def test_captum_takes_a_model_that_is_one_layer():
    needs("captum")
    problem = Problem.from_module(torch.nn.Linear(4, 3).to(FLOAT64), "cross_entropy", labelled(12))
    expected = exact_influence(problem, 0.1, curvature="hessian").scores(QUERIES)
    torch.testing.assert_close(captum_last_layer(problem, 0.1).scores(QUERIES), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.peers
def test_captum_takes_a_model_in_training_mode():
    needs("captum")
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Dropout(), torch.nn.Linear(5, 3)).to(FLOAT64)
    problem = Problem.from_module(module, "cross_entropy", labelled(12))
    expected = 12 * gradient_dot(problem).scores(QUERIES)
    problem.module.train()
    torch.testing.assert_close(captum_tracin(problem).scores(QUERIES), expected)


@pytest.mark.peers
@pytest.mark.parametrize("damping", [0.05, 0.5])
def test_captum_arnoldi_is_our_influence_with_the_top_eigenvectors_of_the_hessian(damping):
    needs("captum")
    problem, rank = converged(60), 3
    sizes, vectors = torch.linalg.eigh(problem.curvature("hessian"))
    left, right = (problem.gradients(data) @ vectors[:, -rank:] for data in (QUERIES, problem.train))
    expected = left / (sizes[-rank:] + damping) @ right.T / 60
    found = captum_arnoldi(problem, damping, rank=rank, krylov=15).scores(QUERIES)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    everything = exact_influence(problem, damping, curvature="hessian").scores(QUERIES)
    assert correlation(captum_arnoldi(problem, damping, rank=15, krylov=15).scores(QUERIES), everything) > 0.9


@pytest.mark.peers
@pytest.mark.parametrize("layers", [(4, 5, 3), (4, 5, 1)])
def test_captum_tracin_is_our_gradient_product(layers):
    needs("captum")
    problem, queries = random_problem(layers), QUERIES if layers[-1] > 1 else continuous(6, seed=5)
    expected = 12 * gradient_dot(problem).scores(queries)
    torch.testing.assert_close(captum_tracin(problem).scores(queries), expected)


# -- the door ----------------------------------------------------------------------------------------


@each_peer
def test_scores_are_one_row_a_query_and_depend_on_nothing_asked_before(name):
    peer = fit(name, random_problem())
    scores = peer.scores(QUERIES)
    assert scores.shape == (6, 12) and bool(torch.isfinite(scores).all()) and not scores.requires_grad
    other = peer.scores(labelled(6, seed=6))
    assert correlation(other, scores) < 0.9
    again = peer.scores(QUERIES)
    assert torch.equal(again, scores)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        torch.testing.assert_close(peer.scores(QUERIES[rows]), scores[rows], rtol=1e-4, atol=1e-5)
    again.zero_()  # and what was handed out is the caller's
    assert torch.equal(peer.scores(QUERIES), scores)


@each_peer
def test_batches_make_no_difference(name, monkeypatch):
    problem = random_problem()
    expected = fit(name, problem).scores(QUERIES)
    monkeypatch.setattr(peers, "BATCH", 5)  # of 12 training examples and 6 queries: the last batches are smaller
    torch.testing.assert_close(fit(name, problem).scores(QUERIES), expected, rtol=1e-3, atol=1e-4)


@each_peer
def test_removing_the_top_proponents_raises_the_loss(name):
    """The sign, by refits of a convex model."""
    problem = converged(40)
    queries = labelled(3, seed=8)
    order = fit(name, problem).scores(queries).argsort(1, descending=True)
    before = problem.losses(queries)
    for q in range(3):
        weights = torch.ones(2, 40, dtype=FLOAT64)
        weights[0, order[q, :8]], weights[1, order[q, -8:]] = 0, 0
        top, bottom = (float(problem.losses(queries, optimum(problem, w))[q]) for w in weights)
        assert bottom < float(before[q]) < top


@each_peer
def test_fitting_leaves_problem_generator_and_threads_alone(name):
    problem = random_problem()
    problem.module.requires_grad_(False)
    module, theta = copy.deepcopy(problem.module.state_dict()), problem.theta.clone()
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    fit(name, problem).scores(QUERIES)
    assert torch.equal(problem.theta, theta) and not any(p.requires_grad for p in problem.module.parameters())
    assert all(torch.equal(value, module[key]) for key, value in problem.module.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@each_peer
def test_nothing_is_printed_or_left_behind(name, capfd, caplog, recwarn, tmp_path, monkeypatch):
    fit(name, random_problem()).scores(QUERIES)  # what importing a package says or keeps is its own affair
    capfd.readouterr(), caplog.clear(), recwarn.clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fit(name, random_problem()).scores(QUERIES)
    assert list(tmp_path.iterdir()) == [] and caplog.records == []
    assert capfd.readouterr() == ("", "") and [str(w.message) for w in recwarn] == []


@each_peer
def test_the_module_is_used_at_theta_and_inputs_in_its_precision(name):
    problem = random_problem()
    expected = fit(name, problem).scores(QUERIES)
    module = copy.deepcopy(problem.module).float()
    with torch.no_grad():
        [p.zero_() for p in module.parameters()]
    single = Examples(problem.train.inputs.float(), problem.train.targets)
    found = fit(name, replace(problem, module=module, train=single)).scores(
        Examples(QUERIES.inputs.float(), QUERIES.targets)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.peers
def test_peers_of_different_settings_live_side_by_side():
    needs("dattri")
    problem = random_problem()
    first = dattri_trak(problem, dimension=9)
    scores = first.scores(QUERIES)
    dattri_trak(problem, dimension=20, seed=3).scores(QUERIES)
    assert torch.equal(first.scores(QUERIES), scores)


@pytest.mark.peers
def test_traker_files_do_not_pile_up_and_go_with_it():
    needs("traker")
    peer = traker(random_problem(), dimension=20)
    folder = Path(peer.folder.name)

    def files() -> dict[str, int]:
        return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}

    peer.scores(QUERIES)
    after_one = files()
    for rows in (1, 2, 6):
        peer.scores(QUERIES[slice(0, rows)])
    with pytest.raises((IndexError, RuntimeError)):
        peer.score(QUERIES.inputs[:3], torch.tensor([0, 1, 99]))  # as if it had been interrupted
    assert [peer.scores(QUERIES[slice(0, rows)]).shape for rows in (2, 6)] == [(2, 12), (6, 12)]
    [path.unlink() for path in folder.rglob("queries4*")]  # what that call left
    assert files().keys() == after_one.keys()
    assert sum(files().values()) <= sum(after_one.values()) + 10  # the name's number has more digits some day
    del peer
    assert not folder.exists()


# -- bad input, missing packages ---------------------------------------------------------------------


@each_peer
def test_queries_that_do_not_fit_are_refused(name):
    peer = fit(name, random_problem())
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, 4\), got \(n, 5\)"):
        peer.scores(labelled(3, d=5))
    with pytest.raises(ValueError, match=r"targets must be torch.int64 as in training"):
        peer.scores(continuous(3))


@CLASSES
def test_regression_is_refused_where_there_is_none(name):
    message = "the loss cross_entropy, got" if name == "dattri/influence" else r"class labels \(int64\), got .*float64"
    with pytest.raises(ValueError, match=f"{name.split('/')[0]}.* needs {message}"):
        fit(name, random_problem((4, 5, 1)))


@each([name for name in PEERS if name != "captum/tracin"])
def test_dampings_that_are_negative_or_not_finite_are_refused(name):
    needs(name)
    for damping in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"damping must be finite and >= 0, got {damping}"):
            PEERS[name](random_problem(), damping)


@CLASSES
def test_dimensions_that_do_not_fit_are_refused(name, monkeypatch):
    needs(name)
    peer = {"traker": traker, "dattri": dattri_trak}.get(name.split("/")[0])
    peer = dattri_influence if name == "dattri/influence" else peer
    with pytest.raises(ValueError, match="dimension must be >= 1 or None, got 0"):
        peer(random_problem(), dimension=0)
    monkeypatch.setattr(peers, "KERNEL_LIMIT", 42)
    with pytest.raises(ValueError, match="without a projection at most 42 parameters, got 43: give a dimension"):
        peer(random_problem(), dimension=None)
    peer(random_problem(), dimension=9)


@each(["traker/unprojected", "dattri/unprojected"])
def test_a_singular_kernel_is_a_value_error(name):
    needs(name)
    problem = random_problem()
    problem.train.inputs[:, 0] = 0  # five parameters whose gradients are zero
    with pytest.raises(ValueError, match="singular kernel, expected a larger damping"):
        PEERS[name](problem, 0.0)


@each(["dattri/influence", "captum", "captum/last_layer", "captum/tracin"])
def test_models_with_other_layers_are_refused(name):
    needs(name)
    problem = Problem.from_module(Branching().to(FLOAT64), "cross_entropy", labelled(12))
    with pytest.raises(ValueError, match=r"needs all parameters in nn.Linear layers, got Branching"):
        fit(name, problem)
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)).to(FLOAT64)
    with pytest.raises(ValueError, match="got LayerNorm 1"):
        fit(name, Problem.from_module(module, "cross_entropy", labelled(12)))


@pytest.mark.peers
def test_models_that_traker_and_dattri_take():
    """TRAK needs nothing of the model but a gradient; images go through, flattened or not."""
    problem = Problem.from_module(Branching().to(FLOAT64), "cross_entropy", labelled(12))
    images = Examples(problem.train.inputs.view(-1, 1, 2, 2), problem.train.targets)
    flat = random_problem()
    of_images = replace(flat, module=torch.nn.Sequential(torch.nn.Flatten(), flat.module), train=images)
    needs("dattri")
    expected = trak(problem, 0.3, dimension=None).scores(QUERIES)
    torch.testing.assert_close(dattri_trak(problem, dimension=None).scores(QUERIES), expected)
    with pytest.raises(ValueError, match=r"dattri's influence needs inputs \(n, d\), got \(12, 1, 2, 2\)"):
        dattri_influence(of_images)
    needs("traker")
    proportional(traker(problem, dimension=None).scores(QUERIES), expected, 1e-4)
    queries = Examples(QUERIES.inputs.view(-1, 1, 2, 2), QUERIES.targets)
    found, expected = (traker(p, dimension=20).scores(q) for p, q in ((of_images, queries), (flat, QUERIES)))
    torch.testing.assert_close(found, expected)


@pytest.mark.peers
def test_another_loss_is_refused_by_dattri_influence_and_used_by_captum():
    needs("dattri")

    def halved(outputs, targets):
        return LOSSES["cross_entropy"](outputs, targets) / 2

    problem = replace(random_problem(), loss=halved)
    with pytest.raises(ValueError, match=r"needs the loss cross_entropy, got <function .*halved"):
        dattri_influence(problem)
    needs("captum")
    expected = captum_tracin(random_problem()).scores(QUERIES) / 4
    torch.testing.assert_close(captum_tracin(problem).scores(QUERIES), expected)


@pytest.mark.parametrize("name", PEERS)
def test_a_missing_package_is_named_with_what_installs_it(name, monkeypatch):
    package = name.split("/")[0]
    module = {"traker": "trak"}.get(package, package)
    for found in [module, *(key for key in sys.modules if key.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, found, None)
    with pytest.raises(ImportError, match=rf'the package {package} is missing .*pip install -e "\.\[peers\]"'):
        PEERS[name](random_problem())
    assert [key for key in peers.installed() if key.startswith(package)] == []


@pytest.mark.peers
def test_installed_lists_every_peer_whose_package_is_there(monkeypatch):
    for name in PEERS:
        needs(name)
    assert peers.installed() == list(PEERS)
    small = random_problem()
    assert peers.installed(small) == list(PEERS)
    monkeypatch.setattr(peers, "KERNEL_LIMIT", small.n_parameters - 1)
    assert set(PEERS) - set(peers.installed(small)) == set(peers.SMALL_ONLY) < set(PEERS)


@pytest.mark.parametrize(("name", "expected"), [("traker", 0.3), ("captum/tracin", None), ("captum/last_layer", 0.0)])
def test_default_dampings_are_those_of_the_functions(name, expected):
    assert peers.default_damping(name) == expected
    assert {name.split("/")[0] for name in PEERS} == {"traker", "dattri", "captum"}


def test_names_stand_for_their_functions():
    found = {name: getattr(function, "func", function) for name, function in PEERS.items()}
    assert found == {
        "traker": traker,
        "traker/unprojected": traker,
        "dattri": dattri_trak,
        "dattri/unprojected": dattri_trak,
        "dattri/influence": dattri_influence,
        "captum": captum_arnoldi,
        "captum/last_layer": captum_last_layer,
        "captum/tracin": captum_tracin,
    }
    assert all(PEERS[f"{name}/unprojected"].keywords == {"dimension": None} for name in ("traker", "dattri"))


def test_importing_the_module_imports_no_peer():
    nodes = ast.walk(ast.parse(Path(peers.__file__).read_text()))
    names = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    nodes = ast.walk(ast.parse(Path(peers.__file__).read_text()))
    names += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    assert {"torch", "tda_core.problem"} < set(names)
    assert not {name.split(".")[0] for name in names} & {"trak", "dattri", "captum"}


def test_a_peer_hands_over_batches_in_order(monkeypatch):
    problem = random_problem()
    monkeypatch.setattr(peers, "BATCH", 4)
    seen = []

    def score(inputs, targets):
        seen.append(len(targets))
        return inputs[:, :1] * torch.ones(12, dtype=FLOAT64)

    queries = Examples(torch.randn(9, 4, generator=generator(0)), torch.zeros(9, dtype=torch.int64))
    found = peers.Peer(problem, score).scores(queries)
    assert seen == [4, 4, 1] and found.dtype == FLOAT64
    assert torch.equal(found[:, 3], queries.inputs[:, 0].double())
