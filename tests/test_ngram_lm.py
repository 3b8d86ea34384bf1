"""N-gram models of subsets against a plain nested-loop one, as probabilities, and their first-order effects."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tda_core.examples import IGNORED, Examples
from tda_core.ngram_lm import DISCOUNTS, NgramLM
from tda_core.subsets import random_subsets

V = 7


def documents(n, *, seed, length=9, prompt=False):
    """Random sequences over few tokens, so that n-grams repeat; unequal lengths, and unlabelled beginnings if asked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (n, length + 1), generator=generator) ** 2 // V  # small ones are frequent
    targets = tokens[:, 1:].clone()
    for i in range(n):
        targets[i, length - i % 4 :] = IGNORED
        if prompt:
            targets[i, : i % 3] = IGNORED
    return Examples(tokens[:, :-1].contiguous(), targets)


def ngrams(examples, rows, order):
    """The n-grams that end at each labelled position of some documents, as tuples; "" before the text."""
    found = []
    for i in rows:
        for t, target in enumerate(examples.targets[i].tolist()):
            if target != IGNORED:
                before = examples.inputs[i, : t + 1].tolist()
                padded = [""] * order + before
                found.append((*padded[len(padded) - order + 1 :], target))
    return found


class Plain:
    """Interpolated Kneser-Ney from its definition, one n-gram after another."""

    def __init__(self, grams, order):
        self.counts = {order: Counter(grams)}
        for n in range(order, 1, -1):
            self.counts[n - 1] = Counter(gram[1:] for gram in self.counts[n])
        self.discounts = {}
        for n, counts in self.counts.items():
            n1, n2 = (sum(c == k for c in counts.values()) for k in (1, 2))
            raw = n1 / (n1 + 2 * n2) if n1 + n2 else 0.0
            self.discounts[n] = min(max(raw, DISCOUNTS[0]), DISCOUNTS[1])

    def probability(self, gram):
        if not gram:
            return 1 / V
        n, lower = len(gram), self.probability(gram[1:])
        after = [c for g, c in self.counts[n].items() if g[:-1] == gram[:-1]]
        if not after:
            return lower
        d = self.discounts[n]
        return (max(self.counts[n][gram] - d, 0) + d * len(after) * lower) / sum(after)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("prompt", [False, True])
def test_losses_are_those_of_a_plain_implementation(order, prompt):
    train, queries = documents(12, seed=0, prompt=prompt), documents(5, seed=1, prompt=prompt)
    masks = random_subsets(12, 6, 0.4, seed=2)
    found = NgramLM(train, order, V).losses(masks, queries)
    for mask, losses in zip(masks, found, strict=True):
        plain = Plain(ngrams(train, mask.nonzero().flatten().tolist(), order), order)
        for q, loss in enumerate(losses.tolist()):
            expected = -sum(math.log(plain.probability(gram)) for gram in ngrams(queries, [q], order))
            assert loss == pytest.approx(expected, rel=1e-6)


@settings(deadline=None, max_examples=15)
@given(
    order=st.integers(1, 3), seed=st.integers(0, 99), context=st.lists(st.integers(0, V - 1), min_size=3, max_size=3)
)
def test_probabilities_sum_to_one_after_every_context(order, seed, context):
    """Contexts that occur in the subset and those that do not, counts without singletons, words that never occur."""
    model = NgramLM(documents(8, seed=seed), order, V)
    inputs = torch.tensor([context]).expand(V, -1).contiguous()
    targets = torch.full((V, 3), IGNORED)
    targets[:, -1] = torch.arange(V)
    losses = model.losses(random_subsets(8, 4, 0.5, seed=seed), Examples(inputs, targets)).double()
    assert torch.allclose((-losses).exp().sum(1), torch.ones(4, dtype=torch.float64), atol=1e-6)


def test_a_subset_is_as_good_as_its_documents_alone():
    train, queries = documents(10, seed=3), documents(4, seed=4)
    mask = random_subsets(10, 1, 0.5, seed=5)
    alone = NgramLM(train[mask[0]], 3, V).losses(torch.ones(1, 5, dtype=torch.bool), queries)
    assert torch.allclose(NgramLM(train, 3, V).losses(mask, queries), alone, rtol=1e-6)


def test_blocks_of_subsets_change_nothing(monkeypatch):
    model, masks = NgramLM(documents(10, seed=3), 3, V), random_subsets(10, 7, 0.5, seed=5)
    whole = model.losses(masks, model.train)
    monkeypatch.setattr("tda_core.ngram_lm.BLOCK_FLOATS", 200)
    assert torch.allclose(model.losses(masks, model.train), whole, rtol=1e-6)


