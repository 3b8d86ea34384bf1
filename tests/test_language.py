"""Causal language models: what is loaded, tokenised, padded and differentiated."""

import pytest
import torch
from language_toys import CONFIGS, VOCABULARY, language_model, text_pairs, tokenizer
from tokenizers import normalizers, processors
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    MambaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from tda_core.examples import IGNORED
from tda_core.gradients import gradient_dot
from tda_core.language import LanguageModel, ModelUnavailable
from tda_core.text_pairs import TextPairs
from tda_core.token_rows import batches_of, cut_left

KINDS = pytest.mark.parametrize("kind", sorted(CONFIGS))
PAIRS = text_pairs(9, seed=3)


def one_by_one(model: LanguageModel, pairs: TextPairs) -> list[torch.Tensor]:
    """Losses of each response's tokens, by a forward pass of each pair alone."""
    found = []
    for prompt, response in pairs.pairs:
        before, after = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response))
        logits = model.model(input_ids=torch.tensor([before + after])).logits[0]
        places = torch.arange(len(after)) + len(before) - 1
        found.append(-logits.log_softmax(1)[places, torch.tensor(after)].detach())
    return found


@KINDS
def test_losses_of_a_ragged_batch_are_those_of_each_pair_alone(kind):
    model = language_model(kind)
    plain = one_by_one(model, PAIRS)
    torch.testing.assert_close(model.losses(PAIRS), torch.stack([losses.sum() for losses in plain]))
    torch.testing.assert_close(model.losses(PAIRS, "mean"), torch.stack([losses.mean() for losses in plain]))
    examples = model.examples(PAIRS)
    of_tokens = model.token_losses(examples)
    for row, labels, losses in zip(of_tokens, examples.targets, plain, strict=True):
        torch.testing.assert_close(row[labels != IGNORED], losses)
        assert not row[labels == IGNORED].any()


@KINDS
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_by_layer_are_those_of_backward_passes(kind, reduction):
    model = language_model(kind)
    problem = model.problem(PAIRS, reduction=reduction)
    assert problem.flow_layers is not None  # of GPT-2 as well, whose layers hold their weights transposed
    found = problem.gradients(problem.train, chunk_size=4)
    own = [dict(model.model.named_parameters())[name.removeprefix("model.")] for name in problem.names]
    assert not any(name.endswith("lm_head.weight") or "wte" in name or "embed" in name for name in problem.names)
    for i in range(len(PAIRS)):
        examples = model.examples(PAIRS[i : i + 1])
        logits = model.model(input_ids=examples.inputs).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), examples.targets.flatten(), reduction=reduction, ignore_index=IGNORED
        )
        plain = torch.cat([part.flatten() for part in torch.autograd.grad(loss, own)])
        torch.testing.assert_close(found[i], plain, rtol=1e-3, atol=1e-5)


def test_parameters_are_chosen_by_pattern():
    model = language_model("gpt2")
    names = model.problem(PAIRS, ["*.h.1.mlp.*"]).names
    assert names == tuple(
        f"model.transformer.h.1.mlp.{layer}" for layer in ("c_fc.weight", "c_fc.bias", "c_proj.weight", "c_proj.bias")
    )
    assert all(value.requires_grad for value in model.model.parameters())
    with pytest.raises(ValueError, match=r"no parameter of a linear layer is called \('\*\.h\.7\*',\); there are"):
        model.problem(PAIRS, ["*.h.7*"])


def test_a_language_model_is_a_problem_like_any_other():
    model = language_model()
    problem = model.problem(PAIRS, ["*.0.mlp.*weight"])
    queries = model.examples(text_pairs(4, seed=8, prompt=(9, 12)))  # longer than any training example
    scores = gradient_dot(problem).scores(queries)
    expected = problem.gradients(queries) @ problem.gradients(problem.train).T / len(PAIRS)
    torch.testing.assert_close(scores, expected)
    direction = torch.randn(1, problem.n_parameters, generator=torch.Generator().manual_seed(0))
    product = problem.curvature_product(direction, "ggn")
    assert float((product * direction).sum()) > 0  # positive semi-definite
    with pytest.raises(ValueError, match="a margin needs one label an example"):
        problem.margins(queries)
    with pytest.raises(ValueError, match="gives an output at each token"):
        problem.head()


def test_outputs_of_a_few_sequences_are_held_at_a_time(monkeypatch):
    model = language_model()
    tuned = model.problem(PAIRS, ["*.1.*weight"])
    losses, gradients = tuned.losses(tuned.train), tuned.gradients(tuned.train)
    monkeypatch.setattr("tda_core.problem.OUTPUT_FLOATS", 2 * VOCABULARY * tuned.train.inputs.shape[1])
    sizes = []
    tuned.placed.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(tuned.losses(tuned.train), losses)
    torch.testing.assert_close(tuned.gradients(tuned.train), gradients)
    assert sizes == [2, 2, 2, 2, 1] * 2


def test_what_is_saved_is_loaded(tmp_path):
    model = language_model("gpt2")
    model.save(tmp_path / "model")
    loaded = LanguageModel.load(tmp_path / "model", device="cpu")
    assert loaded.identity == model.identity
    torch.testing.assert_close(loaded.losses(PAIRS), model.losses(PAIRS))
    half = LanguageModel.load(tmp_path / "model", device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.losses(PAIRS), model.losses(PAIRS), rtol=0.1, atol=0.1)


