"""Steering operators of language models: the written-out gradients against autograd, restricted vocabularies, resuming,
memory, bad settings."""

import dataclasses

import numpy as np
import pytest
import torch
from language_toys import VOCABULARY, language_model, text_pairs
from scipy import sparse
from torch.nn import functional as F

from tda_core import memory, steering_losses, token_steering_fit
from tda_core.designs import balanced
from tda_core.store import Store
from tda_core.token_steering import PUBLISHED, SteeredDocuments, TokenOperators, TokenSteering, fixed_basis
from tda_core.token_steering_fit import fit_token_operators
from tda_core.token_table import logits_of, token_table

MODEL = language_model("llama")
TRAIN = MODEL.examples(text_pairs(12, seed=1, response=(2, 6)))
QUERIES = MODEL.examples(text_pairs(4, seed=2, response=(2, 6)))
MEMBERSHIP = balanced(12, 5, 2, seed=0)
FULL = TokenSteering(basis="identity", members=None, outside=None, steps=6, rate=0.02, second_moment="own")


def documents(model=MODEL, layer=None, weights=None, membership=MEMBERSHIP):
    return SteeredDocuments(model, token_table(model, TRAIN, layer=layer), membership, weights, TRAIN.hash)


def fitted(settings, **options):
    return fit_token_operators(documents(layer=settings.layer, **options), settings, seed=0)


def reference(settings, weights=None):
    """Matrices, basis and losses by autograd, from the losses of `steering_losses` and K x positions x V logits."""
    table = token_table(MODEL, TRAIN, layer=settings.layer)
    base, n = logits_of(MODEL, table.last), table.n_documents
    basis = fixed_basis(settings, table.hidden.T @ table.hidden / len(table), seed=0).requires_grad_(True)
    matrices = torch.zeros(5, basis.shape[1], VOCABULARY, requires_grad=True)
    member = torch.from_numpy(MEMBERSHIP.toarray())[:, table.documents]
    omega = torch.ones(len(table)) if weights is None else weights
    own = member * omega / (member * omega).sum(1, keepdim=True)
    out = (1 - member) / (1 - member).sum(1, keepdim=True)
    groups = [{"params": [matrices], "lr": settings.rate}]
    if settings.basis == "linear":
        groups.append({"params": [basis]})
    adam, losses = torch.optim.Adam(groups, lr=1.0, eps=1e-12), []
    by_document = F.one_hot(table.documents, n).T / table.lengths[:, None].float()
    for _ in range(settings.steps):
        steered = base + table.hidden @ basis @ matrices
        targets = table.targets.expand(5, -1)
        gains = base.log_softmax(1).gather(1, table.targets[:, None])[:, 0]
        gains = steered.log_softmax(2).gather(2, targets[..., None])[..., 0] - gains
        parts = [
            steering_losses.fidelity(lambda o, t: F.cross_entropy(o, t, reduction="none"), steered, targets, own),
            steering_losses.stability(base, steered, out, classifies=True),
            torch.zeros(()),
        ]
        if settings.linearity:
            residual = steering_losses.linearity_residual(MEMBERSHIP, settings.sketch, settings.gamma, seed=0)
            parts[2] = steering_losses.linearity(by_document @ gains.T, residual)
        adam.zero_grad()
        total = settings.fidelity * parts[0] + settings.stability * parts[1] + settings.linearity * parts[2]
        total.backward()
        adam.param_groups[-1]["lr"] = settings.rate
        if settings.basis == "linear":
            adam.param_groups[-1]["lr"] *= float(basis.detach().square().mean().sqrt())
        adam.step()
        losses.append(torch.stack([parts[0] / 5, parts[1] / 5, parts[2]]).detach())
    return matrices.detach(), basis.detach(), torch.stack(losses)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"full_start": False},
        {"budget": 1},
        {"layer": 0.5},
        {"layer": 1, "basis": "linear", "rank": 4, "linearity": 3.0, "sketch": 2},
        {"basis": "whitened", "rank": 5, "stability": 0.0, "linearity": 50.0, "sketch": 2, "fidelity": 0.5},
    ],
)
def test_steps_are_those_of_autograd_and_adam(changes):
    settings = FULL.but(**changes)
    found, losses = fitted(settings)
    matrices, basis, expected = reference(settings)
    torch.testing.assert_close(found.matrices, matrices, rtol=0, atol=1e-3 * settings.rate * settings.steps)
    torch.testing.assert_close(found.projection, basis, rtol=0, atol=1e-3 * float(basis.abs().max()))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)


