"""Figures of two scores of one large pool of examples."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from tda_core.plots import GREY, PALETTE, Labels, interval_ends


def rank_density(x: np.ndarray, y: np.ndarray, labels: Labels) -> Figure:
    """Where examples lie by their rank in x and in y, each in per cent from lowest to highest, as shaded hexagons.

    Shades say how many times as many examples a hexagon holds as it would if the two ranks had nothing to do with
    each other (1 everywhere). The dashed line is equal rank. Ties are broken at random, else scores with few values
    would draw stripes. Raises ValueError for unequal lengths.
    """
    if len(x) != len(y):
        raise ValueError(f"x and y must have one value each an example, got {len(x)} and {len(y)}")
    rng = np.random.default_rng(0)
    across, up = (_percent(side, rng) for side in (x, y))
    figure, axis = plt.subplots(figsize=(8, 6.4))
    shape = (30, 17)  # regular hexagons: two such lattices, half a step apart
    drawn = axis.hexbin(across, up, gridsize=shape, extent=(0, 100, 0, 100), cmap="Blues", linewidths=0.2)
    times = np.asarray(drawn.get_array()) / (len(x) / (2 * shape[0] * shape[1]))
    drawn.set_array(times)
    drawn.set_clim(0, np.percentile(times, 99))
    axis.plot([0, 100], [0, 100], ls="--", color=GREY, lw=1.5)
    figure.colorbar(drawn, ax=axis, extend="max", label="examples (1: as many as by chance)")
    axis.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", xlabel=labels.x, ylabel=labels.y)
    axis.set_title(labels.title)
    axis.grid(False)
    return figure


def overlap_bars(values: Mapping[str, Sequence], groups: Sequence[str], labels: Labels) -> Figure:
    """Grouped bars with 95% whiskers. values: name -> one number or Estimate a group, in the order of `groups`."""
    figure, axis = plt.subplots(figsize=(9.5, 5.2))
    width, places = 0.8 / len(values), np.arange(len(groups))
    for k, (name, row) in enumerate(values.items()):
        if len(row) != len(groups):
            raise ValueError(f"{name} has {len(row)} values for {len(groups)} groups")
        at = places + (k - (len(values) - 1) / 2) * width
        heights = np.array([getattr(value, "value", value) for value in row])
        colour = "#bdbdbd" if name == "chance" else PALETTE[k]
        axis.bar(at, heights, width * 0.94, color=colour, label=name)
        ends = np.array([interval_ends(v) if hasattr(v, "low") else (h, h) for v, h in zip(row, heights, strict=True)])
        if (ends[:, 0] < ends[:, 1]).any():
            errors = np.maximum(0, [heights - ends[:, 0], ends[:, 1] - heights])
            axis.errorbar(at, heights, yerr=errors, fmt="none", ecolor="black", lw=1.5, capsize=3)
        for x, height, top in zip(at, heights, ends[:, 1], strict=True):
            axis.annotate(f"{height:.0%}", (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=13)
    axis.set_xticks(places, groups)
    axis.set(xlabel=labels.x, ylabel=labels.y)
    axis.set_title(labels.title)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.grid(axis="x", visible=False)
    axis.legend()
    return figure


def _percent(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    ranks = np.empty(len(values))
    ranks[np.lexsort((rng.random(len(values)), values))] = np.arange(len(values))
    return 100 * (ranks + 0.5) / len(values)
