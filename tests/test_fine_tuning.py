"""Fine-tuning on chosen examples: against a plain loop, with equal steps, resumed."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language_toys import language_model, text_pairs

from tda_core import fine_tuning
from tda_core.fine_tuning import FineTuning, Selections, batch_rows, fine_tune, right_tokens, top_rows
from tda_core.language import LanguageModel
from tda_core.store import Store
from tda_core.text_pairs import TextPairs

MODEL, POOL, HELD_OUT = language_model(), text_pairs(8), text_pairs(3, seed=4)
SETTING = FineTuning(steps=3, batch_size=2, learning_rate=3e-3)


def test_fine_tuning_is_a_plain_loop_of_adamw():
    tuned = fine_tune(MODEL, POOL, SETTING, seed=5)
    plain = language_model().model
    optimiser = torch.optim.AdamW(plain.parameters(), SETTING.learning_rate, weight_decay=0.0)
    for step, rows in enumerate(batch_rows(8, SETTING, seed=5)):
        for group in optimiser.param_groups:
            group["lr"] = SETTING.rate(step)
        losses = []
        for prompt, response in POOL[rows].pairs:
            before, after = MODEL.tokens([prompt, response])
            log_p = plain(input_ids=torch.tensor([before + after])).logits[0].log_softmax(1)
            places = torch.arange(len(after)) + len(before) - 1
            losses.append(-log_p[places, torch.tensor(after)].mean())
        optimiser.zero_grad()
        torch.stack(losses).mean().backward()
        optimiser.step()
    for name, value in plain.named_parameters():
        torch.testing.assert_close(tuned.model.get_parameter(name), value, rtol=1e-3, atol=1e-4)
    assert not tuned.model.training and tuned.identity != MODEL.identity == language_model().identity
    assert fine_tune(MODEL, POOL, SETTING, seed=5).identity == tuned.identity


def test_dropout_is_off_and_half_precision_left():
    gpt2 = language_model("gpt2")  # which has dropout
    tuned = [fine_tune(gpt2, POOL, SETTING, seed=5) for _ in range(2)]
    assert tuned[0].identity == tuned[1].identity != gpt2.identity
    short = LanguageModel(language_model().model.bfloat16(), MODEL.tokenizer)
    small = FineTuning(steps=3, batch_size=2, learning_rate=1e-6)
    moved = fine_tune(short, POOL, small, seed=5)
    assert moved.dtype == torch.float32
    for name, value in short.model.named_parameters():
        if "layers" in name and value.ndim == 2:
            change = (moved.model.get_parameter(name) - value).detach().abs()
            assert 0 < float(change.max()) < 1e-5


@given(n=st.integers(1, 9), steps=st.integers(1, 6), batch=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_pass_takes_every_example_once(n, steps, batch, seed):
    rows = batch_rows(n, FineTuning(steps, batch), seed=seed)
    assert rows.shape == (steps, batch)
    flat = rows.flatten()
    for start in range(0, len(flat) - n + 1, n):
        assert sorted(flat[start : start + n].tolist()) == list(range(n))
    counts = torch.bincount(flat, minlength=n)
    assert int(counts.max() - counts.min()) <= 1


def test_rates_rise_then_fall_to_almost_nothing():
    rates = [FineTuning(steps=20, learning_rate=2.0).rate(step) for step in range(20)]
    assert rates[:2] == [1.0, 2.0] and rates[2] == 2.0
    assert all(a > b for a, b in pairwise(rates[2:])) and rates[-1] < 0.05


def test_selections_are_compared_seed_by_seed_and_resumed(tmp_path, monkeypatch):
    chosen = {"good": torch.tensor([0, 1]), "bad": torch.tensor([6, 7])}
    selections = Selections(POOL, chosen)
    found = selections.losses(MODEL, HELD_OUT, SETTING, [0, 1], store=Store(tmp_path))
    for name, rows in chosen.items():
        for seed in (0, 1):
            tuned = fine_tune(MODEL, POOL[rows], SETTING, seed=seed)
            assert float(found[name][seed]) == pytest.approx(float(tuned.losses(HELD_OUT, "mean").mean()), abs=1e-6)
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 4
    kept[0].unlink()
    calls = []
    plain = fine_tuning.fine_tune
    monkeypatch.setattr(fine_tuning, "fine_tune", lambda *args, **options: calls.append(1) or plain(*args, **options))
    again = selections.losses(MODEL, HELD_OUT, SETTING, [0, 1], store=Store(tmp_path))
    assert len(calls) == 1 and all(torch.equal(again[name], found[name]) for name in chosen)


def test_top_rows_break_ties_by_row():
    assert top_rows(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.2, got 3"):
        top_rows(torch.zeros(2), 3)
    with pytest.raises(ValueError, match="they hold NaN"):
        top_rows(torch.tensor([math.nan, 1.0]), 1)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "at least 1, got {}"),
        ({"a": torch.tensor([0]), "b": torch.tensor([1, 2])}, "of one number of examples"),
        ({"a": torch.tensor([1, 1])}, "choice 'a' has a row twice"),
        ({"a": torch.tensor([1, 8])}, "choice 'a' has rows outside of the pool of 8"),
    ],
)
def test_choices_that_cannot_be_compared_are_refused(chosen, message):
    with pytest.raises(ValueError, match=message):
        Selections(POOL, chosen)


def test_settings_that_cannot_train_are_refused():
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        FineTuning(steps=0)
    with pytest.raises(ValueError, match="learning_rate must be positive and finite, got nan"):
        FineTuning(learning_rate=math.nan)


def test_right_tokens_are_those_of_greedy_decoding():
    pairs = text_pairs(12, seed=3)
    lengths = [len(tokens) for tokens in MODEL.split(pairs)[1]]
    decoded = []
    for prompt, length in zip(MODEL.tokens(pairs.prompts), lengths, strict=True):
        tokens = torch.tensor([[*MODEL.start, *prompt]])
        grown = MODEL.model.generate(tokens, max_new_tokens=length, min_new_tokens=length, do_sample=False)
        decoded.append(grown[0, tokens.shape[1] :].tolist())
    texts = [MODEL.tokenizer.decode(tokens) for tokens in decoded]
    same = [i for i, tokens in enumerate(decoded) if texts[i].strip() and MODEL.tokens([texts[i]])[0] == tokens]
    assert len(same) > 2
    greedy = TextPairs(pairs[same].prompts, tuple(texts[i] for i in same))
    assert (right_tokens(MODEL, greedy) == 1).all()


def test_right_tokens_by_hand_and_in_any_batch():
    pairs = text_pairs(9, seed=6)
    expected = []
    for prompt, response in zip(*MODEL.split(pairs), strict=True):
        tokens = torch.tensor([[*MODEL.start, *prompt, *response]])
        with torch.no_grad():
            likeliest = MODEL.model(input_ids=tokens).logits[0].argmax(-1)[-len(response) - 1 : -1]
        expected.append(float((likeliest == torch.tensor(response)).float().mean()))
    torch.testing.assert_close(right_tokens(MODEL, pairs), torch.tensor(expected))


def test_outcomes_are_those_of_the_tuned_models():
    found = Selections(POOL, {"a": torch.tensor([0, 3])}).outcomes(MODEL, HELD_OUT, SETTING, [1, 2])
    for place, seed in enumerate((1, 2)):
        tuned = fine_tune(MODEL, POOL[[0, 3]], SETTING, seed=seed)
        torch.testing.assert_close(found["a"]["loss"][place], tuned.losses(HELD_OUT, "mean").mean())
        torch.testing.assert_close(found["a"]["accuracy"][place], right_tokens(tuned, HELD_OUT).mean())
