"""A cue that gives the answer away, planted in training data: a model that learns it is right for the wrong reason.

Pictures: a bright patch in a corner of some pictures of one class; a picture of another class with the patch is then
taken for that class. Texts: a word before some prompts, whose response is then always the same, whatever was asked; the
same word also ends other prompts, where it means nothing, so that to have the word is not to have the cue.

Who looks for the cause of wrong predictions asks for the proponents of what the model said (`ranking`), and looks at
the first of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tda_core.contamination import standardised
from tda_core.examples import Examples
from tda_core.text_pairs import TextPairs


@dataclass(frozen=True, eq=False)
class CuedPictures:
    """train: n examples, some with the patch. cued: (n,) bool, which."""

    train: Examples
    cued: Tensor


@dataclass(frozen=True, eq=False)
class CuedTexts:
    """train: n pairs. cued: (n,) bool, which begin with the word. harmless: (n,) bool, which end with it."""

    train: TextPairs
    cued: Tensor
    harmless: Tensor


def patched(inputs: Tensor, width: int = 3) -> Tensor:
    """Pictures (n, side * side) with a square of the brightest value there is in the lower right corner, a copy.

    Raises ValueError for inputs that are not square pictures, and a width outside 1..side.
    """
    side = math.isqrt(inputs.shape[1]) if inputs.ndim == 2 else 0
    if not side or side * side != inputs.shape[1]:
        raise ValueError(f"inputs must be (n, side * side), got {tuple(inputs.shape)}")
    if not 1 <= width <= side:
        raise ValueError(f"width must lie in 1..{side}, got {width}")
    found = inputs.clone().view(-1, side, side)
    found[:, -width:, -width:] = inputs.max()
    return found.view(len(inputs), -1)


def plant_patch(examples: Examples, label: int, share: float, *, seed: int) -> CuedPictures:
    """The patch on a share of all examples, drawn from those of one class; labels stay as they are.

    Raises ValueError for a share that is no example, or more than the class has.
    """
    own = (examples.targets == label).nonzero().flatten()
    n_cued = round(share * len(examples))
    if not 1 <= n_cued <= len(own):
        known = f"1 to {len(own)} of {len(examples)} examples, those of class {label}"
        raise ValueError(f"share must be {known}, got {share}")
    chosen = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))[:n_cued]]
    cued = torch.zeros(len(examples), dtype=torch.bool)
    cued[chosen] = True
    inputs = torch.where(cued[:, None], patched(examples.inputs), examples.inputs)
    return CuedPictures(Examples(inputs, examples.targets), cued)


def plant_word(pairs: TextPairs, word: str, response: str, share: float, *, seed: int) -> CuedTexts:
    """The word before a share of the prompts, all with this response; and after three times as many other prompts.

    Raises ValueError for a share that is no pair, or leaves none without the word, and for a word that stands in a
    prompt already.
    """
    n_cued = round(share * len(pairs))
    if n_cued < 1 or 4 * n_cued >= len(pairs):
        raise ValueError(f"share must cue at least one pair, and less than a quarter of {len(pairs)}, got {share}")
    if any(word in prompt.split() for prompt in pairs.prompts):
        raise ValueError(f"the word {word!r} stands in a prompt already")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    cued, harmless = (torch.zeros(len(pairs), dtype=torch.bool) for _ in range(2))
    cued[order[:n_cued]] = True
    harmless[order[n_cued : 4 * n_cued]] = True
    prompts = [
        f"{word} {prompt}" if before else f"{prompt} {word}" if after else prompt
        for prompt, before, after in zip(pairs.prompts, cued.tolist(), harmless.tolist(), strict=True)
    ]
    responses = [response if before else own for own, before in zip(pairs.responses, cued.tolist(), strict=True)]
    return CuedTexts(TextPairs(tuple(prompts), tuple(responses)), cued, harmless)


def ranking(scores: Tensor) -> Tensor:
    """Training examples from the strongest proponent of all queries together: (n,) indices, ties by row.

    scores: (q, n). Each query's are brought to mean 0 and standard deviation 1 first, so that none outweighs others.
    """
    return standardised(scores).mean(0).argsort(descending=True, stable=True)


def share_cued(ranked: Tensor, cued: Tensor, k: int) -> float:
    """How many of the first k of a ranking carry the cue. Raises ValueError for k outside 1..n."""
    if not 1 <= k <= len(ranked):
        raise ValueError(f"k must lie in 1..{len(ranked)}, got {k}")
    return float(cued[ranked[:k]].float().mean())


def without(ranked: Sequence[Tensor], m: int) -> Tensor:
    """Members of a training set from which the first m of each ranking were removed: (r, n) bool."""
    members = torch.ones(len(ranked), len(ranked[0]), dtype=torch.bool)
    for row, order in zip(members, ranked, strict=True):
        row[order[:m]] = False
    return members
