"""Recordings: a computation on one batch of queries, with its backward pass, played back without Python in between.

The smaller the model, the more of a query's time goes into starting operations and not into the operations. A recording
runs the same operations on the same numbers without that part. It holds for one batch size and for modules that do the
same operations whatever the inputs' values; `record` tests both.
"""

import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

Function = Callable[[Tensor, Tensor], Tensor]
TESTED = 32  # batches that a recording is tested on


def record(function: Function, inputs: Tensor, targets: Tensor, size: int) -> Function:
    """The recording of function(inputs, targets) -> tensor for batches of `size` examples.

    inputs, targets: examples (n, ...), (n,) to record with and to test the recording on; used again from the
    beginning where they are too few. Raises ValueError for a size below 1, and where the recording differs from the
    function: it then depends on values in a way that a recording cannot follow, such as a branch in Python.
    """
    if size < 1:
        raise ValueError(f"a batch size must be >= 1, got {size}")
    rows = torch.arange(size * TESTED).remainder(len(targets)).view(TESTED, size)
    batches = [(inputs[batch], targets[batch]) for batch in rows]
    expected = [function(*batch) for batch in batches]  # first of all: what it keeps for later is not to be recorded
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # TorchScript is no longer developed; torch is pinned, and has nothing as fast
        try:
            traced = torch.jit.trace(make_fx(function)(*batches[0]), batches[0], check_trace=False)
        except RuntimeError as error:
            raise ValueError(f"this computation cannot be recorded: {error}") from error
        # faster with its constants folded, which breaks some graphs
        for played in (torch.jit.freeze(traced.eval()), traced):
            with contextlib.suppress(RuntimeError):
                found = [played(*batch) for batch in batches]
                break
        else:
            raise ValueError("this computation cannot be recorded: its recording does not run")
    for own, plain in zip(found, expected, strict=True):
        tolerance = 1e-4 * float(plain.abs().max()) + torch.finfo(plain.dtype).tiny
        if own.shape != plain.shape or not float((own - plain).abs().max()) <= tolerance:
            raise ValueError("this computation cannot be recorded: it takes another course for other inputs")
    return played
