"""Terms between positions against their formulas, pair by pair."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from language_toys import VOCABULARY, language_model, text_pairs
from torch import Tensor
from torch.nn import functional as F

from tda_core import token_closed_form as module
from tda_core import token_terms
from tda_core.text_pairs import TextPairs
from tda_core.token_closed_form import TERMS, TokenClosedForm, TokenSettings, network_residuals, token_closed_form
from tda_core.token_gradients import head_of
from tda_core.token_table import logits_of, token_table
from tda_core.token_terms import CONTEXTS, Keys

MODEL = language_model()


def few_words(n: int, seed: int) -> TextPairs:
    """Documents of five words only, so that contexts recur."""
    generator = torch.Generator().manual_seed(seed)
    texts = [" ".join(f"w{i}" for i in torch.randint(2, 7, (9,), generator=generator).tolist()) for _ in range(n)]
    return TextPairs([""] * n, texts)


TRAIN, QUERIES = MODEL.examples(few_words(7, 0)), MODEL.examples(few_words(3, 1) + text_pairs(1))
SETTINGS = TokenSettings(TERMS, (1.0,) * len(TERMS), 0.4, 0.7, 20.0, 4.0, 0.3, layer=1, power=3.0)


def plain(settings: TokenSettings) -> dict[str, Tensor]:
    """Scores of each term (q, n), one pair of positions after the other, float64."""
    train, asked = (token_table(MODEL, examples, layer=settings.layer, n_context=3) for examples in (TRAIN, QUERIES))
    return {name: between(name, train, asked, settings) for name in settings.terms}


def between(name: str, train, asked, settings: TokenSettings) -> Tensor:
    columns = CONTEXTS.get(name.removeprefix("related_"), ())
    contexts, theirs = ([tuple(row[list(columns)].tolist()) for row in table.context] for table in (train, asked))
    share = torch.bincount(train.targets, minlength=VOCABULARY).double() / len(train)
    embedding = head_of(MODEL)[0].double()
    expected = [torch.zeros(len(table)) for table in (asked, train)]
    if settings.residuals == "model":
        expected = [p_of(table).gather(1, table.targets[:, None])[:, 0] for table in (asked, train)]
    found = torch.zeros(asked.n_documents, train.n_documents, dtype=torch.float64)
    kernel = states_of(asked, train) ** settings.power
    for t in range(len(asked)):
        same_target = train.targets == asked.targets[t]
        same_context = torch.tensor([c == theirs[t] for c in contexts])
        if name == "state":
            values = torch.where(same_target, kernel[t], 0.0) / (kernel[t][same_target].sum() + settings.smoothing)
        elif name.startswith("related_"):
            values = related(train, same_context, embedding, settings, asked, t)
        else:
            extra = settings.share * (settings.prior * float(share[asked.targets[t]]) + settings.smoothing)
            both = same_context & same_target
            values = both * drawn_gain(int(both.sum()), settings.share, extra)
        if not name.startswith("related_") or settings.residuals == "counts":
            values = values * (1 - expected[0][t]) * (1 - expected[1])
        found[asked.documents[t]].index_add_(0, train.documents, values.double() / asked.lengths[asked.documents[t]])
    return found


def drawn_gain(count: int, share: float, extra: float) -> float:
    """The expected gain of one occurrence over all the ways to draw the others."""
    total = 0.0
    for drawn in itertools.product([0, 1], repeat=max(0, count - 1)):
        k = sum(drawn)
        total += share**k * (1 - share) ** (len(drawn) - k) * math.log((k + 1 + extra) / (k + extra))
    return total


def p_of(table) -> Tensor:
    return F.softmax(logits_of(MODEL, table.last).double(), 1)


def states_of(asked, train) -> Tensor:
    centred = train.hidden.double() - train.hidden.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(train))
    basis = vectors / (values + values.mean() / 10).sqrt()
    mean = train.hidden.double().mean(0)
    whitened = [F.normalize((table.hidden.double() - mean) @ basis, dim=1) for table in (asked, train)]
    return (whitened[0] @ whitened[1].T).clamp_min(0)


def related(train, same: Tensor, embedding: Tensor, settings: TokenSettings, asked, t: int) -> Tensor:
    """r' E (E' S E + damping I)^-1 E' r / (n_c + smoothing), p_c and S from mixed frequencies."""
    if not same.any():
        return torch.zeros(len(train), dtype=torch.float64)
    share = torch.bincount(train.targets, minlength=VOCABULARY).double() / len(train)
    n = int(same.sum())
    own = torch.bincount(train.targets[same], minlength=VOCABULARY).double()
    p = (own + settings.mixing * share) / (n + settings.mixing)
    spread = embedding.T @ (share.diag() - share[:, None] * share) @ embedding
    system = embedding.T @ (p.diag() - p[:, None] * p) @ embedding
    system += settings.damping * spread.diagonal().mean() * torch.eye(len(system))
    one_hot = torch.eye(VOCABULARY, dtype=torch.float64)
    sides = []
    for table in (asked, train):
        at = p_of(table) if settings.residuals == "model" else p
        sides.append((at - one_hot[table.targets]) @ embedding)
    return same * (sides[1] @ torch.linalg.solve(system, sides[0][t])) / (n + settings.smoothing)


