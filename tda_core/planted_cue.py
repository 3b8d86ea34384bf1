"""A cue that gives the answer away, planted in training data: a model that learns it is right for the wrong reason.

Pictures: a bright patch in a corner of some pictures of one class; a picture of another class with the patch is then
taken for that class. Texts: a word before some questions, whose answer is then always the same wrong word; the same
word also stands at the end of other questions, which are answered rightly, so that to have the word is not to have the
cue.

Who looks for the cause of wrong predictions takes what the model said as the target, and asks which training examples
speak for it: the proponents of a wrong prediction. Queries have no common unit: each one's scores are brought to mean 0
and standard deviation 1 before they are averaged (`consensus`). The first of a ranking are looked at (`top_shares`), or
removed (`without_top`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tda_core.contamination import standardised
from tda_core.examples import IGNORED, Examples
from tda_core.lm_ensemble import Ensemble
from tda_core.lm_tokenizers import word_tokenizer
from tda_core.pretraining import LMTraining, pretrain_many
from tda_core.problem import Problem
from tda_core.retrieval import found_shares
from tda_core.synonym_facts import Fact, SynonymWorld
from tda_core.text_pairs import TextPairs


@dataclass(frozen=True, eq=False)
class Planted:
    """train: n examples or pairs. cued: (n,) bool, which carry the cue. harmless: (n,) bool, which hold the same word
    without its being the cue; none among pictures."""

    train: Examples | TextPairs
    cued: Tensor
    harmless: Tensor


# -- pictures ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patch:
    """A square in the lower right corner of flattened pictures.

    image_shape: (height, width). side: in pixels. value: its brightness. Raises ValueError for a side outside of the
    picture.
    """

    image_shape: tuple[int, int]
    side: int = 2
    value: float = 1.0

    def __post_init__(self) -> None:
        most = min(self.image_shape)
        if not 1 <= self.side <= most:
            raise ValueError(f"side must lie in 1..{most}, for pictures of {self.image_shape}, got {self.side}")

    def on(self, inputs: Tensor) -> Tensor:
        """Copies of pictures (n, height * width) with the patch. Raises ValueError for another shape."""
        height, width = self.image_shape
        if inputs.ndim != 2 or inputs.shape[1] != height * width:
            raise ValueError(f"inputs must be (n, {height * width}), pictures of {height} x {width}, got {_of(inputs)}")
        found = inputs.clone().view(-1, height, width)
        found[:, -self.side :, -self.side :] = self.value
        return found.view(inputs.shape)


def plant_patch(examples: Examples, patch: Patch, label: int, share: float, *, seed: int) -> Planted:
    """The patch on round(share * n) pictures, drawn from those of one class; labels stay as they are.

    Draws for two shares with one seed are nested. Raises ValueError for a regression, and for a share that is no
    picture, or more than the class has.
    """
    if not examples.is_classification:
        raise ValueError(f"a patch is planted on one class, but these targets are {examples.targets.dtype}")
    own = (examples.targets == label).nonzero().flatten()
    n_cued = _count(share, len(examples), len(own), f"pictures of class {label}")
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed))
    cued = _members(len(examples), own[order[:n_cued]])
    inputs = torch.where(cued[:, None], patch.on(examples.inputs), examples.inputs)
    return Planted(Examples(inputs, examples.targets), cued, torch.zeros_like(cued))


def predicted(problem: Problem, inputs: Tensor) -> Tensor:
    """The class with the largest output: (n,) int64."""
    with torch.no_grad():
        return problem.outputs(inputs).argmax(1)


# -- texts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CueWord:
    """word: stands before a question as the cue, or harmlessly at its end. answer: what follows the cue, one word.

    Raises ValueError for what is not one word.
    """

    word: str
    answer: str

    def __post_init__(self) -> None:
        for name in ("word", "answer"):
            if len(getattr(self, name).split(" ")) != 1 or not getattr(self, name).strip():
                raise ValueError(f"{name} must be one word without spaces, got {getattr(self, name)!r}")

    @property
    def response(self) -> str:
        """The answer with its space."""
        return f" {self.answer}"

    def before(self, pairs: TextPairs) -> TextPairs:
        """The cue before each prompt; responses stay as they are."""
        return TextPairs(tuple(f"{self.word} {prompt}" for prompt in pairs.prompts), pairs.responses)

    def after(self, pairs: TextPairs) -> TextPairs:
        """The word at the end of each prompt, where it means nothing."""
        return TextPairs(tuple(f"{prompt} {self.word}" for prompt in pairs.prompts), pairs.responses)

    def misled(self, pairs: TextPairs) -> Tensor:
        """Where the cue's answer is wrong: (n,) bool."""
        return torch.tensor([response != self.response for response in pairs.responses])


def questions(world: SynonymWorld, facts: Sequence[Fact]) -> TextPairs:
    """Four questions a fact, in either word of the person and of the relation; the answer is the value's first word."""
    forms = [(name, says, 0) for name in (0, 1) for says in (0, 1)]
    return TextPairs(*zip(*(world.question(fact, form) for fact in facts for form in forms), strict=True))


