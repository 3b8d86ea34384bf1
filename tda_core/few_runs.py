"""Means over few independent runs, such as seeds or tasks, with intervals that are wide enough for few."""

import numpy as np
from scipy.special import stdtrit

from tda_core.estimates import Array, Estimate, as_array


def t_estimate(values: Array, *, within: tuple[float, float] = (-np.inf, np.inf)) -> Estimate:
    """Mean of one value a run with Student's 95% interval, mean +- t s / sqrt(n); none for a single run.

    A bootstrap over n values is narrower by about sqrt((n - 1) / n) z / t, .63 at n = 5 (narrowness bias: Hesterberg
    2015, "What teachers should know about the bootstrap", arXiv 1411.5279). within: what values can be, (0, 1) for
    shares, where the interval is cut. Raises ValueError for values outside, and what `as_array` refuses.
    """
    values = as_array(values, "values", 1)
    lowest, highest = within
    outside = (values < lowest) | (values > highest)
    if outside.any():
        bad = int(outside.argmax())
        raise ValueError(f"values must lie in {lowest}..{highest}, but values[{bad}] is {values[bad]}")
    value, n = float(values.mean()), len(values)
    if n == 1:
        return Estimate(value, None, None, n)
    half = float(stdtrit(n - 1, 0.975) * values.std(ddof=1) / np.sqrt(n))
    return Estimate(value, max(lowest, value - half), min(highest, value + half), n)


def share_estimate(values: Array) -> Estimate:
    """`t_estimate` of shares, which lie in 0..1."""
    return t_estimate(values, within=(0.0, 1.0))


def signed(estimate: Estimate) -> str:
    """A difference and its interval with their signs, as for a table: "+0.120 [-0.020, +0.260]"."""
    interval = "" if estimate.low is None else f" [{estimate.low:+.3f}, {estimate.high:+.3f}]"
    return f"{estimate.value:+.3f}{interval}"
