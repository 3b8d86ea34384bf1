"""Recordings give what the computation gives, at any values; what cannot be recorded is refused."""

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probes import FLAT, make, problem_of
from toys import FLOAT64, Branching, generator, labelled, random_problem

from tda_core.basis import BasisSettings
from tda_core.basis_fit import fit_basis
from tda_core.dynamics import Dynamics
from tda_core.examples import Examples
from tda_core.gradients import gradient_dot, last_layer, trak
from tda_core.index import build_index
from tda_core.probes import TangentProbe, layer_probe
from tda_core.problem import Problem
from tda_core.recording import record


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", ["loss", "margin"])
@pytest.mark.parametrize("name", [name for name in FLAT if name not in ("frozen_between",)] + ["attention_last"])
def test_recorded_gradients_are_the_gradients(name, target):
    problem = make(name)
    recorded = problem.recorded((1, 3), target)
    for size in (1, 2, 3):
        for start in range(0, len(problem.train) - size, size):
            part = problem.train[start : start + size]
            close(recorded.gradients(part, target), problem.gradients(part, target))
    assert set(recorded.recordings) == {(1, target), (3, target)} and not problem.recordings
    assert not recorded.gradients(problem.train[:1], target).requires_grad


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(1e-3, 1e3))
def test_a_recording_holds_for_other_values(seed, size):
    inputs = size * torch.randn(2, 4, generator=generator(seed), dtype=FLOAT64)
    queries = Examples(inputs, torch.randint(0, 3, (2,), generator=generator(seed)))
    close(RECORDED.gradients(queries), PROBLEM.gradients(queries))


def test_a_recording_is_really_played(monkeypatch):
    monkeypatch.setattr("tda_core.layers.flows", None)
    close(RECORDED.gradients(PROBLEM.train[:2]), EXPECTED)
    with pytest.raises(TypeError):
        RECORDED.gradients(PROBLEM.train[:3])


def test_recordings_do_not_outlive_their_parameters():
    moved = RECORDED.at(2 * PROBLEM.theta)
    close(moved.gradients(PROBLEM.train[:2]), PROBLEM.at(2 * PROBLEM.theta).gradients(PROBLEM.train[:2]))
    assert replace(RECORDED, weight_decay=0.1).recordings == {} and len(RECORDED.recordings) == 1
    probe = layer_probe(PROBLEM, PROBLEM.train, 1.0).recorded()
    assert replace(probe, problem=moved).recordings == {} and len(probe.recordings) == 1
    assert set(RECORDED.recorded((1,)).recordings) == {(1, "loss"), (2, "loss")}


def test_queries_of_another_float_type_are_converted():
    single = Examples(PROBLEM.train.inputs[:2].float(), PROBLEM.train.targets[:2])
    close(RECORDED.gradients(single), PROBLEM.gradients(single))
    probe = layer_probe(PROBLEM, PROBLEM.train, 1.0)
    close(probe.recorded((2,)).features(single), probe.features(single))


def test_pickles_are_without_recordings():
    back = pickle.loads(pickle.dumps(RECORDED))
    assert back.recordings == {} and len(RECORDED.recordings) == 1
    close(back.gradients(PROBLEM.train[:2]), EXPECTED)


def test_what_cannot_be_recorded_is_refused():
    with pytest.raises(ValueError, match="this computation cannot be recorded"):
        record(lambda x, y: x if float(x[0, 0]) > 0 else 2 * x, *DATA, 1)
    state = iter(range(1000))
    with pytest.raises(ValueError, match="takes another course for other inputs"):
        record(lambda x, y: x * next(state), *DATA, 1)
    with pytest.raises(ValueError, match="cannot be recorded"):
        make("frozen_between").recorded()  # TorchScript has no arguments like those of a norm's backward pass
    with pytest.raises(ValueError, match="only gradients of linear layers can be recorded"):
        problem_of(Branching()).recorded()


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_below_one_is_refused(size):
    with pytest.raises(ValueError, match=f"a batch size must be >= 1, got {size}"):
        PROBLEM.recorded((size,))


def test_recorded_problems_still_check_their_queries():
    with pytest.raises(ValueError, match=r"inputs must have shape \(n, 4\), got \(n, 5\)"):
        RECORDED.gradients(labelled(2, 5))


@pytest.mark.parametrize("energy", [0.9, 1.0])
@pytest.mark.parametrize("name", ["biased", "residual", "attention_mean"])
def test_recorded_features_are_the_features(name, energy):
    problem = make(name)
    probe = layer_probe(problem, problem.train, energy)
    recorded = probe.recorded((1, 2))
    for size in (1, 2, 5):
        close(recorded.features(problem.train[:size]), probe.features(problem.train[:size]))
    if name != "attention_mean":
        close(recorded.features(problem.train[:1], "forward"), probe.features(problem.train[:1]))
    assert pickle.loads(pickle.dumps(recorded)).recordings == {}


@pytest.mark.parametrize("by_label", [False, True])
def test_a_recorded_basis_reads_what_it_read(by_label, monkeypatch):
    settings = BasisSettings(rank=3, energy=1.0, by_label=by_label)
    basis = fit_basis(PROBLEM, Dynamics(horizon=5), PROBLEM.train, settings).basis
    recorded, expected = basis.recorded(), basis.read(PROBLEM.train[:1])
    monkeypatch.setattr(Problem, "flows", None)
    for found, other in zip(recorded.read(PROBLEM.train[:1]), expected, strict=True):
        close(found, other)
    assert recorded.fingerprint == basis.fingerprint


def test_a_recorded_index_scores_what_it_scored():
    index = build_index(PROBLEM, Dynamics(horizon=5), PROBLEM.train, BasisSettings(rank=3, energy=1.0))
    recorded = index.recorded((1, 3))
    for size in (1, 2, 3):
        close(recorded.scores(PROBLEM.train[:size]), index.scores(PROBLEM.train[:size]))
    assert set(recorded.basis.probe.recordings) == {1, 3} and not index.basis.probe.recordings


def test_recorded_gradient_methods_score_what_they_scored():
    for method in (trak(PROBLEM, 0.1, dimension=7), gradient_dot([PROBLEM, PROBLEM.at(2 * PROBLEM.theta)])):
        recorded = method.recorded((1, 4))
        for size in (1, 2, 4):
            close(recorded.scores(PROBLEM.train[:size]), method.scores(PROBLEM.train[:size]))
    with pytest.raises(ValueError, match=r"a last-layer method .* cannot be recorded"):
        last_layer(PROBLEM).recorded()


def test_a_probe_of_other_modules_is_not_recorded():
    with pytest.raises(ValueError, match="only probes of linear layers can be recorded"):
        TangentProbe(PROBLEM).recorded()


PROBLEM: Problem = random_problem()
DATA = PROBLEM.train.inputs, PROBLEM.train.targets
RECORDED = PROBLEM.recorded((2,))
EXPECTED = PROBLEM.gradients(PROBLEM.train[:2])
