"""In-context probing: against the formula pair by pair, and what is counted and warned of."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language_toys import language_model, text_pairs

from tda_core import icp
from tda_core.icp import PLAIN, VARIANTS, Template, fit_icp
from tda_core.store import Store
from tda_core.text_pairs import TextPairs

MODEL = language_model()
POOL, QUERIES = text_pairs(11), text_pairs(5, seed=1)


def log_p(text: str, response: str) -> float:
    """log p(response | text) by one forward pass, in nats."""
    before, after = (MODEL.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, response))
    scores = MODEL.model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(1)
    return sum(float(scores[len(before) + k - 1, token]) for k, token in enumerate(after))


@pytest.mark.parametrize("template", [PLAIN, Template("w2 w3 ", " w4 ", "w5 ")])
def test_scores_are_those_of_the_formula(template):
    gains, per_token = torch.zeros(5, 11), torch.zeros(5, 11)
    for i, (prompt, response) in enumerate(QUERIES.pairs):
        alone = log_p(template.alone + prompt, response)
        for z, (p, r) in enumerate(POOL.pairs):
            gains[i, z] = log_p(template.before + p + r + template.between + prompt, response) - alone
            per_token[i, z] = gains[i, z] / len(response.split())
    expected = {"gain": gains, "gain_per_token": per_token, "indicator": (gains > 0).float()}
    for variant in VARIANTS:
        method = fit_icp(MODEL, POOL, template, variant=variant)
        torch.testing.assert_close(method.scores(QUERIES), expected[variant], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(method.probe(QUERIES).of_task(variant), expected[variant].mean(0), atol=1e-4, rtol=0)


def test_the_comparison_is_strict():
    probe = icp.Probe(torch.zeros(2), torch.tensor([[0.0, 1e-6]]), torch.ones(2), torch.zeros(1, 2), torch.zeros(1, 2))
    assert probe.scores("indicator").tolist() == [[0.0], [1.0]]


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(11)))
def test_scores_follow_the_order_of_the_training_set(order):
    order = torch.tensor(order)
    torch.testing.assert_close(
        fit_icp(MODEL, POOL[order], PLAIN).scores(QUERIES),
        fit_icp(MODEL, POOL, PLAIN).scores(QUERIES)[:, order],
        rtol=0,
        atol=1e-4,
    )


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    method = fit_icp(MODEL, POOL, PLAIN, store=Store(tmp_path))
    monkeypatch.setattr(icp, "BLOCK", 4)
    first = next(method.blocks(QUERIES, 4))
    assert len(list(tmp_path.iterdir())) == 1
    calls = []
    plain = icp.log_likelihoods

    def counted(model, prefixes, *args, **options):
        calls.append(len(prefixes))
        return plain(model, prefixes, *args, **options)

    monkeypatch.setattr(icp, "log_likelihoods", counted)
    found = torch.cat([part for part, _ in method.blocks(QUERIES, 4)])
    assert calls == [4, 3] and torch.equal(found[:4], first[0])
    assert torch.equal(torch.cat([part for part, _ in method.blocks(QUERIES, 4)]), found) and len(calls) == 2
    list(fit_icp(MODEL, POOL, Template("w2 "), store=Store(tmp_path)).blocks(QUERIES, 4))
    assert len(calls) == 5  # another template shares nothing


def test_what_is_saved_is_loaded(tmp_path):
    method = fit_icp(MODEL, POOL, PLAIN, variant="gain_per_token", path="packed")
    method.save(tmp_path / "icp.safetensors")
    loaded = icp.ICP.load(tmp_path / "icp.safetensors", MODEL)
    assert (loaded.template, loaded.variant, loaded.path) == (PLAIN, "gain_per_token", "packed")
    assert torch.equal(loaded.scores(QUERIES), method.scores(QUERIES))
    with pytest.raises(ValueError, match="was made for model"):
        icp.ICP.load(tmp_path / "icp.safetensors", language_model(seed=9))


def test_truncation_repeats_and_shared_pairs_are_counted():
    with pytest.warns(UserWarning, match="2 of 13 demonstrations repeat an earlier one"):
        method = fit_icp(MODEL, POOL + POOL[:2], PLAIN)
    with pytest.warns(UserWarning, match="3 times a demonstration equals a query"):
        probe = method.probe(POOL[1:3])
    assert probe.shared.nonzero().tolist() == [[1, 0], [2, 1], [12, 0]]
    long = TextPairs(["w3 " * 59, "w4"], ["w5", "w6"])
    with pytest.warns(UserWarning, match=r"of 15 contexts are longer than the model's window of 64 tokens"):
        probe = fit_icp(MODEL, long, PLAIN).probe(text_pairs(5, prompt=(6, 7), seed=3))
    assert probe.truncated[0].any() and not probe.truncated[1].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_icp(MODEL, POOL, PLAIN).probe(QUERIES)


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match=r"unknown variant 'count', expected one of \('indicator', 'gain',"):
        fit_icp(MODEL, POOL, variant="count")
    with pytest.raises(ValueError, match="unknown variant 'best'"):
        fit_icp(MODEL, POOL, PLAIN).probe(QUERIES).scores("best")
