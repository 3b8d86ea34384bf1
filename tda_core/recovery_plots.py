"""Figures of sparse recovery: planted and recovered influences, and heat maps of what succeeds where.

Apart from `tda_core.plots`, so that notebooks without them do not depend on these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import patheffects
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from tda_core.plots import GREY, PALETTE, PLAIN_NUMBERS, Labels

CURVES = ("white", "#ffb000", "#ff5da2")
EDGE = (patheffects.withStroke(linewidth=6, foreground="black"),)  # so that curves stand out from light and dark
MAP = "viridis"
FEW = 6  # values that are all named on an axis


@dataclass(frozen=True)
class Grid:
    """Where the values of a heat map were measured: increasing x and y, and whether an axis is logarithmic.

    Cells reach half way to their neighbours. bar: what the colours show, with its unit.
    """

    x: Sequence[float]
    y: Sequence[float]
    bar: str
    log_x: bool = False
    log_y: bool = False

    def __post_init__(self) -> None:
        for name, log in (("x", self.log_x), ("y", self.log_y)):
            values = np.asarray(getattr(self, name), dtype=np.float64)
            if values.ndim != 1 or len(values) < 2 or not (np.diff(values) > 0).all():
                raise ValueError(f"{name} must be two or more increasing numbers, got {getattr(self, name)}")
            if log and values[0] <= 0:
                raise ValueError(f"a logarithmic {name} needs values above 0, got {values[0]}")


def heat_maps(
    panels: Mapping[str, np.ndarray],
    grid: Grid,
    labels: Labels,
    *,
    curves: Mapping[str, Sequence[float]] | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """One heat map a panel, all on one scale of colours with one bar.

    panels: title -> values (len(grid.y), len(grid.x)). curves: name -> y at each grid.x, cut at the edge of the map.
    limits: what the ends of the colours stand for. Raises ValueError for no panels, and values or curves that do not
    fit the grid or are not finite.
    """
    if not panels:
        raise ValueError("there are no panels to draw")
    x, y = np.asarray(grid.x, dtype=np.float64), np.asarray(grid.y, dtype=np.float64)
    size = (4.6 * len(panels) + 1.6, 5.6 if curves else 5.0)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False, sharey=True)
    edges = _edges(x, grid.log_x), _edges(y, grid.log_y)
    for axis, (title, values) in zip(axes[0], panels.items(), strict=True):
        values = np.asarray(values, dtype=np.float64)
        if values.shape != (len(y), len(x)) or not np.isfinite(values).all():
            raise ValueError(f"panel {title!r} must be finite and {(len(y), len(x))}, got shape {values.shape}")
        colours = axis.pcolormesh(*edges, values, cmap=MAP, vmin=limits[0], vmax=limits[1], rasterized=True)
        for index, (name, heights) in enumerate((curves or {}).items()):
            if len(heights) != len(x):
                raise ValueError(f"curve {name!r} has {len(heights)} values, but x has {len(x)}")
            axis.plot(x, heights, label=name, color=CURVES[index % len(CURVES)], linewidth=3, path_effects=EDGE)
        axis.set(xlabel=labels.x, title=title)
        for one, values, log in ((axis.xaxis, x, grid.log_x), (axis.yaxis, y, grid.log_y)):
            _scale(one, values, log)
        axis.set(xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]])
        axis.grid(False)
    axes[0, 0].set_ylabel(labels.y)
    figure.suptitle(labels.title)
    figure.colorbar(colours, ax=axes, label=grid.bar, pad=0.02)
    if curves:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def influence_panels(planted: np.ndarray, recovered: Mapping[str, np.ndarray], labels: Labels) -> Figure:
    """What each method recovers of one query's influences: a stem an example, the planted ones ringed.

    planted: (n,). recovered: title -> (n,), drawn in their own panels over one x axis, each scaled to its largest
    entry, since methods that shrink keep another scale than what was planted. Raises ValueError for no panels and for
    arrays of another shape.
    """
    if not recovered:
        raise ValueError("there are no panels to draw")
    planted = np.asarray(planted, dtype=np.float64)
    figure, axes = plt.subplots(
        len(recovered), 1, figsize=(11, 1.2 + 1.9 * len(recovered)), layout="constrained", sharex=True, squeeze=False
    )
    places = np.flatnonzero(planted)
    rings = planted[places] / np.abs(planted).max(initial=1e-300)
    for index, (axis, (title, values)) in enumerate(zip(axes[:, 0], recovered.items(), strict=True)):
        values = np.asarray(values, dtype=np.float64)
        if values.shape != planted.shape or planted.ndim != 1:
            raise ValueError(f"planted and {title!r} must be (n,) alike, got {planted.shape} and {values.shape}")
        scaled = values / max(np.abs(values).max(initial=0), 1e-300)
        axis.vlines(np.arange(len(values)), 0, scaled, color=PALETTE[index % len(PALETTE)], linewidth=2.5)
        axis.plot(places, rings, "o", color=GREY, markersize=9, markerfacecolor="none", markeredgewidth=2)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(ylim=(-1.25, 1.25), yticks=(-1, 0, 1), title=title)
        axis.grid(False)
    axes[-1, 0].set_xlabel(labels.x)
    figure.supylabel(labels.y, fontsize=16)
    figure.suptitle(labels.title)
    return figure


def _scale(axis: Axis, values: np.ndarray, log: bool) -> None:
    """The axis with plain numbers: at the measured values where they are few, else at 1, 2 and 5 if logarithmic."""
    if log:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
    if len(values) <= FEW:
        axis.set_ticks(values)
    axis.set_major_formatter(PLAIN_NUMBERS)


def _edges(values: np.ndarray, log: bool) -> np.ndarray:
    """Edges of cells around increasing values, half way between them (on the axis as it is drawn)."""
    places = np.log(values) if log else values
    middle = (places[1:] + places[:-1]) / 2
    ends = [2 * places[0] - middle[0]], [2 * places[-1] - middle[-1]]
    edges = np.concatenate([ends[0], middle, ends[1]])
    return np.exp(edges) if log else edges
