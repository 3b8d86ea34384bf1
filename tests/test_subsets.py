"""Subset designs: exact sizes, uniform membership, reproducible by seed, and named errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tda_core.subsets import leave_one_out_masks, random_subsets, removal_masks


@given(n=st.integers(2, 60), m=st.integers(1, 8), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_every_subset_has_exactly_the_rounded_size(n, m, fraction, seed):
    size = round(fraction * n)
    if size in (0, n):
        with pytest.raises(ValueError, match=f"is a subset of {size}; expected at least 1 and at most {n - 1}"):
            random_subsets(n, m, fraction, seed=seed)
        return
    masks = random_subsets(n, m, fraction, seed=seed)
    assert masks.shape == (m, n) and masks.dtype == torch.bool
    assert (masks.sum(1) == size).all()


def test_membership_is_uniform_and_independent():
    masks = random_subsets(10, 20000, 0.3, seed=1).double()
    deviation = (0.3 * 0.7 / 20000) ** 0.5
    assert (masks.mean(0) - 0.3).abs().max() < 4.5 * deviation
    # Two examples share a subset with probability (3/10)(2/9), whichever they are.
    together = (masks.T @ masks / 20000)[~torch.eye(10, dtype=torch.bool)]
    assert (together - 3 / 10 * 2 / 9).abs().max() < 4.5 * (0.0667 * 0.9333 / 20000) ** 0.5


def test_seed_decides_everything():
    first, second = random_subsets(50, 9, 0.5, seed=3), random_subsets(50, 9, 0.5, seed=3)
    assert torch.equal(first, second)
    assert not torch.equal(first, random_subsets(50, 9, 0.5, seed=4))
    assert len(first.unique(dim=0)) == 9  # rows are drawn afresh, not repeated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5, 0.5), "n .* at least 1, got 0"),
        ((10, 0, 0.5), "m .* at least 1, got 0"),
        ((10, 5, 0.0), "strictly between 0 and 1, got 0.0"),
        ((10, 5, 1.0), "strictly between 0 and 1, got 1.0"),
        ((10, 5, 1.5), "strictly between 0 and 1, got 1.5"),
        ((10, 5, float("nan")), "got nan"),
        ((10, 5, 0.04), "0.04 of 10 examples is a subset of 0"),
        ((10, 5, 0.96), "0.96 of 10 examples is a subset of 10"),
    ],
)
def test_impossible_designs_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_subsets(*arguments, seed=0)


def test_leave_one_out_removes_the_named_example_only():
    masks = leave_one_out_masks(4, [2, 0])
    assert masks.tolist() == [[True, True, False, True], [False, True, True, True]]
    assert torch.equal(leave_one_out_masks(4, np.array([2, 0], dtype=np.int32)), masks)
    assert torch.equal(leave_one_out_masks(4, torch.tensor([2, 0])), masks)


@pytest.mark.parametrize(
    ("n", "indices", "message"),
    [
        (4, [], "non-empty"),
        (4, [4], r"0\.\.3, got 4"),
        (4, [1, -1], r"0\.\.3, got -1"),
        (4, [3, 1, 3], "3 occurs more than once"),
        (4, [0.5], "whole numbers, got torch.float32"),
        (4, [True, False], "whole numbers, got torch.bool"),
        (4, [[1]], r"shape \(1, 1\)"),
        (1, [0], "at least 2 training examples, got n=1"),
    ],
)
def test_bad_leave_one_out_indices_are_named(n, indices, message):
    with pytest.raises(ValueError, match=message):
        leave_one_out_masks(n, indices)


def test_removal_drops_the_top_proponents_and_breaks_ties_by_index():
    scores = torch.tensor([[0.1, 3.0, -5.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert removal_masks(scores, 2).tolist() == [[True, False, True, False], [False, False, True, True]]
    assert torch.equal(removal_masks(scores.numpy(), 2), removal_masks(scores, 2))


@given(st.integers(0, 1000), st.integers(1, 14))
def test_removed_scores_are_never_below_kept_ones(seed, k):
    scores = torch.randn(3, 15, generator=torch.Generator().manual_seed(seed))
    keep = removal_masks(scores, k)
    assert (keep.sum(1) == 15 - k).all()
    for row, mask in zip(scores, keep, strict=True):
        assert row[~mask].min() >= row[mask].max()


@pytest.mark.parametrize("k", [0, 4, -1])
def test_removing_nothing_or_everything_is_refused(k):
    with pytest.raises(ValueError, match=rf"1\.\.3 for 4 training examples, got {k}"):
        removal_masks(torch.zeros(2, 4), k)


def test_bad_scores_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 2\] is nan"):
        removal_masks(torch.tensor([[0.0, 0, 0], [0, 0, float("nan")]]), 1)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        removal_masks(torch.zeros(3), 1)


def test_many_equal_scores_still_go_by_the_lower_index():
    keep = removal_masks(torch.zeros(1, 5000), 100)
    assert not keep[0, :100].any() and keep[0, 100:].all()
