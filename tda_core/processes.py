"""Work on queries, documents or subsets split over the processes that `accelerate` started, one a GPU if there are any.

    accelerate launch --num_processes 4 my_script.py      # or accelerate.notebook_launcher(function, num_processes=4)

Each process calls the same function and works on its share; what they found is put together in all of them. With one
process nothing is split, so the same script runs anywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from tda_core.examples import Examples
from tda_core.language import LanguageModel
from tda_core.truth_bank import Measured, TruthBank


class Scorer(Protocol):
    """What every method gives once it is fitted."""

    def scores(self, queries: Examples) -> Tensor: ...


def rows_by_process(compute: Callable[[Tensor], Tensor], n: int) -> Tensor:
    """The n rows of a result, of which each process computes a run: compute(indices (k,)) -> (k, ...) for some k >= 1.

    All processes get all rows, on the CPU. Raises ValueError for n < 1 and a share of another length, in every process.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    with Accelerator().split_between_processes(list(range(n))) as share:
        own = compute(torch.tensor(share)).detach().cpu() if share else None
    shares = gather_object([(len(share), own)])
    for process, (k, found) in enumerate(shares):
        if found is not None and len(found) != k:
            raise ValueError(f"process {process} was asked for {k} rows and computed {len(found)}")
    return torch.cat([found for _, found in shares if found is not None])


def measured_by_process(bank: TruthBank, masks: Tensor, seeds: Sequence[int]) -> Measured:
    """`TruthBank.measure`, each process training some of what the bank lacks on its own device; all get everything.

    The bank's folder must be one that all processes see. Raises RuntimeError, in all of them, where one has failed
    (whose own error is its cause) and where models are missing that another has trained.
    """
    accelerator, failed = Accelerator(), None
    own = replace(bank, training=replace(bank.training, device=str(accelerator.device)))
    lacking = own.missing(masks, seeds)
    accelerator.wait_for_everyone()  # all have looked before one adds to it
    with accelerator.split_between_processes(lacking) as share:
        try:
            own.fill(masks, share, n_jobs=1, progress=accelerator.is_main_process)
        except Exception as error:  # the others must not wait for this process forever
            failed = error
    errors = gather_object([None if failed is None else repr(failed)])
    if any(errors):
        process = next(i for i, said in enumerate(errors) if said)
        raise RuntimeError(f"process {process} has failed: {errors[process]}") from failed
    if lacking := own.missing(masks, seeds):
        raise RuntimeError(f"{len(lacking)} models are not in {bank.folder}: it must be one that all processes see")
    return own.measure(masks, seeds, n_jobs=1, progress=False)


def losses_by_process(model: LanguageModel, examples: Examples) -> Tensor:
    """Loss of each sequence in nats, summed over its labelled positions: (n,)."""
    own = on_own_device(model)
    return rows_by_process(lambda rows: own.token_losses(examples[rows]).sum(1), len(examples))


def scores_by_process(method: Scorer, queries: Examples) -> Tensor:
    """A fitted method's scores (n_query, n_train), the queries split."""
    return rows_by_process(lambda rows: method.scores(queries[rows]), len(queries))


def on_own_device(model: LanguageModel) -> LanguageModel:
    """The model on this process's own device, where it is moved."""
    return replace(model, model=model.model.to(Accelerator().device))
