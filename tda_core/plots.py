"""Figures for notebooks and slides, from plain arrays; each function returns a matplotlib Figure.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which colour-blind readers can tell apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.stats import spearmanr

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
BLUE, ORANGE, GREEN, RED = PALETTE[:4]
GREY = "#6b6b6b"
BARS = {
    "tuned": {"facecolor": BLUE, "edgecolor": BLUE},
    "untuned": {"facecolor": "#bcd9ea", "edgecolor": BLUE, "hatch": "//"},
    "plain": {"facecolor": "#8c8c8c", "edgecolor": "#8c8c8c"},
}
VARIANTS = {"tuned": "tuned on validation queries", "untuned": "untuned default", "plain": "nothing to tune"}
PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:,.7g}")  # 100, not 10^2
LINES = ("--", ":", "-.")
MARKERS = "osD^vPX"  # with the colours, so that print in grey still tells series apart


@dataclass(frozen=True)
class Labels:
    """What the axes show, with units where there are any."""

    x: str
    y: str = ""
    title: str = ""


def use_style() -> None:
    """Set type sizes that are legible on a slide, and the palette, for all figures that follow."""
    sns.set_theme(
        context="talk",
        style="whitegrid",
        palette=PALETTE,
        rc={
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 17,
            "axes.labelsize": 16,
            "xtick.labelsize": 14,
            "ytick.labelsize": 14,
            "legend.fontsize": 14,
            "legend.frameon": False,
            "grid.color": "#dddddd",
            "hatch.linewidth": 1.5,
        },
    )


def save(figure: Figure, path: str | Path) -> Figure:
    """Write a PNG (150 dpi, cut to its contents), make its folder, and close the figure.

    Returns the figure, so that a notebook cell that ends with `save` shows it.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"figures are saved as .png, got {path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return figure


def query_gallery(
    query: tuple[np.ndarray, str],
    proponents: Sequence[tuple[np.ndarray, str]],
    opponents: Sequence[tuple[np.ndarray, str]],
) -> Figure:
    """A query on the left, its top proponents in a row beside it and its top opponents below them.

    Each is (image, title), images (height, width) in grey or (height, width, 3). Raises ValueError
    for images of another shape, such as flattened ones, and where there is no example to show.
    """
    columns = max(len(proponents), len(opponents))
    if columns == 0:
        raise ValueError("a gallery needs at least one proponent or opponent")
    figure = plt.figure(figsize=(2.0 * (columns + 2) + 0.6, 5.2))
    grid = figure.add_gridspec(2, columns + 2, wspace=0.25, hspace=0.45)
    _image(figure.add_subplot(grid[:, :2]), query, "black")
    rows = ((proponents, BLUE, "proponents"), (opponents, RED, "opponents"))
    for row, (examples, colour, name) in enumerate(rows):
        for column, example in enumerate(examples):
            axis = figure.add_subplot(grid[row, column + 2])
            _image(axis, example, colour)
            if column == 0:
                axis.set_ylabel(name, color=colour, fontsize=16)
    return figure


