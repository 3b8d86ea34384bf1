"""What there is to run: notebooks, their variants and profiles, in order, with every parameter checked first.

`papers/<slug>/profiles.toml` holds only what differs from the notebooks' own defaults:

    title = "Forward-only attribution"
    [variants.digits]
    dataset = "digits"
    [variants.mnist]
    dataset = "mnist"
    requires = "mnist"                # a dataset whose files must be there, else the variant is skipped
    profiles = ["laptop", "paper"]    # default: all
    notebooks = ["01_ground_truth"]   # default: all
    [laptop.digits."01_ground_truth"] # profile, variant, notebook
    n_train = 1000

The notebooks of notebooks/<slug>/ run in the order of their names, each in all its variants; the notebooks
in notebooks/ itself are the slug `tour`, which needs no profiles.toml and comes first.
"""

import ast
import contextlib
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tda_core import paths
from tda_core.references import PROFILES

TOUR = "tour"
INJECTED = ("profile", "dataset")  # what the runner gives every notebook
MAX_PARAMETERS = 8

Scalar = bool | int | float | str


@dataclass(frozen=True)
class Variant:
    """One dataset that a paper's notebooks run on; see the module's docstring."""

    name: str
    dataset: str
    requires: str = ""
    profiles: tuple[str, ...] = PROFILES
    notebooks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Paper:
    """A checked profiles.toml: variants by name, and overrides[profile][variant][notebook]."""

    slug: str
    title: str
    variants: tuple[Variant, ...]
    overrides: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Scalar]]]]


@dataclass(frozen=True)
class Job:
    """One notebook in one variant and profile: its folders, its file and all parameters to inject."""

    run: paths.Run
    notebook: Path
    parameters: Mapping[str, Scalar]
    requires: str = ""

    @property
    def label(self) -> str:
        return f"{self.run.slug}/{self.run.notebook} {self.run.variant}"


def notebook_folder(slug: str) -> Path:
    """Where a slug's notebooks lie."""
    return paths.NOTEBOOKS if slug == TOUR else paths.NOTEBOOKS / slug


def notebooks_of(slug: str) -> list[Path]:
    """A slug's notebooks, `NN_name.ipynb`, in order; [] for an unknown slug."""
    return sorted(notebook_folder(slug).glob("[0-9][0-9]_*.ipynb"))


def known_slugs() -> list[str]:
    """All slugs that have notebooks, in the order in which they run: the tour, then by name."""
    folders = sorted(paths.NOTEBOOKS.iterdir()) if paths.NOTEBOOKS.is_dir() else []
    slugs = [TOUR, *(folder.name for folder in folders if folder.is_dir())]
    return [slug for slug in slugs if notebooks_of(slug)]


def read_notebook(path: Path) -> dict[str, Any]:
    """A notebook as plain JSON. Raises ValueError naming a file that is not a notebook."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a notebook: {error}") from error
    return document


def cell_source(cell: Mapping[str, Any]) -> str:
    """A cell's text (notebook files hold it whole or as lines)."""
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def read_parameters(path: Path) -> dict[str, Scalar]:
    """Names and defaults of the cell tagged `parameters`.

    Raises ValueError naming the notebook where there is not exactly one such cell, it holds anything but at
    most 8 assignments of numbers, texts, True and False, or it lacks `profile` or `dataset`.
    """
    tagged = [
        cell_source(cell)
        for cell in read_notebook(path)["cells"]
        if cell["cell_type"] == "code" and "parameters" in cell["metadata"].get("tags", [])
    ]
    if len(tagged) != 1:
        raise ValueError(f"{path} must have exactly one code cell tagged 'parameters', found {len(tagged)}")
    parameters: dict[str, Scalar] = {}
    try:
        body = ast.parse(tagged[0]).body
    except SyntaxError as error:
        raise ValueError(f"{path}, parameters cell, line {error.lineno}: {error.msg}") from error
    for node in body:
        line = f"{path}, parameters cell, line {node.lineno}"
        if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            raise ValueError(f"{line}: expected `name = value`, got `{ast.unparse(node)}`")
        try:
            value = ast.literal_eval(node.value)
        except ValueError:
            value = None
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"{line}: expected a number, a text, True or False, got `{ast.unparse(node.value)}`")
        parameters[node.targets[0].id] = value
    if len(parameters) > MAX_PARAMETERS:
        raise ValueError(f"{path}: at most {MAX_PARAMETERS} parameters, found {len(parameters)}")
    for name in INJECTED:
        if not isinstance(parameters.get(name), str):
            raise ValueError(f"{path}: the parameters cell must set {name} to a text")
    return parameters


