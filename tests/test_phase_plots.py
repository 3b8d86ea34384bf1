"""Heat maps hold what they were given, and refuse what they cannot draw."""

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt

from tda_core.phase_plots import Grid, heat_maps
from tda_core.plots import Labels

matplotlib.use("agg")
LABELS = Labels("subsets", "influences", "title")
GRID = Grid([10, 20, 40], [1, 2], "share")
VALUES = np.arange(6).reshape(2, 3) / 6


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_values_lie_where_they_were_measured_on_one_scale():
    figure = heat_maps({"a": VALUES, "b": 1 - VALUES}, GRID, LABELS, limits=(0, 2))
    first, second, bar = figure.axes
    for axis, values, title in ((first, VALUES, "a"), (second, 1 - VALUES, "b")):
        mesh = axis.collections[0]
        assert np.allclose(mesh.get_array(), values) and mesh.get_clim() == (0, 2)
        assert (axis.get_title(), axis.get_xlabel()) == (title, "subsets")
        edges = mesh.get_coordinates()
        assert edges[0, :, 0].tolist() == [5, 15, 30, 50] and edges[:, 0, 1].tolist() == [0.5, 1.5, 2.5]
        assert axis.get_xlim() == (5, 50) and axis.get_ylim() == (0.5, 2.5)
    assert (first.get_ylabel(), second.get_ylabel(), bar.get_ylabel()) == ("influences", "", "share")
    assert figure.get_suptitle() == "title" and not figure.legends


def test_logarithmic_cells_are_cut_half_way_on_the_axis():
    grid = Grid([1, 4, 16], [1, 2], "share", log_x=True)
    axis = heat_maps({"a": VALUES}, grid, LABELS).axes[0]
    assert np.allclose(axis.collections[0].get_coordinates()[0, :, 0], [0.5, 2, 8, 32])
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "linear")


def test_curves_are_named_once():
    figure = heat_maps({"a": VALUES, "b": VALUES}, GRID, LABELS, curves={"one": [1, 1, 2], "two": [2, 2, 9]})
    for axis in figure.axes[:2]:
        assert [line.get_ydata().tolist() for line in axis.lines] == [[1, 1, 2], [2, 2, 9]]
        assert axis.get_ylim() == (0.5, 2.5), "a curve does not stretch the map"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no panels"):
        heat_maps({}, GRID, LABELS)
    with pytest.raises(ValueError, match=r"panel 'a' must be finite and \(2, 3\), got shape \(3, 2\)"):
        heat_maps({"a": VALUES.T}, GRID, LABELS)
    with pytest.raises(ValueError, match="panel 'a' must be finite"):
        heat_maps({"a": np.full((2, 3), np.nan)}, GRID, LABELS)
    with pytest.raises(ValueError, match="curve 'one' has 2 values, but x has 3"):
        heat_maps({"a": VALUES}, GRID, LABELS, curves={"one": [1, 2]})
    with pytest.raises(ValueError, match=r"x must be two or more increasing numbers, got \[2, 1\]"):
        Grid([2, 1], [1, 2], "share")
    with pytest.raises(ValueError, match=r"y must be two or more increasing numbers, got \[1\]"):
        Grid([1, 2], [1], "share")
    with pytest.raises(ValueError, match="logarithmic y needs values above 0, got 0"):
        Grid([1, 2], [0, 2], "share", log_y=True)