def method_bars(
    estimates: Mapping[str, Any], xlabel: str, *, ceiling: float | None = None, title: str = "", log_x: bool = False
) -> Figure:
    """Horizontal bars with 95% whiskers, largest on top; the ceiling is a dashed line.

    estimates: name -> object with value, low and high (None: no whisker). `trak/tuned` and
    `trak/untuned` form one group: full colour for the tuned bar, light and hatched for the untuned.
    Raises ValueError for no estimates, and for values <= 0 on a logarithmic axis.
    """
    if not estimates:
        raise ValueError("there are no estimates to draw")
    ends = [interval_ends(estimate) for estimate in estimates.values()]
    left, right = min(low for low, _ in ends), max(ceiling or 0.0, *(high for _, high in ends))
    if log_x and left <= 0:
        raise ValueError(f"a logarithmic axis needs values above 0, got {left}")
    groups: dict[str, dict[str, Any]] = {}
    for name, estimate in estimates.items():
        base, _, variant = name.rpartition("/")
        base, variant = (base, variant) if base and variant in ("tuned", "untuned") else (name, "plain")
        groups.setdefault(base, {})[variant] = estimate
    order = sorted(groups, key=lambda name: max(estimate.value for estimate in groups[name].values()))
    figure, axis = plt.subplots(figsize=(10, 1.8 + 0.62 * len(order)), layout="constrained")
    for position, name in enumerate(order):
        for variant, estimate in groups[name].items():
            alone = len(groups[name]) == 1
            place = position + (0 if alone else 0.2 if variant == "tuned" else -0.2)
            axis.barh(place, estimate.value, 0.64 if alone else 0.38, **BARS[variant])
            low, high = interval_ends(estimate)
            axis.plot([low, high], [place] * 2, color="black", linewidth=2, solid_capstyle="butt")
            text = f"{estimate.value:.3g}" if log_x else f"{estimate.value:.2f}"
            axis.annotate(text, (max(high, 0), place), (6, 0), textcoords="offset points", va="center", fontsize=13)
    axis.set_yticks(range(len(order)), [name.replace("_", " ").replace("/", ", ") for name in order])
    axis.grid(False, axis="y")
    if log_x:
        _log_axis(axis.xaxis)
        axis.set_xlim(left / 2, right * (right / left) ** 0.12)
    else:
        left = min(0.0, left)
        axis.set_xlim(left * 1.05, right + 0.12 * (right - left))
        axis.axvline(0, color="black", linewidth=1)
    if ceiling is not None:
        axis.axvline(ceiling, color=RED, linestyle="--", linewidth=2)
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "center"}
        axis.annotate(f"ceiling {ceiling:.2f}", (ceiling, 1), (0, 4), color=RED, fontsize=14, **where)
    axis.set_xlabel(xlabel)
    axis.set_title(title, pad=28 if ceiling is not None else None)
    variants = [variant for variant in BARS if any(variant in group for group in groups.values())]
    if variants != ["plain"]:
        handles = [Patch(label=VARIANTS[variant], **BARS[variant]) for variant in variants]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(variants))
    return figure


def curves(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    labels: Labels,
    *,
    log_x: bool = False,
    log_y: bool = False,
    lines: Mapping[str, float] | None = None,
) -> Figure:
    """One line with markers a series over shared x values; `lines` are labelled horizontal references.

    Raises ValueError for no series, and for one whose length is not that of x.
    """
    if not series:
        raise ValueError("there are no series to draw")
    figure, axis = plt.subplots(figsize=(9, 5.5))
    _series(axis, x, series)
    for index, (name, value) in enumerate((lines or {}).items()):
        axis.axhline(value, color=GREY, linestyle=LINES[index % 3], linewidth=2, label=f"{name} ({value:.2f})")
    if log_x:
        _log_axis(axis.xaxis)
    if log_y:
        _log_axis(axis.yaxis)
    _label(axis, labels)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def panels(
    x: Sequence[float],
    series: Mapping[str, Mapping[str, Sequence[float]]],
    labels: Labels,
    *,
    lines: Mapping[str, Mapping[str, float]] | None = None,
) -> Figure:
    """`curves` side by side, a panel for each title in `series`, with one legend; each panel has a scale of its own.

    lines: by panel, labelled horizontal references. Panels share the names of their series and lines.
    Raises ValueError for no panels, panels whose names differ, and a series whose length is not that of x.
    """
    if not series:
        raise ValueError("there are no panels to draw")
    figure, axes = plt.subplots(1, len(series), figsize=(5.5 * len(series), 6.5), layout="constrained", squeeze=False)
    first = axes[0, 0]
    for axis, (title, of_panel) in zip(axes[0], series.items(), strict=True):
        _series(axis, x, of_panel)
        for index, (name, value) in enumerate((lines or {}).get(title, {}).items()):
            axis.axhline(value, color=GREY, linestyle=LINES[index % 3], linewidth=2, label=name)
        _label(axis, Labels(labels.x, labels.y if axis is first else "", title))
        names, expected = axis.get_legend_handles_labels()[1], first.get_legend_handles_labels()[1]
        if names != expected:
            raise ValueError(f"panels must show the same, but {title!r} has {names}, and the first {expected}")
    figure.suptitle(labels.title)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def tradeoff(
    points: Mapping[str, tuple[float, Any]], labels: Labels, *, ours: Sequence[str], lines: Mapping[str, float]
) -> Figure:
    """Cost (log scale) against quality of each method, with intervals: the upper left is where to be.

    points: name -> (cost, Estimate). ours: names drawn as filled; lines: vertical references by name.
    Raises ValueError for no points.
    """
    if not points:
        raise ValueError("there are no points to draw")
    figure, axis = plt.subplots(figsize=(11, 6.5))
    for index, (name, (cost, quality)) in enumerate(sorted(points.items(), key=lambda item: item[1][0])):
        low, high = interval_ends(quality)
        look = _look(index)
        filled = look["color"] if name in ours else "white"
        bars = [[quality.value - low], [high - quality.value]]
        look |= {"markersize": 12, "markerfacecolor": filled, "markeredgewidth": 2.5}
        axis.errorbar([cost], [quality.value], yerr=bars, linestyle="", capsize=4, label=name.replace("_", " "), **look)
    for name, cost in lines.items():
        axis.axvline(cost, color=GREY, linestyle="--", linewidth=2, label=name)
    _log_axis(axis.xaxis)
    _label(axis, labels)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="filled: ours")
    return figure


