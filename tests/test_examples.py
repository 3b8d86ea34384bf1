"""Examples: the checks at the door, subsets, and the hash that caches are keyed by."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import continuous, labelled

from tda_core.examples import IGNORED, Examples

INPUTS, LABELS = torch.arange(6.0).view(3, 2), torch.tensor([0, 2, 1])


def test_length_and_kind_of_task():
    assert len(Examples(INPUTS, LABELS)) == 3
    assert Examples(INPUTS, LABELS).is_classification
    assert not Examples(INPUTS, LABELS.float()).is_classification
    assert len(Examples(torch.zeros(2, 1, 8, 8), LABELS[:2])) == 2  # images keep their shape


def test_negative_regression_targets_are_fine():
    assert float(Examples(INPUTS, -LABELS.float()).targets.min()) == -2


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (0, [0]),
        (2, [2]),
        (-1, [2]),
        (-2, [1]),
        (slice(1, None), [1, 2]),
        (torch.tensor([2, 0, 2]), [2, 0, 2]),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_subsets_keep_inputs_and_targets_together(index, expected):
    part = Examples(INPUTS, LABELS)[index]
    assert torch.equal(part.inputs, INPUTS[expected])
    assert torch.equal(part.targets, LABELS[expected])


@pytest.mark.parametrize("index", [slice(0, 0), 3, torch.zeros(3).bool(), torch.zeros(0).long()])
def test_an_empty_subset_is_refused(index):
    with pytest.raises(ValueError, match="must not be empty, got 0 examples"):
        Examples(INPUTS, LABELS)[index]


def test_hash_is_sha256_of_shapes_types_and_contents():
    digest = hashlib.sha256()
    digest.update(b"(3, 2) torch.float32" + INPUTS.numpy().tobytes())
    digest.update(b"(3,) torch.int64" + LABELS.numpy().tobytes())
    assert Examples(INPUTS, LABELS).hash == digest.hexdigest()


def test_hash_differs_with_contents_shape_and_type_and_not_with_layout():
    base = Examples(INPUTS, LABELS).hash
    changed = INPUTS.clone()
    changed[0, 0] = 1e-30
    others = [
        Examples(changed, LABELS),
        Examples(INPUTS, LABELS.roll(1)),
        Examples(INPUTS.double(), LABELS),
        Examples(INPUTS.view(3, 1, 2), LABELS),
        Examples(INPUTS, LABELS.float()),
    ]
    assert len({base, *(other.hash for other in others)}) == 6
    assert Examples(INPUTS.T.contiguous().T, LABELS).hash == base
    assert Examples(INPUTS.clone().requires_grad_(), LABELS).hash == base


@settings(deadline=None)
@given(st.permutations(range(8)))
def test_a_permutation_and_its_inverse_give_the_same_set(order):
    data = continuous(8)
    back = torch.tensor(order).argsort()
    assert data[torch.tensor(order)][back].hash == data.hash
    assert (data[torch.tensor(order)].hash == data.hash) == (list(order) == list(range(8)))


@pytest.mark.parametrize(
    ("inputs", "targets", "error", "message"),
    [
        ([[1.0]], LABELS, TypeError, "inputs must be a torch.Tensor, got list"),
        (INPUTS, [0, 1, 2], TypeError, "targets must be a torch.Tensor, got list"),
        (INPUTS.long(), LABELS, TypeError, "inputs must be floating point, got torch.int64"),
        (INPUTS, LABELS.int(), TypeError, "int64 class labels or floating point, got torch.int32"),
        (INPUTS, LABELS > 0, TypeError, "got torch.bool"),
        (INPUTS[:, 0], LABELS, ValueError, r"at least 2 dimensions, got \(3,\)"),
        (INPUTS, LABELS[:, None], ValueError, r"targets must be \(n,\), got \(3, 1\)"),
        (INPUTS, LABELS[:2], ValueError, "3 inputs but 2 targets"),
        (INPUTS[:0], LABELS[:0], ValueError, "must not be empty, got 0 examples"),
        (INPUTS, torch.tensor([0, -3, 1]), ValueError, "class labels must be >= 0, got -3"),
    ],
)
def test_what_is_not_an_example_set_is_refused(inputs, targets, error, message):
    with pytest.raises(error, match=message):
        Examples(inputs, targets)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused_and_located(bad):
    inputs = labelled(5).inputs.view(5, 2, 2).clone()
    inputs[3, 1, 0] = bad
    with pytest.raises(ValueError, match="inputs must be finite, but example 3 holds"):
        Examples(inputs, torch.zeros(5))
    targets = torch.zeros(5)
    targets[2] = bad
    with pytest.raises(ValueError, match="targets must be finite, but example 2 holds"):
        Examples(labelled(5).inputs, targets)


# sequences: a label at each position


def sequence(tokens: list[list[int]], labels: list[list[int]]) -> Examples:
    return Examples(torch.tensor(tokens), torch.tensor(labels))


def test_sequences_are_examples_of_any_length():
    short, long = sequence([[1, 2]], [[IGNORED, 3]]), sequence([[1, 2, 3], [4, 5, 6]], [[2, 3, 4], [IGNORED] * 2 + [5]])
    assert short.is_sequence and short.is_classification and not Examples(INPUTS, LABELS).is_sequence
    short.expect_like(long, 6)
    with pytest.raises(ValueError, match="label 5 is out of range for 5 outputs"):
        long.expect_like(short, 5)


def test_sequences_and_single_labels_do_not_mix():
    tokens, plain = sequence([[1, 2]], [[2, 3]]), Examples(INPUTS, LABELS)
    with pytest.raises(ValueError, match="targets must be one a row, as in training"):
        tokens.expect_like(plain, 9)
    with pytest.raises(ValueError, match="targets must be one a token, as in training"):
        plain.expect_like(tokens, 9)


@pytest.mark.parametrize(
    ("tokens", "labels", "error", "message"),
    [
        ([[1, 2], [3, 4]], [[2, 3], [IGNORED, IGNORED]], ValueError, "sequence 1 has no labelled position"),
        ([[1, 2]], [[-1, 3]], ValueError, "class labels must be >= 0, got -1"),
        ([[1, 2]], [[1, 2, 3]], ValueError, r"targets must be \(n,\), got \(1, 3\)"),
    ],
)
def test_sequences_that_cannot_be_learnt_are_refused(tokens, labels, error, message):
    with pytest.raises(error, match=message):
        sequence(tokens, labels)
