"""The panel, driven from Python: what it shows is what the index says of the image that is picked or drawn."""

import io
import re

import ipywidgets
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.image import imread
from toys import continuous, labelled, random_problem

from tda_core import live
from tda_core.basis import BasisSettings
from tda_core.dynamics import Dynamics
from tda_core.examples import Examples
from tda_core.index import Index, build_index

DYNAMICS = Dynamics(horizon=5, damping=0.1)
SETTING = BasisSettings(energy=1.0, rank=4)


def indexed(width: int = 4, n: int = 12) -> tuple[Index, Examples]:
    """An index of a small classifier of width x width images, and queries to it."""
    problem = random_problem((width**2, 5, 3), n=n)
    return build_index(problem, DYNAMICS, labelled(6, width**2, seed=3), SETTING), labelled(7, width**2, seed=4)


INDEX, QUERIES = indexed()
TRAIN = INDEX.basis.problem.train


@pytest.fixture
def panel():
    return live.Panel(INDEX, QUERIES, k=3)


def decoded(widget: ipywidgets.Image) -> np.ndarray:
    """The picture of a widget as a 4 x 4 image of shades from 0 to 255, all channels equal, pixels repeated."""
    shown = np.rint(255 * imread(io.BytesIO(widget.value), format="png")[..., :3])
    edge = len(shown) // 4
    assert edge * 4 == len(shown) >= 2 * live.EDGE
    shades = shown[::edge, ::edge]
    np.testing.assert_array_equal(shown, shades.repeat(edge, 0).repeat(edge, 1))
    np.testing.assert_array_equal(shades, shades[..., :1].repeat(3, 2))
    return shades[..., 0]


def thousandths(score: float) -> str:
    return f"{1000 * score:+.1f}" if abs(1000 * score) >= 1 else f"{1000 * score:+.1g}"


def shows(panel: live.Panel, inputs: torch.Tensor, label: int) -> None:
    """Assert that every widget says what the index says of these inputs and this label."""
    top = INDEX.top(Examples(inputs[None], torch.tensor([label])), panel.k)
    low, high = float(TRAIN.inputs.min()), float(TRAIN.inputs.max())

    def check(image, inputs):
        expected = 255 * (high - inputs.view(4, 4).clamp(low, high)) / (high - low)
        np.testing.assert_allclose(decoded(image), expected, atol=0.51)

    check(panel.shown, inputs)
    sides = (
        (panel.proponents, top.proponents, top.proponent_scores),
        (panel.opponents, top.opponents, top.opponent_scores),
    )
    for boxes, ids, scores in sides:
        for (image, caption), i, score in zip(boxes, ids[0].tolist(), scores[0].tolist(), strict=True):
            check(image, TRAIN.inputs[i])
            assert f"a {int(TRAIN.targets[i])}, {thousandths(score)}" in caption.value
    probabilities = INDEX.basis.problem.outputs(inputs[None])[0].softmax(0)
    assert f"says <b>{int(probabilities.argmax())}</b>" in panel.says.value
    assert f"label <b>{label}</b>" in panel.says.value
    for c, p in enumerate(probabilities.tolist()):
        assert f"{c}: {p:.1%}" in panel.says.value
    assert re.search(r"12 training images scored in \d+\.\d ms", panel.says.value)


def predicted(inputs: torch.Tensor) -> int:
    return int(INDEX.basis.problem.outputs(inputs[None]).argmax())


def test_a_picked_query_is_shown_with_its_proponents_and_opponents(panel):
    shows(panel, QUERIES.inputs[0], predicted(QUERIES.inputs[0]))
    for i in (5, 2):
        panel.picker.value = i
        shows(panel, QUERIES.inputs[i], predicted(QUERIES.inputs[i]))
        assert f"labelled {int(QUERIES.targets[i])}" in panel.says.value and not panel.is_drawn
    assert (panel.picker.min, panel.picker.max) == (0, 6)


def test_every_label_can_be_asked_about(panel):
    for c in range(3):
        panel.about.value = c
        shows(panel, QUERIES.inputs[0], c)
    panel.about.value = None
    shows(panel, QUERIES.inputs[0], predicted(QUERIES.inputs[0]))


def test_clicks_draw_white_grey_and_black_and_are_answered(panel):
    low, high = panel.low, panel.high
    panel.clear.click()
    drawn = torch.full((16,), low, dtype=torch.float64)
    shows(panel, drawn, predicted(drawn))
    assert {button.style.button_color for button in panel.pixels} == {"rgb(255, 255, 255)"}
    for grey, value in (("128", (low + high) / 2), ("0", high), ("255", low), ("128", (low + high) / 2)):
        panel.pixels[6].click()
        drawn[6] = value
        torch.testing.assert_close(panel.inputs, drawn)
        shows(panel, drawn, predicted(drawn))
        assert panel.pixels[6].style.button_color == f"rgb({grey}, {grey}, {grey})"
    assert "drawn by you" in panel.says.value


