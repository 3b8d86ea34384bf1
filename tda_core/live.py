"""Watching a model live: pick or draw an image, and see at once which training images speak for its label.

`ask` answers one query, `picture` draws an answer, and `watch` gives a panel of widgets that redraws at every change,
where ipywidgets is installed. The panel lives in a notebook whose front end shows widgets, and opens no window.
"""

import importlib
import importlib.util
import io
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from tda_core import plots
from tda_core.examples import Examples
from tda_core.index import Index, Top

# no dependency of the library, but of its notebooks
widgets = importlib.import_module("ipywidgets") if importlib.util.find_spec("ipywidgets") else None

MAX_DRAWN = 16  # pixels a side that are drawn by hand: more would be too fine a grid of buttons
LEVELS = (0.0, 0.5, 1.0)  # what a click leads through, as shares of the training images' range: white, grey, black
EDGE = 72  # screen pixels a side of a training image; the query's is twice as long
BUTTON = 26  # screen pixels a side of a pixel that is drawn on
WITHOUT_WIDGETS = 'ipywidgets is not installed, so this picture stands still: pip install -e ".[site]"'


@dataclass(frozen=True, eq=False)
class Answer:
    """What an index says about one query.

    label: the one whose loss is attributed. probabilities: (C,) of the model. top: strongest proponents and
    opponents, (1, k) each. milliseconds: what the attribution took, without the prediction before it.
    """

    label: int
    probabilities: Tensor
    top: Top
    milliseconds: float

    @property
    def prediction(self) -> int:
        return int(self.probabilities.argmax())


def ask(index: Index, inputs: Tensor, *, label: int | None = None, k: int = 5) -> Answer:
    """Predict one input and find the k strongest proponents and opponents of a label.

    inputs: one example, of the shape of a training example. label: default what the model predicts, since nobody
    labels a drawing. Raises ValueError for inputs of another shape, a label out of range, and k outside 1..n.
    """
    problem = index.basis.problem
    query = Examples(inputs[None], torch.tensor([label or 0]))
    problem.check(query)
    with torch.no_grad():
        probabilities = problem.outputs(query.inputs)[0].softmax(0)
    label = int(probabilities.argmax()) if label is None else label
    start = time.perf_counter()
    top = index.top(Examples(query.inputs, torch.tensor([label])), k)
    return Answer(label, probabilities, top, 1e3 * (time.perf_counter() - start))


def picture(index: Index, inputs: Tensor, answer: Answer, title: str = "query") -> Figure:
    """An answer as a figure that stands still. Raises ValueError where inputs are no square images."""
    _check_index(index)
    found = {False: [], True: []}
    for position, caption, is_opponent in _examples(index, answer):
        found[is_opponent].append((as_image(index.basis.problem.train.inputs[position]), caption))
    title += f"\nmodel: {answer.prediction} ({float(answer.probabilities.max()):.0%})"
    return plots.query_gallery((as_image(inputs), title), found[False], found[True])


def watch(index: Index, queries: Examples, *, k: int = 5) -> "widgets.Widget | Figure":
    """The widget of a `Panel`; without ipywidgets the `picture` of the first query, saying what is missing."""
    if widgets:
        return Panel(index, queries, k=k).widget
    figure = picture(index, queries.inputs[0], ask(index, queries.inputs[0], k=k))
    figure.suptitle(WITHOUT_WIDGETS, fontsize=12)
    return figure


