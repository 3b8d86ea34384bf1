"""In-context probing: a training example's influence, read from one forward pass with it as a demonstration.

Jiao et al. 2025 (arXiv 2407.12259). For a training example z and a task with examples (x_i, y_i), i = 1..m, with
ll_0(i) = log p(y_i | x_i) and ll_z(i) = log p(y_i | z, x_i), both summed over the tokens of y_i:

    ICP(z) = mean over i of 1[ll_z(i) > ll_0(i)]

"indicator" is that, "gain" the mean of ll_z(i) - ll_0(i), "gain_per_token" the same over the length of y_i. No gradient
is taken.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tda_core.language import LanguageModel
from tda_core.likelihood_paths import Queries
from tda_core.likelihoods import log_likelihoods
from tda_core.store import Store, load_tensors, save_tensors
from tda_core.text_pairs import TextPairs

VARIANTS = ("indicator", "gain", "gain_per_token")
# Demonstrations that are scored between two savings.
BLOCK = 256


@dataclass(frozen=True)
class Template:
    """How a demonstration and a query become one text: `before` + prompt + response + `between` + the query's prompt.

    alone: what stands before the query in the baseline, which has no demonstration. The defaults follow the paper's
    layout (a sentence, the demonstration on a line, a blank line, the query; the query alone as baseline) in words of
    our own.
    """

    before: str = "Here is an example that may help to answer the question below.\n"
    between: str = "\n\n"
    alone: str = ""

    def demonstrations(self, pool: TextPairs) -> list[str]:
        return [f"{self.before}{prompt}{response}{self.between}" for prompt, response in pool.pairs]


PLAIN = Template(before="", between="\n", alone="")


@dataclass(frozen=True, eq=False)
class Probe:
    """Log-likelihoods of m queries with and without each of n demonstrations, in nats.

    baseline: ll_0 (m,). prompted: ll_z (n, m). n_response: (m,) tokens of each response. truncated: (n, m) bool,
    where the window cut the context. shared: (n, m) bool, where demonstration and query are the same pair.
    """

    baseline: Tensor
    prompted: Tensor
    n_response: Tensor
    truncated: Tensor
    shared: Tensor

    @property
    def gains(self) -> Tensor:
        """ll_z(i) - ll_0(i): (n, m), in nats."""
        return self.prompted - self.baseline

    def scores(self, variant: str = "indicator") -> Tensor:
        """What each demonstration does for each query: (m, n), positive for a proponent.

        The indicator is 1 where the response becomes more likely, strictly, else 0.
        """
        _check_variant(variant)
        if variant == "indicator":
            return (self.prompted > self.baseline).float().T
        return (self.gains if variant == "gain" else self.gains / self.n_response).T

    def of_task(self, variant: str = "indicator") -> Tensor:
        """The mean over the queries, which make up one task: (n,)."""
        return self.scores(variant).mean(0)


@dataclass(frozen=True, eq=False)
class ICP:
    """In-context probing of one training set: see the module. Counted, and warned of: demonstrations that occur more
    than once, contexts that the window cuts, and demonstrations that are queries themselves.

    variant: one of `VARIANTS`. path: see `likelihoods.log_likelihoods`. store: where finished blocks of demonstrations
    are kept, so that a stopped run goes on there.
    """

    model: LanguageModel
    train: TextPairs
    template: Template = field(default_factory=Template)
    variant: str = "gain"
    path: str = "auto"
    store: Store | None = None

    def __post_init__(self) -> None:
        _check_variant(self.variant)
        if self.train.n_duplicates:
            warnings.warn(
                f"{self.train.n_duplicates} of {len(self.train)} demonstrations repeat an earlier one", stacklevel=3
            )

    def scores(self, queries: TextPairs) -> Tensor:
        """Scores of every training example for every query: (n_query, n_train), positive for proponents."""
        return self.probe(queries).scores(self.variant)

    def probe(self, queries: TextPairs) -> Probe:
        """Log-likelihoods of the queries with and without each training example as demonstration."""
        asked = Queries.of(self.model, queries)
        baseline, cut_alone = log_likelihoods(self.model, self.model.tokens([self.template.alone]), asked)
        parts = list(self.blocks(queries))
        prompted, truncated = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        probe = Probe(baseline[0], prompted, asked.n_response, truncated, self.train.shared_with(queries))
        if n_cut := int(truncated.sum()) + int(cut_alone.sum()):
            pairs = truncated.numel() + cut_alone.numel()
            warnings.warn(
                f"{n_cut} of {pairs} contexts are longer than the model's window of {self.model.window} tokens and "
                "have lost their beginning",
                stacklevel=2,
            )
        if n_shared := int(probe.shared.sum()):
            warnings.warn(
                f"{n_shared} times a demonstration equals a query, which it then gives away: see Probe.shared",
                stacklevel=2,
            )
        return probe

    def blocks(self, queries: TextPairs, size: int = BLOCK) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-likelihoods and cuts (b, m) of consecutive blocks of demonstrations: what streams over a large pool."""
        asked = Queries.of(self.model, queries)
        key = {"model": self.model.identity, "queries": queries.hash, "template": self.template, "path": self.path}
        with tqdm(total=len(self.train), desc="in-context probing", leave=False, unit="demonstration") as bar:
            for start in range(0, len(self.train), size):
                part = self.train[start : start + size]

                def compute(part: TextPairs = part) -> dict[str, Tensor]:
                    demonstrations = self.model.tokens(self.template.demonstrations(part))
                    found, cut = log_likelihoods(self.model, demonstrations, asked, path=self.path)
                    return {"log_likelihoods": found, "cut": cut}

                found = compute() if self.store is None else self.store.get("icp", key | {"pool": part.hash}, compute)
                yield found["log_likelihoods"], found["cut"]
                bar.update(len(part))

    def save(self, path: Path | str) -> None:
        """Write the training set and the settings, with the model's hash, to one file."""
        settings = {"template": vars(self.template), "variant": self.variant, "path": self.path}
        made_for = {"icp": settings, "model": self.model.identity, "train": [list(pair) for pair in self.train.pairs]}
        save_tensors(Path(path), {"lengths": self.train.lengths}, made_for)

    @classmethod
    def load(cls, path: Path | str, model: LanguageModel) -> "ICP":
        """Read what `save` wrote; ValueError where the model is another one."""
        _, found = load_tensors(Path(path))
        if "icp" not in found:
            raise ValueError(f"{path} does not hold in-context probing, but {sorted(found)}")
        if found["model"] != model.identity:
            raise ValueError(f"{path} was made for model {found['model']}, but this one is {model.identity}")
        prompts, responses = zip(*found["train"], strict=True)
        settings = found["icp"]
        return cls(model, TextPairs(prompts, responses), Template(**settings.pop("template")), **settings)


def fit_icp(model: LanguageModel, train: TextPairs, template: Template | None = None, **settings: object) -> ICP:
    """In-context probing of a training set; nothing is computed before queries come. settings: fields of `ICP`."""
    return ICP(model, train, template or Template(), **settings)


def _check_variant(name: str) -> None:
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}, expected one of {VARIANTS}")
