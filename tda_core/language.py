"""Causal language models: any `AutoModelForCausalLM` and its tokenizer, checked, and as a `Problem`.

Tokens are padded here and never by the tokenizer, so that one without a pad token does as well. A text is tokenised in
parts (demonstration, prompt, response): what a part becomes does not depend on what stands beside it.
"""

import copy
import fnmatch
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tda_core.examples import IGNORED, Examples, hash_of
from tda_core.layers import linear_layers, own_parameters
from tda_core.models import mean_sequence_cross_entropy, sequence_cross_entropy
from tda_core.problem import Problem
from tda_core.text_pairs import TextPairs
from tda_core.token_rows import batches_of, cut_left, lengths_of

REDUCTIONS = {"sum": sequence_cross_entropy, "mean": mean_sequence_cross_entropy}
# Tokens of one forward pass over texts of all lengths: larger batches are no faster on a CPU, and take more memory.
BATCH_TOKENS = 4096
# By how much, relatively, a later token may move an earlier logit, by type.
CAUSAL = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
# What a configuration says of where a model comes from, not of what it computes.
PROVENANCE = ("_name_or_path", "architectures", "dtype", "transformers_version")


class ModelUnavailable(RuntimeError):
    """A model is neither in a folder of this name nor in the local cache, and the hub is out of reach."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model in evaluation mode with the tokenizer that goes with it.

    window: most tokens of one sequence, None where the model sets no limit. start: tokens that stand before every
    text, what the tokenizer itself would put there. Raises ValueError for a model that is not causal (tested: a later
    token must not change what is predicted at an earlier one), a tokenizer with more tokens than the model has
    embeddings for, and logits that are not finite.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        self.model.eval()
        known, named = self.model.get_input_embeddings().num_embeddings, self.tokenizer.get_vocab().values()
        if max(named) >= known:
            raise ValueError(f"the tokenizer has tokens up to {max(named)}, but the model embeds only {known}")
        tokens = torch.arange(8, device=self.device).remainder(known).view(1, 8)
        changed = torch.cat([tokens[:, :4], tokens[:, :4]], 1)
        with torch.no_grad():
            before, after = (self.model(input_ids=t, use_cache=False).logits[:, :4].float() for t in (tokens, changed))
        if not torch.isfinite(before).all():
            raise ValueError("the model's logits are NaN or infinite: are its weights those of a trained model?")
        # no difference at all in dense models; mixtures of experts group other tokens together, which rounds anew
        if float((before - after).abs().max()) > CAUSAL[self.dtype] * float(before.abs().max()):
            kind = type(self.model).__name__
            raise ValueError(f"{kind} is not causal: a later token changes what it predicts at an earlier one")

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> "LanguageModel":
        """The model and tokenizer of a folder that `save_pretrained` wrote, or of that name on the hub.

        device: "cpu", "cuda", ..., or "auto" to spread a large model over what there is (`device_map`); default the
        GPU, if there is one. dtype: default bfloat16 on a GPU and float32 elsewhere. Raises ModelUnavailable, which
        says what to do, where the name is unknown here and the hub out of reach, and ValueError for a model that is
        no causal language model or comes without a tokenizer.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float32 if device == "cpu" or not torch.cuda.is_available() else torch.bfloat16)
        part = "no tokenizer that can be read"
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
            part = "no causal language model"
            model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, device_map=device)
        except OSError as error:
            raise ModelUnavailable(
                f"{str(name)!r} is no folder with a model and a tokenizer, nor in the local cache, and could not be "
                f"had from the hub ({str(error).splitlines()[0]}). Offline: run `hf download {name}` on a connected "
                "machine and pass the folder's path here, or copy the cache and point HF_HOME to it"
            ) from error
        except ValueError as error:
            raise ValueError(f"{str(name)!r} holds {part}: {error}") from error
        return cls(model, tokenizer)

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer so that `load` reads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.model.config.get_text_config().hidden_size

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @cached_property
    def n_layer_parameters(self) -> int:
        """Parameters but for the embeddings of tokens at either end."""
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        held = {id(value) for end in ends if end is not None for value in end.parameters()}
        return sum(value.numel() for value in self.model.parameters() if id(value) not in held)

    @cached_property
    def window(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def start(self) -> tuple[int, ...]:
        ids = sorted(set(self.tokenizer.get_vocab().values()) - set(self.tokenizer.all_special_ids))
        text = next(text for text in (self.tokenizer.decode([i]) for i in ids) if text.strip())  # which it surely knows
        plain, whole = (self.tokenizer(text, add_special_tokens=add)["input_ids"] for add in (False, True))
        places = range(len(whole) - len(plain) + 1)
        first = next((i for i in places if whole[i : i + len(plain)] == plain), 0)
        return tuple(whole[:first])  # what it puts behind a text is left out

    @cached_property
    def has_plain_head(self) -> bool:
        """Whether logits are the output embedding's product with the last hidden states (tested), and nothing more."""
        head = self.model.get_output_embeddings()
        tokens = torch.arange(4, device=self.device).view(1, 4)
        if head is None:
            return False
        with torch.no_grad():
            logits = self.model(input_ids=tokens, use_cache=False).logits
            hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            fits = hidden.shape[-1] == head.weight.shape[-1] and hidden.dtype == head.weight.dtype
            return fits and torch.equal(head(hidden), logits)

    @cached_property
    def identity(self) -> str:
        """Hash of weights, configuration and tokenizer (vocabulary, rules and start): what results are keyed by."""
        config = {k: v for k, v in self.model.config.to_dict().items() if k not in PROVENANCE}
        rules = getattr(self.tokenizer, "backend_tokenizer", None)  # merges and the like, where the library shows them
        rules = {} if rules is None else json.loads(rules.to_str()) | {"truncation": None, "padding": None}
        parts = [config, sorted(self.tokenizer.get_vocab().items()), rules, self.start]
        text = json.dumps(parts, sort_keys=True, default=str)
        as_bytes = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return hash_of([*self.model.state_dict().values(), as_bytes])[:16]

    def made_for(self, train: Examples) -> dict[str, str]:
        """What a file of a method is checked by: this model and its training documents."""
        return {"model": self.identity, "data": train.hash}

    def check_made_for(self, path: object, saved: dict[str, str], train: Examples) -> None:
        """Raise ValueError where a file was made for another model or other documents, naming both hashes."""
        for name, own in self.made_for(train).items():
            if saved.get(name) != own:
                raise ValueError(f"{path} was made for {name} {saved.get(name)}, but this {name} is {own}")

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, none added."""
        with warnings.catch_warnings():  # texts longer than the window are dealt with where they are used
            warnings.simplefilter("ignore")
            found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return found if len(texts) else []

    def split(self, pairs: TextPairs) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens of the prompts and of the responses. ValueError for a response of which no token is left."""
        prompts, responses = self.tokens(pairs.prompts), self.tokens(pairs.responses)
        empty = [i for i, tokens in enumerate(responses) if not tokens]
        if empty:
            raise ValueError(f"responses[{empty[0]}] = {pairs.responses[empty[0]]!r} has no token in this vocabulary")
        return prompts, responses

    def examples(self, pairs: TextPairs) -> Examples:
        """Pairs as sequences: inputs (n, T) tokens padded on the right, targets (n, T) the response's tokens alone.

        On the model's device. Prompts that are too long lose their beginning, with one warning that counts them.
        Raises ValueError for a response longer than the window.
        """
        rows, n_cut = [], 0
        for i, (prompt, response) in enumerate(zip(*self.split(pairs), strict=True)):
            before, cut = cut_left(self.start, prompt, response, self.window, f"responses[{i}]")
            before, n_cut = before or [self.empty_context], n_cut + (cut > 0)
            row = torch.tensor([*before, *response])
            labels = row.clone()
            labels[: len(before)] = IGNORED
            rows.append((row[:-1], labels[1:]))
        pad = nn.utils.rnn.pad_sequence
        if n_cut:
            warnings.warn(
                f"{n_cut} of {len(pairs)} pairs are longer than the model's window of {self.window} tokens and have "
                "lost their beginning",
                stacklevel=2,
            )
        inputs = pad([tokens for tokens, _ in rows], batch_first=True)
        targets = pad([labels for _, labels in rows], batch_first=True, padding_value=IGNORED)
        return Examples(inputs.to(self.device), targets.to(self.device))

    @property
    def empty_context(self) -> int:
        """The token that a response follows where there is no prompt. ValueError where the tokenizer has none."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return token
        raise ValueError("a prompt is empty, and this tokenizer has neither a bos nor an eos token to begin with")

    def token_losses(self, examples: Examples) -> Tensor:
        """Loss in nats of each labelled token, 0 elsewhere: (n, T) on the CPU. Batched by length."""
        found = torch.zeros(examples.targets.shape)
        labelled = examples.targets != IGNORED
        lengths = lengths_of(examples)
        for rows in batches_of(lengths.tolist(), BATCH_TOKENS):
            part = slice(0, int(lengths[rows].max()))
            inputs, targets, own = (of_all[rows, part] for of_all in (examples.inputs, examples.targets, labelled))
            with torch.no_grad():
                logits = self.model(input_ids=inputs.to(self.device), use_cache=False).logits[own.to(self.device)]
            losses = nn.functional.cross_entropy(logits.float(), targets[own].to(self.device), reduction="none")
            found[rows, part] = torch.zeros(own.shape).masked_scatter_(own.cpu(), losses.cpu())
        if not torch.isfinite(found).all():
            bad = int((~torch.isfinite(found)).any(1).nonzero()[0])
            raise ValueError(f"the loss of example {bad} is NaN or infinite")
        return found

    def losses(self, pairs: TextPairs, reduction: str = "sum") -> Tensor:
        """Loss of each response given its prompt, in nats, summed over its tokens or a token's mean: (n,)."""
        _reduction(reduction)
        examples = self.examples(pairs)
        total = self.token_losses(examples).sum(1)
        return total / (examples.targets != IGNORED).sum(1).cpu() if reduction == "mean" else total

    def problem(
        self, train: TextPairs, parameters: Sequence[str] = ("*weight",), *, reduction: str = "mean"
    ) -> Problem:
        """The model as a `Problem` whose training set are these pairs.

        parameters: names, or patterns such as "*.mlp.*", of what is attributed to; of the weights in linear layers
        (GPT-2's transposed ones included) that are not the output embedding. Raises ValueError where none is named.
        """
        loss = REDUCTIONS[_reduction(reduction)]
        names = self.attributable(parameters)
        module = copy.deepcopy(Logits(self.model))  # its own, as other threads may use the model
        module.model.set_attn_implementation("eager")  # forward-mode derivatives do not go through fused kernels
        own = dict(module.model.named_parameters())
        for name, value in own.items():
            value.requires_grad_(name in names)
        theta = torch.cat([value.detach().flatten() for name, value in own.items() if name in names])
        return Problem(module, theta, loss, self.examples(train))

    def attributable(self, parameters: Sequence[str] = ("*weight",)) -> set[str]:
        """Parameters of attention and MLP layers that fit the patterns. ValueError where none does."""
        output = self.model.get_output_embeddings()
        layers = {name: layer for name, layer in linear_layers(self.model).items() if layer is not output}
        known = [f"{name}.{kind}" for name, layer in layers.items() for kind in own_parameters(layer)]
        found = {name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in parameters)}
        if not found:
            some = ", ".join(known[:8])
            raise ValueError(f"no parameter of a linear layer is called {tuple(parameters)}; there are {some}, ...")
        return found


class Logits(nn.Module):
    """A causal language model as a function of tokens alone: (n, T) int64 -> (n, T, V).

    Rows padded on the right need no mask: what follows a position does not reach it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def _reduction(name: str) -> str:
    if name not in REDUCTIONS:
        raise ValueError(f"unknown reduction {name!r}, expected one of {sorted(REDUCTIONS)}")
    return name