class Panel:
    """Widgets that pick a query, draw over it, choose the label asked about, and show the answer.

    Images of at most `MAX_DRAWN` pixels a side can be drawn on, each click the next level; larger ones can only be
    picked. Raises ValueError where images are not square, the queries do not fit the index's model, the index is of
    groups or holds examples that its model was not trained on, or k is not in 1..n.
    """

    def __init__(self, index: Index, queries: Examples, *, k: int = 5) -> None:
        _check_index(index)
        index.basis.problem.check(queries)
        self.index, self.queries, self.k = index, queries, k
        train = index.basis.problem.train.inputs
        self.low, self.high = float(train.min()), float(train.max())
        self.inputs, self.width = queries.inputs[0], len(as_image(queries.inputs[0]))
        labels = [("what the model says", None), *((str(c), c) for c in range(index.basis.problem.n_outputs))]
        self.picker = widgets.IntSlider(0, 0, len(queries) - 1, description="test query")
        self.about = widgets.Dropdown(options=labels, description="label")
        self.says, self.shown = widgets.HTML(), self._image(2 * EDGE)
        self.proponents, self.opponents = ([self._example() for _ in range(k)] for _ in range(2))
        self.pixels = [widgets.Button(layout=self._square(BUTTON)) for _ in range(self._n_drawn)]
        self.clear, self.reset = (widgets.Button(description=text) for text in ("clear", "undo drawing"))
        self.widget = self._arranged()
        self._connect()
        self._pick()

    @property
    def is_drawn(self) -> bool:
        """Whether what is asked about differs from the picked query."""
        return not torch.equal(self.inputs, self.queries.inputs[self.picker.value])

    @property
    def _n_drawn(self) -> int:
        return self.width**2 if self.width <= MAX_DRAWN else 0

    def press(self, pixel: int) -> None:
        """Lead a pixel, counted row by row, from the level that it is nearest to to the next one."""
        flat = self.inputs.flatten().clone()
        levels = [self.low + share * (self.high - self.low) for share in LEVELS]
        nearest = min(range(len(levels)), key=lambda i: abs(levels[i] - float(flat[pixel])))
        flat[pixel] = levels[(nearest + 1) % len(levels)]
        self._show(flat.view_as(self.inputs))

    def _pick(self, _: Any = None) -> None:
        self._show(self.queries.inputs[self.picker.value])

    def _clear(self, _: Any = None) -> None:
        self._show(torch.full_like(self.inputs, self.low))

    def _show(self, inputs: Tensor) -> None:
        self.inputs = inputs
        greys = self._greys(inputs).flatten().tolist()
        for position, button in enumerate(self.pixels):
            grey = greys[position]
            button.style.button_color = f"rgb({grey}, {grey}, {grey})"
        self._answer()

    def _answer(self, _: Any = None) -> None:
        answer = ask(self.index, self.inputs, label=self.about.value, k=self.k)
        train = self.index.basis.problem.train.inputs
        boxes = iter([*self.proponents, *self.opponents])
        for (position, caption, _), (image, text) in zip(_examples(self.index, answer), boxes, strict=True):
            image.value, text.value = as_png(self._greys(train[position])), f"<center>{caption}</center>"
        self.shown.value = as_png(self._greys(self.inputs))
        self.says.value = self._sentence(answer)

    def _sentence(self, answer: Answer) -> str:
        likely = answer.probabilities.topk(min(3, len(answer.probabilities)))
        each = ", ".join(f"{c}: {p:.1%}" for p, c in zip(likely.values.tolist(), likely.indices.tolist(), strict=True))
        source = "drawn by you" if self.is_drawn else f"labelled {int(self.queries.targets[self.picker.value])}"
        return (
            f"The model says <b>{answer.prediction}</b> ({each}); this image is {source}.<br>"
            f"Scores are of the loss of label <b>{answer.label}</b>, in thousandths of a nat.<br>"
            f"{len(self.index)} training images scored in {answer.milliseconds:.1f} ms."
        )

    def _greys(self, inputs: Tensor) -> np.ndarray:
        return as_greys(as_image(inputs), self.low, self.high)

    # -- layout --

    def _arranged(self) -> "widgets.Widget":
        columns = widgets.Layout(grid_template_columns=f"repeat({self.width}, {BUTTON}px)", grid_gap="1px")
        grid = [widgets.GridBox(self.pixels, layout=columns), widgets.HBox([self.clear, self.reset])]
        too_fine = f"Images of {self.width} x {self.width} pixels are too fine to draw by clicks: pick one."
        drawing = grid if self.pixels else [widgets.HTML(too_fine)]
        left = widgets.VBox([self.picker, self.about, *drawing])
        sides = (("Proponents", plots.BLUE, self.proponents), ("Opponents", plots.RED, self.opponents))
        rows = []
        for name, colour, examples in sides:
            title = widgets.HTML(f'<b style="color: {colour}">{name}</b>')
            rows += [title, widgets.HBox([widgets.VBox(example) for example in examples])]
        return widgets.HBox([left, widgets.VBox([widgets.HBox([self.shown, self.says]), *rows])])

    def _connect(self) -> None:
        self.picker.observe(self._pick, "value")
        self.about.observe(self._answer, "value")
        self.clear.on_click(self._clear)
        self.reset.on_click(self._pick)
        for position, button in enumerate(self.pixels):
            button.on_click(lambda _, position=position: self.press(position))

    def _example(self) -> "tuple[widgets.Image, widgets.HTML]":
        return self._image(EDGE), widgets.HTML()

    def _image(self, edge: int) -> "widgets.Image":
        layout = widgets.Layout(
            width=f"{edge}px", height=f"{edge}px", margin="2px 8px 2px 2px", border="1px solid #888"
        )
        return widgets.Image(format="png", layout=layout)

    def _square(self, edge: int) -> "widgets.Layout":
        return widgets.Layout(width=f"{edge}px", height=f"{edge}px", margin="0", padding="0", border="1px solid #bbb")