def test_token_weights_are_those_of_the_fidelity():
    weights = torch.rand(int((TRAIN.targets >= 0).sum()), generator=torch.Generator().manual_seed(0))
    found, losses = fitted(FULL, weights=weights)
    matrices, _, expected = reference(FULL, weights)
    torch.testing.assert_close(found.matrices, matrices, rtol=0, atol=1e-3 * FULL.rate * FULL.steps)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)


def test_a_shared_second_moment_keeps_the_first_step_linear():
    """One step is then a common scale times each operator's own gradient: operators of the same scale add up."""
    settings = FULL.but(steps=1, second_moment="shared")
    found, _ = fitted(settings)
    table = token_table(MODEL, TRAIN)
    residuals = logits_of(MODEL, table.last).softmax(1) - F.one_hot(table.targets, VOCABULARY)
    products = table.sums((table.last @ found.projection)[:, :, None] * residuals[:, None])
    member = torch.from_numpy(MEMBERSHIP.toarray())
    gradients = torch.einsum("ki,irv->krv", member, products) / (member @ table.lengths.float())[:, None, None]
    expected = -settings.rate * gradients / gradients.square().mean(0).sqrt()
    torch.testing.assert_close(found.matrices, expected, rtol=1e-3, atol=1e-6)


def test_measurements_are_falls_of_the_loss_under_each_operator():
    settings = FULL.but(layer=1, rank=4, basis="random", budget=4000)
    operators, _ = fitted(settings)
    table = operators.table(QUERIES)
    base = logits_of(MODEL, table.last)
    steered = base + table.hidden @ operators.projection @ operators.matrices
    gains = steered.log_softmax(2) - base.log_softmax(1)
    gains = gains.gather(2, table.targets.expand(5, -1)[..., None])[..., 0]
    expected = table.sums(gains.T)
    torch.testing.assert_close(operators.measurements(QUERIES), expected, rtol=1e-4, atol=1e-5)
    one = torch.cat([operators.measurements(QUERIES[i]) for i in range(4)])
    torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"layer": 0.5, "basis": "linear", "rank": 3}, {"restricted": 6}])
def test_first_order_measurements_are_slopes(changes):
    operators, _ = fitted(FULL.but(**changes))
    small = dataclasses.replace(operators, matrices=operators.matrices * 1e-2)
    found, expected = operators.measurements(QUERIES, first_order=True), small.measurements(QUERIES) * 100
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 * float(expected.abs().max()))
    torch.testing.assert_close(small.measurements(QUERIES, first_order=True) * 100, found)
    tight = dataclasses.replace(operators, settings=operators.settings.but(budget=64))
    torch.testing.assert_close(tight.measurements(QUERIES, first_order=True), found)


def test_measurements_do_not_depend_on_blocks(monkeypatch):
    operators, _ = fitted(FULL)
    whole = operators.measurements(QUERIES)
    monkeypatch.setitem(memory.CACHED_LOGITS, "cpu", 3 * VOCABULARY)
    torch.testing.assert_close(operators.measurements(QUERIES), whole)


def test_operators_lower_the_loss_of_their_subsets():
    operators, losses = fitted(FULL.but(second_moment="shared", steps=10))
    assert losses[-1, 0] < losses[0, 0] - 0.01
    inside = torch.from_numpy(MEMBERSHIP.toarray().astype(bool)).T
    gains = operators.measurements(TRAIN)
    assert gains[inside].mean() > gains[~inside].mean()


def test_restricted_softmaxes_converge_to_the_full_one():
    shared = FULL.but(second_moment="shared", stability=0.0)
    full, _ = fitted(shared)
    expected, errors = full.measurements(QUERIES), []
    for m in (2, 10, 25, VOCABULARY - 1, VOCABULARY):
        found, _ = fitted(shared.but(restricted=m))
        errors.append(float((found.measurements(QUERIES) - expected).abs().max() / expected.abs().max()))
    assert errors[-1] == 0
    assert errors[-2] < 0.03 and errors[0] > 0.3
    assert errors[1] > errors[2] > errors[3]


