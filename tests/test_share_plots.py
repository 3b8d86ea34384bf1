"""Figures of shares hold what they were given, and refuse what they cannot draw."""

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt

from tda_core import share_plots
from tda_core.plots import Labels
from tda_core.share_plots import grouped_bars, stacked_shares

matplotlib.use("agg")
LABELS = Labels("query", "%", "title")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def heights(collection, x):
    """Lower and upper edge of a stacked area at x."""
    vertices = collection.get_paths()[0].vertices
    y = vertices[vertices[:, 0] == x][:, 1]
    return y.min(), y.max()


def test_areas_are_moving_averages_stacked_to_a_hundred():
    shares = np.random.default_rng(0).dirichlet([1.0, 1.0, 1.0], 50)
    axis = stacked_shares(shares, ["a", "b", "c"], LABELS, window=10).axes[0]
    for end in (10, 23, 50):
        mean = 100 * shares[end - 10 : end].mean(0)
        for unit, area in enumerate(axis.collections):
            low, high = heights(area, end)
            assert low == pytest.approx(mean[:unit].sum()) and high == pytest.approx(mean[: unit + 1].sum())
    assert axis.get_xlim() == (10, 50) and axis.get_ylim() == (0, 100)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["c", "b", "a"], "as they are stacked"
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title()) == ("query", "%", "title")


def test_a_long_stream_is_drawn_by_few_points_and_a_single_window_too():
    shares = np.full((10_000, 2), 0.5)
    area = stacked_shares(shares, ["a", "b"], LABELS, window=500).axes[0].collections[0]
    assert len(area.get_paths()[0].vertices) < 1500
    assert len(stacked_shares(shares[:5], ["a", "b"], LABELS, window=5).axes[0].collections) == 2


def test_twelve_units_have_twelve_colours():
    assert len({share_plots._shade(index) for index in range(12)}) == 12


def test_bars_stand_side_by_side():
    values = {"x": [1.0, 2.0, 3.0], "y": [3.0, -2.0, 1.0]}
    axis = grouped_bars(values, ["source 1", "source 2", "c"], LABELS).axes[0]
    drawn = {container.get_label(): container for container in axis.containers}
    for name, expected in values.items():
        assert [bar.get_height() for bar in drawn[name]] == expected
    for group in range(3):
        left, right = drawn["x"][group], drawn["y"][group]
        assert left.get_x() + left.get_width() == pytest.approx(right.get_x())
        assert left.get_x() > group - 0.5 and right.get_x() + right.get_width() < group + 0.5
    assert [label.get_text() for label in axis.get_xticklabels()] == ["source\n1", "source\n2", "c"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["x", "y"]


def test_bad_input_is_named():
    shares = np.full((4, 2), 0.5)
    with pytest.raises(ValueError, match=r"shares must be \(n, 3\), one column a name, got shape \(4, 2\)"):
        stacked_shares(shares, ["a", "b", "c"], LABELS, window=2)
    for window in (0, 5):
        with pytest.raises(ValueError, match=rf"window must lie in 1\.\.4, the queries there are, got {window}"):
            stacked_shares(shares, ["a", "b"], LABELS, window=window)
    shares[2, 1] = 0.75
    with pytest.raises(ValueError, match=r"row 2 sums to 1\.25"):
        stacked_shares(shares, ["a", "b"], LABELS, window=2)
    shares[2, 1] = np.nan
    with pytest.raises(ValueError, match="row 2 sums to nan"):
        stacked_shares(shares, ["a", "b"], LABELS, window=2)
    with pytest.raises(ValueError, match="series 'x' has 1 values, but there are 2 groups"):
        grouped_bars({"x": [1.0]}, ["a", "b"], LABELS)
    with pytest.raises(ValueError, match="no series"):
        grouped_bars({}, ["a"], LABELS)