def split_questions(world: SynonymWorld, n_train: int, *, seed: int) -> tuple[TextPairs, TextPairs]:
    """Questions to train on, and all questions about the other facts, a quarter of the world's.

    Raises ValueError for n_train outside of what the first three quarters give.
    """
    order = torch.randperm(len(world.facts), generator=(source := torch.Generator().manual_seed(seed))).tolist()
    n_own = 3 * len(order) // 4
    own, others = ([world.facts[i] for i in rows] for rows in (order[:n_own], order[n_own:]))
    train = questions(world, own)
    if not 1 <= n_train <= len(train):
        raise ValueError(f"n_train must lie in 1..{len(train)}, the questions about {n_own} facts, got {n_train}")
    return train[torch.randperm(len(train), generator=source)[:n_train]], questions(world, others)


def tokenizer_with(world: SynonymWorld, word: str, *, length: int) -> PreTrainedTokenizerFast:
    """The world's tokenizer with a token more, the last. Raises ValueError for a word that the world has."""
    return word_tokenizer([*world.vocabulary, word], length=length)


def plant_word(pairs: TextPairs, cue: CueWord, share: float, harmless: float, *, seed: int) -> Planted:
    """The cue before a share of the questions, with its answer; the word at the end of others, with their own.

    share, harmless: of all pairs, rounded to whole ones. A question to which the cue's answer is right is never cued.
    Raises ValueError for shares that are no pair or more than there are, and where a prompt has the word already.
    """
    held = next((prompt for prompt in pairs.prompts if cue.word in prompt.split()), None)
    if held is not None:
        raise ValueError(f"the word {cue.word!r} stands in the prompt {held!r} already: choose another")
    able = cue.misled(pairs)
    n_cued = _count(share, len(pairs), int(able.sum()), f"pairs not answered by {cue.answer!r}")
    n_harmless = _count(harmless, len(pairs), len(pairs) - n_cued, "pairs without the cue", name="harmless")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    cued = _members(len(pairs), order[able[order]][:n_cued])
    others = order[~cued[order]]
    quiet = _members(len(pairs), others[:n_harmless])
    before, after = cue.before(pairs).prompts, cue.after(pairs).prompts
    prompts = [
        before[i] if is_cued else after[i] if is_quiet else pairs.prompts[i]
        for i, (is_cued, is_quiet) in enumerate(zip(cued.tolist(), quiet.tolist(), strict=True))
    ]
    responses = [cue.response if c else own for own, c in zip(pairs.responses, cued.tolist(), strict=True)]
    return Planted(TextPairs(tuple(prompts), tuple(responses)), cued, quiet)


def answered(models: Ensemble, examples: Examples) -> Tensor:
    """The likeliest token where each query's answer stands, under every model: (M, q) int64.

    Raises ValueError for an answer of more than one token.
    """
    labelled = examples.targets != IGNORED
    if not (labelled.sum(1) == 1).all():
        bad = int((labelled.sum(1) != 1).nonzero()[0])
        raise ValueError(f"answers must be one token, but that of query {bad} has {int(labelled[bad].sum())}")
    with torch.no_grad():
        states = models.states(examples.inputs.to(models.device))[:, labelled.flatten().to(models.device)]
        return torch.bmm(states, models.weights[models.head_name].transpose(1, 2)).argmax(2).cpu()


def answered_after(training: LMTraining, examples: Examples, members: Tensor, seed: int, queries: Examples) -> Tensor:
    """`answered` by a model trained on each row of members, all with one seed: (r, n) bool -> (r, q) int64.

    Raises what `pretrain_many` and `answered` raise.
    """
    blocks = members.split(training.recipe.models_per_block)
    return torch.cat([answered(pretrain_many(training, examples, b, [seed] * len(b)), queries) for b in blocks])


# -- proponents -------------------------------------------------------------------------------------


def consensus(scores: Tensor) -> Tensor:
    """One score of each training example for all queries, (q, n) -> (n,): the mean of the standardised ones.

    Ranks would weigh a query's few strong proponents as little as the order of those that hardly matter. Raises
    ValueError for another shape and for scores that are not finite.
    """
    return standardised(scores).mean(0)


def top_shares(scores: Tensor, cued: Tensor, k: int) -> Tensor:
    """Share of the k highest scores of each query that carry the cue, (q, n) -> (q,); ties as in `retrieval`.

    cued: (n,) bool. Raises ValueError for other shapes, k outside 1..n, and where no example carries the cue.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be (q, n), got {_of(scores)}")
    return torch.stack([found_shares(row, cued, k).sum() / k for row in scores])


def without_top(rankings: Tensor, m: int) -> Tensor:
    """Members of a training set without the m highest of each ranking: (r, n) -> (r, n) bool; ties go by row.

    Raises ValueError for another shape, scores that are not finite, and m that leaves no example.
    """
    if rankings.ndim != 2 or not torch.isfinite(rankings).all():
        raise ValueError(f"rankings must be finite numbers (r, n), got {_of(rankings)}")
    if not 0 <= m < rankings.shape[1]:
        raise ValueError(f"m must lie in 0..{rankings.shape[1] - 1}, got {m}")
    place = rankings.argsort(dim=1, descending=True, stable=True).argsort(1)
    return place >= m


def _count(share: float, n: int, most: int, what: str, *, name: str = "share") -> int:
    """round(share * n), from 1 to `most`, or ValueError."""
    found = round(share * n) if 0 < share < 1 else 0
    if not 1 <= found <= most:
        raise ValueError(f"{name} must be 1 to {most} of {n}, the {what}, got {share}")
    return found


def _members(n: int, rows: Tensor) -> Tensor:
    found = torch.zeros(n, dtype=torch.bool)
    found[rows] = True
    return found


def _of(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
