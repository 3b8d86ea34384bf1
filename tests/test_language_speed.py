"""What scoring prompts costs: all ways are the same numbers, and a peer's are ours."""

import pytest
import torch
from language_toys import language_model, text_pairs

from tda_core.language_speed import _cost, cost, harness, one_by_one, scorers, seconds_each
from tda_core.likelihood_paths import Queries

MODEL = language_model()
PREFIXES = MODEL.tokens(["w3 w4 w5", "w6", "w7 w8"])
QUERIES = Queries.of(MODEL, text_pairs(4))


def test_every_way_of_ours_gives_the_plain_numbers():
    plain = one_by_one(MODEL, PREFIXES, QUERIES)
    ways = scorers(MODEL, PREFIXES, QUERIES)
    for name in ("batched", "prefix", "packed", "auto"):
        torch.testing.assert_close(ways[name](), plain, rtol=0, atol=1e-4)


@pytest.mark.peers
def test_lm_evaluation_harness_gives_the_same_numbers():
    pytest.importorskip("lm_eval")
    torch.testing.assert_close(
        harness(MODEL, PREFIXES, QUERIES, 4), one_by_one(MODEL, PREFIXES, QUERIES), atol=1e-4, rtol=0
    )
    assert {"lm_eval/16", "lm_eval/64", "lm_eval/256"} <= set(scorers(MODEL, PREFIXES, QUERIES))


def test_ways_take_turns_and_the_first_round_is_not_counted():
    calls = []
    found = seconds_each({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2)
    assert calls == ["a", "b"] * 3 and all(value >= 0 for value in found.values())


def test_costs_come_from_a_process_of_their_own(tmp_path):
    MODEL.save(tmp_path)
    asked = text_pairs(8), text_pairs(4, seed=2)
    for found in (cost(tmp_path, *asked, "icp"), _cost(str(tmp_path), *asked, "gradient_dot")):
        assert found.seconds > 0 and found.peak_bytes >= 0
    with pytest.raises(ValueError, match="unknown method 'trak', expected one of"):
        cost(tmp_path, text_pairs(8), text_pairs(4), "trak")


def test_memory_counts_what_scores_hold_and_not_what_the_parent_held(tmp_path):
    parent = torch.ones(2**26)  # 256 MB, which a child must not be charged with
    MODEL.save(tmp_path)
    pool, queries = text_pairs(2000), text_pairs(4, seed=2)
    found = cost(tmp_path, pool, queries, "gradient_dot")
    held = 4 * 2000 * MODEL.problem(pool[:1]).n_parameters  # bytes of the training gradients
    assert 0.8 * held < found.peak_bytes < 20 * held
    del parent
