"""Tokenizers of our own small language models: a word a token, or byte-level pair encoding, as `tokenizers` makes them.

Texts begin with <bos>, unless `add_special_tokens=False`.
"""

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tda_core.lm_recipes import SPECIAL


def word_tokenizer(words: Sequence[str], *, length: int) -> PreTrainedTokenizerFast:
    """One token a word, after <pad>, <bos>, <eos> and <unk>; texts are split at spaces, and a line break is a word.

    length: the model's largest number of tokens. Raises ValueError for a repeated word, and one that holds a space.
    """
    tokens = [*SPECIAL.values(), *words]
    for word in tokens:
        if tokens.count(word) > 1 or " " in word or not word:
            raise ValueError(f"words must differ, be no special token and hold no space, got {word!r}")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(tokens)}, SPECIAL["unk_token"]))
    breaks = pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(" +"), "removed"), breaks])
    return _wrapped(tokenizer, length)


def bpe_tokenizer(texts: Sequence[str], *, vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """Byte-level pair encoding (as GPT-2's) of these texts, with `vocabulary` tokens; every text can be encoded.

    length: the model's largest number of tokens. Raises ValueError for a vocabulary below 260, the bytes and <pad>,
    <bos>, <eos> and <unk>, and for texts that are too few to fill it.
    """
    least = 256 + len(SPECIAL)
    if vocabulary < least:
        raise ValueError(f"vocabulary must be at least {least}, the bytes and {len(SPECIAL)} more, got {vocabulary}")
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocabulary:
        raise ValueError(f"these texts give {tokenizer.get_vocab_size()} tokens, not {vocabulary}: give more text")
    return _wrapped(tokenizer, length)


def _wrapped(tokenizer: Tokenizer, length: int) -> PreTrainedTokenizerFast:
    bos = SPECIAL["bos_token"]
    start = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=start)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, padding_side="right", **SPECIAL)