def as_image(inputs: Tensor) -> np.ndarray:
    """One example, (h, h), (1, h, h) or flattened, as a square image (h, h). Raises ValueError for what is none."""
    edge = math.isqrt(inputs.numel())
    sides = [size for size in inputs.shape if size != 1]
    if edge < 2 or edge**2 != inputs.numel() or sides not in ([edge**2], [edge, edge]):
        raise ValueError(f"expected a square grey image, (h, h) or flattened, got shape {tuple(inputs.shape)}")
    return inputs.reshape(edge, edge).numpy()


def as_greys(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values as shades for the screen, uint8: `low` and below 255 (white), `high` and above 0 (black)."""
    shares = (image - low) / ((high - low) or 1.0)
    return np.rint(255 * (1 - shares.clip(0, 1))).astype(np.uint8)


def as_png(greys: np.ndarray) -> bytes:
    """Shades (h, w) as a PNG, pixels repeated so that a browser does not blur them."""
    repeats = math.ceil(2 * EDGE / len(greys))
    enlarged = np.kron(greys, np.ones((repeats, repeats), np.uint8))
    buffer = io.BytesIO()
    imsave(buffer, np.stack([enlarged] * 3, 2), format="png")
    return buffer.getvalue()


def _check_index(index: Index) -> None:
    """Raise ValueError where an index's units are not the images that its model was trained on."""
    train = index.basis.problem.train
    if not train.is_classification:
        raise ValueError(f"only a classifier can be watched, but these targets are {train.targets.dtype}")
    as_image(train.inputs[0])
    if index.units != "examples":
        raise ValueError(f"expected an index of examples, whose images can be shown, got one of {index.units}")
    if len(index) and int(index.ids.max()) >= len(train):
        raise ValueError(
            f"the index holds id {int(index.ids.max())}, but the model's training set ends at {len(train) - 1}: "
            "appended examples have no image here"
        )


def _examples(index: Index, answer: Answer) -> Iterator[tuple[int, str, bool]]:
    """(position in the training set, caption, is an opponent) of proponents, then of opponents."""
    targets, top = index.basis.problem.train.targets, answer.top
    sides = ((top.proponents, top.proponent_scores), (top.opponents, top.opponent_scores))
    for is_opponent, (ids, scores) in enumerate(sides):
        for position, score in zip(ids[0].tolist(), scores[0].tolist(), strict=True):
            scaled = 1000 * score
            number = f"{scaled:+.1f}" if abs(scaled) >= 1 else f"{scaled:+.1g}"
            yield position, f"a {int(targets[position])}, {number}", bool(is_opponent)