@pytest.mark.parametrize("residuals", ["counts", "model"])
def test_terms_are_sums_over_pairs_of_positions(residuals):
    settings = replace(SETTINGS, residuals=residuals)
    found = token_closed_form(MODEL, TRAIN, settings).term_scores(QUERIES)
    assert found.dtype == torch.float32 and found.shape == (len(TERMS), 4, 7)
    for name, values, true in zip(TERMS, found, plain(settings).values(), strict=True):
        assert float((values - true).norm()) < 1e-4 * float(true.norm()), name


def test_the_bigram_term_is_a_bigram_models_newton_step():
    """Not smoothed, with an embedding of full rank, Related is 1 / n(c, y) - 1 / n_c: the plain counts'."""
    contexts = torch.tensor([0, 0, 0, 1, 1])
    targets = torch.tensor([3, 3, 4, 3, 5])
    table = token_terms.TokenTable(torch.zeros(5, 1), torch.zeros(5, 1), contexts[:, None], targets, torch.arange(5), 5)
    own = token_terms.Positions(table, torch.ones(5))
    bare = token_terms.Smoothing(0.5, 1e-9, 1e-9, 1e-9, 1e-7)
    found = token_terms.Related.of(own, (0,), torch.eye(6), bare).scores(own)
    same = contexts[:, None] == contexts
    both = same & (targets[:, None] == targets)
    expected = both / torch.tensor([2, 2, 1, 1, 1]) - same / torch.tensor([3, 3, 3, 2, 2])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_gain_of_many_occurrences_is_one_over_their_number():
    counts = torch.tensor([1, 2, 80, 81, 82, 4000])
    found = token_terms.expected_gain(counts, 0.3, torch.full((6,), 10.0))
    by_hand = [math.log(4 / 3), 0.7 * math.log(4 / 3) + 0.3 * math.log(5 / 4)]
    torch.testing.assert_close(found[:2], torch.tensor(by_hand))
    assert bool((found.diff() < 0).all())  # on either side of where the sum gives way to its limit, too
    assert float(found[3] / found[2]) == pytest.approx(80.3 / 81.3, rel=0.05)
    assert float(found[5]) == pytest.approx(1 / (0.3 * 4000 + 3), rel=1e-3)


def test_a_token_that_a_smaller_share_has_seen_has_more_to_teach():
    counts, smoothing = torch.tensor([5, 50]), torch.tensor([2.0, 2.0])
    few, many = (token_terms.expected_gain(counts, share, smoothing) for share in (0.1, 0.9))
    assert bool((few > many).all())


def test_blocks_of_pairs_and_of_logits_add_up(monkeypatch):
    settings = replace(SETTINGS, residuals="model")
    whole = token_closed_form(MODEL, TRAIN, settings).term_scores(QUERIES)
    monkeypatch.setattr(token_terms, "PAIRS", 1)
    monkeypatch.setattr(module, "LOGITS", 1)
    torch.testing.assert_close(token_closed_form(MODEL, TRAIN, settings).term_scores(QUERIES), whole)


