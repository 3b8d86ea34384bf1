import base64
import logging
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import nbformat
import pytest
from conftest import FIRST

from tda_core import jobs, paths, site

NOTEBOOKS = ["smoke/demo/01_first.digits.html", "smoke/demo/02_second.digits.html"]
PNG = base64.b64encode(b"\x89PNG").decode()


class Links(HTMLParser):
    """Collects what a page would fetch, its tags, and its links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched, self.links, self.tags, self.alts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        if tag == "a":
            self.links.append(found.get("href", ""))
        elif tag in ("script", "link", "img", "iframe", "source", "object"):
            self.fetched.append(found.get("src") or found.get("href") or found.get("data") or "")
        if tag == "img":
            self.alts.append(found.get("alt"))


def check_offline(text: str) -> Links:
    """A page that a browser can show without fetching anything, and that assistive software can read."""
    page = Links(text)
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    assert re.search(r"<title>[^<]+</title>", text)
    assert all(source.startswith("data:") for source in page.fetched)
    assert "script" not in page.tags and "link" not in page.tags
    assert not re.search(r"@import|url\(\s*['\"]?http", text)
    assert all(page.alts) or not page.alts
    return page


def execute(project, cells, **metadata) -> jobs.Job:
    """Replace the executed first notebook by these cells; returns its job."""
    job = jobs.plan("smoke", ["demo"])[0]
    job.run.executed.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=cells, metadata=metadata)))
    return job


def test_pages_and_index_open_offline(finished):
    folder = finished.root / "site"
    index = (folder / "index.html").read_text()
    page = check_offline(index)
    for link in page.links:
        assert (folder / link).is_file()
    for link in NOTEBOOKS:
        text = (folder / link).read_text()
        assert "../../index.html" in check_offline(text).links
        assert "<math" in text and "$x^2$" not in text and "<h1" in text
    assert len(page.fetched) == 2  # a figure of each notebook
    for words in (
        "Demo",
        "A title",
        "It doubles",
        "6 [1, 90]",
        "holds in sign only",
        "not run at this profile",
        " s, 20",
    ):
        assert words in index


def test_only_what_changed_is_written_again(finished):
    assert site.build(jobs.plan("smoke", ["demo"])) == []
    page = finished.root / "site" / "smoke" / "demo" / "01_first.digits.html"
    page.unlink()
    assert site.build(jobs.plan("smoke", ["demo"])) == [page, finished.root / "site" / "index.html"]


def test_a_gallery_is_copied_and_linked_and_a_run_without_one_has_no_link(finished):
    folder = finished.root / "site"
    index, own, other = (folder / name for name in ("index.html", *NOTEBOOKS))
    copy = folder / "smoke/demo/01_first.digits.gallery.html"
    assert copy.read_text() == "<p>3 scores</p>" and copy == site.gallery_path(jobs.plan("smoke", ["demo"])[0])
    assert Links(index.read_text()).links == [NOTEBOOKS[0], copy.relative_to(folder).as_posix(), NOTEBOOKS[1]]
    assert [(own.parent / link).resolve() for link in Links(own.read_text()).links[:2]] == [index, copy]
    assert 'aria-label="gallery of A title (digits)"' in index.read_text() and "gallery" not in other.read_text()
    assert sorted(folder.rglob("*gallery*")) == [copy]


def test_a_changed_gallery_is_copied_again_and_one_that_is_gone_leaves_no_copy(finished):
    every = jobs.plan("smoke", ["demo"])
    run, copy, page = every[0].run, site.gallery_path(every[0]), site.page_path(every[0])
    run.gallery.write_text("new")
    assert site.build(every) == [copy, page, finished.root / "site" / "index.html"] and copy.read_text() == "new"
    assert site.build(every) == []
    run.gallery.unlink()  # as a run of the notebook that writes none any more leaves it
    run.executed.touch()
    run.stamp.touch()
    assert site.build(every) == [page, finished.root / "site" / "index.html"] and not copy.exists()
    assert not any("gallery.html" in path.read_text() for path in (finished.root / "site").rglob("*.html"))


def test_an_unfinished_runs_gallery_stays_out(finished):
    every = jobs.plan("smoke", ["demo"])
    every[0].run.stamp.unlink()
    every[0].run.gallery.write_text("half")
    site.build(every)
    assert site.gallery_path(every[0]).read_text() == "<p>3 scores</p>"


def test_index_of_nothing(project):
    assert "Nothing has run yet" in site.index_page([])
    check_offline(site.index_page([]))
    assert site.build(jobs.plan("smoke", ["demo"])) == []


def test_outputs_are_embedded_and_scripts_left_out(finished):
    output = nbformat.v4.new_output
    cells = [
        nbformat.v4.new_code_cell(
            "print('<b>')",
            outputs=[
                output("stream", text="a < b & c\n"),
                output("display_data", {"image/png": PNG, "text/plain": "<Figure>"}),
                output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%| bar"}),
                output("display_data", {"application/javascript": "alert(1)"}),
                output("execute_result", {"text/html": "<table><tr><td>7</td></tr></table>", "text/plain": "7"}),
                output("error", ename="ValueError", evalue="1 < 2", traceback=["\x1b[31mValueError\x1b[0m: 1 < 2"]),
            ],
        ),
        nbformat.v4.new_code_cell("cost = '$5' + '$6'"),
    ]
    text = site.notebook_page(execute(finished, cells))
    page = check_offline(text)
    assert page.fetched == [f"data:image/png;base64,{PNG}"]
    assert "a &lt; b &amp; c" in text and "<td>7</td>" in text and "1 &lt; 2" in text
    assert "0%| bar" not in text and "alert(1)" not in text
    assert "<math" not in text  # dollars in code are no equations
    assert page.alts == ["Figure drawn by the cell above"]


def test_the_state_of_widgets_is_left_out(finished):
    shown = {"application/vnd.jupyter.widget-view+json": {"model_id": "m1"}, "text/plain": "HBox(children=(1,))"}
    cell = nbformat.v4.new_code_cell("panel", outputs=[nbformat.v4.new_output("execute_result", shown)])
    model = {"model_name": "HBoxModel", "model_module": "@jupyter-widgets/controls", "state": {"children": []}}
    state = {"state": {"m1": model}, "version_major": 2, "version_minor": 0}
    widgets = {"application/vnd.jupyter.widget-state+json": state}
    text = site.notebook_page(execute(finished, [cell], widgets=widgets))
    check_offline(text)
    assert "panel" in text and "HBox" not in text and "jupyter-widgets" not in text


def test_pictures_in_markdown_are_those_beside_each_notebook(finished):
    """One exporter makes all pages, and the folder that it looks in is each page's own."""
    cell = nbformat.v4.new_markdown_cell("![drawn by hand](picture.png)")
    folder = finished.root / "notebooks" / "demo"
    job = execute(finished, [cell])
    (folder / "picture.png").write_bytes(base64.b64decode(PNG))
    other = replace(job, notebook=finished.root / "notebooks" / "other" / "01_first.ipynb")
    shutil.copytree(folder, other.notebook.parent)
    (other.notebook.parent / "picture.png").write_bytes(b"another")
    for one, picture in ((job, PNG), (other, base64.b64encode(b"another").decode()), (job, PNG)):
        assert Links(site.notebook_page(one)).fetched == [f"data:image/png;base64,{picture}"]