def test_a_zero_operator_gains_nothing_under_restriction():
    operators, _ = fitted(FULL.but(restricted=3, steps=1))
    still = dataclasses.replace(operators, matrices=torch.zeros_like(operators.matrices))
    torch.testing.assert_close(still.measurements(QUERIES), torch.zeros(4, 5), rtol=0, atol=1e-5)


def test_restriction_moves_only_the_tokens_that_it_keeps():
    operators, _ = fitted(FULL.but(restricted=3, steps=1, outside=1))
    moved = (operators.matrices != 0).any(1)
    table = token_table(MODEL, TRAIN)
    for k in range(5):
        members = torch.from_numpy(MEMBERSHIP.toarray()[k].astype(bool))
        own = set(table.targets[members[table.documents]].tolist()) | set(operators.common.tolist())
        assert own <= set(moved[k].nonzero()[:, 0].tolist())
        assert int(moved[k].sum()) < VOCABULARY


def test_half_precision_tables_give_nearly_the_same():
    whole = documents()
    table = dataclasses.replace(whole.table, last=whole.table.last.half(), hidden=whole.table.hidden.half())
    settings = FULL.but(second_moment="shared")
    found, _ = fit_token_operators(dataclasses.replace(whole, table=table), settings, seed=0)
    expected, _ = fit_token_operators(whole, settings, seed=0)
    torch.testing.assert_close(found.matrices, expected.matrices, rtol=0, atol=0.02 * settings.rate * settings.steps)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "changes", [{"second_moment": "shared"}, {"basis": "linear", "rank": 3, "linearity": 1.0, "layer": 1}]
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, changes):
    settings = FULL.but(members=2, outside=3, save_every=2, **changes)
    expected, losses = fitted(settings)
    store, steps, advance = Store(tmp_path), [], token_steering_fit._Training.advance

    def stops(self, state, step):
        if step == 5:
            raise Killed
        advance(self, state, step)

    def counts(self, state, step):
        steps.append(step)
        advance(self, state, step)

    monkeypatch.setattr(token_steering_fit._Training, "advance", stops)
    with pytest.raises(Killed):
        fit_token_operators(documents(layer=settings.layer), settings, seed=0, store=store)
    monkeypatch.setattr(token_steering_fit._Training, "advance", counts)
    for again in range(2):  # the second time all is there
        found, course = fit_token_operators(documents(layer=settings.layer), settings, seed=0, store=store)
        assert torch.equal(found.matrices, expected.matrices), again
        assert torch.equal(found.projection, expected.projection)
        assert torch.equal(course, losses)
    assert steps == [4, 5]


@pytest.mark.parametrize("change", ["seed", "settings", "weights", "membership"])
def test_a_store_keeps_runs_apart(tmp_path, change):
    store, settings = Store(tmp_path), FULL.but(steps=1, full_start=False, members=2)
    first, _ = fit_token_operators(documents(), settings, seed=0, store=store)
    weights = torch.linspace(0, 1, int((TRAIN.targets >= 0).sum())) if change == "weights" else None
    others = balanced(12, 5, 2, seed=1) if change == "membership" else MEMBERSHIP
    settings = settings.but(rate=0.1) if change == "settings" else settings
    data = documents(weights=weights, membership=others)
    second, _ = fit_token_operators(data, settings, seed=int(change == "seed"), store=store)
    assert not torch.equal(first.matrices, second.matrices)


def test_operators_beyond_memory_are_refused_before_they_are_allocated(monkeypatch):
    monkeypatch.setattr(token_steering_fit.torch, "zeros", lambda *_, **__: pytest.fail("something was allocated"))
    data = documents()
    monkeypatch.setattr(memory, "available_memory", lambda device: 2**19)
    what = r"5 operators of 16 x 40 with their moments need 1\.00 GiB, but 0\.00 GiB are available"
    with pytest.raises(MemoryError, match=what):
        fit_token_operators(data, FULL.but(budget=2**30), seed=0)
    needed = 4 * (3 * 5 * 16 * 40 + 12 * int(data.table.lengths.max()) * 40) + 1
    monkeypatch.setattr(memory, "available_memory", lambda device: needed - 1)
    with pytest.raises(MemoryError, match="need"):
        fit_token_operators(data, FULL.but(budget=1), seed=0)


