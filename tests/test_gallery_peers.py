"""Scores that other packages really give, from their own matrix to what a browser shows: axes and sign included.

The packages are called as their manuals do, not through `tda_core.peers`, which turns their matrices already. There
are as many queries as training examples, so that no shape tells the axes apart; retraining does.
"""

import html
from functools import cache

import pytest
import torch
from test_gallery import cards, needs_browser, seen
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from toys import FLOAT64, converged, correlation, labelled, optimum

from tda_core.gallery import gallery
from tda_core.gradients import exact_influence
from tda_core.models import cross_entropy, margin
from tda_core.score_file import About, Items, ScoreFile
from tda_core.score_import import from_package

N = 24
TRAIN = Items(tuple(f"train-{i}" for i in range(N)), tuple(f"example {i}" for i in range(N)))
QUERIES = Items(tuple(f"query-{i}" for i in range(N)), tuple(f"question {i}" for i in range(N)))


@cache
def task():
    """A convex model at its optimum, queries, and what leaving out each example does to their losses: (n_train, q)."""
    problem, queries = converged(N), labelled(N, seed=8)
    problem.module.load_state_dict(problem.unravel(problem.theta))  # packages take a module as it is
    left_out = [problem.losses(queries, optimum(problem, weights)) for weights in 1 - torch.eye(N, dtype=FLOAT64)]
    return problem, queries, torch.stack(left_out) - problem.losses(queries)


def loader(examples):
    return DataLoader(TensorDataset(examples.inputs, examples.targets), batch_size=N)


def of_traker(folder):
    """TRAK, of margins."""
    trak, projectors = pytest.importorskip("trak"), pytest.importorskip("trak.projectors")
    problem, queries, _ = task()
    model, weights = problem.module, problem.module.state_dict()
    settings = {"train_set_size": N, "save_dir": str(folder / "trak"), "device": "cpu", "use_half_precision": False}
    settings["logging_level"] = "ERROR"  # which it sets for the whole process
    projector = projectors.NoOpProjector(device="cpu")
    tracer = trak.TRAKer(model=model, task="image_classification", projector=projector, lambda_reg=1.0, **settings)
    tracer.load_checkpoint(weights, model_id=0)
    for batch in loader(problem.train):
        tracer.featurize(batch, num_samples=N)
    tracer.finalize_features()
    tracer.start_scoring_checkpoint("queries", weights, model_id=0, num_targets=N)
    for batch in loader(queries):
        tracer.score(batch, num_samples=N)
    return tracer.finalize_scores("queries")


def dattri_task(loss, target=None):
    """Of gradients of `loss` at training examples and of `target` at queries, both of which it asks for one by one."""
    model = task()[0].module

    def of(function):
        def output(parameters, example):
            inputs, label = example
            return function(functional_call(model, parameters, (inputs[None],)), label[None])[0]

        return output

    tasks = pytest.importorskip("dattri.task")
    return tasks.AttributionTask(of(loss), model, model.state_dict(), target_func=of(target or loss))


def of_dattri_trak(_):
    """TRAK, of margins."""
    algorithm = pytest.importorskip("dattri.algorithm")
    problem, queries, _ = task()

    def right(parameters, example):
        return torch.exp(
            -cross_entropy(functional_call(problem.module, parameters, (example[0][None],)), example[1][None])
        )[0]

    attributor = algorithm.TRAKAttributor(
        dattri_task(margin),
        correct_probability_func=right,
        projector_kwargs={"proj_dim": problem.n_parameters, "proj_type": "identity"},
        regularization=0.1,
    )
    attributor.cache(loader(problem.train))
    return attributor.attribute(loader(queries))


def of_dattri_tracin(target):
    """Products of the gradient of a training example's loss and of the query's loss, or margin."""
    algorithm = pytest.importorskip("dattri.algorithm.tracin")
    problem, queries, _ = task()
    asked = dattri_task(cross_entropy, target)
    attributor = algorithm.TracInAttributor(asked, torch.ones(1), normalized_grad=False)
    return attributor.attribute(loader(problem.train), loader(queries))


def of_dattri_influence(_):
    """Influence functions, of losses."""
    algorithm, tasks = pytest.importorskip("dattri.algorithm.influence_function"), pytest.importorskip("dattri.task")
    problem, queries, _ = task()

    def mean_loss(parameters, batch):
        return cross_entropy(functional_call(problem.module, parameters, (batch[0],)), batch[1]).mean()

    asked = tasks.AttributionTask(mean_loss, problem.module, problem.module.state_dict())
    attributor = algorithm.IFAttributorExplicit(asked, regularization=0.05)
    attributor.cache(loader(problem.train))
    return attributor.attribute(loader(problem.train), loader(queries))


PACKAGES = [
    (About("traker", "margin"), of_traker, "proponents_positive"),
    (About("dattri/trak", "margin"), of_dattri_trak, "proponents_positive"),
    (About("dattri/influence", "loss"), of_dattri_influence, "proponents_positive"),
    (About("dattri/tracin", "loss"), lambda _: of_dattri_tracin(cross_entropy), "proponents_positive"),
    # a margin rises where the loss falls
    (About("dattri/tracin", "margin"), lambda _: of_dattri_tracin(margin), "proponents_negative"),
]


@pytest.mark.peers
@needs_browser
@pytest.mark.parametrize(("about", "ask", "sign"), PACKAGES, ids=[f"{a.method} {a.target}" for a, *_ in PACKAGES])
def test_a_browser_shows_the_scores_that_a_package_gave_with_their_sign(tmp_path, about, ask, sign):
    matrix = ask(tmp_path)
    file = from_package(matrix, about, sign=sign, train=TRAIN, queries=QUERIES)
    file.save(tmp_path / "scores.safetensors")
    loaded = ScoreFile.load(tmp_path / "scores.safetensors")
    _, _, rises = task()  # (n_train, q): by how much a query's loss rises without an example

    # what is in the file is right by retraining, for all queries
    found = loaded.scores.double()
    exact = exact_influence(task()[0], 0.05, curvature="hessian").scores(task()[1])
    assert correlation(exact, rises.T) > 0.95, "the retraining that is the judge"
    assert correlation(found, rises.T) > 0.7 and correlation(found, exact) > 0.7
    assert correlation(found.T, rises.T) < 0.2, "the axes can be told apart"
    strongest, weakest = found.argmax(1), found.argmin(1)
    every = torch.arange(N)
    assert (rises[strongest, every] > 0).all() and (rises[weakest, every] < 0).all()

    # and what is on the page is what the package gave: by its own matrix, training examples first
    body, errors = seen(gallery([loaded]), tmp_path, "q=query-5")
    assert errors == [] and "question 5" in body
    shown = cards(body, about.method)
    turned = -1 if sign == "proponents_negative" else 1
    given = [(turned * score, i) for i, score in enumerate(matrix[:, 5].tolist())]
    first, last = sorted((g for g in given if g[0] > 0), reverse=True)[:8], sorted(g for g in given if g[0] < 0)[:8]
    assert [name for _, name in shown] == [f"train-{i}" for _, i in first + last] and len(first) == len(last) == 8
    assert [float(score) for score, _ in shown] == pytest.approx([score for score, _ in first + last], rel=5e-4)
    assert f"example {first[0][1]}" in html.unescape(body)
    removed = [rises[int(name.removeprefix("train-")), 5] for _, name in (shown[0], shown[8])]
    assert removed[0] > 0 > removed[1], "without the top proponent the loss is higher, without the top opponent lower"