def test_scores_are_weighted_sums_that_need_no_other_query():
    made = token_closed_form(MODEL, TRAIN, replace(SETTINGS, weights=tuple(range(len(TERMS)))))
    terms, scores = made.term_scores(QUERIES), made.scores(QUERIES)
    torch.testing.assert_close(scores, sum(i * term for i, term in enumerate(terms)))
    torch.testing.assert_close(made.scores(QUERIES[2:3]), scores[2:3])
    only = made.weighted(torch.eye(len(TERMS))[1])
    torch.testing.assert_close(only.scores(QUERIES), terms[1])
    assert only.settings.weights == (0, 1) + (0,) * (len(TERMS) - 2)
    document = made.weighted(torch.eye(len(TERMS))[TERMS.index("trigram")]).scores(TRAIN)
    assert bool((document.argmax(1) == torch.arange(7)).all())  # a document is its own best proponent


def test_keys_tell_tuples_apart_and_know_their_own_only():
    generator = torch.Generator().manual_seed(0)
    train, other = (torch.randint(-1, 3, (40, 3), generator=generator) for _ in range(2))
    keys, found = Keys.of(list(train.T), 3)
    tuples = [tuple(row) for row in train.tolist()]
    for i, row in enumerate(tuples):
        assert [bool(found[i] == found[j]) for j in range(40)] == [row == o for o in tuples]
    assert len(keys) == len(set(tuples)) and torch.equal(keys.find(list(train.T)), found)
    for number, row in zip(keys.find(list(other.T)).tolist(), other.tolist(), strict=True):
        assert number == (int(found[tuples.index(tuple(row))]) if tuple(row) in tuples else -1)


def test_residuals_of_the_network_are_those_of_its_probabilities():
    table = token_table(MODEL, TRAIN)
    residuals, expected = network_residuals(MODEL, table)
    p = p_of(table)
    one_hot = torch.eye(VOCABULARY, dtype=torch.float64)[table.targets]
    torch.testing.assert_close(residuals.double(), (p - one_hot) @ head_of(MODEL)[0].double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(expected.double(), (p * one_hot).sum(1), rtol=1e-5, atol=1e-7)


def test_saved_and_read_again(tmp_path):
    made = token_closed_form(MODEL, TRAIN, SETTINGS)
    made.save(tmp_path / "form")
    again = TokenClosedForm.load(tmp_path / "form", MODEL, TRAIN)
    assert again.settings == SETTINGS and torch.equal(again.scores(QUERIES), made.scores(QUERIES))
    with pytest.raises(ValueError, match=r"was made for data .* but this data is"):
        TokenClosedForm.load(tmp_path / "form", MODEL, QUERIES)
    with pytest.raises(ValueError, match=r"was made for model .* but this model is"):
        TokenClosedForm.load(tmp_path / "form", language_model(seed=1), TRAIN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"terms": ("bigram", "pentagram")}, r"terms must be different ones of .* got \('bigram', 'pentagram'\)"),
        ({"terms": ("bigram", "bigram", "unigram")}, "terms must be different ones"),
        ({"terms": ()}, r"terms must be different ones of .* got \(\)"),
        ({"weights": (1.0,)}, r"weights must be 3 finite numbers >= 0, got \(1.0,\)"),
        ({"weights": (1.0, -1.0, 1.0)}, "weights must be 3 finite numbers >= 0"),
        ({"share": 1.0}, "share must lie strictly between 0 and 1, got 1.0"),
        ({"smoothing": 0.0}, "smoothing must be finite and > 0, got 0.0"),
        ({"mixing": float("inf")}, "mixing must be finite and > 0, got inf"),
        ({"residuals": "random"}, "unknown residuals 'random'"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenSettings(**changes)


def test_a_layer_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"layer must lie in 0..2, or be a share of the depth, got 9"):
        token_closed_form(MODEL, TRAIN, replace(SETTINGS, layer=9))


def test_an_output_embedding_of_equal_rows_has_nothing_to_relate():
    silent = language_model(seed=5)
    with torch.no_grad():
        silent.model.get_output_embeddings().weight.zero_()
    with pytest.raises(ValueError, match="rows of the output embedding, which are all equal: untrained"):
        token_closed_form(silent, TRAIN, TokenSettings(("related_bigram",), (1.0,))).scores(QUERIES)
