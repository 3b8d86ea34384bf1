"""Figures of ablations: many settings beside one baseline, grouped by what was changed."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from tda_core.plots import GREY, PALETTE, interval_ends

ROWS_PER_COLUMN = 26
INCHES_PER_ROW = 0.42


def forest(differences: Mapping[tuple[str, str], Any], xlabel: str, *, title: str = "") -> Figure:
    """Differences from a baseline with 95% whiskers, a row a setting under the name of its factor; 0 is a line.

    differences: (factor, setting) -> object with value, low and high (None: no whisker), in the order to draw; settings
    of a factor must be neighbours. Two columns of panels where there are many. Raises ValueError for none, and for a
    factor that comes in two places.
    """
    if not differences:
        raise ValueError("there are no differences to draw")
    groups = [(factor, list(items)) for factor, items in groupby(differences.items(), key=lambda item: item[0][0])]
    names = [factor for factor, _ in groups]
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"settings of factor {repeated!r} must be neighbours")
    columns = _columns(groups)
    tallest = max(sum(len(items) + 1 for _, items in column) for column in columns)
    size = (9 * len(columns), 1.6 + INCHES_PER_ROW * tallest)
    figure, axes = plt.subplots(1, len(columns), figsize=size, layout="constrained", squeeze=False, sharex=True)
    colours = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}
    for axis, column in zip(axes[0], columns, strict=True):
        labels, position = {}, 0
        for factor, items in column:
            labels[position] = factor
            for (_, setting), estimate in items:
                position += 1
                labels[position] = setting
                low, high = interval_ends(estimate)
                axis.plot([low, high], [position] * 2, color=colours[factor], linewidth=3, solid_capstyle="butt")
                axis.plot([estimate.value], [position], "o", color=colours[factor], markersize=9)
            position += 1
        axis.set_yticks(list(labels), list(labels.values()))
        for tick, name in zip(axis.get_yticklabels(), labels.values(), strict=True):
            if name in colours and labels[round(tick.get_position()[1])] == name:
                tick.set(fontweight="bold", color=colours[name])
        axis.set_ylim(position, -1)
        axis.axvline(0, color=GREY, linewidth=2, linestyle="--")
        axis.set_xlabel(xlabel)
        axis.grid(False, axis="y")
    figure.suptitle(title)
    return figure


def _columns(groups: list) -> list[list]:
    """Groups in one column, or in two of about equal height; a group is never torn."""
    heights = [len(items) + 1 for _, items in groups]
    if sum(heights) <= ROWS_PER_COLUMN or len(groups) < 2:
        return [groups]
    cut = min(range(1, len(groups)), key=lambda i: abs(sum(heights[:i]) - sum(heights[i:])))
    return [groups[:cut], groups[cut:]]
