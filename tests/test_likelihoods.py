"""Three paths to the same log-likelihoods, against a forward pass for each pair alone."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from language_toys import CONFIGS, NEAR_SIGHTED, language_model, text_pairs, words

from tda_core import likelihood_paths
from tda_core.language import LanguageModel
from tda_core.likelihood_paths import Queries
from tda_core.likelihoods import (
    PATHS,
    cheapest_path,
    log_likelihoods,
    path_costs,
    usable_paths,
)
from tda_core.text_pairs import TextPairs
from tda_core.token_rows import batches_of_sum, padded

MODELS = {kind: language_model(kind) for kind in CONFIGS}
EACH_PATH = pytest.mark.parametrize("path", PATHS)


def prefixes_of(model: LanguageModel, n: int, *, seed: int = 0, longest: int = 12) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return model.tokens([words(length, generator) for length in lengths])


def one_by_one(model: LanguageModel, prefixes: list[list[int]], queries: Queries) -> torch.Tensor:
    """A forward pass for each pair, cut on the left to the window."""
    found = torch.zeros(len(prefixes), len(queries))
    for i, prefix in enumerate(prefixes):
        for j in range(len(queries)):
            response = queries.responses[j]
            tokens = ((prefix + queries.prompts[j]) or [1]) + response
            tokens = torch.tensor(tokens[-model.window :])
            log_p = model.model(input_ids=tokens[None]).logits[0].log_softmax(1).detach()
            places = torch.arange(len(tokens) - len(response), len(tokens))
            found[i, j] = log_p[places - 1, tokens[places]].sum()
    return found


@EACH_PATH
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_each_path_agrees_with_one_pair_at_a_time(kind, path, padding):
    model = MODELS[kind]
    prefixes, queries = prefixes_of(model, 5), Queries.of(model, text_pairs(6, seed=2))
    found, cut = log_likelihoods(model, prefixes, queries, path=path, padding=padding)
    torch.testing.assert_close(found, one_by_one(model, prefixes, queries), rtol=0, atol=1e-4)
    assert not cut.any() and usable_paths(model) == PATHS


@EACH_PATH
@pytest.mark.parametrize("kind", sorted(NEAR_SIGHTED))
def test_layers_that_look_back_over_some_columns_only_see_the_same_on_each_path(kind, path):
    model = language_model(kind)
    queries = Queries.of(model, text_pairs(6, seed=2) + text_pairs(3, seed=3, prompt=(12, 18)))
    for longest in (9, 40):
        prefixes = prefixes_of(model, 6, longest=longest)
        found, _ = log_likelihoods(model, prefixes, queries, path=path)
        torch.testing.assert_close(found, one_by_one(model, prefixes, queries), rtol=0, atol=1e-4)
    assert usable_paths(model) == PATHS


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_memory_of_a_pass_is_bounded(kind, monkeypatch):
    model = language_model(kind)
    prefixes, queries = prefixes_of(model, 12, longest=9), Queries.of(model, text_pairs(12, seed=5))
    floats, per_key = 2**13, 2 * model.width * 2  # keys and values of two layers
    monkeypatch.setattr(likelihood_paths, "KEY_FLOATS", floats)
    monkeypatch.setattr(likelihood_paths, "LOGITS", 60 * 40)
    held, passed = [], []
    behind, scores = likelihood_paths._behind, likelihood_paths.token_scores

    def watched_behind(model, kept, real, some):
        held.append(len(real) * len(some) * (real.shape[1] + max(some.lengths)) * per_key)
        return behind(model, kept, real, some)

    def watched_scores(model, inputs, *args):
        passed.append(inputs["input_ids"].numel())
        return scores(model, inputs, *args)

    monkeypatch.setattr(likelihood_paths, "_behind", watched_behind)
    monkeypatch.setattr(likelihood_paths, "token_scores", watched_scores)
    for path in PATHS:
        found, _ = log_likelihoods(model, prefixes, queries, path=path)
        torch.testing.assert_close(found, one_by_one(model, prefixes, queries), rtol=0, atol=1e-4)
    assert max(held) <= floats and len(held) > 1
    # all logits are held only where the head cannot be applied to some positions alone
    assert model.has_plain_head or max(passed) <= 80


@EACH_PATH
def test_small_passes_give_what_one_large_pass_gives(path, monkeypatch):
    model = MODELS["llama"]
    prefixes, queries = prefixes_of(model, 9, seed=4), Queries.of(model, text_pairs(7, seed=5))
    whole, _ = log_likelihoods(model, prefixes, queries, path=path)
    for tokens in (1, 40, 150):
        monkeypatch.setattr(likelihood_paths, "CPU_TOKENS", tokens)
        monkeypatch.setattr(likelihood_paths, "LOGITS", 3 * 40)
        part, _ = log_likelihoods(model, prefixes, queries, path=path)
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-4)


@EACH_PATH
def test_truncation_empty_prompts_and_empty_prefixes_on_every_path(path):
    model = language_model("gpt2", window=16)
    pairs = text_pairs(4, seed=6) + TextPairs(["", "w9 " * 14], ["w5 w6", "w7"])
    prefixes = [[], *prefixes_of(model, 4, seed=7)]
    queries = Queries.of(model, pairs)
    found, cut = log_likelihoods(model, prefixes, queries, path=path)
    torch.testing.assert_close(found, one_by_one(model, prefixes, queries), rtol=0, atol=1e-4)
    lengths = torch.tensor(
        [[len(p) + len(q) + len(r) for q, r in zip(queries.prompts, queries.responses, strict=True)] for p in prefixes]
    )
    assert torch.equal(cut, lengths > 16) and cut.any() and not cut.all()
    alone, _ = log_likelihoods(model, [[]], queries, path=path)
    torch.testing.assert_close(alone, found[:1], rtol=0, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 4), m=st.integers(1, 4), path=st.sampled_from(PATHS))
def test_what_stands_beside_a_pair_does_not_matter(seed, n, m, path):
    model = MODELS["llama"]
    prefixes, queries = prefixes_of(model, n, seed=seed), Queries.of(model, text_pairs(m, seed=seed + 1))
    whole, _ = log_likelihoods(model, prefixes, queries, path=path)
    i, j = seed % n, seed % m
    single, _ = log_likelihoods(model, [prefixes[i]], queries.some([j]), path=path)
    torch.testing.assert_close(single[0, 0], whole[i, j], rtol=0, atol=1e-4)


def test_tokens_that_start_every_text_are_put_before_prefixes():
    model = language_model()
    model.__dict__["start"] = (1,)
    queries = Queries.of(model, text_pairs(3))
    plain = one_by_one(model, [[1, 5, 6], [1]], queries)
    for path in PATHS:
        found, _ = log_likelihoods(model, [[5, 6], []], queries, path=path)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


def test_a_model_that_does_more_after_its_head_is_noticed():
    model = language_model()
    forward = type(model.model).forward

    def softened(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = 3 * torch.tanh(out.logits / 3)
        return out

    model.model.forward = softened.__get__(model.model)
    assert not model.has_plain_head and MODELS["llama"].has_plain_head
    prefixes, queries = prefixes_of(model, 3), Queries.of(model, text_pairs(4))
    plain = one_by_one(model, prefixes, queries)
    for path in PATHS:
        torch.testing.assert_close(log_likelihoods(model, prefixes, queries, path=path)[0], plain, rtol=0, atol=1e-4)


def test_a_path_that_a_model_does_not_take_is_not_used(caplog, monkeypatch):
    model = language_model(seed=5)
    base = model.model.base_model
    forward = type(base).forward

    def without_masks(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim == 4:
            raise TypeError("no 4-d masks")
        return forward(self, *args, position_ids=kwargs.pop("position_ids", None), **kwargs)

    base.forward = without_masks.__get__(base)
    with caplog.at_level(logging.WARNING):
        assert usable_paths(model) == ("batched",)
    assert "does not take the packed path (no 4-d masks)" in caplog.text
    assert "gives other numbers on the prefix path" in caplog.text
    assert cheapest_path(model, [[3]] * 5, Queries.of(model, text_pairs(30))) == "batched"


def test_costs_rank_the_paths_as_their_lengths_suggest():
    model = MODELS["llama"]
    one, many = (Queries.of(model, text_pairs(n)) for n in (1, 50))
    assert path_costs(model, 0.0, many)["batched"] <= path_costs(model, 0.0, many)["packed"]
    for length in (40.0, 100.0):  # what is shared is long
        costs, alone = path_costs(model, length, many), path_costs(model, length, one)
        assert min(costs["prefix"], costs["packed"]) < costs["batched"]
        assert alone["batched"] <= min(alone.values())
    found, _ = log_likelihoods(model, [[3, 4]], many)
    expected, _ = log_likelihoods(model, [[3, 4]], many, path="batched")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_rows_are_padded_on_the_side_that_is_asked_for():
    ids, real = padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and real.tolist() == [[True] * 3, [True, False, False]]
    ids, real = padded([[5, 6, 7], [8]], "left")
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]] and real[1].tolist() == [False, False, True]
    assert batches_of_sum([3, 3, 9, 1, 1], 6) == [[0, 1], [2], [3, 4]]


def test_bad_input_is_refused():
    model = MODELS["llama"]
    queries = Queries.of(model, text_pairs(2))
    with pytest.raises(
        ValueError, match=r"unknown path 'fast', expected one of \('batched', 'prefix', 'packed', 'auto'"
    ):
        log_likelihoods(model, [[3]], queries, path="fast")
    with pytest.raises(ValueError, match="unknown padding 'middle'"):
        log_likelihoods(model, [[3]], queries, padding="middle")
    with pytest.raises(ValueError, match="nothing to score: 0 prefixes, 2 queries"):
        log_likelihoods(model, [], queries)
    with pytest.raises(ValueError, match=r"responses\[0\] has 70 tokens, which do not fit the model's window of 64"):
        log_likelihoods(model, [[3]], Queries([[2]], [[4] * 70]))


@EACH_PATH
def test_logits_that_are_not_numbers_name_the_pair(path):
    model = language_model(seed=6)
    with torch.no_grad():
        model.model.get_input_embeddings().weight[20] = torch.nan
    queries = Queries([[3], [4]], [[5], [6]])
    with pytest.raises(ValueError, match="of response 0 behind prefix 1 is NaN or infinite"):
        log_likelihoods(model, [[7], [20]], queries, path=path)