def scatter_agreement(x: np.ndarray, y: np.ndarray, labels: Labels) -> Figure:
    """Two scores of the same pairs against each other, with their Spearman correlation in the title.

    x, y: arrays of equal shape (flattened). Raises ValueError for unequal shapes.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape, got {x.shape} and {y.shape}")
    x, y = x.ravel(), y.ravel()
    figure, axis = plt.subplots(figsize=(6.5, 6))
    # Vector points by the ten thousand are slow and hide density; small, clear, rasterised ones show it.
    axis.scatter(x, y, s=12, alpha=min(1.0, max(0.05, 300 / len(x))), color=BLUE, linewidths=0, rasterized=True)
    agreement = f"Spearman {spearmanr(x, y).statistic:.3f}"
    _label(axis, Labels(labels.x, labels.y, f"{labels.title}: {agreement}" if labels.title else agreement))
    return figure


def _series(axis: plt.Axes, x: Sequence[float], series: Mapping[str, Sequence[float]]) -> None:
    for index, (name, values) in enumerate(series.items()):
        if len(values) != len(x):
            raise ValueError(f"series {name!r} has {len(values)} values, but x has {len(x)}")
        axis.plot(x, values, label=name.replace("_", " "), linewidth=2.5, markersize=8, **_look(index))


def _look(index: int) -> dict[str, str]:
    """Colour and marker of a series: a colour that comes again has another marker."""
    marker = MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]
    return {"color": PALETTE[index % len(PALETTE)], "marker": marker}


def _image(axis: plt.Axes, example: tuple[np.ndarray, str], colour: str) -> None:
    image, title = np.asarray(example[0]), example[1]
    if image.ndim != 2 and not (image.ndim == 3 and image.shape[2] == 3):
        raise ValueError(f"an image must be (height, width) or (height, width, 3), got {image.shape} for {title!r}")
    axis.imshow(image, cmap="gray_r")
    axis.set_title(title, fontsize=14)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set(visible=True, color=colour, linewidth=3)


def _log_axis(axis: Axis) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5, or at powers of ten alone where there are many."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    few = low > 0 and high / low < 300
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.set_major_formatter(PLAIN_NUMBERS)
    axis.set_minor_formatter(NullFormatter())


def interval_ends(estimate: Any) -> tuple[float, float]:
    """The ends of the interval, or the value twice where there is none."""
    return (estimate.value, estimate.value) if estimate.low is None else (estimate.low, estimate.high)


def _label(axis: plt.Axes, labels: Labels) -> None:
    axis.set_xlabel(labels.x)
    axis.set_ylabel(labels.y)
    axis.set_title(labels.title)
