"""The rules that every committed notebook keeps."""

import ast
import re

import nbformat
import pytest

from tda_core import jobs, paths
from tda_core.jobs import MAX_PARAMETERS, read_parameters

NOTEBOOKS = sorted(path for path in paths.NOTEBOOKS.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
MAX_CELL_LINES, MAX_FUNCTION_LINES = 15, 10
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(paths.NOTEBOOKS)))


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What is wrong with a notebook, by cell; [] if nothing."""
    found = []
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        found.append(f"format {notebook.nbformat}.{notebook.nbformat_minor} instead of 4.5")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("kernel is not python3")
    ids = [cell.get("id") for cell in notebook.cells]
    if None in ids or len(set(ids)) != len(ids):
        found.append("cell ids are missing or repeated")
    if notebook.cells[0].cell_type != "markdown" or not notebook.cells[0].source.startswith("# "):
        found.append("does not begin with a heading")
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1 or tagged[0] is not next(c for c in notebook.cells if c.cell_type == "code"):
        found.append("the first code cell, and no other, must be tagged 'parameters'")
    for cell in tagged:
        found += _parameters_problems(cell.source)
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            found += [f"cell {i}: {problem}" for problem in _code_problems(cell)]
    return found


def _parameters_problems(source: str) -> list[str]:
    lines = [line for line in source.splitlines() if "=" in line]
    found = [f"parameter without a comment: {line}" for line in lines if not re.search(r"=.*\S\s+#\s*\S", line)]
    if not re.search(r"^profile = \"smoke\"", source, re.MULTILINE):
        found.append('the default profile is not "smoke"')
    return found + (["too many parameters"] if len(lines) > MAX_PARAMETERS else [])


def _code_problems(cell: nbformat.NotebookNode) -> list[str]:
    found = []
    if cell.outputs or cell.execution_count is not None:
        found.append("has outputs or an execution count")
    if len(cell.source.splitlines()) > MAX_CELL_LINES:
        found.append(f"has {len(cell.source.splitlines())} lines, at most {MAX_CELL_LINES}")
    magics = [line for line in cell.source.splitlines() if re.match(r"\s*[%!]", line)]
    found += [f"uses {line.strip()!r}" for line in magics]
    tree = ast.parse("\n".join(line for line in cell.source.splitlines() if line not in magics))
    # text after a value, as in f"{dataset}/lds/trak", is no path
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values[1:]}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found.append(f"defines class {node.name}")
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES:
            found.append(f"function {node.name} is longer than {MAX_FUNCTION_LINES} lines")
        if isinstance(node, ast.ExceptHandler) and all(isinstance(inner, ast.Pass) for inner in node.body):
            found.append("swallows an exception")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
            if re.match(r"/\w+/|/(tmp|home|root|mnt|data|Users)\b|~/|[A-Za-z]:\\", node.value):
                found.append(f"holds the absolute path {node.value!r}")
            if re.search(r"\bpip\b", node.value):
                found.append("calls pip")
    return found


@each_notebook
def test_a_notebook_keeps_the_rules(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert problems(notebook) == []
    assert read_parameters(path)["profile"] == "smoke"


@each_notebook
def test_a_notebook_is_called_so_that_the_runner_finds_it(path):
    slug = jobs.TOUR if path.parent == paths.NOTEBOOKS else path.parent.name
    assert path in jobs.notebooks_of(slug)


@pytest.mark.parametrize("slug", jobs.known_slugs())
def test_overrides_are_parameters_of_their_notebooks(slug):
    assert jobs.load_paper(slug).title  # loading checks every name and type
    for profile in jobs.PROFILES:
        jobs.plan(profile, [slug])


@pytest.mark.parametrize("profile", jobs.PROFILES)
def test_trak_has_the_projection_that_its_damping_was_chosen_for(profile):
    found: dict[str, dict[str, int]] = {}
    for job in jobs.plan(profile, ["forward_only"]):
        if job.run.notebook in ("04_comparison", "06_index"):
            parameters = read_parameters(job.notebook) | dict(job.parameters)
            found.setdefault(job.run.variant, {})[job.run.notebook] = parameters["dimension"]
    assert any(len(of_variant) == 2 for of_variant in found.values())
    assert all(len(set(of_variant.values())) == 1 for of_variant in found.values())


# the rules themselves


def notebook(code: str, **changes) -> nbformat.NotebookNode:
    """A good notebook with one code cell more."""
    made = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    made.nbformat_minor = 5
    parameters = 'profile = "smoke"  # smoke, laptop or paper\ndataset = "digits"  # or mnist\n'
    made.cells = [
        nbformat.v4.new_markdown_cell("# A title"),
        nbformat.v4.new_code_cell(changes.get("parameters", parameters), metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    return made


def test_a_good_notebook_has_no_problems():
    assert (
        problems(
            notebook(
                "x = 1 / 2\nlabel = 'a/b'\nunit = '/s'\nname = f'{label}/lds/trak'\nfor i in range(3):\n    print(i)"
            )
        )
        == []
    )


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("\n".join(f"x{i} = 1" for i in range(16)), "has 16 lines"),
        ("class A:\n    x = 1", "defines class A"),
        ("def f():\n" + "    x = 1\n" * 10, "function f is longer"),
        ("try:\n    x = 1\nexcept ValueError:\n    pass", "swallows an exception"),
        ("!pip install torch", "uses '!pip install torch'"),
        ("%pip install torch", "uses '%pip install torch'"),
        ("import os\nos.system('pip install torch')", "calls pip"),
        ("path = '/home/me/data.csv'", "absolute path '/home/me/data.csv'"),
        ("path = '~/data.csv'", "absolute path"),
        ("path = f'/home/{1}/data.csv'", "absolute path '/home/'"),
        ("path = 'C:\\\\data'", "absolute path"),
    ],
)
def test_a_bad_cell_is_found(code, problem):
    found = problems(notebook(code))
    assert len(found) == 1 and problem in found[0]


def test_other_problems_are_found():
    made = notebook("x = 1")
    made.cells[2].execution_count = 1
    made.metadata.kernelspec.name = "my-kernel"
    made.nbformat_minor = 4
    made.cells[0].source = "no heading"
    made.cells[2].id = made.cells[1].id
    assert len(problems(made)) == 5
    assert problems(notebook("x = 1", parameters='profile = "laptop"  # the profile\nn = 3')) == [
        "parameter without a comment: n = 3",
        'the default profile is not "smoke"',
    ]
    untagged = notebook("x = 1")
    untagged.cells[1].metadata = nbformat.NotebookNode()
    assert problems(untagged) == ["the first code cell, and no other, must be tagged 'parameters'"]