def test_a_hub_name_without_network_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match=r"Offline: run `hf download nobody/no-such-model`"):
        LanguageModel.load("nobody/no-such-model")


def test_models_that_are_not_causal_are_refused(tmp_path):
    size = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    bert = BertLMHeadModel(BertConfig(num_hidden_layers=1, **size))
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal: a later token changes"):
        LanguageModel(bert, tokenizer())
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, d_model=16, d_ff=16, num_layers=1, num_heads=2))
    t5.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no causal language model"):
        LanguageModel.load(tmp_path)


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    language_model().model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer that can be read"):
        LanguageModel.load(tmp_path)


@pytest.mark.parametrize(("form", "start"), [("<s> $A", (1,)), ("$A <s>", ()), ("<s> $A <s>", (1,))])
@pytest.mark.parametrize("knows_every_word", [True, False])
def test_what_a_tokenizer_puts_before_texts_is_their_start_and_what_it_puts_behind_is_not(
    form, start, knows_every_word
):
    ours = tokenizer()
    if not knows_every_word:
        ours.backend_tokenizer.model.unk_token = "<none>"
    ours.backend_tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<s>", 1)])
    model = LanguageModel(language_model().model, ours)
    assert model.start == start
    assert model.examples(TextPairs(["w3"], ["w4 w5"])).inputs.tolist() == [[*start, 3, 4]]
    assert model.identity != language_model().identity


def test_results_of_another_configuration_or_tokenizer_have_another_key():
    plain = language_model()
    config = CONFIGS["llama"](VOCABULARY, 64)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 77.0}
    turned = AutoModelForCausalLM.from_config(config)
    turned.load_state_dict(plain.model.state_dict())
    lower = tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    found = [
        LanguageModel(plain.model, tokenizer()),
        LanguageModel(turned, tokenizer()),
        LanguageModel(plain.model, lower),
    ]
    assert found[0].identity == plain.identity and len({model.identity for model in found}) == 3
    assert not torch.allclose(found[0].losses(PAIRS), found[1].losses(PAIRS))


def test_a_head_in_another_type_than_the_hidden_states_is_not_applied_alone():
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    assert not LanguageModel(mamba.to(torch.bfloat16), tokenizer()).has_plain_head


def test_a_vocabulary_that_does_not_fit_and_broken_weights_are_refused():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"](VOCABULARY, 64))
    with pytest.raises(ValueError, match=f"the tokenizer has tokens up to {VOCABULARY}, but the model embeds only"):
        LanguageModel(model, tokenizer(VOCABULARY + 1))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits are NaN or infinite"):
        LanguageModel(model, tokenizer())


def test_contexts_lose_their_beginning_and_responses_must_fit():
    model = language_model(window=16)
    long = TextPairs(["w3 " * 40 + "w5 w6"], [" w7 w8"])
    with pytest.warns(UserWarning, match="1 of 2 pairs are longer than the model's window of 16 tokens"):
        model.losses(long + PAIRS[:1])
    with pytest.warns(UserWarning, match="1 of 1 pairs are longer"):
        examples = model.examples(long)
    assert examples.inputs.shape == (1, 15) and examples.inputs[0, -3:].tolist() == [5, 6, 7]
    assert cut_left([], [1, 2, 3, 4], [5, 6], 5, "it") == ([2, 3, 4], 1)
    assert cut_left([9], [1, 2, 3, 4], [5, 6], 5, "it") == ([9, 3, 4], 2)  # what every text starts with stays
    assert cut_left([9], [1, 2, 3, 4], [5, 6, 7, 8], 5, "it") == ([9], 4)
    assert cut_left([9], [1, 2], [5, 6], None, "it") == ([9, 1, 2], 0)
    with pytest.raises(ValueError, match="it has 5 tokens, which do not fit the model's window of 5"):
        cut_left([9], [1], [4] * 5, 5, "it")
    with pytest.raises(ValueError, match=r"responses\[0\] has 16 tokens, which do not fit the model's window of 16"):
        model.examples(TextPairs(["w3"], ["w4 " * 16]))


def test_an_empty_prompt_follows_the_token_that_texts_begin_with():
    model = language_model()
    assert model.examples(TextPairs([""], ["w4 w5"])).inputs.tolist() == [[1, 4]]
    bare = LanguageModel(model.model, tokenizer(bos=False))
    with pytest.raises(ValueError, match="neither a bos nor an eos token"):
        bare.examples(TextPairs([""], ["w4"]))


def test_unknown_reductions_are_refused():
    with pytest.raises(ValueError, match=r"unknown reduction 'max', expected one of \['mean', 'sum'\]"):
        language_model().losses(PAIRS, "max")


def test_batches_keep_their_budget_and_lose_no_row():
    lengths = [5, 1, 9, 3, 3, 8, 30]
    batches = batches_of(lengths, 12)
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert all(max(lengths[i] for i in batch) * len(batch) <= 12 or len(batch) == 1 for batch in batches)
    assert len(batches) < 7
