"""Heat maps and panels of influences hold what they were given, and refuse what they cannot draw."""

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt

from tda_core.plots import Labels
from tda_core.recovery_plots import Grid, heat_maps, influence_panels

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
    assert axis.get_xticks().tolist() == [1, 4, 16], "few values are named as they are"
    many = Grid(2 ** np.arange(8), [1, 2], "share", log_x=True)
    axis = heat_maps({"a": np.zeros((2, 8))}, many, LABELS).axes[0]
    assert {1, 2, 5, 10, 20, 50} <= set(axis.get_xticks())


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


def test_panels_of_influences_ring_what_was_planted():
    planted, found = np.array([0.0, 2, 0, -2]), np.array([0.1, 0.5, 0, -0.2])
    figure = influence_panels(planted, {"a": found, "b": np.zeros(4)}, Labels("example", "influence", "title"))
    first, second = figure.axes
    for axis, expected in ((first, [0.2, 1, 0, -0.4]), (second, [0, 0, 0, 0])):
        stems = axis.collections[0].get_segments()
        assert [stem[0].tolist() for stem in stems] == [[i, 0] for i in range(4)]
        assert [stem[1][1] for stem in stems] == pytest.approx(expected)
        assert axis.lines[0].get_xdata().tolist() == [1, 3] and axis.lines[0].get_ydata().tolist() == [1, -1]
    assert (first.get_title(), second.get_title()) == ("a", "b")
    assert (figure.get_supylabel(), second.get_xlabel(), figure.get_suptitle()) == ("influence", "example", "title")
    with pytest.raises(ValueError, match="no panels"):
        influence_panels(planted, {}, LABELS)
    with pytest.raises(ValueError, match=r"planted and 'a' must be \(n,\) alike, got \(4,\) and \(3,\)"):
        influence_panels(planted, {"a": found[:3]}, LABELS)