def test_available_memory_is_within_a_containers_limit(tmp_path, monkeypatch):
    free = memory.available_memory()
    assert 0 < free < 2**50
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1500\n")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    assert memory.available_memory() == 3500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() > 3500


def test_the_whitened_basis_whitens():
    states = token_table(MODEL, TRAIN).last
    basis = fixed_basis(TokenSteering(rank=16), states.T @ states / len(states), seed=0)
    white = states @ basis
    torch.testing.assert_close(white.T @ white / len(states), torch.eye(16), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["random", "identity"])
def test_fixed_bases_have_unit_mean_squares(kind):
    states = token_table(MODEL, TRAIN).last
    basis = fixed_basis(TokenSteering(basis=kind, rank=4000), states.T @ states / len(states), seed=0)
    assert float((states @ basis).square().mean()) == pytest.approx(1, abs=0.1)


def test_published_settings_are_the_papers():
    assert (PUBLISHED.basis, PUBLISHED.rank, PUBLISHED.layer) == ("linear", 16, 0.6)
    assert min(PUBLISHED.fidelity, PUBLISHED.stability, PUBLISHED.linearity) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"basis": "two_layer"}, "unknown basis 'two_layer', expected one of"),
        ({"second_moment": "none"}, "unknown second_moment 'none'"),
        ({"fidelity": 0.0}, "fidelity must be > 0"),
        ({"stability": -1.0}, r"stability must be finite and >= 0, got -1\.0"),
        ({"linearity": float("nan")}, "linearity must be finite and >= 0, got nan"),
        ({"rate": 0.0}, r"rate must be finite and > 0, got 0\.0"),
        ({"gamma": float("inf")}, "gamma must be finite and > 0, got inf"),
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"restricted": 0}, r"restricted must be None \(all\) or >= 1, got 0"),
        ({"members": 0}, r"members must be None \(all\) or >= 1, got 0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenSteering().but(**changes)


def test_bad_documents():
    n = int((TRAIN.targets >= 0).sum())
    with pytest.raises(ValueError, match="a column for each of 12 documents, got"):
        documents(membership=balanced(13, 5, 2, seed=0))
    with pytest.raises(ValueError, match=rf"weights must be \({n},\), got \(3,\)"):
        documents(weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"weights must lie in \[0, 1\], got 0\.0 to 2\.0"):
        documents(weights=2 * torch.arange(n).clamp_max(1))
    with pytest.raises(ValueError, match="rank must be at most 16, the directions of the states, got 17"):
        fitted(TokenSteering(rank=17))
    with pytest.raises(ValueError, match=r"layer must lie in 0\.\.2"):
        fitted(FULL.but(layer=3))


def test_divergence_is_said():
    with pytest.raises(FloatingPointError, match=r"steering diverged by step 6: lower rate=1e\+37"):
        fitted(FULL.but(rate=1e37))


def test_a_head_with_a_bias_is_steered_too():
    model = language_model("gpt2")
    head = torch.nn.Linear(16, VOCABULARY)
    model.model.set_output_embeddings(head)
    table = token_table(model, TRAIN)
    operators = TokenOperators(model, FULL, torch.eye(16), torch.randn(2, 16, VOCABULARY), None)
    base = head(table.last).detach()
    steered = base + table.last @ operators.matrices
    gains = (steered.log_softmax(2) - base.log_softmax(1)).gather(2, table.targets.expand(2, -1)[..., None])[..., 0]
    torch.testing.assert_close(operators.measurements(table), table.sums(gains.T), rtol=1e-4, atol=1e-4)


def test_subsets_of_another_order_of_rows_are_the_same():
    dense = MEMBERSHIP.toarray()
    shuffled = sparse.csc_array(sparse.coo_array(dense)).tocsr()[np.arange(5)].tocsc()
    first, _ = fitted(FULL)
    second, _ = fitted(FULL, membership=shuffled)
    torch.testing.assert_close(first.matrices, second.matrices, rtol=0, atol=1e-3 * FULL.rate * FULL.steps)
