"""Figures hold what they were given: values, labels, titles; and refuse what they cannot draw."""

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from tda_core import plots
from tda_core.metrics import Estimate

matplotlib.use("agg")
IMAGE = np.arange(64.0).reshape(8, 8)


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        plots.use_style()
        yield
    plt.close("all")


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_style_is_legible_and_its_colours_distinct():
    assert min(plt.rcParams[f"{name}size"] for name in ("axes.label", "xtick.label", "ytick.label")) >= 14
    assert len(set(plots.PALETTE)) == len(plots.PALETTE) == len(plots.MARKERS)


def test_save_writes_a_png_and_closes_the_figure(tmp_path):
    figure = plots.curves([1, 2], {"a": [1, 2]}, plots.Labels("n", "LDS"))
    assert plots.save(figure, tmp_path / "new" / "a.png") is figure
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.format == "PNG" and image.width > 800
    assert figure.number not in plt.get_fignums()
    with pytest.raises(ValueError, match=r"saved as \.png, got a\.pdf"):
        plots.save(figure, tmp_path / "a.pdf")


def test_gallery_shows_the_query_and_every_example():
    figure = plots.query_gallery((IMAGE, "query 3"), [(IMAGE + 1, "p0"), (IMAGE + 2, "p1")], [(IMAGE + 3, "o0")])
    assert [axis.get_title() for axis in figure.axes] == ["query 3", "p0", "p1", "o0"]
    for offset, axis in enumerate(figure.axes):
        np.testing.assert_array_equal(axis.images[0].get_array(), IMAGE + offset)
    assert [axis.get_ylabel() for axis in figure.axes] == ["", "proponents", "", "opponents"]
    query, first, second, opponent = (axis.get_position() for axis in figure.axes)
    assert query.x1 < first.x0 < second.x0 and opponent.y1 < first.y0


def test_gallery_refuses_flattened_images_and_nothing_to_show():
    with pytest.raises(ValueError, match=r"got \(64,\) for 'p0'"):
        plots.query_gallery((IMAGE, "q"), [(IMAGE.ravel(), "p0")], [])
    with pytest.raises(ValueError, match="at least one proponent"):
        plots.query_gallery((IMAGE, "q"), [], [])


ESTIMATES = {
    "random": Estimate(0.01, -0.02, 0.03, 9),
    "trak/untuned": Estimate(0.2, 0.1, 0.3, 9),
    "trak/tuned": Estimate(0.6, 0.55, 0.65, 9),
    "exact_influence": Estimate(0.5, None, None, 9),
}


def test_bars_are_sorted_paired_and_whiskered():
    figure = plots.method_bars(ESTIMATES, "LDS", ceiling=0.95, title="digits")
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["random", "exact influence", "trak"]
    bars = {round(bar.get_width(), 6): bar for bar in axis.patches}
    assert set(bars) == {0.01, 0.2, 0.6, 0.5}
    centre = {value: bar.get_y() + bar.get_height() / 2 for value, bar in bars.items()}
    assert centre[0.01] == pytest.approx(0) and centre[0.5] == pytest.approx(1)
    assert centre[0.2] < 2 < centre[0.6], "tuned above untuned, both at their method's tick"
    assert bars[0.2].get_hatch() and not bars[0.6].get_hatch()
    assert bars[0.2].get_facecolor() != bars[0.6].get_facecolor() != bars[0.5].get_facecolor()
    whiskers = {tuple(line.get_xdata()): line.get_ydata()[0] for line in axis.lines if len(set(line.get_xdata())) == 2}
    assert whiskers[0.55, 0.65] == pytest.approx(centre[0.6]) and whiskers[0.1, 0.3] == pytest.approx(centre[0.2])
    assert set(texts(axis)) == {"0.01", "0.20", "0.60", "0.50", "ceiling 0.95"}
    assert any(list(line.get_xdata()) == [0.95, 0.95] and line.get_linestyle() == "--" for line in axis.lines)
    assert axis.get_xlim()[0] <= -0.02 and axis.get_xlim()[1] > 0.95
    assert axis.get_xlabel() == "LDS" and axis.get_title() == "digits"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["tuned on validation queries", "untuned default", "nothing to tune"]


def test_bars_without_variants_need_no_legend_and_may_be_logarithmic():
    figure = plots.method_bars(
        {"a": Estimate(0.002, 0.001, 0.003, 9), "b": Estimate(150.0, 140, 160, 9)}, "ms", log_x=True
    )
    assert not figure.legends and figure.axes[0].get_xscale() == "log"
    assert set(texts(figure.axes[0])) == {"0.002", "150"}
    low, high = figure.axes[0].get_xlim()
    assert 0 < low < 0.001 and high > 160
    with pytest.raises(ValueError, match=r"above 0, got -0\.02"):
        plots.method_bars(ESTIMATES, "LDS", log_x=True)
    with pytest.raises(ValueError, match="no estimates"):
        plots.method_bars({}, "LDS")


