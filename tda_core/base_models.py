"""A small language model that applications start from: trained on documents once, and kept in a folder."""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from tda_core.language import LanguageModel
from tda_core.lm_bench import MODEL_SEED
from tda_core.lm_recipes import LMRecipe
from tda_core.pretraining import LMTraining, pretrain_many
from tda_core.text_pairs import TextPairs


def base_model(
    recipe: LMRecipe,
    tokenizer: PreTrainedTokenizerFast,
    documents: TextPairs,
    folder: Path | str,
    *,
    initial: LanguageModel | None = None,
) -> LanguageModel:
    """The model of a recipe on all tokens of the documents, from a folder if it is there, else trained and kept there.

    initial: a model to go on from, default from scratch. The folder's name must stand for all of these: it is trusted
    as it is, and appears whole or not at all. Raises what `pretrain_many` raises.
    """
    folder = Path(folder)
    if not folder.is_dir():
        blank = LanguageModel(recipe.untrained(len(tokenizer), seed=0), tokenizer)
        examples = blank.examples(documents)
        training = LMTraining(recipe, len(tokenizer), None if initial is None else initial.model)
        trained = pretrain_many(training, examples, torch.ones(1, len(examples), dtype=torch.bool), [MODEL_SEED])
        model = trained.copy_to(0, training.start(MODEL_SEED))
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        LanguageModel(model, tokenizer).save(partial)
        partial.replace(folder)
    return LanguageModel.load(folder, device="cpu")
