"""Figures of who gets paid: shares along a stream of queries, and amounts side by side.

Apart from `tda_core.plots`, so that the notebooks that draw no shares do not depend on these.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from tda_core.plots import PALETTE, Labels


def stacked_shares(shares: np.ndarray, names: Sequence[str], labels: Labels, *, window: int) -> Figure:
    """Who gets which share along a stream, as stacked areas of the moving average over `window` queries.

    shares: (n, n_units), rows that sum to 1, in the order of the queries. The first unit lies at the bottom; each point
    is the mean over the window that ends there. Raises ValueError for names that do not fit, rows that do not
    sum to 1, and a window outside 1..n.
    """
    shares = np.asarray(shares, dtype=np.float64)
    if shares.ndim != 2 or shares.shape[1] != len(names) or not len(names):
        raise ValueError(f"shares must be (n, {len(names)}), one column a name, got shape {shares.shape}")
    if not (np.abs(shares.sum(1) - 1) < 1e-4).all():
        bad = int(np.argmax(~(np.abs(shares.sum(1) - 1) < 1e-4)))
        raise ValueError(f"rows of shares must sum to 1, but row {bad} sums to {shares[bad].sum():.4g}")
    if not 1 <= window <= len(shares):
        raise ValueError(f"window must lie in 1..{len(shares)}, the queries there are, got {window}")
    summed = np.concatenate([np.zeros((1, len(names))), np.cumsum(shares, axis=0)])
    ends = np.unique(np.linspace(window, len(shares), 600).astype(int))  # more points than a slide has pixels for
    means = (summed[ends] - summed[ends - window]) / window
    figure, axis = plt.subplots(figsize=(11, 6))
    colours = [_shade(index) for index in range(len(names))]
    axis.stackplot(ends, 100 * means.T, labels=names, colors=colours, edgecolor="white", linewidth=0.6)
    axis.set(xlim=(ends[0], ends[-1]) if len(ends) > 1 else (0, ends[0]), ylim=(0, 100))
    axis.set(xlabel=labels.x, ylabel=labels.y, title=labels.title)
    handles, texts = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], texts[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))  # as they are stacked
    return figure


def grouped_bars(values: Mapping[str, Sequence[float]], groups: Sequence[str], labels: Labels) -> Figure:
    """Upright bars side by side, one a series in each group: the same quantity told by several methods.

    values: series -> one number a group. Raises ValueError for no series and for one of another length.
    """
    if not values:
        raise ValueError("there are no series to draw")
    figure, axis = plt.subplots(figsize=(max(9, 1.15 * len(groups)), 5.5))
    width = 0.8 / len(values)
    for index, (name, heights) in enumerate(values.items()):
        if len(heights) != len(groups):
            raise ValueError(f"series {name!r} has {len(heights)} values, but there are {len(groups)} groups")
        places = np.arange(len(groups)) - 0.4 + (index + 0.5) * width
        axis.bar(places, heights, width, label=name.replace("_", " "), color=_shade(index))
    axis.axhline(0, color="black", linewidth=1)
    axis.set_xticks(range(len(groups)), [group.replace(" ", "\n") for group in groups])
    axis.grid(False, axis="x")
    axis.set(xlabel=labels.x, ylabel=labels.y, title=labels.title)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))  # where it covers no bar
    return figure


def _shade(index: int) -> tuple[float, ...]:
    """A colour a series: the palette without black, then the same ones lighter, which tells twelve apart."""
    colours = PALETTE[:-1]
    colour = np.array(to_rgb(colours[index % len(colours)]))
    return tuple(colour + (1 - colour) * (0.55 if index // len(colours) % 2 else 0))
