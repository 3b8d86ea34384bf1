"""Small language models with a word for a token, made anew in milliseconds."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from tda_core.language import LanguageModel
from tda_core.text_pairs import TextPairs

VOCABULARY, WINDOW = 40, 64
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 1}
NEAR = {"num_key_value_heads": 2, "head_dim": 4, "sliding_window": 20}
# By kind: a configuration for a vocabulary of n tokens and a window.
CONFIGS = {
    "llama": lambda n, window: LlamaConfig(
        vocab_size=n, max_position_embeddings=window, num_key_value_heads=2, **SIZE, **SPECIAL
    ),
    "gpt2": lambda n, window: GPT2Config(vocab_size=n, n_embd=16, n_layer=2, n_head=4, n_positions=window, **SPECIAL),
    "neox": lambda n, window: GPTNeoXConfig(vocab_size=n, max_position_embeddings=window, **SIZE, **SPECIAL),
}
# Models of which some layers look back over the last 20 columns only.
NEAR_SIGHTED = {
    "mistral": lambda n, window: MistralConfig(vocab_size=n, max_position_embeddings=window, **SIZE, **NEAR),
    "gemma2": lambda n, window: Gemma2Config(vocab_size=n, max_position_embeddings=window, **SIZE, **NEAR),
    "gpt_neo": lambda n, window: GPTNeoConfig(
        vocab_size=n,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=20,
        max_position_embeddings=window,
    ),
}


def tokenizer(n: int = VOCABULARY, *, bos: bool = True, words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Words, or w2..w(n-1), after <unk>, which stands for every other word, and <s>. There is no pad token."""
    known = ["<unk>", "<s>", *(words or (f"w{i}" for i in range(2, n)))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)


def language_model(
    kind: str = "llama", *, seed: int = 0, window: int = WINDOW, words: Sequence[str] = ()
) -> LanguageModel:
    """An untrained model whose logits are far from flat."""
    torch.manual_seed(seed)
    toy = tokenizer(words=words)
    model = AutoModelForCausalLM.from_config((CONFIGS | NEAR_SIGHTED)[kind](len(toy), window))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                value.normal_(0, 0.3)
    return LanguageModel(model, toy)


def words(n: int, generator: torch.Generator, low: int = 2) -> str:
    return " ".join(f"w{i}" for i in torch.randint(low, VOCABULARY, (n,), generator=generator).tolist())


def text_pairs(
    n: int, *, seed: int = 0, prompt: tuple[int, int] = (2, 7), response: tuple[int, int] = (1, 4)
) -> TextPairs:
    """Pairs of random words, of random lengths (both ends included)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> str:
        return words(int(torch.randint(low, high + 1, (1,), generator=generator)), generator)

    prompts, responses = [], []
    for _ in range(n):
        prompts.append(draw(*prompt))
        responses.append(" " + draw(*response))
    return TextPairs(prompts, responses)