def test_curves_hold_their_values_and_references():
    labels = plots.Labels("steps", "LDS", "digits")
    figure = plots.curves([1, 10, 100], {"a": [1, 2, 3], "b": [3, 2, 1]}, labels, log_x=True, lines={"exact": 2.5})
    axis = figure.axes[0]
    lines = {line.get_label(): line for line in axis.lines}
    assert list(lines) == ["a", "b", "exact (2.50)"]
    assert list(lines["b"].get_xdata()) == [1, 10, 100] and list(lines["b"].get_ydata()) == [3, 2, 1]
    assert list(lines["exact (2.50)"].get_ydata()) == [2.5, 2.5]
    assert lines["a"].get_color() != lines["b"].get_color() and lines["a"].get_marker() != lines["b"].get_marker()
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title(), axis.get_xscale()) == (
        "steps",
        "LDS",
        "digits",
        "log",
    )
    assert [text.get_text() for text in axis.get_legend().get_texts()] == list(lines)
    assert plots.curves([1, 2], {"a": [1, 2]}, labels).axes[0].get_xscale() == "linear"


def test_many_curves_are_told_apart():
    figure = plots.curves([1, 2], {f"s{i}": [i, i] for i in range(20)}, plots.Labels("x"))
    assert len({(line.get_color(), line.get_marker()) for line in figure.axes[0].lines}) == 20


def test_curves_refuse_unequal_lengths():
    with pytest.raises(ValueError, match="series 'b' has 2 values, but x has 3"):
        plots.curves([1, 2, 3], {"a": [1, 2, 3], "b": [1, 2]}, plots.Labels("x"))
    with pytest.raises(ValueError, match="no series"):
        plots.curves([1], {}, plots.Labels("x"))


def test_panels_share_names_but_not_values():
    series = {"5%": {"of_a": [1, 2], "b": [3, 4]}, "20%": {"of_a": [5, 6], "b": [7, 8]}}
    lines = {"5%": {"best": 9}, "20%": {"best": 10}}
    figure = plots.panels([0, 40], series, plots.Labels("inspected", "accuracy", "digits"), lines=lines)
    for axis, title in zip(figure.axes, series, strict=True):
        drawn = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
        assert drawn == {"of a": series[title]["of_a"], "b": series[title]["b"], "best": [lines[title]["best"]] * 2}
        assert (axis.get_title(), axis.get_xlabel()) == (title, "inspected")
    assert [axis.get_ylabel() for axis in figure.axes] == ["accuracy", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["of a", "b", "best"]
    assert figure.get_suptitle() == "digits"


def test_panels_refuse_other_names_and_lengths():
    labels = plots.Labels("x")
    with pytest.raises(ValueError, match="'q' has \\['b'\\], and the first \\['a'\\]"):
        plots.panels([1], {"p": {"a": [1]}, "q": {"b": [1]}}, labels)
    with pytest.raises(ValueError, match="series 'a' has 2 values, but x has 1"):
        plots.panels([1], {"p": {"a": [1, 2]}}, labels)
    with pytest.raises(ValueError, match="no panels"):
        plots.panels([1], {}, labels)


def test_scatter_states_the_rank_correlation():
    x = np.arange(12.0).reshape(3, 4)
    figure = plots.scatter_agreement(x, -np.exp(x), plots.Labels("exact", "simulated", "digits"))
    axis = figure.axes[0]
    assert axis.get_title() == "digits: Spearman -1.000"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("exact", "simulated")
    np.testing.assert_allclose(axis.collections[0].get_offsets(), np.column_stack([x.ravel(), -np.exp(x).ravel()]))
    assert plots.scatter_agreement(x, x, plots.Labels("a", "b")).axes[0].get_title() == "Spearman 1.000"
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(4, 3\)"):
        plots.scatter_agreement(x, x.T, plots.Labels("a", "b"))


def test_no_two_methods_of_a_tradeoff_look_alike():
    points = {f"m{i}": (i + 1.0, Estimate(0.5, 0.4, 0.6, 9)) for i in range(20)}
    axis = plots.tradeoff(points, plots.Labels("ms"), ours=list(points), lines={}).axes[0]
    assert len({(c[0].get_color(), c[0].get_marker()) for c in axis.containers}) == 20


def test_logarithmic_axes_have_plain_numbers():
    figure = plots.curves([100, 1e6], {"a": [0.2, 30]}, plots.Labels("n", "ms"), log_x=True, log_y=True)
    figure.canvas.draw()
    shown = [
        [t.get_text() for t in axis.get_ticklabels(which="both")]
        for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis)
    ]
    assert {"100", "1,000,000"} <= set(shown[0]) and {"0.2", "1", "20"} <= set(shown[1])
    assert not any("10^" in text for axis in shown for text in axis)


def test_tradeoff_puts_each_method_at_its_cost_and_quality():
    points = {"a": (2.0, Estimate(0.5, 0.4, 0.6, 9)), "b": (0.1, Estimate(0.7, 0.6, 0.8, 9))}
    figure = plots.tradeoff(points, plots.Labels("ms", "LDS", "t"), ours=["a"], lines={"limit": 0.05})
    axis = figure.axes[0]
    drawn = {c.get_label(): c[0] for c in axis.containers}
    assert {name: (line.get_xdata()[0], line.get_ydata()[0]) for name, line in drawn.items()} == {
        "a": (2.0, 0.5),
        "b": (0.1, 0.7),
    }
    assert drawn["b"].get_markerfacecolor() == "white" != drawn["a"].get_markerfacecolor()
    assert axis.get_xscale() == "log" and axis.lines[-1].get_xdata()[0] == 0.05
    with pytest.raises(ValueError, match="no points to draw"):
        plots.tradeoff({}, plots.Labels("ms", "LDS", "t"), ours=[], lines={})
