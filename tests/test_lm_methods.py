"""The methods of the language-model tables: each answers, is chosen on validation queries alone, and is timed."""

from dataclasses import replace

import pytest
import torch
from language_toys import language_model

from tda_core import lm_methods
from tda_core.corpora import CorpusSize, load_corpus
from tda_core.language import LanguageModel
from tda_core.lm_bench import LMBench, LMGoal, Subject, bank_of, build_bench
from tda_core.lm_judging import Answer, Method, costs, judge, scores_by_setting
from tda_core.lm_methods import cropped, lengths, share_of, weighted_terms
from tda_core.lm_recipes import LMRecipe
from tda_core.store import Store
from tda_core.text_pairs import TextPairs

GOAL = LMGoal(LMRecipe(width=8, layers=1, heads=2, length=24, batch_size=8), epochs=3, n_subsets=8, n_seeds=1)
METHODS = {
    **lm_methods.controls(),
    **lm_methods.gradient_methods(("*mlp*",), 2),
    **lm_methods.steering_methods(12, 3, rank=4, steps=2),
    "forward_only/tuned": lm_methods.simulation(),
    **lm_methods.closed_forms(),
    **{f"{name}/model": method for name, method in lm_methods.closed_forms("model").items()},
    "icp": lm_methods.probing(),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    corpus = load_corpus("help_topics", CorpusSize(30, 5, 6, 24, 300, 4))
    build_bench(corpus, GOAL, folder, bank_of(corpus, GOAL, folder / "bank"), n_jobs=1)
    return LMBench.load(folder)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_answers_all_test_queries(bench, name):
    method = METHODS[name]
    found = judge(bench, method)
    shape = (8, 6) if name.endswith("_lm") else (6, 30)
    assert found.scores.shape == shape and bool(torch.isfinite(found.scores).all())
    assert found.lds.value == pytest.approx(bench.lds(found.scores).value)
    assert found.lds_raw.value == pytest.approx(bench.lds(found.scores, raw=True).value)
    assert found.build_seconds >= 0 and found.query_ms > 0
    assert found.setting in (map(str, method.settings) if len(method.settings) > 1 else [""])
    # a query may share no word with any document, and a Lasso may keep nothing for it
    assert name == "length" or name.startswith("stride/") or float(found.scores.std(1).max()) > 0


def test_settings_are_chosen_without_the_test_queries(bench):
    asked = []

    def finish(prepared, setting):
        def scores(queries):
            asked.append((setting, len(queries)))
            return setting * torch.arange(30.0).expand(len(queries), -1)

        return Answer(scores)

    judge(bench, Method(lambda b: None, finish, (1, -1)))
    assert [n for _, n in asked[:2]] == [5, 5] and asked[2][1] == 6 and len(asked) == 3


def test_a_stopped_table_goes_on_where_it_stopped(bench, tmp_path):
    calls = []

    def prepare(subject):
        calls.append(subject)
        return Answer(lambda queries: torch.arange(30.0).expand(len(queries), -1) * len(calls))

    store, method = Store(tmp_path), Method(prepare, lambda p, s: p, (1, 2))
    first = judge(bench, method, name="mine", store=store)
    again = judge(bench, method, name="mine", store=store)
    assert len(calls) == 1 and torch.equal(again.scores, first.scores) and again.setting == first.setting == "1"
    assert (again.build_seconds, again.query_ms, again.peak_mb) == (first.build_seconds, first.query_ms, first.peak_mb)
    judge(bench, method, name="other", store=store)
    judge(bench.asking(slice(0, 3)), method, name="mine", store=store)
    assert len(calls) == 3


def test_costs_need_no_ground_truth():
    corpus = load_corpus("help_topics", CorpusSize(12, 2, 3, 24, 300, 4))
    recipe = LMRecipe(width=8, layers=1, heads=2, length=24)
    subject = Subject(corpus, LanguageModel(recipe.untrained(300, seed=0), corpus.tokenizer))
    build, query, _ = costs(subject, METHODS["adam_dot"])
    assert build >= 0 and query > 0


def test_methods_without_a_truth_answer_a_subject():
    corpus = load_corpus("help_topics", CorpusSize(12, 2, 3, 24, 300, 4))
    recipe = LMRecipe(width=8, layers=1, heads=2, length=24)
    subject = Subject(corpus, LanguageModel(recipe.untrained(300, seed=0), corpus.tokenizer))
    methods = lm_methods.without_truth(8, 2, 4)
    assert {"random", "length", "tfidf", "ngram_tfidf", "stride", "stride_published", "adapter", "icp"} <= set(methods)
    assert not any("/" in name for name in methods)
    for name, method in methods.items():
        found = scores_by_setting(subject, method, {"own": corpus.test, "fewer": corpus.validation})
        assert list(found) == list(method.settings), name
        for scores in found.values():
            assert {of: tuple(values.shape) for of, values in scores.items()} == {"own": (3, 12), "fewer": (2, 12)}
            assert all(torch.isfinite(values).all() for values in scores.values()), name


def test_scores_by_setting_prepare_once_and_take_the_settings_that_are_asked_for():
    prepared = []

    def prepare(subject):
        prepared.append(subject)
        return 10.0

    method = Method(prepare, lambda base, s: Answer(lambda q: torch.full((len(q), 2), base * s)), (1, 2, 3), texts=True)
    pairs = TextPairs(("a", "b"), (" c", " d"))
    found = scores_by_setting("subject", method, {"x": pairs}, [3, 1])
    assert prepared == ["subject"] and list(found) == [3, 1]
    assert found[3]["x"].tolist() == [[30.0, 30.0]] * 2


def gradients(bench, part):
    """Gradients of each document's summed loss by the layers that the methods take, by autograd alone: (n, p)."""
    model, examples = bench.model.model, bench.examples(part)
    chosen = [value for name, value in model.named_parameters() if "mlp" in name]
    rows = []
    for tokens, targets in zip(examples.inputs, examples.targets, strict=True):
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen)]))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["gradient_dot", "gradient_cosine"])
def test_products_are_of_documents_sums_and_queries_means(bench, name):
    own, goals = (gradients(bench, part) for part in ("train", "test"))
    expected = goals @ own.T / lengths(bench.examples("test"))[:, None]
    if name == "gradient_cosine":
        expected = torch.nn.functional.cosine_similarity(goals[:, None], own[None], dim=2)
    method = METHODS[name]
    found = method.finish(method.prepare(bench), None).scores(bench.examples("test"))
    torch.testing.assert_close(found.to(expected), expected, rtol=1e-3, atol=float(expected.abs().max()) * 1e-4)


