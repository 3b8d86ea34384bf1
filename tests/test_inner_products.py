"""Inner products of gradients, against plain loops over examples and tensors."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language_toys import language_model, text_pairs
from toys import random_problem

from tda_core import inner_products
from tda_core.inner_products import KINDS, GradientProducts, one_step_changes
from tda_core.language import LanguageModel
from tda_core.problem import Problem

MODEL = language_model()
PROBLEM = MODEL.problem(text_pairs(10), reduction="mean")
QUERIES = MODEL.examples(text_pairs(4, seed=1))
G, Q = PROBLEM.gradients(PROBLEM.train).double(), PROBLEM.gradients(QUERIES).double()


def clamped(gradient: torch.Tensor) -> torch.Tensor:
    return torch.tensor([math.copysign(min(max(abs(g), 1e-4), 1.0), g) if g else 0.0 for g in gradient.tolist()])


def released(signed: bool) -> torch.Tensor:
    """The released score, tensor by tensor and pair by pair."""
    found = torch.zeros(len(Q), len(G), dtype=torch.float64)
    parts = list(PROBLEM.offsets.values())
    training = [[clamped(g[part]).double() for part in parts] for g in G]
    for i, q in enumerate(Q):
        mine = [clamped(q[part]).double() for part in parts]
        for j, theirs in enumerate(training):
            for a, b in zip(mine, theirs, strict=True):
                s = float(a @ b)
                if signed:
                    found[i, j] += math.copysign(1.0, s) * math.log(abs(s))
                elif s > 0:
                    found[i, j] += math.log(s)
    return found


def expected(kind: str, damping: float) -> torch.Tensor:
    adam = G / (G.square().mean(0).sqrt() + inner_products.EPSILON)
    if kind == "damped":
        n, p = G.shape
        scaled = damping * float(G.square().sum(1).mean()) / n
        return Q @ torch.linalg.solve(G.T @ G / n + scaled * torch.eye(p, dtype=G.dtype), G.T)
    return {
        "dot": lambda: Q @ G.T,
        "cosine": lambda: torch.stack([torch.cosine_similarity(q[None], G) for q in Q]),
        "released_log": lambda: released(False),
        "released_signed_log": lambda: released(True),
        "adam_dot": lambda: Q @ adam.T,
        "less": lambda: torch.stack([torch.cosine_similarity(q[None], adam) for q in Q]),
    }[kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_its_formula(kind, monkeypatch):
    for held in (inner_products.HELD, 0):  # gradients kept, and computed again
        monkeypatch.setattr(inner_products, "HELD", held)
        found = GradientProducts(PROBLEM, damping=0.3, chunk_size=4).scores(QUERIES, kind)
        torch.testing.assert_close(found.double(), expected(kind, 0.3), rtol=2e-3, atol=2e-4)


def test_the_unit_of_a_loss_decides_the_released_order():
    scaled = Problem(PROBLEM.module, PROBLEM.theta, lambda out, y: 100 * PROBLEM.loss(out, y), PROBLEM.train)
    for kind in ("released_log", "released_signed_log"):
        by_unit = GradientProducts(PROBLEM, unit=100.0).scores(QUERIES, kind)
        torch.testing.assert_close(by_unit, GradientProducts(scaled).scores(QUERIES, kind), rtol=1e-3, atol=1e-3)
        assert not torch.equal(by_unit.argsort(1), GradientProducts(PROBLEM).scores(QUERIES, kind).argsort(1))


def test_all_kinds_at_once_are_each_alone():
    products = GradientProducts(PROBLEM)
    together = products.all_scores(QUERIES)
    assert list(together) == list(KINDS)
    for kind in KINDS:
        torch.testing.assert_close(together[kind], products.scores(QUERIES, kind))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_cosines_ignore_the_scale_of_a_loss_and_stay_within_one(seed, scale):
    problem = random_problem(seed=seed)
    scaled = Problem(problem.module, problem.theta, lambda out, y: scale * problem.loss(out, y), problem.train)
    for kind in ("cosine", "less"):
        one, other = (GradientProducts(p).scores(problem.train, kind) for p in (problem, scaled))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert float(one.abs().max()) <= 1 + 1e-6
    cosines = GradientProducts(problem).scores(problem.train, "cosine")
    torch.testing.assert_close(cosines.diagonal(), torch.ones(len(cosines), dtype=cosines.dtype))


def test_a_small_step_changes_losses_as_the_inner_product_says():
    rows = torch.tensor([7, 0, 3])
    changes = one_step_changes(PROBLEM, QUERIES, 1e-3, rows)
    dot = GradientProducts(PROBLEM).scores(QUERIES)[:, rows]
    torch.testing.assert_close(changes / 1e-3, dot, rtol=0.05, atol=0.05 * float(dot.abs().max()))
    large = one_step_changes(PROBLEM, QUERIES, 0.5, rows[:1])[:, 0]
    theta = PROBLEM.theta - 0.5 * G[7].float()
    torch.testing.assert_close(large, PROBLEM.losses(QUERIES) - PROBLEM.losses(QUERIES, theta), rtol=1e-4, atol=1e-5)


def test_half_precision_is_left_where_rounding_would_decide():
    short = language_model(seed=2)
    with torch.no_grad():
        for value in short.model.parameters():
            value.mul_(0.3)
    short = LanguageModel(short.model.bfloat16(), short.tokenizer)
    exact = LanguageModel(copy.deepcopy(short.model).float(), short.tokenizer)
    pool, queries = text_pairs(20), text_pairs(4, seed=1)
    rows = torch.arange(8)
    halved, whole = (one_step_changes(m.problem(pool), m.examples(queries), 1e-3, rows) for m in (short, exact))
    torch.testing.assert_close(halved, whole)
    products = GradientProducts(short.problem(pool))
    g, q = (products.problem.gradients(e).float() for e in (products.problem.train, short.examples(queries)))
    found = products.all_scores(short.examples(queries), ("dot", "adam_dot"))
    torch.testing.assert_close(found["dot"], q @ g.T)
    adam = g / (g.square().mean(0).sqrt() + inner_products.EPSILON)
    torch.testing.assert_close(found["adam_dot"], q @ adam.T, rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_loaded(tmp_path):
    products = GradientProducts(PROBLEM, damping=0.2)
    products.save(tmp_path / "products.safetensors")
    loaded = GradientProducts.load(tmp_path / "products.safetensors", PROBLEM)
    assert loaded.damping == 0.2 and torch.equal(loaded.second_moment, products.second_moment)
    other = language_model(seed=4).problem(text_pairs(10))
    with pytest.raises(ValueError, match="was made for theta"):
        GradientProducts.load(tmp_path / "products.safetensors", other)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="damping must be positive and finite, got 0"):
        GradientProducts(PROBLEM, damping=0)
    with pytest.raises(ValueError, match="unit must be positive and finite, got nan"):
        GradientProducts(PROBLEM, unit=math.nan)
    with pytest.raises(ValueError, match="unknown kind 'trak', expected one of"):
        GradientProducts(PROBLEM).scores(QUERIES, "trak")
    for rate in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="rate must be positive"):
            one_step_changes(PROBLEM, QUERIES, rate)
