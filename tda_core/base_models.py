"""A small language model that applications start from: trained on documents once, and kept in a folder."""

import json
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from tda_core.language import LanguageModel
from tda_core.lm_bench import MODEL_SEED
from tda_core.lm_recipes import LMRecipe
from tda_core.pretraining import LMTraining, pretrain_many
from tda_core.text_pairs import TextPairs

MADE_OF = "made_of.json"


def base_model(
    recipe: LMRecipe,
    tokenizer: PreTrainedTokenizerFast,
    documents: TextPairs,
    folder: Path | str,
    *,
    initial: LanguageModel | None = None,
) -> LanguageModel:
    """The model of a recipe on all tokens of the documents, from a folder if it is there, else trained and kept there.

    initial: a model to go on from, default from scratch. A folder that was made of other things is replaced; it appears
    whole or not at all. Raises what `pretrain_many` raises.
    """
    folder = Path(folder)
    blank = LanguageModel(recipe.untrained(len(tokenizer), seed=0), tokenizer)
    examples = blank.examples(documents)
    training = LMTraining(recipe, len(tokenizer), None if initial is None else initial.model)
    made_of = json.dumps({"training": training.identity, "data": examples.hash})
    marker = folder / MADE_OF
    if not marker.is_file() or marker.read_text(encoding="utf-8") != made_of:
        trained = pretrain_many(training, examples, torch.ones(1, len(examples), dtype=torch.bool), [MODEL_SEED])
        model = trained.copy_to(0, training.start(MODEL_SEED))
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        LanguageModel(model, tokenizer).save(partial)
        (partial / MADE_OF).write_text(made_of, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    return LanguageModel.load(folder, device="cpu")
