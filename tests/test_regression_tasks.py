"""Regression tasks: moments, shifts that change one thing each, pairing by seed, and named errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core.regression_tasks import Family, Pairs, Shift, Sizes, Tasks, draw_pairs, draw_tasks

FAMILY = Family(4, 0.5)
MANY = Sizes(tasks=4000, background=3, candidates=10, queries=5)


def residuals(pairs: Pairs, vectors: torch.Tensor) -> torch.Tensor:
    return pairs.targets - (pairs.inputs * vectors[:, None]).sum(2)


def test_tasks_have_the_moments_of_their_family():
    tasks = draw_tasks(FAMILY, MANY, seed=1)
    assert (tasks.vectors.T @ tasks.vectors / 4000 - torch.eye(4)).abs().max() < 4.5 * (2 / 4000) ** 0.5
    for pairs in (tasks.background, tasks.candidates, tasks.queries):
        flat = pairs.inputs.flatten(0, 1)
        assert (flat.T @ flat / len(flat) - torch.eye(4)).abs().max() < 4.5 * (2 / len(flat)) ** 0.5
        assert abs(float(residuals(pairs, tasks.vectors).std()) - 0.5) < 4.5 * 0.5 / (2 * len(flat)) ** 0.5


@settings(max_examples=20, deadline=None)
@given(rotation=st.floats(1, 180), scale=st.floats(0.1, 5), seed=st.integers(0, 99))
def test_a_labelling_vector_is_turned_and_stretched_by_what_was_asked(rotation, scale, seed):
    sizes = Sizes(tasks=3, candidates=20, queries=2)
    tasks = draw_tasks(Family(4, 0.0), sizes, Shift(rotation=rotation, scale=scale), seed=seed)
    other = torch.linalg.lstsq(tasks.candidates.inputs, tasks.candidates.targets[:, :, None]).solution[:, :, 0]
    torch.testing.assert_close(other.norm(dim=1), scale * tasks.vectors.norm(dim=1), rtol=1e-3, atol=1e-4)
    cosine = torch.cosine_similarity(other, tasks.vectors)
    expected = torch.full((3,), rotation).deg2rad().cos()
    torch.testing.assert_close(cosine, expected, rtol=0, atol=1e-3)
    assert residuals(tasks.queries, tasks.vectors).abs().max() < 1e-5  # queries keep the task's own vector


def test_spread_sets_the_standard_deviations_along_the_axes():
    tasks = draw_tasks(FAMILY, Sizes(tasks=5, candidates=20000, queries=1), Shift(spread=3.0), seed=0)
    deviations = torch.linalg.svdvals(tasks.candidates.inputs) / 20000**0.5
    expected = 3 ** torch.tensor([1.0, 1 / 3, -1 / 3, -1.0])
    torch.testing.assert_close(deviations, expected.expand(5, 4), rtol=0.03, atol=0)


def test_a_shift_changes_the_candidates_only_and_noise_only_their_targets():
    own, noisy = (draw_tasks(FAMILY, MANY, shift, seed=2) for shift in (None, Shift(noise=4.0)))
    for shift in (Shift(rotation=90), Shift(scale=2), Shift(spread=2), Shift(noise=4.0)):
        changed = draw_tasks(FAMILY, MANY, shift, seed=2)
        assert torch.equal(changed.vectors, own.vectors)
        for name in ("background", "queries"):
            assert torch.equal(getattr(changed, name).targets, getattr(own, name).targets)
        assert not torch.equal(changed.candidates.targets, own.candidates.targets)
    assert torch.equal(noisy.candidates.inputs, own.candidates.inputs)
    a, b = (residuals(tasks.candidates, tasks.vectors) for tasks in (own, noisy))
    torch.testing.assert_close(b, 4 * a, rtol=1e-4, atol=1e-4)


def test_a_rotation_leaves_demonstrations_as_they_were_in_distribution_and_other_shifts_do_not():
    levels = torch.linspace(0.02, 0.98, 25)
    sizes = Sizes(tasks=20000, candidates=1, queries=1)

    def quantiles(shift: Shift) -> torch.Tensor:
        return draw_tasks(FAMILY, sizes, shift, seed=5).candidates.targets.flatten().quantile(levels)

    own = quantiles(Shift())
    assert (quantiles(Shift(rotation=90)) - own).abs().max() < 0.1
    for shift in (Shift(scale=3.0), Shift(spread=3.0), Shift(noise=5.0)):
        assert (quantiles(shift) - own).abs().max() > 0.5


def test_a_seed_decides_everything():
    first, again, other = (draw_tasks(FAMILY, MANY, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.candidates.targets, again.candidates.targets)
    assert not torch.equal(first.candidates.targets, other.candidates.targets)
    assert torch.equal(draw_pairs(FAMILY, 5, 6, seed=1).targets, draw_pairs(FAMILY, 5, 6, seed=1).targets)


def test_shuffled_labels_are_the_same_labels_in_another_order():
    tasks = draw_tasks(FAMILY, Sizes(tasks=6, candidates=12, queries=2), seed=0)
    shuffled = tasks.with_shuffled_labels(seed=1)
    assert torch.equal(shuffled.candidates.targets.sort(1).values, tasks.candidates.targets.sort(1).values)
    assert torch.equal(shuffled.candidates.inputs, tasks.candidates.inputs)
    assert not torch.equal(shuffled.candidates.targets, tasks.candidates.targets)
    assert torch.equal(tasks.with_queries(1).queries.targets, tasks.queries.targets[:, :1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Family(0), "dimension must be at least 1, got 0"),
        (lambda: Family(2, -0.1), "noise must be finite and >= 0, got -0.1"),
        (lambda: Shift(rotation=181.0), r"0\.\.180 degrees, got 181.0"),
        (lambda: Shift(scale=float("nan")), "scale must be finite and >= 0, got nan"),
        (lambda: Shift(spread=0.5), "spread must be at least 1, got 0.5"),
        (lambda: Sizes(0), "tasks must be at least 1, got 0"),
        (lambda: Sizes(1, background=-1), "background must be at least 0, got -1"),
        (lambda: Sizes(1, candidates=0), "candidates must be at least 1, got 0"),
        (lambda: Pairs(torch.zeros(2, 3), torch.zeros(2, 3)), r"\(t, n, d\) and \(t, n\), got \(2, 3\) and \(2, 3\)"),
        (lambda: Pairs(torch.zeros(2, 3, 1), torch.zeros(2, 4)), r"got \(2, 3, 1\) and \(2, 4\)"),
        (lambda: Pairs(torch.zeros(1, 1, 1), torch.full((1, 1), float("nan"))), "targets must be finite"),
        (lambda: Pairs(torch.zeros(1, 2, 1), torch.zeros(1, 2)).first(3), r"n must lie in 0\.\.2, got 3"),
        (lambda: draw_tasks(Family(1), Sizes(1), Shift(rotation=9.0), seed=0), "no direction to turn to"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parts_of_other_tasks_are_refused():
    tasks = draw_tasks(FAMILY, Sizes(tasks=2), seed=0)
    other = draw_tasks(FAMILY, Sizes(tasks=3), seed=0)
    with pytest.raises(ValueError, match="candidates must be of 2 tasks in 4 dimensions"):
        Tasks(tasks.vectors, tasks.background, other.candidates, tasks.queries)
