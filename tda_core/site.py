"""The executed notebooks as web pages with an index; they open offline (the only importer of nbconvert).

Pages need no script and nothing from elsewhere: equations become MathML, pictures are embedded, and the
style is in the page, for light and dark screens. A notebook's gallery, where it wrote one, is copied as it is:
galleries are self-contained too (with a script of their own inside), so links between files are all that a site
needs, and it opens from a disk.
"""

import base64
import html
import logging
import os
import re
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from tda_core import paths
from tda_core.claims import COLUMNS, claims_table
from tda_core.files import atomic_write
from tda_core.jobs import Job, cell_source, load_paper, read_notebook, without_iri_grammar
from tda_core.references import PROFILES, duration, load_metrics
from tda_core.stamps import read_stamp

if TYPE_CHECKING:
    from nbconvert.exporters import HTMLExporter

log = logging.getLogger(__name__)

PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".svg": "image/svg+xml"}
NEED_SCRIPTS = {"application/vnd.jupyter.widget-view+json", "application/javascript"}  # progress bars, panels

STYLE = """
:root { color-scheme: light dark; --text: #1d2327; --soft: #59636b; --back: #ffffff; --box: #f4f6f8;
  --line: #d5dade; --link: #0b5cad; --key: #8a2be2; --str: #2b6d2f; --num: #a04000; --err: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8eb; --soft: #a3adb5; --back: #15191c; --box: #1f2529;
  --line: #3a434a; --link: #7fb8f5; --key: #c9a1f5; --str: #93cf96; --num: #f0b07a; --err: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 17px/1.6 system-ui, sans-serif; }
main, nav { max-width: 60rem; margin: 0 auto; padding: 0.5rem 1.2rem; }
main { padding-bottom: 4rem; }
a { color: var(--link); }
a.anchor-link { visibility: hidden; text-decoration: none; }
h1, h2, h3 { line-height: 1.25; margin: 1.6em 0 0.5em; }
.soft { color: var(--soft); }
pre, code { font: 0.88em/1.5 ui-monospace, monospace; }
pre { overflow-x: auto; padding: 0.7rem 0.9rem; background: var(--box); border-radius: 6px; margin: 0.6rem 0; }
.output pre, .output_subarea pre { background: none; border-left: 3px solid var(--line); border-radius: 0; }
.output_stderr pre { color: var(--soft); }
.prompt { display: none; }
img, svg { max-width: 100%; height: auto; }
.output_png img, figure img { background: #ffffff; border-radius: 6px; padding: 4px; }
figure { margin: 1rem 0; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.8rem 0; font-size: 0.92em; }
th, td { padding: 0.35rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
math[display="block"] { margin: 0.8rem 0; overflow-x: auto; }
.k, .kn, .kc, .kd, .ow, .nb { color: var(--key); } .s, .s1, .s2, .sa, .sd, .si { color: var(--str); }
.mi, .mf { color: var(--num); } .c1, .c { color: var(--soft); font-style: italic; }
.ansi-red-fg, .ansi-red-intense-fg { color: var(--err); }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def build(jobs: Sequence[Job]) -> list[Path]:
    """Bring pages and galleries of these jobs, as far as they have run, and the index up to date.

    Returns what was written. The index shows these jobs alone, so hand over those of all profiles.
    """
    finished = [job for job in jobs if job.run.executed.is_file() and read_stamp(job.run)]
    written = []
    for job in finished:
        page, gallery, copy = page_path(job), job.run.gallery, gallery_path(job)
        if not gallery.is_file():
            copy.unlink(missing_ok=True)  # what an earlier run left, to which nothing links any more
        elif _is_older(copy, gallery):
            atomic_write(copy, gallery.read_bytes())  # before the pages that link to it
            written.append(copy)
        if copy in written or _is_older(page, job.run.executed):
            atomic_write(page, notebook_page(job))
            written.append(page)
    index = paths.SITE / "index.html"
    sources = [job.run.stamp for job in finished] + [job.run.metrics for job in finished if job.run.metrics.is_file()]
    if written or any(_is_older(index, source) for source in sources):
        atomic_write(index, index_page(finished))
        written.append(index)
    return written


def page_path(job: Job) -> Path:
    """site/<profile>/<slug>/<notebook>.<variant>.html"""
    return paths.SITE / job.run.profile / job.run.slug / f"{job.run.stem}.html"


def gallery_path(job: Job) -> Path:
    """site/<profile>/<slug>/<notebook>.<variant>.gallery.html, a copy of the self-contained page `Run.gallery`."""
    page = page_path(job)
    return page.with_name(f"{page.stem}.gallery.html")


def notebook_page(job: Job) -> str:
    """An executed notebook as one self-contained page."""
    exporter = _exporter()
    import nbformat

    notebook = nbformat.reads(job.run.executed.read_text(encoding="utf-8"), as_version=4)
    notebook.metadata.pop("widgets", None)  # their state would be embedded, for a script that is not there
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not NEED_SCRIPTS & set(output.get("data", {}))]
    exporter.register_filter("markdown2html", partial(_markdown, str(job.notebook.parent)))
    content, _ = exporter.from_notebook_node(notebook)
    content = content.replace("No description has been provided for this image", "Figure drawn by the cell above")
    up = os.path.relpath(paths.SITE / "index.html", page_path(job).parent)
    facts = html.escape(f"{job.run.variant}, profile {job.run.profile}, {_facts(job)}")
    links = f'<a href="{up}">All notebooks</a>{_gallery_link(job, page_path(job).parent)}'
    body = f'<nav>{links} <span class="soft">{facts}</span></nav>\n<main>{content}</main>'
    return PAGE.format(title=html.escape(f"{title_of(job)} ({job.run.variant})"), style=STYLE, body=body)


def index_page(finished: Sequence[Job]) -> str:
    """Everything that has run: by profile and paper, the claims table, links, run times and pictures."""
    parts = ["<h1>Training data attribution: executed notebooks</h1>"]
    if not finished:
        parts.append("<p>Nothing has run yet.</p>")
    for profile in reversed(PROFILES):
        slugs = list(dict.fromkeys(job.run.slug for job in finished if job.run.profile == profile))
        if slugs:
            parts.append(f"<h2>Profile {profile}</h2>")
        for slug in slugs:
            mine = [job for job in finished if (job.run.profile, job.run.slug) == (profile, slug)]
            parts += _section(slug, mine)
    return PAGE.format(title="Executed notebooks", style=STYLE, body="<main>" + "\n".join(parts) + "</main>")


def to_mathml(latex: str, display: str) -> str:
    """An equation as MathML, which browsers draw by themselves; display is "inline" or "block".

    What cannot be converted is shown as it was written, with a warning in the log.
    """
    from latex2mathml.converter import convert

    tag = re.search(r"\\tag\{([^{}]*)\}", latex)
    plain = latex.replace(tag.group(0), "") if tag else latex
    environments = r"(\\(?:begin|end))\{(?:align(?:ed)?|gather(?:ed)?|split)\*?\}"
    plain = re.sub(environments, r"\1{align*}", plain)  # one that the converter knows, and does not number
    try:
        mathml = convert(plain.strip(), display=display)
        unknown = re.search(r"<m\w+>\\[a-zA-Z]+", mathml)
    except Exception as error:  # its errors have no base of their own
        mathml, unknown = "", error
    if unknown:
        log.warning("an equation is shown as LaTeX, because it cannot be converted: %s", latex.strip())
        return f"<code>{html.escape(latex.strip())}</code>"
    number = f"<mspace width='2em'/><mtext>({html.escape(tag.group(1))})</mtext>" if tag else ""
    return mathml.replace("</math>", f"{number}</math>")


def title_of(job: Job) -> str:
    """A notebook's first heading, its file's name where it has none."""
    for cell in read_notebook(job.notebook)["cells"]:
        heading = re.search(r"^#\s+(.+)", cell_source(cell), re.MULTILINE) if cell["cell_type"] == "markdown" else None
        if heading:
            return heading.group(1).strip()
    return job.run.notebook


@cache
def _exporter() -> "HTMLExporter":
    """One for all pages: its templates are compiled once, which takes longer than a page."""
    with without_iri_grammar():
        from nbconvert.exporters import HTMLExporter  # here: it takes a second, and most runs have no page to make
    exporter = HTMLExporter(template_name="basic")
    exporter.log = logging.getLogger("nbconvert.quiet")  # it warns of each picture without a description
    exporter.log.setLevel(logging.ERROR)
    return exporter


def _markdown(folder: str, source: str) -> str:
    """Markdown as HTML, with equations as MathML, where nbconvert leaves them to a script from the network.

    folder: of the notebook, where its pictures lie.
    """
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str) -> str:
            return to_mathml(body, "inline")

        def block_math(self, body: str) -> str:
            return to_mathml(body, "block")

        def latex_environment(self, name: str, body: str) -> str:
            return to_mathml(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")

    renderer = Renderer(escape=False, embed_images=True, path=folder, exclude_anchor_links=True)
    return MarkdownWithMath(renderer=renderer).render(source)


def _section(slug: str, jobs: Sequence[Job]) -> list[str]:
    """One paper in one profile."""
    parts = [f"<h3>{html.escape(load_paper(slug).title)}</h3>"]
    metrics = jobs[0].run.metrics
    rows = claims_table(slug, load_metrics(metrics)["metrics"]) if metrics.is_file() else []
    if rows:
        head = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS)
        lines = [[html.escape(getattr(row, column)) for column in COLUMNS] for row in rows]
        body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
        parts.append(f'<div class="wide"><table><caption class="soft">Claims</caption>\n<thead><tr>{head}</tr></thead>')
        parts.append(f"<tbody>\n{body}\n</tbody></table></div>")
    parts.append("<ul>")
    for job in jobs:
        link = html.escape(os.path.relpath(page_path(job), paths.SITE))
        title, facts = html.escape(title_of(job)), html.escape(f"{job.run.variant}, {_facts(job)}")
        gallery = _gallery_link(job, paths.SITE)
        parts.append(f'<li><a href="{link}">{title}</a>{gallery} <span class="soft">{facts}</span></li>')
    parts.append("</ul>")
    pictures = [_picture(path, job) for job in jobs for path in sorted(job.run.figures.rglob("*"))]
    if any(pictures):
        parts.append('<div class="pictures">' + "\n".join(pictures) + "</div>")
    return parts


def _gallery_link(job: Job, folder: Path) -> str:
    """A link to a job's gallery from a page in this folder, "" where the run wrote none."""
    if not job.run.gallery.is_file():
        return ""
    link = html.escape(os.path.relpath(gallery_path(job), folder))
    name = html.escape(f"gallery of {title_of(job)} ({job.run.variant})")  # lists of links are read without the rest
    return f' · <a href="{link}" aria-label="{name}">gallery</a>'


def _picture(path: Path, job: Job) -> str:
    kind = PICTURES.get(path.suffix.lower())
    if kind is None or not path.is_file():
        return ""
    caption = html.escape(f"{path.stem.replace('_', ' ')} ({job.run.variant})")
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img src="data:{kind};base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _facts(job: Job) -> str:
    """`34 s, 2026-05-04` of a finished run."""
    stamp = read_stamp(job.run)
    return f"{duration(stamp['seconds'])}, {stamp['date'][:10]}"


def _is_older(path: Path, source: Path) -> bool:
    return not path.is_file() or path.stat().st_mtime < source.stat().st_mtime