def test_loss_per_token_is_a_mean_over_own_and_other_positions():
    train, queries = documents(10, seed=3, prompt=True), documents(4, seed=4)
    masks = random_subsets(10, 3, 0.5, seed=5)
    model = NgramLM(train, 2, V)
    own, other = model.loss_per_token(masks, queries)
    for k, mask in enumerate(masks):
        part = train[mask]
        total = model.losses(masks[k : k + 1], part).sum() / (part.targets != IGNORED).sum()
        assert float(own[k]) == pytest.approx(float(total), rel=1e-6)
        total = model.losses(masks[k : k + 1], queries).sum() / (queries.targets != IGNORED).sum()
        assert float(other[k]) == pytest.approx(float(total), rel=1e-6)
    assert bool((own < other).all())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_scores_are_derivatives_in_the_probability_of_each_document(order):
    model, queries = NgramLM(documents(9, seed=6), order, V, fraction=0.4), documents(3, seed=7)
    scores = model.scores(queries).double()
    drawn = model._models(random_subsets(9, 8, 0.4, seed=0))
    discounts = [d.mean() for *_, d in drawn]
    places = [level.places(queries, V) for level in model._levels]

    def losses(p):
        return model._losses(model._smoothed(*model._expected(p), discounts), places, queries)[0]

    step = 1e-5
    for i in range(9):
        p = torch.full((9,), 0.4, dtype=torch.float64)
        up, down = p.clone(), p.clone()
        up[i] += step
        down[i] -= step
        expected = -(losses(up) - losses(down)) / (2 * step)
        assert torch.allclose(scores[:, i], expected, atol=1e-4, rtol=1e-4)


def test_expected_counts_are_means_over_all_subsets():
    """Of discounted counts too: c - D of an n-gram that is there, 0 of one that is not."""
    model = NgramLM(documents(6, seed=8), 2, V)
    p = torch.tensor([0.1, 0.3, 0.5, 0.2, 0.7, 0.4], dtype=torch.float64)
    counts, present = model._expected(p)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).double()
    chance = torch.where(every > 0, p, 1 - p).prod(1)
    of_each = every @ torch.from_numpy(model._levels[1].counts.toarray())
    assert torch.allclose(chance @ of_each, counts[:, 0])
    assert torch.allclose(chance @ (of_each > 0).double(), present[1][:, 0])
    assert torch.allclose(chance @ (of_each - 0.7).clamp_min(0), counts[:, 0] - 0.7 * present[1][:, 0])


def test_scores_foretell_the_losses_of_subsets():
    """What they stand for: over random subsets, summed scores rise where the loss falls."""
    train, queries = documents(40, seed=9), documents(6, seed=10)
    model, masks = NgramLM(train, 2, V), random_subsets(40, 60, 0.3, seed=11)
    predicted, losses = masks.float() @ model.scores(queries).T, model.losses(masks, queries)
    for q in range(len(queries)):
        assert float(torch.corrcoef(torch.stack([predicted[:, q], -losses[:, q]]))[0, 1]) > 0.6


def test_saved_and_loaded(tmp_path):
    model, queries = NgramLM(documents(9, seed=6), 3, V, fraction=0.5), documents(3, seed=7)
    model.save(tmp_path / "lm.safetensors")
    loaded = NgramLM.load(tmp_path / "lm.safetensors")
    assert (loaded.order, loaded.n_tokens, loaded.fraction) == (3, V, 0.5)
    assert torch.equal(loaded.scores(queries), model.scores(queries))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 0}, "order and n_tokens must be at least 1, got 0 and 7"),
        ({"order": 30, "n_tokens": 151_936}, "151936 tokens have more than 2.63 n-grams of order 30"),
        ({"fraction": 1.0}, "fraction must lie strictly between 0 and 1, got 1.0"),
        ({"n_tokens": 3}, "train hold token [345], outside of a vocabulary of 3"),
        ({"train": Examples(torch.rand(3, 2), torch.zeros(3, dtype=torch.int64))}, "train must be sequences of tokens"),
    ],
)
def test_bad_models(change, message):
    with pytest.raises(ValueError, match=message):
        NgramLM(**{"train": documents(4, seed=0), "order": 2, "n_tokens": V} | change)


def test_bad_queries_and_masks():
    model, masks = NgramLM(documents(4, seed=0), 2, V), random_subsets(4, 2, 0.5, seed=0)
    strange = Examples(torch.tensor([[1, 2]]), torch.tensor([[2, V]]))
    for call in (lambda: model.losses(masks, strange), lambda: model.scores(strange)):
        with pytest.raises(ValueError, match="queries hold token 7, outside of a vocabulary of 7"):
            call()
    for wrong in (masks[:, :3], masks.float(), masks[0], masks[:0]):
        with pytest.raises(ValueError, match=r"masks must be \(m, 4\) bool, got"):
            model.losses(wrong, model.train)
    masks[1] = False
    with pytest.raises(ValueError, match="subset 1 is empty"):
        model.losses(masks, model.train)
