"""Forest plots: what is drawn is what was given."""

import matplotlib.pyplot as plt
import pytest

from tda_core.ablation_plots import ROWS_PER_COLUMN, forest
from tda_core.metrics import Estimate


def rows(factors, settings):
    return {
        (f"factor {i}", f"setting {i}.{j}"): Estimate(0.1 * i - 0.01 * j, 0.1 * i - 0.1, 0.1 * i + 0.1, 5)
        for i in range(factors)
        for j in range(settings)
    }


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def drawn(figure):
    """setting -> (value, low, high), read off the axes."""
    found = {}
    for axis in figure.axes:
        names = {tick: label.get_text() for tick, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)}
        for line in axis.lines:
            x, y = line.get_xdata(), line.get_ydata()
            if (len(x) == 2 and x[0] != x[1]) or len(x) == 1:
                found.setdefault(names[y[0]], []).extend(x)
    return found


@pytest.mark.parametrize(("factors", "settings", "columns"), [(2, 3, 1), (8, 6, 2), (1, ROWS_PER_COLUMN + 5, 1)])
def test_every_difference_stands_at_its_name(factors, settings, columns):
    figure = forest(rows(factors, settings), "difference", title="what matters")
    assert len(figure.axes) == columns
    for (_, setting), estimate in rows(factors, settings).items():
        assert drawn(figure)[setting] == pytest.approx([estimate.low, estimate.high, estimate.value])
    headings = {label.get_text() for axis in figure.axes for label in axis.get_yticklabels()}
    assert {f"factor {i}" for i in range(factors)} <= headings


def test_bad_input():
    with pytest.raises(ValueError, match="no differences"):
        forest({}, "x")
    one = Estimate(0.0, None, None, 1)
    torn = {("a", "1"): one, ("b", "1"): one, ("a", "2"): one}
    with pytest.raises(ValueError, match="settings of factor 'a' must be neighbours"):
        forest(torn, "x")