@pytest.mark.parametrize("name", ["adam_dot", "last_layer/tuned", "logra/tuned"])
def test_scores_of_a_query_are_of_its_mean_loss(bench, name):
    """Times its number of labels they add up over its labels."""
    method = METHODS[name]
    answer = method.finish(method.prepare(bench), method.settings[0])
    queries = bench.examples("test")
    summed = answer.scores(queries) * lengths(queries)[:, None]
    parts = []
    for odd in (0, 1):
        targets = queries.targets.clone()
        targets[:, odd::2] = -100
        some = replace(queries, targets=targets)
        parts.append(answer.scores(some) * lengths(some)[:, None])
    torch.testing.assert_close(sum(parts), summed, rtol=1e-3, atol=float(summed.abs().max()) * 1e-4)


def test_what_is_recovered_is_of_the_mean_loss(bench):
    method, queries = METHODS["stride/tuned"], bench.examples("test")
    prepared = method.prepare(bench)
    found = method.finish(prepared, method.settings[0]).scores(queries)
    summed = prepared[0].recovering(method.settings[0]).scores(queries)
    torch.testing.assert_close(found * lengths(queries)[:, None], summed)
    assert float(summed.abs().max()) > 0


def test_the_control_without_a_network_never_looks_at_one(bench):
    other = replace(bench, model=LanguageModel(GOAL.recipe.untrained(300, seed=5), bench.model.tokenizer))
    found = {}
    for name in ("no_network/tuned", "stride_closed_form/tuned"):
        method = METHODS[name]
        scores = [
            method.finish(method.prepare(b), method.settings[0]).scores(b.examples("test")) for b in (bench, other)
        ]
        found[name] = torch.equal(*scores)
    assert found == {"no_network/tuned": True, "stride_closed_form/tuned": False}


def test_shares_are_those_of_the_ground_truth(bench):
    opposite = replace(bench, test=replace(bench.test, masks=~bench.masks))
    assert share_of(bench) == pytest.approx(0.3) and share_of(opposite) == pytest.approx(0.7)
    assert share_of(Subject(bench.corpus, bench.model)) == 0.3


def test_weights_of_terms_are_fitted_to_validation_queries_alone(bench):
    form = METHODS["stride_closed_form/untuned"].prepare(bench)
    before = weighted_terms(bench, form)[1].values.clone()
    flipped = replace(bench, test=replace(bench.test, losses=-bench.test.losses))
    assert torch.equal(weighted_terms(flipped, form)[1].values, before)
    flipped = replace(bench, validation=replace(bench.validation, losses=-bench.validation.losses))
    assert not torch.equal(weighted_terms(flipped, form)[1].values, before)


def test_n_gram_models_predict_mean_losses(bench):
    queries = bench.examples("test")
    found = METHODS["bigram_lm"].prepare(bench).scores(queries)
    from tda_core.ngram_lm import NgramLM

    summed = NgramLM(bench.examples("train"), 2, 300).losses(bench.masks, queries)
    assert torch.equal(found * lengths(queries), -summed) or torch.allclose(found * lengths(queries), -summed)


def test_texts_are_cropped_to_leave_room():
    model = language_model("llama")
    pairs = TextPairs(("w2 w3", ""), ("w4 w5 w6", "w7"))
    assert cropped(model, pairs, 4).responses == ("w4 w5", "w7")
    assert cropped(model, pairs, 5) == pairs and cropped(model, pairs, None) == pairs
    assert cropped(model, pairs, 2).pairs == (("w3", "w4"), ("", "w7"))
    assert cropped(model, pairs, 1).pairs == (("", "w4"), ("", "w7"))
    with pytest.raises(ValueError, match="n_tokens must be at least 1, got 0"):
        cropped(model, pairs, 0)