def load_paper(slug: str) -> Paper:
    """The checked profiles.toml of a slug; the tour may have none (then: digits, without overrides).

    Raises ValueError naming the file and what is wrong: unknown words, and overrides that are not a
    parameter of their notebook or have another type.
    """
    path = paths.PAPERS / slug / "profiles.toml"
    if not path.is_file():
        if slug == TOUR:
            return Paper(slug, "Tour", (Variant("digits", "digits"),), {})
        raise ValueError(f"{path} is missing: it names the variants that the notebooks of {slug} run in")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    _known(document, ("title", "variants", *PROFILES), f"{path}")
    notebooks = {notebook.stem: notebook for notebook in notebooks_of(slug)}
    variants = document.get("variants")
    if not isinstance(variants, dict) or not variants:
        raise ValueError(f"{path} must have at least one [variants.NAME]")
    parsed = tuple(
        _variant(name, entry, list(notebooks), f"{path}, variant {name}") for name, entry in variants.items()
    )
    overrides = {profile: document.get(profile, {}) for profile in PROFILES}
    for profile, by_variant in overrides.items():
        _known(by_variant, tuple(variants), f"{path}, [{profile}]")
        for variant, by_notebook in by_variant.items():
            where = f"{path}, [{profile}.{variant}]"
            _known(by_notebook, tuple(notebooks), where)
            for stem, values in by_notebook.items():
                _check_overrides(values, notebooks[stem], f"{where[:-1]}.{stem}]")
    return Paper(slug, document.get("title", slug), parsed, overrides)


def plan(profile: str, slugs: Sequence[str]) -> list[Job]:
    """All jobs of these slugs in a profile, in the order in which they run.

    Raises ValueError for an unknown profile or slug, naming the known ones, and what `load_paper` raises.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}, expected one of: {', '.join(PROFILES)}")
    for slug in slugs:
        if slug not in known_slugs():
            raise ValueError(f"unknown paper {slug!r}, expected one of: {', '.join(known_slugs())}")
    jobs = []
    for slug in (slug for slug in known_slugs() if slug in slugs):
        paper = load_paper(slug)
        for notebook in notebooks_of(slug):
            read_parameters(notebook)
            for variant in paper.variants:
                if profile not in variant.profiles or (variant.notebooks and notebook.stem not in variant.notebooks):
                    continue
                overrides = paper.overrides.get(profile, {}).get(variant.name, {}).get(notebook.stem, {})
                parameters = {"profile": profile, "dataset": variant.dataset, **overrides}
                run = paths.Run(slug, profile, notebook.stem, variant.name)
                jobs.append(Job(run, notebook, parameters, variant.requires))
    return jobs


def missing_files(requires: str) -> str:
    """Nothing ("") where the files of a dataset are at hand, else a sentence that says where to put them."""
    if not requires:
        return ""
    from tda_core import data  # here, because it imports torch, which takes seconds

    return "" if data.is_available(requires) else data.where_to_put(requires)


def _known(found: Any, expected: tuple[str, ...], where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a table, got {found!r}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{where}: unknown name {name!r}, expected one of: {', '.join(expected)}")


def _variant(name: str, entry: Any, notebooks: list[str], where: str) -> Variant:
    _known(entry, ("dataset", "requires", "profiles", "notebooks"), where)
    for field in ("dataset", "requires"):
        if not isinstance(entry.get(field, "" if field == "requires" else None), str):
            raise ValueError(f"{where}: {field} must be a text, got {entry.get(field)!r}")
    for field, known in (("profiles", PROFILES), ("notebooks", notebooks)):
        values = entry.get(field, [])
        if not isinstance(values, list) or (field in entry and not values):
            raise ValueError(f"{where}: {field} must be a list of names, got {values!r}")
        for value in values:
            if value not in known:
                raise ValueError(f"{where}: unknown name {value!r} in {field}, expected one of: {', '.join(known)}")
    lists = {field: tuple(entry[field]) for field in ("profiles", "notebooks") if field in entry}
    return Variant(name, entry["dataset"], entry.get("requires", ""), **lists)


def _check_overrides(values: Any, notebook: Path, where: str) -> None:
    defaults = {name: value for name, value in read_parameters(notebook).items() if name not in INJECTED}
    _known(values, tuple(defaults), where)
    for name, value in values.items():
        expected, got = type(defaults[name]).__name__, type(value).__name__
        if expected != got:
            raise ValueError(
                f"{where}: {name} must be of type {expected}, as in {notebook.name} "
                f"({name} = {defaults[name]!r}), got {value!r} of type {got}"
            )


@contextlib.contextmanager
def without_iri_grammar() -> Iterator[None]:
    """Import Jupyter's packages in here: they take two seconds less.

    jsonschema, if it can, imports a package that builds a grammar of addresses (RFC 3987) at once, for a check that it
    makes of no notebook; where that package is missing it does without.
    """
    name = "rfc3987_syntax"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # what the import system takes for missing
    try:
        yield
    finally:
        del sys.modules[name]