def test_drawing_starts_from_the_picked_query_and_can_be_undone(panel):
    panel.picker.value = 3
    panel.pixels[0].click()
    assert torch.equal(panel.inputs[1:], QUERIES.inputs[3, 1:]) and panel.inputs[0] != QUERIES.inputs[3, 0]
    assert panel.is_drawn
    panel.reset.click()
    shows(panel, QUERIES.inputs[3], predicted(QUERIES.inputs[3]))
    assert not panel.is_drawn


def test_the_widget_holds_all_parts(panel):
    def below(widget):
        return {widget, *(part for child in getattr(widget, "children", ()) for part in below(child))}

    parts = below(panel.widget)
    examples = [part for box in (*panel.proponents, *panel.opponents) for part in box]
    assert parts >= {panel.picker, panel.about, panel.shown, panel.says, panel.clear, *panel.pixels, *examples}
    assert len(panel.pixels) == 16


def test_large_images_are_picked_only():
    index, queries = indexed(width=17, n=8)
    panel = live.Panel(index, queries, k=2)
    assert panel.pixels == []
    texts = [child.value for child in panel.widget.children[0].children if isinstance(child, ipywidgets.HTML)]
    assert texts == ["Images of 17 x 17 pixels are too fine to draw by clicks: pick one."]
    top = index.top(Examples(queries.inputs[4:5], index.basis.problem.outputs(queries.inputs[4:5]).argmax(1)), 2)
    panel.picker.value = 4
    for (_, caption), score in zip(panel.proponents, top.proponent_scores[0].tolist(), strict=True):
        assert f", {thousandths(score)}" in caption.value


def test_an_answer_is_what_the_index_gives():
    answer = live.ask(INDEX, QUERIES.inputs[1], label=2, k=4)
    top = INDEX.top(Examples(QUERIES.inputs[1:2], torch.tensor([2])), 4)
    for name in ("proponents", "proponent_scores", "opponents", "opponent_scores"):
        assert torch.equal(getattr(answer.top, name), getattr(top, name))
    assert answer.label == 2 and answer.milliseconds > 0
    assert answer.prediction == predicted(QUERIES.inputs[1])
    assert float(answer.probabilities.sum()) == pytest.approx(1)


def test_the_picture_shows_the_answer():
    answer = live.ask(INDEX, QUERIES.inputs[1], k=2)
    figure = live.picture(INDEX, QUERIES.inputs[1], answer, "query 1")
    query, *examples = figure.axes
    assert query.get_title() == f"query 1\nmodel: {answer.prediction} ({float(answer.probabilities.max()):.0%})"
    for axis, i in zip(examples, [*answer.top.proponents[0], *answer.top.opponents[0]], strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), TRAIN.inputs[i].view(4, 4))
        assert axis.get_title().startswith(f"a {int(TRAIN.targets[i])}, ")
    plt.close(figure)


def test_watching_gives_a_widget_and_without_ipywidgets_a_picture_that_says_so(monkeypatch):
    assert isinstance(live.watch(INDEX, QUERIES, k=2), ipywidgets.Widget)
    monkeypatch.setattr(live, "widgets", None)
    figure = live.watch(INDEX, QUERIES, k=2)
    assert "ipywidgets is not installed" in figure.get_suptitle()
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), QUERIES.inputs[0].view(4, 4))
    plt.close(figure)


@pytest.mark.parametrize("shape", [(16,), (4, 4), (1, 4, 4), (4, 4, 1), (1, 16)])
def test_square_images_of_several_shapes(shape):
    values = torch.arange(16.0)
    np.testing.assert_array_equal(live.as_image(values.view(shape)), values.view(4, 4))


@pytest.mark.parametrize("shape", [(15,), (2, 8), (3, 4, 4), (4, 4, 4), (1,), (2, 2, 4)])
def test_what_is_no_square_image_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"(h, h) or flattened, got shape {shape}")):
        live.as_image(torch.zeros(shape))


def test_an_index_of_other_things_is_refused():
    wide = random_problem((6, 5, 3))
    with pytest.raises(ValueError, match=r"got shape \(6,\)"):
        live.Panel(build_index(wide, DYNAMICS, labelled(4, 6), SETTING), labelled(4, 6))
    with pytest.raises(ValueError, match=r"expected an index of examples.*got one of groups"):
        live.Panel(INDEX.grouped(torch.arange(12) % 2), QUERIES)
    with pytest.raises(ValueError, match="holds id 13, but the model's training set ends at 11"):
        live.Panel(INDEX.append(labelled(2, 16, seed=9)), QUERIES)
    regression = random_problem((16, 5, 1))
    with pytest.raises(ValueError, match=r"only a classifier.*torch\.float64"):
        live.Panel(build_index(regression, DYNAMICS, continuous(4, 16), SETTING), QUERIES)


def test_queries_and_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"shape \(n, 16\), got \(n, 9\)"):
        live.Panel(INDEX, labelled(4, 9))
    with pytest.raises(ValueError, match=r"1\.\.12, .* got 13"):
        live.Panel(INDEX, QUERIES, k=13)
    with pytest.raises(ValueError, match="label 3 is out of range"):
        live.ask(INDEX, QUERIES.inputs[0], label=3)
    with pytest.raises(ValueError, match=r"shape \(n, 16\), got \(n, 4, 4\)"):
        live.ask(INDEX, QUERIES.inputs[0].view(4, 4))