def test_equations_in_markdown_become_mathml(finished, caplog):
    source = r"""# Loss $\ell$ of <data> & more

Inline $\nabla_\theta \ell(z;\theta)^\top (H+\lambda I)^{-1}$, cost 5\$ and `$code$`.

$$\hat\tau = \frac{1}{n}\sum_i x_i \tag{1}$$

\begin{aligned} a &= b \\ c &= d \end{aligned}
"""
    with caplog.at_level(logging.WARNING):
        page = site.notebook_page(execute(finished, [nbformat.v4.new_markdown_cell(source)]))
    text = page.split("</style>")[1]
    assert text.count("<math") == 4 and text.count('display="block"') == 2
    assert "(1)" in text and "<mtable" in text and "$code$" in text and "5$" in text
    assert caplog.text == ""
    assert not re.search(r"\\[a-z]+", text)


@pytest.mark.parametrize("latex", [r"\frac{1}{", r"x + \nosuchcommand{y}", r"\left( x"])
def test_an_equation_that_cannot_be_converted_is_shown_as_written(latex, caplog):
    with caplog.at_level(logging.WARNING):
        assert site.to_mathml(latex, "inline") == f"<code>{latex}</code>"
    assert latex in caplog.text


def test_text_is_escaped_everywhere(finished):
    finished.notebook("demo/01_first", FIRST, prose="# <script>alert(1)</script>")
    claims = finished.root / "papers" / "demo" / "claims.toml"
    claims.write_text(claims.read_text().replace("It doubles", "It <doubles> & more"))
    index = site.index_page(jobs.plan("smoke", ["demo"]))
    assert "&lt;script&gt;" in index and "It &lt;doubles&gt; &amp; more" in index
    check_offline(index)


def test_a_notebook_without_a_heading_is_called_by_its_name(finished):
    finished.notebook("demo/01_first", FIRST, prose="no heading")
    assert site.title_of(jobs.plan("smoke", ["demo"])[0]) == "01_first"
    assert site.page_path(jobs.plan("smoke", ["demo"])[0]) == paths.SITE / "smoke" / "demo" / "01_first.digits.html"
