"""The simulated head against its steps taken one by one, in all its parameters."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language_toys import language_model, text_pairs

from tda_core import token_gradients
from tda_core.token_gradients import HeadGradients, head_of, position_weights
from tda_core.token_simulation import HeadDynamics, SimulatedHead, simulate_head, token_shares, with_bias
from tda_core.token_table import logits_of, token_table

MODEL = language_model()
TRAIN, QUERIES = (MODEL.examples(text_pairs(n, seed=n, prompt=(0, 3), response=(3, 6))) for n in (8, 3))


def residual_gradients(examples, dynamics: HeadDynamics, scale: float, reduction: str) -> torch.Tensor:
    """(n, V, f) float64, position by position."""
    table = token_table(MODEL, examples, layer=dynamics.layer)
    phi = torch.cat([table.hidden / scale, torch.full((len(table), 1), dynamics.bias)], 1).double()
    p = logits_of(MODEL, table.last).double().softmax(1)
    n_tokens = p.shape[1]
    if dynamics.start == "flat":
        p = torch.full_like(p, 1 / n_tokens)
    elif dynamics.start == "frequency":
        p = shares().double().expand(len(table), -1)
    found = torch.zeros(len(examples), n_tokens, phi.shape[1], dtype=torch.float64)
    for t in range(len(table)):
        residual = p[t].clone()
        residual[table.targets[t]] -= 1
        weight = 1.0 if reduction == "sum" else 1 / int(table.lengths[table.documents[t]])
        found[table.documents[t]] += weight * residual[:, None] * phi[t]
    return found


def shares() -> torch.Tensor:
    return token_shares(token_table(MODEL, TRAIN).targets, len(head_of(MODEL)[0]))


def stepped(dynamics: HeadDynamics, steps: int) -> torch.Tensor:
    """Scores after so many steps of every response, none of them in an eigenbasis."""
    table = token_table(MODEL, TRAIN, layer=dynamics.layer)
    scale = float(table.hidden.square().sum(1).mean().sqrt())
    phi = torch.cat([table.hidden / scale, torch.full((len(table), 1), dynamics.bias)], 1).double()
    c, s = phi.T @ phi / len(phi), shares().double()
    damping = dynamics.damping * float(s.mean() * c.diagonal().mean())
    pace = s**-dynamics.adaptivity
    largest = float((pace * (s * torch.linalg.eigvalsh(c)[-1] + damping)).max())
    push = residual_gradients(TRAIN, dynamics, scale, "sum") / len(table)
    response = torch.zeros_like(push)
    for _ in range(steps):
        curved = s[:, None] * response @ c + damping * response
        response = response - dynamics.rate / largest * pace[:, None] * (curved - push)
    goals = residual_gradients(QUERIES, dynamics, scale, "mean")
    return goals.flatten(1) @ response.flatten(1).T


@pytest.mark.parametrize("start", ["flat", "frequency", "model"])
@pytest.mark.parametrize(("horizon", "adaptivity"), [(1, 1.0), (7, 0.5), (30, 0.0)])
def test_the_closed_form_is_what_the_steps_give(start, horizon, adaptivity):
    dynamics = HeadDynamics(horizon, 0.7, adaptivity, 0.3, start, layer=1, bias=0.5)
    found = simulate_head(MODEL, TRAIN, dynamics).scores(QUERIES)
    true = stepped(dynamics, horizon)
    assert found.dtype == torch.float32
    assert float((found - true).norm()) < 1e-4 * float(true.norm())


def test_the_limit_is_where_the_steps_end():
    dynamics = HeadDynamics(None, 1.0, 1.0, 0.5, "frequency")
    limit = simulate_head(MODEL, TRAIN, dynamics).scores(QUERIES)
    true = stepped(dynamics, 4000)
    assert float((limit - true).norm()) < 1e-3 * float(true.norm())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 2))
def test_responses_grow_with_the_horizon_towards_the_limit(horizon, rate, adaptivity, damping):
    s, c = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.0, 0.3, 2.0])
    shape = HeadDynamics(horizon, rate, adaptivity, damping)
    now, later = (replace(shape, horizon=t).filter(s, c) for t in (horizon, horizon + 1))
    limit = replace(shape, horizon=None).filter(s, c)
    assert bool((now > 0).all() and (later >= now * (1 - 1e-9)).all() and (limit >= later * (1 - 1e-9)).all())


def test_slices_of_the_vocabulary_add_up(monkeypatch):
    made = simulate_head(MODEL, TRAIN)
    whole = made.scores(QUERIES)
    monkeypatch.setattr(token_gradients, "HELD", 1)
    torch.testing.assert_close(made.scores(QUERIES), whole, rtol=1e-4, atol=1e-7)
    assert torch.equal(simulate_head(MODEL, TRAIN).scores(QUERIES), made.scores(QUERIES))


def test_another_start_leaves_the_rest_of_a_gradient_alone():
    table = token_table(MODEL, TRAIN)
    own = HeadGradients.of(MODEL, table, with_bias(table.last, 1.0), position_weights(table, "sum"))
    whole, moved = (part.of_tokens(slice(0, 40)) for part in (own, replace(own, start=shares(), normalisers=None)))
    assert not torch.allclose(whole, moved)
    torch.testing.assert_close(whole.sum(1), torch.zeros(8, 17), rtol=0, atol=1e-4)  # residuals sum to zero
    torch.testing.assert_close(moved.sum(1), torch.zeros(8, 17), rtol=0, atol=1e-4)


def test_saved_and_read_again(tmp_path):
    made = simulate_head(MODEL, TRAIN, HeadDynamics(3, layer=0.5, start="model"))
    made.save(tmp_path / "head")
    again = SimulatedHead.load(tmp_path / "head", MODEL, TRAIN)
    assert again.dynamics == made.dynamics and torch.equal(again.scores(QUERIES), made.scores(QUERIES))
    with pytest.raises(ValueError, match=r"was made for data .* but this data is"):
        SimulatedHead.load(tmp_path / "head", MODEL, QUERIES)
    with pytest.raises(ValueError, match=r"was made for model .* but this model is"):
        SimulatedHead.load(tmp_path / "head", language_model(seed=1), TRAIN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "horizon must be >= 1 step, or None for the limit, got 0"),
        ({"rate": 2.0}, r"rate must lie in \(0, 1\], past which steps swing to and fro, got 2.0"),
        ({"adaptivity": 1.5}, r"adaptivity must lie in \[0, 1\], got 1.5"),
        ({"damping": -1.0}, "damping must be finite and >= 0, got -1.0"),
        ({"bias": float("nan")}, "bias must be finite and >= 0, got nan"),
        ({"start": "zero"}, "unknown start 'zero'"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HeadDynamics(**changes)
    with pytest.raises(ValueError, match="unknown reduction 'max'"):
        position_weights(token_table(MODEL, QUERIES), "max")
