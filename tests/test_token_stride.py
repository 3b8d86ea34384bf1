"""STRIDE for language models from end to end: first-order influence, files, settings of recovery, bad input."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from language_toys import VOCABULARY, language_model, text_pairs
from scipy import sparse
from torch.nn import functional as F

from tda_core.designs import balanced
from tda_core.metrics import check_sign
from tda_core.recovery import Penalty
from tda_core.store import Store, save_tensors
from tda_core.stride import Recovery
from tda_core.subsets import random_subsets
from tda_core.token_steering import TokenSteering
from tda_core.token_stride import TokenStride, fit_token_stride
from tda_core.token_table import logits_of, token_table

MODEL = language_model("llama")
TRAIN = MODEL.examples(text_pairs(12, seed=1, response=(4, 4)))
QUERIES = MODEL.examples(text_pairs(5, seed=2, response=(2, 6)))
MEMBERSHIP = balanced(12, 6, 2, seed=0)
SETTINGS = TokenSteering(rank=4, steps=4, rate=0.02, members=2, outside=3)


def fitted(membership=MEMBERSHIP, **changes):
    return fit_token_stride(MODEL, TRAIN, membership, SETTINGS.but(**changes))


def head_gradients(examples):
    """Gradients of each document's summed loss in the output embedding: (n, d V)."""
    table = token_table(MODEL, examples)
    residuals = logits_of(MODEL, table.last).softmax(1) - F.one_hot(table.targets, VOCABULARY)
    return table.sums(table.last[:, :, None] * residuals[:, None]).flatten(1)


def test_small_steps_are_gradient_products_and_are_recovered():
    """One small step without stability, of K = n independent subsets of equally many tokens: the scores are products of
    gradients in the output embedding, scaled by the shared second moment."""
    ring = np.zeros(12, dtype=np.float32)
    ring[[0, 1, 2, 3, 5, 9]] = 1
    dense = np.stack([np.roll(ring, k) for k in range(12)])
    assert np.linalg.matrix_rank(dense) == 12
    settings = TokenSteering(basis="identity", steps=1, rate=1e-4, stability=0.0, members=None)
    stride = fit_token_stride(MODEL, TRAIN, sparse.csc_array(dense), settings)
    stride = stride.recovering(Recovery(lam=1e-9, penalty=Penalty("ridge")))
    train = head_gradients(TRAIN)
    scale = (torch.from_numpy(dense) @ train).square().mean(0).sqrt()
    expected = head_gradients(QUERIES) @ (train / scale).T
    found = stride.scores(QUERIES)
    ratio = (found * expected).sum() / expected.square().sum()
    assert ratio > 0
    torch.testing.assert_close(found / ratio, expected, rtol=0, atol=3e-2 * float(expected.abs().max()))


def test_proponents_are_positive():
    """Against a truth of first-order influence; check_sign refuses the reversed matrix."""
    stride = fitted(balanced(12, 10, 4, seed=1), basis="identity", steps=10, members=None)
    masks = random_subsets(12, 60, 0.5, seed=0)
    outcomes = masks.float() @ head_gradients(TRAIN) @ head_gradients(QUERIES).T
    check_sign(stride.recovering(Recovery(lam=0.03)).scores(QUERIES), masks, outcomes)


def test_scores_are_recovered_from_measurements():
    stride = fitted().recovering(Recovery(lam=0.1, penalty=Penalty(nonnegative=True)))
    scores = stride.scores(QUERIES)
    assert scores.shape == (5, 12) and bool((scores >= 0).all())
    expected = stride.recovery(MEMBERSHIP, stride.measurements(QUERIES)).weights
    assert torch.equal(scores, expected)


def test_equal_seeds_are_equal_bit_for_bit_and_others_are_not():
    assert torch.equal(fitted().scores(QUERIES), fitted().scores(QUERIES))
    other = fit_token_stride(MODEL, TRAIN, MEMBERSHIP, SETTINGS, seed=1)
    assert not torch.equal(other.measurements(QUERIES), fitted().measurements(QUERIES))


@pytest.mark.parametrize("changes", [{}, {"basis": "linear", "layer": 0.5}, {"restricted": 6}])
def test_saved_and_loaded(tmp_path, changes):
    stride = fitted(**changes).recovering(Recovery(lam="pooled", penalty=Penalty(intercept=True)))
    stride = replace(stride, first_order="layer" in changes)
    stride.save(tmp_path / "stride.safetensors")
    again = TokenStride.load(tmp_path / "stride.safetensors", MODEL, TRAIN)
    assert torch.equal(again.measurements(QUERIES), stride.measurements(QUERIES))
    assert (again.membership != stride.membership).nnz == 0
    assert again.recovery == stride.recovery and again.operators.settings == stride.operators.settings
    assert torch.equal(again.losses, stride.losses) and again.first_order == stride.first_order


def test_files_of_other_models_documents_and_kinds_are_refused(tmp_path):
    path, stride, other = tmp_path / "stride.safetensors", fitted(), language_model("llama", seed=1)
    stride.save(path)
    with pytest.raises(ValueError, match=f"made for model {MODEL.identity}, but this model is {other.identity}"):
        TokenStride.load(path, other, TRAIN)
    with pytest.raises(ValueError, match=f"made for data {TRAIN.hash}, but this data is {QUERIES.hash}"):
        TokenStride.load(path, MODEL, QUERIES)
    save_tensors(path, {"a": torch.ones(1)}, {"kind": "something"})
    with pytest.raises(ValueError, match="does not hold a TokenStride"):
        TokenStride.load(path, MODEL, TRAIN)


def test_stored_zeros_are_no_members():
    dense = MEMBERSHIP.toarray()
    columns, rows = (part.ravel() for part in np.meshgrid(np.arange(12), np.arange(6), indexing="ij"))
    stored = sparse.csc_array((dense[rows, columns], rows, np.arange(0, 73, 6)), shape=(6, 12))
    assert torch.equal(fitted(stored).measurements(QUERIES), fitted().measurements(QUERIES))
    assert stored.nnz == 72


def test_weights_of_tokens_and_a_store(tmp_path):
    weights = torch.zeros(TRAIN.targets.shape)
    weights[:6] = 1
    store = Store(tmp_path)
    half = fit_token_stride(MODEL, TRAIN, MEMBERSHIP, SETTINGS, weights=weights, store=store)
    assert not torch.equal(half.measurements(QUERIES), fitted().measurements(QUERIES))
    ones = fit_token_stride(MODEL, TRAIN, MEMBERSHIP, SETTINGS, weights=torch.ones_like(weights), store=store)
    assert torch.equal(ones.measurements(QUERIES), fitted().measurements(QUERIES))
    assert len(list(tmp_path.iterdir())) == 2


def test_bad_input():
    with pytest.raises(ValueError, match="K >= 2"):
        fitted(MEMBERSHIP[:1])
    with pytest.raises(ValueError, match="a column for each of 12 documents"):
        fitted(balanced(13, 6, 2, seed=0))
    with pytest.raises(ValueError, match=r"weights must be \(12, 10\) as targets, got \(12,\)"):
        fit_token_stride(MODEL, TRAIN, MEMBERSHIP, SETTINGS, weights=torch.ones(12))
    with pytest.raises(TypeError, match="unknown option 'weight'"):
        fit_token_stride(MODEL, TRAIN, MEMBERSHIP, SETTINGS, weight=torch.ones(12))
    with pytest.raises(ValueError, match="measured by their loss, got target 'margin'"):
        fitted().recovering(Recovery(target="margin"))
