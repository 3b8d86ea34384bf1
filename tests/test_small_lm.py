"""The small language model: its tokens, what a step does, that it learns, and that checkpoints are whole and reused."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tda_core import small_lm as module
from tda_core.lm_recipes import SPECIAL, LMRecipe
from tda_core.lm_tokenizers import word_tokenizer
from tda_core.small_lm import INDEX, NOTES, load_lms, small_lms
from tda_core.task_corpus import SEPARATOR, CorpusSpec, TaskCorpus

CORPUS = TaskCorpus()
TINY = LMRecipe(width=16, layers=1, heads=2, steps=40, batch_size=16, length=24, learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def trained(folder):
    return small_lms(CORPUS, TINY, [0, 1], folder=folder, progress=False)


def test_a_token_is_a_word_and_a_line_break():
    tokenizer = word_tokenizer(CORPUS.vocabulary, length=50)
    example = CORPUS.pool(1, seed=0).pairs.pairs[0]
    text = SEPARATOR.join(["".join(example)] * 2)
    tokens = tokenizer(text)["input_ids"]
    words = text.replace(SEPARATOR, f" {SEPARATOR} ").split(" ")
    assert tokenizer.convert_ids_to_tokens(tokens) == [SPECIAL["bos_token"], *words]
    assert tokenizer("never-seen red", add_special_tokens=False)["input_ids"] == [
        tokenizer.unk_token_id,
        tokenizer.convert_tokens_to_ids("red"),
    ]
    assert len(tokenizer) == len(CORPUS.vocabulary) + len(SPECIAL)


def test_prompt_and_response_are_cut_where_they_meet():
    tokenizer = word_tokenizer(CORPUS.vocabulary, length=50)
    for prompt, response in CORPUS.pool(50, seed=0).pairs.pairs:
        apart = tokenizer(prompt)["input_ids"] + tokenizer(response, add_special_tokens=False)["input_ids"]
        assert tokenizer(prompt + response)["input_ids"] == apart
        assert tokenizer.unk_token_id not in apart


def test_every_row_is_full_and_begins_a_document():
    tokenizer = word_tokenizer(CORPUS.vocabulary, length=50)
    batches = module._batches(CORPUS, tokenizer, 48, 7, seed=0)
    for _, rows in zip(range(300), batches, strict=False):  # beyond one block
        assert rows.shape == (7, 48)
        assert bool((rows[:, 0] == tokenizer.bos_token_id).all())
        assert not bool(torch.isin(rows[:, 1:], torch.tensor(tokenizer.all_special_ids)).any())
    first, other = (next(module._batches(CORPUS, tokenizer, 24, 4, seed=seed)) for seed in (0, 1))
    assert torch.equal(first, next(module._batches(CORPUS, tokenizer, 24, 4, seed=0))) and not torch.equal(first, other)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_is_that_of_transformers(architecture):
    model = LMRecipe(architecture=architecture, width=16, heads=2, layers=1).untrained(50, seed=0)
    tokens = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(module._loss(model, tokens), model(input_ids=tokens, labels=tokens).loss, atol=1e-6)
    same, other = (
        LMRecipe(architecture=architecture, width=16, heads=2, layers=1).untrained(50, seed=s) for s in (0, 1)
    )
    weights = [next(m.parameters()) for m in (model, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_seed_leaves_torchs_random_state_as_it_was():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    TINY.untrained(50, seed=0)
    assert torch.equal(torch.rand(2), expected)


def test_the_rate_rises_then_falls():
    recipe = LMRecipe(steps=100, learning_rate=1.0)
    rates = [recipe.rate(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[5] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.05, abs=1e-3) and LMRecipe(steps=1).rate(0) == 3e-3


def test_it_learns_and_notes_how(trained):
    for one in trained:
        assert one.steps[-1] == TINY.steps and len(one.steps) == len(one.train_loss) == len(one.heldout_loss)
        start = math.log(len(one.tokenizer))  # of a uniform guess
        assert one.heldout_loss[-1] < 0.75 * start and one.seconds > 0
        # the noted loss is the one of the model that was saved
        rows = next(module._batches(CORPUS, one.tokenizer, TINY.length, 256, seed="held out"))
        with torch.no_grad():
            assert float(module._loss(one.model, rows)) == pytest.approx(one.heldout_loss[-1], rel=1e-5)


def test_a_checkpoint_loads_by_the_usual_names(trained):
    one = trained[0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(one.folder), AutoTokenizer.from_pretrained(one.folder)
    tokens = tokenizer("two plus three ?", return_tensors="pt")
    assert tokens["input_ids"][0, 0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert model.config.vocab_size == len(tokenizer) and tokenizer.model_max_length == TINY.length
    logits = [m(input_ids=tokens["input_ids"]).logits for m in (model, one.model)]
    assert torch.equal(*logits)


def test_what_was_trained_is_read_again_and_equal_seeds_are_equal(trained, folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*/*")}
    again = small_lms(CORPUS, TINY, [1], folder=folder, progress=False)[0]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*/*")}
    assert again.folder == trained[1].folder and again.heldout_loss == trained[1].heldout_loss
    anew = small_lms(CORPUS, TINY, [1], folder=tmp_path, progress=False)[0]  # alone, not beside another seed
    for a, b, c in zip(*(m.model.parameters() for m in (anew, trained[1], trained[0])), strict=True):
        assert torch.equal(a, b) and (a.ndim < 2 or not torch.equal(a, c))


def test_other_parameters_and_half_a_checkpoint_are_trained_anew(tmp_path):
    short = LMRecipe(width=8, layers=1, heads=2, steps=2, batch_size=2, length=10)
    one = small_lms(CORPUS, short, [0], folder=tmp_path, progress=False)[0]
    other = small_lms(TaskCorpus(seed=1), short, [0], folder=tmp_path, progress=False)[0]
    assert one.folder != other.folder
    (one.folder / NOTES).unlink()
    assert small_lms(CORPUS, short, [0], folder=tmp_path, progress=False)[0].folder == one.folder
    notes = json.loads((one.folder / NOTES).read_text())
    assert notes["seed"] == 0 and notes["steps"][-1] == 2
    assert {path.name for path in tmp_path.iterdir()} == {one.folder.name, other.folder.name, INDEX}


def test_a_folder_gives_back_its_corpus_and_models(tmp_path):
    short = LMRecipe(width=8, layers=1, heads=2, steps=2, batch_size=2, length=10)
    corpus = TaskCorpus(CorpusSpec(keep_base=0.5, own_formats=False), seed=3)
    made = small_lms(corpus, short, [4, 2], folder=tmp_path, progress=False)
    again, models = load_lms(tmp_path)
    assert (again.spec, again.seed, again.questions) == (corpus.spec, corpus.seed, corpus.questions)
    assert [one.folder for one in models] == [one.folder for one in made] and len(models) == 2
    with pytest.raises(FileNotFoundError, match="no models were trained in this folder"):
        load_lms(tmp_path / "none")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LMRecipe(architecture="bert"), "unknown architecture 'bert', expected one of llama, gpt2"),
        (lambda: LMRecipe(steps=0), "steps must be at least 1, got 0"),
        (lambda: LMRecipe(width=30, heads=4), "width must be an even multiple of heads = 4, got 30"),
        (lambda: LMRecipe(learning_rate=float("nan")), "learning_rate must be finite and > 0, got nan"),
        (lambda: word_tokenizer(["a", "b", "a"], length=9), "got 'a'"),
        (lambda: word_tokenizer(["a", "b c"], length=9), "got 'b c'"),
        (lambda: word_tokenizer(["a", "<pad>"], length=9), "got '<pad>'"),
        (lambda: small_lms(CORPUS, TINY, [], folder="unused"), r"seeds must be distinct and at least one, got \[\]"),
        (lambda: small_lms(CORPUS, TINY, [1, 1], folder="unused"), r"got \[1, 1\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
