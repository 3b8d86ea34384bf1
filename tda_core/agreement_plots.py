"""Figures of two scores of one large pool of examples."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tda_core.plots import GREY, PALETTE, Labels, interval_ends


def rank_density(x: np.ndarray, y: np.ndarray, labels: Labels, *, bins: int = 40) -> Figure:
    """Where examples lie by their rank in x and in y, each in per cent from lowest to highest, as shaded squares.

    Shades say how many times as many examples a square holds as it would if the two ranks had nothing to do with
    each other (1 everywhere). The dashed line is equal rank. Ties are broken at random, else scores with few values
    would draw stripes. Raises ValueError for unequal lengths.
    """
    if len(x) != len(y):
        raise ValueError(f"x and y must have one value each an example, got {len(x)} and {len(y)}")
    rng = np.random.default_rng(0)
    across, up = (_percent(side, rng) for side in (x, y))
    counts, edges, _ = np.histogram2d(across, up, bins=bins, range=((0, 100), (0, 100)))
    times = counts.T * bins**2 / len(x)
    figure, axis = plt.subplots(figsize=(8, 6.4))
    drawn = axis.pcolormesh(edges, edges, times, cmap="Blues", vmin=0, vmax=np.percentile(times, 99), rasterized=True)
    axis.plot([0, 100], [0, 100], ls="--", color=GREY, lw=1.5)
    figure.colorbar(drawn, ax=axis, extend="max", label="examples (1: as many as by chance)")
    axis.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", xlabel=labels.x, ylabel=labels.y)
    axis.set_title(labels.title)
    axis.grid(False)
    return figure


def estimate_bars(
    values: Mapping[str, Sequence], groups: Sequence[str], labels: Labels, *, percent: bool = False
) -> Figure:
    """Bars in groups, with 95% whiskers and their values above them.

    values: name -> one Estimate or number a group, in the order of `groups`; a series named "chance" is grey.
    Raises ValueError for no series, and for one that has not a value for each group.
    """
    if not values:
        raise ValueError("there are no series to draw")
    figure, axis = plt.subplots(figsize=(1.5 + 0.9 * len(groups) * len(values), 5.4))
    width, places = 0.84 / len(values), np.arange(len(groups))
    for k, (name, row) in enumerate(values.items()):
        if len(row) != len(groups):
            raise ValueError(f"{name} has {len(row)} values for {len(groups)} groups")
        at = places + (k - (len(values) - 1) / 2) * width
        heights = np.array([getattr(value, "value", value) for value in row], dtype=float)
        colour = "#bdbdbd" if name == "chance" else PALETTE[k % len(PALETTE)]
        axis.bar(at, heights, width * 0.94, color=colour, label=name.replace("_", " "))
        for x, height, value in zip(at, heights, row, strict=True):
            low, high = interval_ends(value) if hasattr(value, "low") else (height, height)
            if low < high:
                axis.plot([x, x], [low, high], color="black", linewidth=2, solid_capstyle="butt")
            text = f"{height:.{1 if 0 < abs(height) < 0.095 else 0}%}" if percent else f"{height:.2f}"
            axis.annotate(text, (x, max(high, 0)), (0, 3), textcoords="offset points", ha="center", fontsize=13)
    if percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.axhline(0, color="black", linewidth=1)
    axis.set_xticks(places, groups)
    axis.set(xlabel=labels.x, ylabel=labels.y)
    axis.set_title(labels.title)
    axis.grid(False, axis="x")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2)
    return figure


def _percent(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    ranks = np.empty(len(values))
    ranks[np.lexsort((rng.random(len(values)), values))] = np.arange(len(values))
    return 100 * (ranks + 0.5) / len(values)
